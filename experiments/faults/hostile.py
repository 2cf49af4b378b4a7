"""An engine on a hostile day: a session serves on it, and transfers, passes and workers fail as dice say."""

import collections
import random
from collections.abc import Callable, Mapping, Sequence

from experiments.faults.chaos import Chaos, End
from experiments.faults.engine_faults import FaultyEngine, FaultyWorker, PassFault, WayFault
from experiments.faults.kinds import Dice
from pdjax.engine.engine import Engine
from pdjax.engine.worker import Worker
from pdjax.serving.messages import Done, Event, Order, StepOrder, TransferOrder, WorkerBack

WAY_FAULTS: dict[str, WayFault] = {
  'transfer_refused': 'refused',
  'transfer_fails': 'fails',
  'transfer_stalls': 'stalls',
  'transfer_slow': 'slow',
  'pages_corrupt': 'corrupts',
  'pages_permuted': 'permutes',
  'pages_unwritable': 'unwritable',
}
ENDS: dict[str, End] = {'end_late': 'late', 'end_twice': 'twice', 'end_lost': 'lost'}
PASS_FAULTS: dict[str, PassFault] = {
  'pass_refused': 'refused',
  'pass_refused_halfway': 'refused halfway',
  'pass_fails': 'fails',
  'pass_takes_pages': 'takes its pages',
  'pass_stalls': 'stalls',
}
_DOWN_S = (0.0, 0.05, 0.3)  # that a lost worker is away
_RETOLD = 3  # passes of an earlier life that a worker tells of


class Hostile(Chaos):
  """What a `Deployment` takes for its engine; nothing goes wrong but what the dice say.

  Attributes:
    engine: The engine, whose workers are faulty ones and its ways too.
  """

  def __init__(self, engine: Engine, dice: Dice, rng: random.Random, late_s: float):
    """Begin with nothing wrong.

    Args:
      engine: The engine.
      dice: What goes wrong.
      rng: Tells which worker it is, and for how long.
      late_s: How late an end is told that is told late; more than the deadline of transfers.
    """
    self.engine = engine
    self._faulty = FaultyEngine(engine)
    self._dice = dice
    self._rng = rng
    self._passes: dict[str, collections.deque[int]] = {
      name: collections.deque(maxlen=_RETOLD) for name in engine.workers
    }
    self._down_s: dict[str, float] = {}  # of workers that are lost on purpose
    super().__init__(self._faulty, self._draw_fault, self._draw_end, late_s)
    for worker in engine.workers.values():
      assert isinstance(worker, FaultyWorker)
      worker.faults = {}

  def lose(self, worker: str, down_s: float) -> None:
    """A worker dies now, as one does whose pass fails, and is back so much later."""
    self._faulty.break_worker(worker)
    self._down_s[worker] = down_s

  @property
  def workers(self) -> Mapping[str, Worker]:
    """Each worker by its name."""
    return self.engine.workers

  def start_clock(self) -> None:
    """Let a run begin now, at 0 s."""
    self.now_s = 0.0
    self.engine.start_clock()

  def interrupt(self, note: Callable[[float], None]) -> None:
    """From any thread: call `note` with the time now and end the wait under way, or else the next."""
    self.engine.interrupt(note)

  def close(self) -> None:
    """Wait for what is under way, and end the threads."""
    self.engine.close()

  def submit(self, orders: Sequence[Order]) -> None:
    """Begin the orders of one action; then a worker of theirs may be lost."""
    for order in orders:
      if isinstance(order, StepOrder) and self._faulty.hears(order):
        self._passes[order.worker].append(order.id)
        kind = self._dice.draw('pass')
        if kind is not None:
          worker = self.engine.workers[order.worker]
          assert isinstance(worker, FaultyWorker)
          worker.faults[order.id] = PASS_FAULTS[kind]
    super().submit(orders)
    for order in orders:
      self._maybe_lose(order)

  def wait(self, until_s: float) -> tuple[float, list[Event]]:
    """Wait until there is something to tell or `until_s` has come; a worker may have begun another life."""
    if self._dice.draw('turn') is not None:
      name = self._rng.choice(list(self.engine.workers))
      self.lose(name, 0.0)
      later_s = self.now_s + 0.01
      self._later += [(later_s, Done(order, self.now_s, later_s)) for order in self._passes[name]]
    now_s, events = super().wait(until_s)
    told = []
    for event in events:
      down_s = self._down_s.pop(event.worker, 0.0) if isinstance(event, WorkerBack) else 0.0
      if down_s:
        self._later.append((now_s + down_s, event))
      else:
        told.append(event)
    return now_s, told

  def _in_order(self, events: list[Event]) -> list[Event]:
    """As the engine tells it: that a worker is lost comes before what its passes in another life bring."""
    return events

  def _maybe_lose(self, order: Order) -> None:
    if not isinstance(order, StepOrder | TransferOrder) or not self._faulty.hears(order):
      return
    if isinstance(order, TransferOrder):
      kind, places = self._dice.draw('hand-off'), [order.source, order.target]
    else:
      kind, places = self._dice.draw('chunks' if order.chunks else 'decodes'), [order.worker]
    if kind is not None:
      self.lose(self._rng.choice(places), self._rng.choice(_DOWN_S))

  def _draw_fault(self) -> WayFault | None:
    kind = self._dice.draw('transfer')
    return None if kind is None else WAY_FAULTS[kind]

  def _draw_end(self) -> End | None:
    kind = self._dice.draw('end')
    return None if kind is None else ENDS[kind]
