"""The engine with transfers that fail on demand, over the compiled programs of a transport that works."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from pdjax.engine.engine import Engine, _Broken
from pdjax.kv.transfer import DevicePut, Parcel
from pdjax.serving.messages import Event, Order, TransferOrder, WorkerBack, WorkerLost
from pdjax.types.span import Span
from tests.faults.shadow import Fault

STALL_S = 20.0  # longer than any test waits
SLOW_S = 0.1


class FaultyWay(DevicePut):
  """A way between two pools that does to each transfer what it was told to do."""

  def __init__(self, way: DevicePut, checksums: bool = True):
    self.__dict__ |= way.__dict__
    self.has_checksums = checksums
    self.faults: deque[Fault | None] = deque()
    self.released = threading.Event()
    self._fault: Fault | None = None
    for shape in self.shapes:  # what is compiled for checksums is compiled now
      DevicePut.send(self, self.first_span(shape)).wait()

  def send(self, span: Span) -> Parcel:
    self._fault = fault = self.faults.popleft() if self.faults else None
    if fault == 'refused':
      raise RuntimeError('the transport refused it')
    try:
      parcel = super().send(span)
    finally:
      self._fault = None
    if fault is not None:
      parcel.wait = self._waits(fault, parcel.wait)  # type: ignore[method-assign]
    return parcel

  def put(self, pieces, devices) -> list[jax.Array]:
    if self._fault in ('corrupts', 'permutes'):
      return [self._damaged(piece, device) for piece, device in zip(pieces, devices, strict=True)]
    return super().put(pieces, devices)

  def _damaged(self, piece: jax.Array, device: jax.Device) -> jax.Array:
    here = np.array(piece)
    if self._fault == 'permutes':
      here = np.roll(here, 1, 1 if here.shape[1] > 1 else -2)  # units, or of a single one the tokens
    else:
      here.reshape(-1).view(np.uint8)[3] ^= 1
    assert here.tobytes() != np.asarray(piece).tobytes()
    return jax.device_put(here, device)

  def _waits(self, fault: Fault, wait: Callable[[], None]) -> Callable[[], None]:
    released = self.released

    def waits() -> None:
      released.wait(STALL_S if fault == 'stalls' else SLOW_S)
      if fault == 'fails':
        raise RuntimeError('the link broke')
      wait()

    return waits


@contextlib.contextmanager
def fresh(ways: Iterable[FaultyWay]) -> Iterator[None]:
  """A run in which nothing is wrong yet, and after which no thread waits any more."""
  before = set(threading.enumerate())  # of other engines in this process, which may be idle for long
  for way in ways:
    way.faults.clear()
    way.released = threading.Event()
  try:
    yield
  finally:
    for way in ways:
      way.released.set()
    for thread in threading.enumerate():
      if thread.name == 'pdjax-transfers' and thread not in before:
        thread.join(STALL_S)


class FaultyEngine:
  """An engine whose workers can be lost and whose transfers can fail."""

  def __init__(self, engine: Engine):
    self.fault_of: Callable[[TransferOrder], Fault | None] = lambda order: None
    self._engine = engine

  def submit(self, orders: Sequence[Order]) -> None:
    for order in orders:
      if isinstance(order, TransferOrder) and not self._engine._is_stale(order):
        self._engine._transports[order.source, order.target].faults.append(self.fault_of(order))
    self._engine.submit(orders)

  def wait(self, until_s: float) -> tuple[float, Sequence[Event]]:
    return self._engine.wait(until_s)

  def lose(self, worker: str) -> tuple[WorkerLost, WorkerBack]:
    incarnation = self._engine.workers[worker].incarnation
    lost, back = self._engine._rebuild(_Broken(worker, incarnation, 'it is gone', self._engine._mailbox.now_s()))
    assert isinstance(lost, WorkerLost) and isinstance(back, WorkerBack)
    return lost, back
