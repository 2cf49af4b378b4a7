"""The engine with transfers, steps and workers that fail on demand, over compiled programs that work."""

import contextlib
import copy
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from experiments.faults.chaos import Fault
from pdjax.engine.engine import Engine
from pdjax.engine.programs import Admit, Begin, Copy, Program, Remember
from pdjax.engine.runner import Broken
from pdjax.engine.worker import Collected, Pending, Worker
from pdjax.kv.transfer import CorruptError, DevicePut, Parcel
from pdjax.model.transformer import Weights
from pdjax.serving.events import Ended, Event, WorkerBack, WorkerLost
from pdjax.serving.orders import Order, StepOrder, TransferOrder
from pdjax.types.cache import KV
from pdjax.types.span import Span

STALL_S = 20.0  # longer than any test waits
SLOW_S = 0.1
STEP_STALL_S = 0.5

WayFault = Fault | Literal['unwritable']
StepFault = Literal['refused', 'refused halfway', 'fails', 'takes its pages', 'stalls', 'NaN']
EarlyFault = Literal['early NaN']  # that nobody sees until another step


class FaultyWay(DevicePut):
  """A way between two pools that does to each transfer what it was told to do.

  Attributes:
    faults: The fault of each transfer that comes, or None, and a function that is called as it acts.
  """

  def __init__(self, way: DevicePut, checksums: bool = True):
    self.__dict__ |= way.__dict__
    self.pieces = copy.copy(way.pieces)
    self.pieces.has_checksums = checksums
    self.faults: deque[tuple[WayFault | None, Callable[[], None]]] = deque()
    self._released = threading.Event()
    self._fault: WayFault | None = None
    self._unwritable: list[tuple[Parcel, Callable[[], None]]] = []
    for shape in self.pieces.shapes:  # what is compiled for checksums is compiled now
      DevicePut.send(self, self.pieces.first_span(shape)).wait()

  def clear(self) -> None:
    """Have nothing wrong with what comes next; those who wait go on."""
    self.faults.clear()
    self._unwritable.clear()
    self.go_on()

  def go_on(self) -> None:
    """Let all that stands still go on, each until its transfer is there."""
    self._released.set()
    self._released = threading.Event()

  def send(self, span: Span) -> Parcel:
    """Put cached tokens on their way, with the fault that is due."""
    fault, acted = self.faults.popleft() if self.faults else (None, lambda: None)
    if fault == 'refused':
      acted()
      raise RuntimeError('the transport refused it')
    self._fault = fault
    try:
      parcel = super().send(span)
    finally:
      self._fault = None
    if fault == 'unwritable':
      self._unwritable.append((parcel, acted))
    elif fault is not None:
      parcel.wait = self._waits(fault, parcel.wait, acted)  # type: ignore[method-assign]
    return parcel

  def put(self, pieces: Sequence[jax.Array], devices: Sequence[jax.Device]) -> list[jax.Array]:
    """Carry pieces over, damaged ones if that is to happen."""
    if self._fault in ('corrupts', 'permutes'):
      return [self._damaged(piece, device) for piece, device in zip(pieces, devices, strict=True)]
    return super().put(pieces, devices)

  def receive(self, parcel: Parcel) -> jax.Array:
    """Write a parcel, unless that is to fail."""
    for place, (unwritable, acted) in enumerate(self._unwritable):
      if unwritable is parcel:
        del self._unwritable[place]
        acted()
        raise RuntimeError('the pieces cannot be written')
    return super().receive(parcel)

  def _damaged(self, piece: jax.Array, device: jax.Device) -> jax.Array:
    here = np.array(piece)
    if self._fault == 'permutes':
      here = np.roll(here, 1, 1 if here.shape[1] > 1 else -2)  # units, or of a single one the tokens
    else:
      here.reshape(-1).view(np.uint8)[3] ^= 1
    assert here.tobytes() != np.asarray(piece).tobytes()
    return jax.device_put(here, device)

  def _waits(self, fault: WayFault, wait: Callable[[], None], acted: Callable[[], None]) -> Callable[[], None]:
    released = self._released

    def waits() -> None:
      if fault in ('stalls', 'slow'):
        acted()
      released.wait(STALL_S if fault == 'stalls' else SLOW_S)
      if fault == 'fails':
        acted()
        raise RuntimeError('the link broke')
      try:
        wait()
      except CorruptError:
        acted()
        raise

    return waits


class FaultyWorker(Worker):
  """A worker that does to each step what it was told to do.

  Attributes:
    faults: The faults of steps, by their orders.
    acted: Told of an order whose fault has acted, on whatever thread.
  """

  faults: dict[int, StepFault | EarlyFault]
  acted: Callable[[int], None]
  _refusing: bool

  @classmethod
  def of(cls, worker: Worker) -> 'FaultyWorker':
    """The same worker, which engines and ways know, as one whose steps may fail from now on."""
    worker.__class__ = cls
    assert isinstance(worker, cls)
    worker._refusing = False
    worker.clear()
    return worker

  def clear(self) -> None:
    """Have nothing wrong with what comes next."""
    self.faults, self.acted = {}, lambda order: None

  def dispatch(self, order: StepOrder, after: Callable[[tuple[int, int]], None] = lambda group: None) -> Pending:
    """Hand a step to the devices, or fail to."""
    fault = self.faults.get(order.id)
    if fault == 'refused':
      self.acted(order.id)
      raise RuntimeError('the step was refused')
    if fault == 'takes its pages':
      self.acted(order.id)
      for leaf in jax.tree.leaves(self.pages):
        leaf.delete()
      raise RuntimeError('the step took its pages')
    self._refusing = fault == 'refused halfway'
    weights = self.weights
    if fault == 'NaN' and (token := self._token_in(order)) is not None:
      self.weights = _with_nan_for(token, weights)
    if fault == 'early NaN':  # in a chunk that chooses no token, so that nobody sees it yet
      self.weights = _with_nan_for(int(order.chunks[0].token_ids[-1]), weights)
      self.acted(order.id)
    try:
      return super().dispatch(order, after)
    except _RefusedError:
      self.acted(order.id)
      raise
    finally:
      self._refusing, self.weights = False, weights

  def run(self, program: Program, *arguments: Any) -> tuple[Any, ...]:
    """Hand a program to the devices; one that computes layers is refused where its step is to be refused halfway."""
    if self._refusing and not isinstance(program, Admit | Remember | Copy | Begin):
      raise _RefusedError('the step was refused halfway')
    return super().run(program, *arguments)

  def collect(self, order: StepOrder, pending: Pending) -> Collected:
    """Wait for a step, or learn that it failed."""
    fault = self.faults.get(order.id)
    if fault == 'stalls':
      self.acted(order.id)
      time.sleep(STEP_STALL_S)
    if fault == 'fails':
      self.acted(order.id)
      raise RuntimeError('the step failed on its device')
    collected = super().collect(order, pending)
    ended: Sequence[Ended] = () if collected.decoded is None else collected.decoded.ended
    errors = [*(one.error for one in collected.results), *(one.error for one in ended)]
    if fault == 'NaN' and any(error is not None for error in errors):
      self.acted(order.id)
    return collected

  def _token_in(self, order: StepOrder) -> int | None:
    """A token after which the step chooses one; None if it chooses none."""
    tokens: list[Callable[[], int]] = [functools.partial(int, one.token_ids[-1]) for one in order.chunks if one.is_last]
    admitted = {join.slot: join.admission for join in order.joins if join.admission is not None}
    for slot in order.batch.slots:
      if (admission := admitted.get(slot)) is not None:
        tokens.append(functools.partial(int, (*admission.request.prompt, *admission.tokens)[-1]))
      else:  # its slot knows, once the steps before are over
        tokens.append(functools.partial(lambda slot: int(self.slots.rows.tokens[slot]), slot))
    return tokens[order.id % len(tokens)]() if tokens else None


class _RefusedError(RuntimeError):
  """A program was to be refused."""


def _with_nan_for(token: int, weights: Weights) -> Weights:
  """The weights with NaN in the embedding of a token: a sequence with it has NaN in its logits, and in its pages."""
  embed = np.array(weights['embed'])
  embed[token] = np.nan
  return {**weights, 'embed': jax.device_put(embed, weights['embed'].sharding)}


@contextlib.contextmanager
def fresh(ways: Iterable[FaultyWay], workers: Iterable[Worker]) -> Iterator[None]:
  """A run in which nothing is wrong yet, and after which nothing goes wrong or waits any more.

  Order numbers begin anew in the next run: a fault left behind would happen to one of its steps.
  """
  before = set(threading.enumerate())  # of other engines in this process, which may be idle for long
  faulty: list[FaultyWay | FaultyWorker] = [*ways, *(worker for worker in workers if isinstance(worker, FaultyWorker))]
  for one in faulty:
    one.clear()
  try:
    yield
  finally:
    for one in faulty:
      one.clear()
    for thread in threading.enumerate():
      if thread.name == 'pdjax-transfers' and thread not in before:
        thread.join(STALL_S)


class FaultyEngine:
  """An engine whose workers can be lost and whose transfers can fail.

  Attributes:
    fault_of: Says what happens to a transfer: a `WayFault`, or None.
    acted: Told of an order whose fault has acted, on whatever thread.
  """

  def __init__(self, engine: Engine):
    self.fault_of: Callable[[TransferOrder], Any] = lambda order: None
    self.acted: Callable[[int], None] = lambda order: None
    self._engine = engine

  def submit(self, orders: Sequence[Order]) -> None:
    """Begin the orders of one action, each transfer with its fault."""
    for order in orders:
      if isinstance(order, TransferOrder) and self.hears(order):
        fault = self.fault_of(order)
        self.way(order.source, order.target).faults.append((fault, functools.partial(self.acted, order.id)))
    self._engine.submit(orders)

  def wait(self, until_s: float) -> tuple[float, Sequence[Event]]:
    """Wait until something happened or `until_s` has come."""
    return self._engine.wait(until_s)

  def way(self, source: str, target: str) -> FaultyWay:
    """The way of keys and values between two workers."""
    way = self._engine._transports[source, target, KV]
    assert isinstance(way, FaultyWay)
    return way

  def hears(self, order: Order) -> bool:
    """Whether an order is for workers as they are now, and not for an incarnation that is over."""
    return not self._engine._is_stale(order)

  def incarnation(self, worker: str) -> int:
    """The number of a worker's incarnation."""
    return self._engine.workers[worker].incarnation

  def break_worker(self, worker: str) -> None:
    """Let a worker be gone as if a step had failed; its next incarnation begins when the engine next waits."""
    self._engine._runners[worker].post_broken(self.incarnation(worker), 'it is gone')

  def lose(self, worker: str) -> tuple[WorkerLost, WorkerBack]:
    """Let a worker begin another incarnation; return the events that tell of it."""
    lost, back = self._engine._restart(
      Broken(worker, self.incarnation(worker), 'it is gone', self._engine._mailbox.now_s())
    )
    assert isinstance(lost, WorkerLost) and isinstance(back, WorkerBack)
    return lost, back
