"""Runs the steps of one worker in the order of decisions, and tells when each has ended."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pdjax.engine.waiters import Waiter
from pdjax.engine.worker import Pending, Worker
from pdjax.serving.events import Done, Event, Failed, WorkerBack, WorkerLost
from pdjax.serving.mailbox import Mailbox
from pdjax.serving.orders import Order, StepOrder, TransferOrder

After = Callable[[tuple[int, int]], None]  # called behind each group of layers of a step


@dataclasses.dataclass(frozen=True)
class Ran:
  """A step of one of a worker's incarnations has ended well."""

  worker: str
  incarnation: int
  done: Done


@dataclasses.dataclass(frozen=True)
class Broken:
  """A step failed after it had taken the worker's pages."""

  worker: str
  incarnation: int
  error: str
  ended_s: float


@dataclasses.dataclass(frozen=True)
class Crashed:
  """A waiting thread raised what none of its jobs may raise."""

  error: BaseException


class Runner:
  """Dispatches the steps of one worker, and waits for them on a thread.

  It posts a `Ran`, a `Broken` or a `Failed` for each, and a `Crashed` that should never be. Whoever empties the mailbox
  brings the first two back, to `hear` and `restart`. One thread calls all but `post_broken`.
  """

  def __init__(self, worker: Worker, mailbox: Mailbox):
    self.worker = worker
    self._mailbox = mailbox
    self._waiter = Waiter(f'{worker.spec.name}-steps', crash_poster(mailbox))
    self._free_from_s = 0.0

  def end_run(self) -> None:
    """Wait for steps under way, and let go of their requests; what is posted by now is of no run any more."""
    self._waiter.drain()
    self.worker.forget_all()
    self._free_from_s = 0.0

  def run(self, order: StepOrder, after: After = lambda group: None) -> None:
    """Dispatch a step; what goes wrong is posted."""
    dispatched_s = self._mailbox.now_s()
    try:
      pending = self.worker.dispatch(order, after)
    except Exception as error:
      self._leave_out(order, describe(error))
      return
    self._waiter.add(functools.partial(self._collect, self.worker.incarnation, order, pending, dispatched_s))

  def hear(self, ran: Ran) -> list[Event]:
    """The events of a step's end: none, if it was a step of an earlier incarnation."""
    return [ran.done] if ran.incarnation == self.worker.incarnation else []

  def restart(self, broken: Broken) -> list[Event]:
    """Give the worker new pages where its own are gone; steps of the incarnation before are not heard of again."""
    worker = self.worker
    if worker.incarnation != broken.incarnation:
      return []
    worker.reset()
    return [
      WorkerLost(broken.worker, broken.ended_s, broken.error),
      WorkerBack(broken.worker, broken.ended_s, worker.incarnation),
    ]

  def post_broken(self, incarnation: int, message: str) -> None:
    """From any thread: tell that the pages of an incarnation are gone."""
    name = self.worker.spec.name
    self._mailbox.post(lambda ended_s: Broken(name, incarnation, message, ended_s))

  def begin_after(self, written: jax.Array) -> None:
    """Let the next step begin no sooner than something is written into the worker's pages."""
    self._waiter.add(functools.partial(self._await_written, self.worker.incarnation, written.block_until_ready))

  def close(self) -> None:
    """Wait for steps under way, and end the thread."""
    self._waiter.close()

  def _leave_out(self, order: StepOrder, message: str) -> None:
    """Fail a step that could not be dispatched."""
    worker = self.worker
    jobs: list[Callable[[], Any]] = [
      functools.partial(self._mailbox.post, lambda ended_s: Failed(order.id, ended_s, message))
    ]
    try:
      if not worker.broken:
        jobs.insert(0, worker.leave_out(order))
    except Exception as error:
      message = describe(error)
    if worker.broken:
      self.post_broken(worker.incarnation, message)
      return
    for job in jobs:  # after the steps before it, which may still end some of its requests well
      self._waiter.add(job)

  def _collect(self, incarnation: int, order: StepOrder, pending: Pending, dispatched_s: float) -> None:
    """On the waiting thread: block until a step has ended and post its outcome."""
    try:
      results, wasted = self.worker.collect(order, pending)
    except Exception as error:
      self.post_broken(incarnation, describe(error))
      return
    began_s = max(dispatched_s, self._free_from_s)

    def ran(ended_s: float) -> Ran:
      self._free_from_s = ended_s
      return Ran(order.worker, incarnation, Done(order.id, began_s, ended_s, results, wasted))

    self._mailbox.post(ran)

  def _await_written(self, incarnation: int, block: Callable[[], object]) -> None:
    """On the waiting thread: block until something is written."""
    try:
      block()
    except Exception as error:
      self.post_broken(incarnation, describe(error))
      return
    self._free_from_s = self._mailbox.now_s()


def crash_poster(mailbox: Mailbox) -> Callable[[BaseException], None]:
  """A function for waiting threads that posts what they raised."""
  return lambda error: mailbox.post(lambda _: Crashed(error))


def dispatch_in_turn(orders: Sequence[Order], dispatch: Callable[[Order, After], None]) -> None:
  """Call `dispatch` with each order of one action, and with what a step must call behind its groups of layers.

  A transfer of some layers of a step is dispatched right behind these: behind more, it would wait for them.
  """
  by_layers = [order for order in orders if isinstance(order, TransferOrder) and order.span.layers is not None]
  sent: set[int] = set()

  def send(layers: tuple[int, int]) -> None:
    for transfer in by_layers:
      if transfer.span.layers == layers:
        sent.add(transfer.id)
        dispatch(transfer, lambda layers: None)

  for order in orders:
    if order.id not in sent:
      dispatch(order, send)


def describe(error: BaseException) -> str:
  """An exception in one line for those who wait."""
  first_line = str(error).splitlines()[0] if str(error) else ''
  return f'{type(error).__name__}: {first_line}'
