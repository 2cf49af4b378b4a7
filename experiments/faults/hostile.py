"""An engine on a hostile day: a session serves on it, and transfers, steps and workers fail as dice say."""

import collections
import random
from collections.abc import Callable, Mapping, Sequence

from experiments.faults.chaos import Chaos, End
from experiments.faults.engine_faults import FaultyEngine, FaultyWorker, StepFault, WayFault
from experiments.faults.kinds import KINDS, TOO_LATE, Dice
from experiments.faults.losses import Loss, Losses
from pdjax.engine.engine import Engine
from pdjax.engine.place import Place
from pdjax.engine.worker import Worker
from pdjax.serving.events import Done, Event
from pdjax.serving.orders import Order, StepOrder, TransferOrder

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
STEP_FAULTS: dict[str, StepFault] = {
  'pass_refused': 'refused',
  'pass_refused_halfway': 'refused halfway',
  'pass_fails': 'fails',
  'pass_takes_pages': 'takes its pages',
  'pass_stalls': 'stalls',
  'pass_has_nan': 'NaN',
}
LINK_FAULTS: dict[str, WayFault] = {'link_slow': 'slow', 'link_stalls': 'stalls'}
_LATE = {kind for kind in KINDS if TOO_LATE[0] in KINDS[kind].errors}
_LINK_S = 1.0  # that a fault of a link lasts, which is a few tries at a transfer
_DOWN_S = (0.0, 0.05, 0.3)  # that a lost worker is away
_LOST_IN_TURN = {
  'worker_restarts': Loss('worker_restarts'),
  'worker_returns': Loss('worker_returns', down_s=0.4, returning=True),
  'worker_given_up': Loss('worker_given_up', down_s=0.4, returning=True, given_up_after_s=0.1),
}
_RETOLD = 3  # steps of an earlier incarnation that a worker tells of


class Hostile(Chaos):
  """The engine of a `Deployment`, with the faults that the dice draw and no others.

  Attributes:
    engine: The engine, whose workers are faulty ones and its ways too.
    submitting: Told of orders that are about to be handed over.
    withdraw: Called with a sample of which no more is wanted from now on.
    made_late: Transfers that were made late, or are never told to have ended.
  """

  def __init__(self, engine: Engine, dice: Dice, rng: random.Random, late_s: float):
    """Begin with nothing wrong.

    Args:
      engine: The engine.
      dice: Draws the faults.
      rng: Draws the worker that is lost, and for how long.
      late_s: Seconds by which an end is told late; more than the deadline of transfers.
    """
    self.engine = engine
    self.submitting: Callable[[Sequence[Order]], None] = lambda orders: None
    self.withdraw: Callable[[str], None] = lambda sample: None
    self.made_late: set[int] = set()
    self._faulty = FaultyEngine(engine)
    self._dice = dice
    self._rng = rng
    self._kinds: dict[int, str] = {}  # of faults, by the order that they happen to
    self._links: dict[tuple[str, str], tuple[str, float]] = {}  # kinds of faults of ways, and when they end
    self._steps: dict[str, collections.deque[int]] = {
      name: collections.deque(maxlen=_RETOLD) for name in engine.workers
    }
    super().__init__(self._faulty, lambda: None, lambda: None, late_s)
    self._losses = Losses(self._faulty, self._tell_later, dice.count)
    self._faulty.fault_of, self._faulty.acted = self._draw_fault, self._acted
    for worker in engine.workers.values():
      assert isinstance(worker, FaultyWorker)
      worker.clear()
      worker.acted = self._acted

  @property
  def workers(self) -> Mapping[str, Worker]:
    """Each worker by its name."""
    return self.engine.workers

  @property
  def places(self) -> Mapping[str, Place]:
    """Each worker, and each place that only holds pages, by its name."""
    return self.engine.places

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
    self.submitting(orders)
    for order in orders:
      if isinstance(order, StepOrder) and self._faulty.hears(order):
        self._steps[order.worker].append(order.id)
        kind = self._dice.draw('step')
        if kind is not None:
          self._kinds[order.id] = kind
          worker = self.engine.workers[order.worker]
          assert isinstance(worker, FaultyWorker)
          worker.faults[order.id] = STEP_FAULTS[kind]
    super().submit(orders)
    for order in orders:
      self._after(order)

  def wait(self, until_s: float) -> tuple[float, list[Event]]:
    """Wait until there is something to tell or `until_s` has come; a worker may have begun another incarnation."""
    kind = self._dice.draw('turn')
    if kind is not None:
      name = self._rng.choice(list(self.engine.workers))
      self._losses.lose(name, _LOST_IN_TURN[kind])
      for order in self._steps[name] if kind == 'worker_restarts' else ():
        self._tell_later(0.01, Done(order, self.now_s, self.now_s + 0.01))
    now_s, events = super().wait(min([until_s, *(ends_s for _, ends_s in self._links.values())]))
    for way, (_, ends_s) in list(self._links.items()):
      if ends_s <= now_s:
        del self._links[way]
        self._faulty.way(*way).go_on()
    return now_s, [told for event in events for told in self._losses.told(event)]

  def _in_order(self, events: list[Event]) -> list[Event]:
    """The order of the engine: the loss of a worker comes before what steps of its next incarnation bring."""
    return events

  def _tell_later(self, after_s: float, event: Event) -> None:
    self._later.append((self.now_s + after_s, event))

  def _acted(self, order: int) -> None:
    self._dice.count(self._kinds[order])

  def _after(self, order: Order) -> None:
    """Draw a fault that acts once an order was handed over: a worker is lost, or a reader wants no more."""
    if not isinstance(order, StepOrder | TransferOrder) or not self._faulty.hears(order):
      return
    if isinstance(order, TransferOrder):
      kind, places = self._dice.draw('hand-off'), [order.source, order.target]
    else:
      kind, places = self._dice.draw('chunks' if order.chunks else 'decodes'), [order.worker]
    if kind == 'cancels_in_hand_off':
      assert isinstance(order, TransferOrder)
      self.withdraw(order.request)
    elif kind is not None:
      self._losses.lose(self._rng.choice(places), Loss(kind, self._rng.choice(_DOWN_S)))

  def _draw_fault(self, order: TransferOrder) -> WayFault | None:
    way = order.source, order.target
    if way not in self._links and (drawn := self._dice.draw('link')) is not None:
      self._links[way] = drawn, self.now_s + _LINK_S
    kind = self._links[way][0] if way in self._links else self._dice.draw('transfer')
    if kind is None:
      return None
    self._note(order.id, kind)
    return (LINK_FAULTS | WAY_FAULTS)[kind]

  def _end_of(self, done: Done) -> End | None:
    kind = self._dice.draw('end')
    if kind is None:
      return None
    self._note(done.order, kind)
    self._dice.count(kind)
    return ENDS[kind]

  def _note(self, order: int, kind: str) -> None:
    self._kinds[order] = kind
    if kind in _LATE:
      self.made_late.add(order)
