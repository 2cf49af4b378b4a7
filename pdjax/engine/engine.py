"""The backend on devices: dispatches orders to workers and transports, and collects what has ended in one queue."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

from pdjax.engine.waiters import Waiter, Waiters
from pdjax.engine.worker import Pending, Worker
from pdjax.kv.transfer import CorruptError, Parcel, Transport
from pdjax.serving.events import Done, Event, Failed, Trip, WorkerBack, WorkerLost
from pdjax.serving.mailbox import Interrupt, Mailbox
from pdjax.serving.orders import AbandonOrder, EndOrder, Order, StepOrder, TransferOrder


@dataclasses.dataclass(frozen=True)
class _Landed:
  """A transfer's pieces are on the target's devices, to be written into its pages."""

  order: TransferOrder
  parcel: Parcel
  began_s: float
  trip: Trip


@dataclasses.dataclass(frozen=True)
class _Missed:
  """A transfer did not arrive."""

  order: TransferOrder
  failed: Failed


@dataclasses.dataclass(frozen=True)
class _UnderWay:
  """A transfer whose pieces are to be written. Its number is that of no other transfer of any run."""

  number: int
  order: TransferOrder
  parcel: Parcel


@dataclasses.dataclass(frozen=True)
class _Passed:
  """A pass of one of a worker's lives has ended well."""

  worker: str
  incarnation: int
  done: Done


@dataclasses.dataclass(frozen=True)
class _Broken:
  """A pass failed after it had taken the worker's pages."""

  worker: str
  incarnation: int
  error: str
  ended_s: float


@dataclasses.dataclass(frozen=True)
class _Crashed:
  """A waiting thread raised what none of its jobs may raise."""

  error: BaseException


class Engine:
  """Carries orders out on devices.

  Every program that touches pages is dispatched by the thread that calls `submit` and `wait`, so the order on each
  device is that of decisions. Beside it each worker has a thread that waits for its passes in that order, and each
  transfer has one while it is under way; they post what ended, and when, to one mailbox.
  """

  def __init__(self, workers: Sequence[Worker], transports: Mapping[tuple[str, str], Transport]):
    """Serve with compiled workers and a transport for every (source, target) that orders will name."""
    self.workers = {worker.spec.name: worker for worker in workers}
    self._transports = transports
    self._mailbox = Mailbox()
    self._closed = False
    self._passes = {name: Waiter(f'{name}-passes', self._post_crash) for name in self.workers}
    self._transfers = Waiters('transfers', self._post_crash)
    self._under_way: dict[int, _UnderWay] = {}  # by order
    self._next_transfer = itertools.count()
    self._free_from_s = dict.fromkeys(self.workers, 0.0)

  def start_clock(self) -> None:
    """Let a run begin now, at 0 s; of an earlier one nothing is heard any more.

    Raises:
      ValueError: if the engine is closed.
    """
    if self._closed:
      raise ValueError('the engine is closed, and nothing would come of a run; deploy the config again.')
    for order in list(self._under_way):
      self._give_up(order)
    self._mailbox.forget_all_but((Interrupt, _Crashed, _Broken))
    self._mailbox.start_clock()
    self._free_from_s = dict.fromkeys(self.workers, 0.0)

  def interrupt(self, note: Callable[[float], None]) -> None:
    """From any thread: call `note` with the time now and end the wait under way, or else the next.

    A turn at time t comes after all that was noted up to t, and before all that is noted later.
    """
    self._mailbox.interrupt(note)

  def close(self) -> None:
    """Wait for passes under way, and a while for transfers, and end the threads."""
    self._closed = True
    self._transfers.close()
    for waiter in self._passes.values():
      waiter.close()

  def submit(self, orders: Sequence[Order]) -> None:
    """Dispatch the orders of one action; what goes wrong comes back as an event.

    A transfer of some layers of a pass is dispatched right behind these: behind more, it would wait for them.
    """
    by_layers = [order for order in orders if isinstance(order, TransferOrder) and order.span.layers is not None]
    sent: set[int] = set()

    def send(layers: tuple[int, int]) -> None:
      for transfer in by_layers:
        if transfer.span.layers == layers:
          sent.add(transfer.id)
          self._submit(transfer)

    for order in orders:
      if order.id not in sent:
        self._submit(order, send)

  def _submit(self, order: Order, after: Callable[[tuple[int, int]], None] = lambda layers: None) -> None:
    if self._is_stale(order):
      return  # for a life of a worker that is over, and with it all its orders, as the loop is about to learn
    try:
      match order:
        case StepOrder():
          self._dispatch(order, after)
        case TransferOrder():
          self._send(order)
        case EndOrder():
          for worker in self.workers.values():
            worker.forget(order.request)
          now_s = self._mailbox.now_s()
          self._mailbox.post(lambda ended_s: Done(order.id, now_s, ended_s))
        case AbandonOrder():  # its gather was dispatched before all that its pages are given to next
          self._give_up(order.transfer)
          now_s = self._mailbox.now_s()
          self._mailbox.post(lambda ended_s: Done(order.id, now_s, ended_s))
    except Exception as error:  # whatever it is, the loop goes on and the requests learn of it
      self._dispatch_failed(order, describe(error))

  def _dispatch_failed(self, order: Order, message: str) -> None:
    failed = functools.partial(self._mailbox.post, lambda ended_s: Failed(order.id, ended_s, message))
    if not isinstance(order, StepOrder):
      failed()
      return
    worker = self.workers[order.worker]
    jobs: list[Callable[[], None]] = [failed]
    try:
      if not worker.broken:
        jobs.insert(0, worker.leave_out(order))
    except Exception as error:
      message = describe(error)
    if worker.broken:
      self._post_broken(order.worker, worker.incarnation, message)
      return
    for job in jobs:  # after the passes before it, which may still end some of its requests well
      self._passes[order.worker].add(job)

  def _post_crash(self, error: BaseException) -> None:
    self._mailbox.post(lambda _: _Crashed(error))

  def _post_broken(self, worker: str, incarnation: int, message: str) -> None:
    self._mailbox.post(lambda ended_s: _Broken(worker, incarnation, message, ended_s))

  def wait(self, until_s: float) -> tuple[float, Sequence[Event]]:
    """Wait until an order ended, an interrupt or `until_s` has come; pieces that landed are written on the way."""
    while True:
      now_s, items = self._mailbox.collect(until_s)
      events: list[Event] = []
      interrupted = False
      for item in items:
        match item:
          case _Landed():
            self._receive(item)
          case _Missed(order, failed):
            if self._end(order):
              events.append(failed)
          case _Passed():
            if item.incarnation == self.workers[item.worker].incarnation:
              events.append(item.done)
          case _Broken():
            events += self._rebuild(item)
          case _Crashed():
            raise item.error
          case Interrupt():
            interrupted = True
          case _:
            events.append(item)
      if events or interrupted or now_s >= until_s:
        return now_s, events

  # -------------------------------------------------------------------------- passes

  def _dispatch(self, order: StepOrder, after: Callable[[tuple[int, int]], None]) -> None:
    worker = self.workers[order.worker]
    dispatched_s = self._mailbox.now_s()
    pending = worker.dispatch(order, after)
    job = functools.partial(self._collect, worker, worker.incarnation, order, pending, dispatched_s)
    self._passes[order.worker].add(job)

  def _collect(self, worker: Worker, incarnation: int, order: StepOrder, pending: Pending, dispatched_s: float) -> None:
    """On the worker's waiting thread: block until a pass has ended and post its outcome."""
    name = worker.spec.name
    try:
      results, wasted = worker.collect(order, pending)
    except Exception as error:
      self._post_broken(name, incarnation, describe(error))
      return
    began_s = max(dispatched_s, self._free_from_s[name])

    def passed(ended_s: float) -> _Passed:
      self._free_from_s[name] = ended_s
      return _Passed(name, incarnation, Done(order.id, began_s, ended_s, results, wasted))

    self._mailbox.post(passed)

  def _rebuild(self, broken: _Broken) -> list[Event]:
    """Give a worker whose pages are gone new ones; passes of its earlier life are not heard of again."""
    worker = self.workers[broken.worker]
    if worker.incarnation != broken.incarnation:
      return []
    worker.reset()
    for one in list(self._under_way.values()):
      if broken.worker in (one.order.source, one.order.target):
        self._give_up(one.order.id)
    return [
      WorkerLost(broken.worker, broken.ended_s, broken.error),
      WorkerBack(broken.worker, broken.ended_s, worker.incarnation),
    ]

  # -------------------------------------------------------------------------- transfers

  def _send(self, order: TransferOrder) -> None:
    transport = self._transports[order.source, order.target]
    parcel = transport.send(order.span)
    number = next(self._next_transfer)
    self._under_way[order.id] = _UnderWay(number, order, parcel)
    self._transfers.add(number, functools.partial(self._watch, order, parcel))

  def _watch(self, order: TransferOrder, parcel: Parcel) -> None:
    """On a waiting thread of its own: block until the pieces are there and say so."""
    try:
      parcel.wait_gathered()
      began_s = self._mailbox.now_s()
      parcel.wait()
    except Exception as error:
      message = describe(error)
      corrupt = isinstance(error, CorruptError)
      self._mailbox.post(lambda ended_s: _Missed(order, Failed(order.id, ended_s, message, corrupt)))
      return
    self._mailbox.post(lambda arrived_s: _Landed(order, parcel, began_s, Trip(began_s, arrived_s, parcel.num_pieces)))

  def _receive(self, landed: _Landed) -> None:
    """Write landed pieces. Passes dispatched from now on find them, so the transfer has ended."""
    order = landed.order
    if not self._end(order):
      return  # it was given up
    if self._incarnations(order) != order.incarnations:
      return  # a worker was lost meanwhile, and the transfer with it
    try:
      written = self._transports[order.source, order.target].receive(landed.parcel)
    except Exception as error:
      self._post_broken(order.target, order.incarnations[1], describe(error))
      return
    job = functools.partial(self._note_written, order.target, order.incarnations[1], written.block_until_ready)
    self._passes[order.target].add(job)
    wire_bytes, trip = landed.parcel.wire_bytes, landed.trip
    self._mailbox.post(lambda ended_s: Done(order.id, landed.began_s, ended_s, wire_bytes=wire_bytes, trip=trip))

  def _is_stale(self, order: Order) -> bool:
    match order:
      case StepOrder():
        return order.incarnation != self.workers[order.worker].incarnation
      case TransferOrder():
        return order.incarnations != self._incarnations(order)
    return False

  def _give_up(self, transfer: int) -> None:
    """Whatever of a transfer still lands is not written."""
    one = self._under_way.pop(transfer, None)
    if one is not None:
      one.parcel.abandoned = True
      self._transfers.forget(one.number)

  def _end(self, order: TransferOrder) -> bool:
    """Whether a transfer that has ended was still waited for; another one, of another run, may have its id."""
    one = self._under_way.get(order.id)
    if one is None or one.order is not order:
      return False
    del self._under_way[order.id]
    return True

  def _incarnations(self, order: TransferOrder) -> tuple[int, int]:
    return self.workers[order.source].incarnation, self.workers[order.target].incarnation

  def _note_written(self, target: str, incarnation: int, block: Callable[[], object]) -> None:
    """On the target's waiting thread: the next pass begins no sooner than the pieces are written."""
    try:
      block()
    except Exception as error:
      self._post_broken(target, incarnation, describe(error))
      return
    self._free_from_s[target] = self._mailbox.now_s()


def describe(error: Exception) -> str:
  """An exception in one line for those who wait."""
  first_line = str(error).splitlines()[0] if str(error) else ''
  return f'{type(error).__name__}: {first_line}'
