"""Runs the steps of one worker in the order of decisions, and tells when each has ended."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import jax

from pdjax.engine.place import Place
from pdjax.engine.waiters import Waiter
from pdjax.engine.worker import Pending, Worker
from pdjax.serving.batch import LOOKAHEAD
from pdjax.serving.bounds import Bounds, most_steps
from pdjax.serving.events import Done, Event, Failed, WorkerBack, WorkerLost
from pdjax.serving.mailbox import Mailbox
from pdjax.serving.orders import Order, StepOrder, TransferOrder

After = Callable[[tuple[int, int]], None]  # called behind each group of layers of a step


@dataclasses.dataclass(eq=False)
class Standing:
  """A standing order, as the steps behind its first see it: nothing changes in them.

  Attributes:
    order: The order.
    most: The most steps of it.
    given: Steps of it that were dispatched.
    in_flight: Those of them that have not been heard of.
    goes_on: Whether more may follow.
  """

  order: StepOrder
  most: int
  given: int = 0
  in_flight: int = 0
  goes_on: bool = True


@dataclasses.dataclass(frozen=True)
class Ran:
  """A step of a worker has ended well.

  Attributes:
    worker: The worker.
    epoch: The run and incarnation that it was of, counted together.
    done: Its end.
    order: Its order.
    standing: The standing order that it was of, if of any.
  """

  worker: str
  epoch: int
  done: Done
  order: StepOrder
  standing: Standing | None = None


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


P = TypeVar('P', bound=Place)


class Keeper(Generic[P]):
  """Sees to the pages of one place: waits on a thread for what is written there, and gives it new ones.

  It posts a `Broken` where pages are gone, and a `Crashed` that should never be. Whoever empties the mailbox brings the
  first back, to `restart`. One thread calls all but `post_broken`.

  Attributes:
    place: The place.
  """

  def __init__(self, place: P, mailbox: Mailbox):
    self.place = place
    self._mailbox = mailbox
    self._waiter = Waiter(f'{place.spec.name}-steps', crash_poster(mailbox))
    self._free_from_s = 0.0
    self._begin_anew()

  def _begin_anew(self) -> None:
    """Let what is under way be of no run any more."""

  def end_run(self) -> None:
    """Wait for what is under way; what is posted by now is of no run any more."""
    self._waiter.drain()
    self.place.forget_all()
    self._free_from_s = 0.0
    self._begin_anew()

  def restart(self, broken: Broken) -> list[Event]:
    """Give the place new pages where its own are gone; steps of the incarnation before are not heard of again."""
    place = self.place
    if place.incarnation != broken.incarnation:
      return []
    place.reset()
    self._begin_anew()
    return [
      WorkerLost(broken.worker, broken.ended_s, broken.error),
      WorkerBack(broken.worker, broken.ended_s, place.incarnation),
    ]

  def post_broken(self, incarnation: int, message: str) -> None:
    """From any thread: tell that the pages of an incarnation are gone."""
    name = self.place.spec.name
    self._mailbox.post(lambda ended_s: Broken(name, incarnation, message, ended_s))

  def begin_after(self, written: jax.Array) -> None:
    """Let the next step begin no sooner than something is written into the pages."""
    self._waiter.add(functools.partial(self._await_written, self.place.incarnation, written.block_until_ready))

  def close(self) -> None:
    """Wait for what is under way, and end the thread."""
    self._waiter.close()

  def _await_written(self, incarnation: int, block: Callable[[], object]) -> None:
    """On the waiting thread: block until something is written."""
    try:
      block()
    except Exception as error:
      self.post_broken(incarnation, describe(error))
      return
    self._free_from_s = self._mailbox.now_s()


class Runner(Keeper[Worker]):
  """Dispatches the steps of one worker, and waits for them on a thread.

  It posts a `Ran`, a `Broken` or a `Failed` for each, and a `Crashed` that should never be. Whoever empties the mailbox
  brings the first two back, to `hear` and `restart`. One thread calls all but `post_broken`.
  """

  def __init__(self, worker: Worker, mailbox: Mailbox):
    self.worker = worker
    self._epoch = 0
    super().__init__(worker, mailbox)

  def _begin_anew(self) -> None:
    self._epoch += 1
    self._in_flight = 0
    self._ended: set[str] = set()  # in the batch, though they ended here: the books are told, and may not have heard
    self._bounds = Bounds()
    self._standing: Standing | None = None

  def end_run(self) -> None:
    """Wait for steps under way, and let go of their requests; what is posted by now is of no run any more."""
    self.halt()
    super().end_run()

  def run(self, order: StepOrder, after: After = lambda group: None) -> None:
    """Dispatch a step, or the first of one that stands; what goes wrong is posted."""
    self.halt()
    bounds = self._bounds.change(order)
    if self._ended and order.decodes:  # who has left by now may come again
      self._ended &= set(order.batch.requests)
      self._ended -= {join.request for join in order.joins if join.admission is not None}
    if not order.standing:
      self._bounds.steps += order.steps if order.decodes else 0
      self._dispatch(order, after)
      return
    self._standing = standing = Standing(order, most_steps(bounds, self._bounds.steps))
    self._go_on(standing)
    standing.order = dataclasses.replace(order, joins=(), leaves=(), growth=())
    if self._has_ended(order):  # it was given before anyone there knew
      self.halt()

  def _has_ended(self, order: StepOrder) -> bool:
    """Whether one of the sequences of an order has ended here."""
    return not self._ended.isdisjoint(order.batch.requests)

  def top_up(self) -> None:
    """Let steps of a standing order follow until so many are with the worker as are to be.

    To be called when all that is known was told and answered: an answer may let another step follow instead.
    """
    standing = self._standing
    while standing is not None and standing.goes_on and self._in_flight < LOOKAHEAD:
      self._go_on(standing)

  def halt(self) -> None:
    """Let no more steps of a standing order follow."""
    if self._standing is not None:
      self._standing.goes_on = False
      self._standing = None

  def leave(self, request: str) -> None:
    """A sequence has left the batch: let go of it, and of a standing order."""
    self.halt()
    self.worker.forget(request)

  def hear(self, ran: Ran) -> list[Event]:
    """The events of a step's end: none, if it was of an earlier run or incarnation; a standing order goes on."""
    if ran.epoch != self._epoch:
      return []
    self._in_flight -= 1
    standing = ran.standing
    ended = ran.done.ended(ran.order.batch)
    stay = {*ran.order.batch.requests, *(chunk.request.id for chunk in ran.order.chunks if chunk.slot is not None)}
    self._ended |= stay.intersection(ended)
    if self._standing is not None and self._has_ended(self._standing.order):
      self.halt()
    if standing is None:
      return [ran.done]
    standing.in_flight -= 1
    if ended or standing.given == standing.most:
      standing.goes_on = False
    if standing.goes_on and not standing.in_flight:  # the loop was late: an order that goes on has a step in flight
      self._go_on(standing)
    return [dataclasses.replace(ran.done, to_come=None if standing.goes_on else standing.in_flight)]

  def _go_on(self, standing: Standing) -> None:
    """Dispatch another step of a standing order, if there is to be one."""
    if standing.given == standing.most:
      standing.goes_on = False
      return
    standing.given += 1
    standing.in_flight += 1
    self._bounds.steps += 1
    if not self._dispatch(standing.order, lambda group: None, standing):
      standing.goes_on = False

  def _dispatch(self, order: StepOrder, after: After, standing: Standing | None = None) -> bool:
    """Dispatch a step; return whether that was done, and else its failure is posted."""
    dispatched_s = self._mailbox.now_s()
    try:
      pending = self.worker.dispatch(order, after)
    except Exception as error:
      self._leave_out(order, describe(error))
      return False
    self._in_flight += 1
    incarnation, epoch = self.worker.incarnation, self._epoch
    self._waiter.add(functools.partial(self._collect, incarnation, epoch, order, pending, dispatched_s, standing))
    return True

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

  def _collect(
    self,
    incarnation: int,
    epoch: int,
    order: StepOrder,
    pending: Pending,
    dispatched_s: float,
    standing: Standing | None,
  ) -> None:
    """On the waiting thread: block until a step has ended and post its outcome."""
    try:
      results, decoded, wasted = self.worker.collect(order, pending)
    except Exception as error:
      self.post_broken(incarnation, describe(error))
      return
    began_s = max(dispatched_s, self._free_from_s)

    def ran(ended_s: float) -> Ran:
      self._free_from_s = ended_s
      done = Done(order.id, began_s, ended_s, results, decoded, wasted_tokens=wasted)
      return Ran(order.worker, epoch, done, order, standing)

    self._mailbox.post(ran)


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
