"""The backend with a virtual clock: orders end on a heap, when a cost model or a record says so."""

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pdjax.cost.cost_model import CostModel, as_cost
from pdjax.serving.events import Done, Event, Failed, Result, Started, Trip, Turn, WorkerBack, WorkerLost
from pdjax.serving.orders import AbandonOrder, EndOrder, Order, StepOrder, TransferOrder
from pdjax.types.checks import is_number
from pdjax.types.model import ModelSpec
from pdjax.types.worker import WorkerSpec

PLACEHOLDER_TOKEN = 0  # what a simulated request "generates"


class Simulator:
  """Carries orders out in virtual time.

  A worker runs its steps one after another, and workers that name the same devices wait for one another; transfers
  that leave one worker go one after another too. Simulated requests generate placeholder tokens up to their true length
  if the workload knows it, else up to `max_tokens`.
  """

  def __init__(
    self,
    model: ModelSpec,
    workers: Sequence[WorkerSpec],
    cost: CostModel,
  ):
    """Simulate these workers, `num_pages` filled in; their cache is float32 if they do not say otherwise."""
    self._model = model
    self._workers = {worker.name: worker for worker in workers}
    self._cost = as_cost(cost)
    self.start_clock()

  def start_clock(self) -> None:
    """Let a run begin now, at 0 s, with nothing under way."""
    self._now_s = 0.0
    self._heap: list[tuple[float, int, Callable[[], Event]]] = []
    self._sequence = itertools.count()
    self._busy_until_s: dict[object, float] = {}  # by lane: a device, a worker with devices of its own, a way out
    self._ends_s: dict[int, float] = {}
    self._began_s: dict[int, float] = {}  # of steps
    self._left: dict[str, int] = {}  # tokens each request will still generate

  def close(self) -> None:
    """Nothing runs that would have to end."""

  def interrupt(self, note: Callable[[float], None]) -> None:
    """Call `note` with the time now: no wait is ever under way."""
    note(self._now_s)

  @property
  def workers(self) -> Mapping[str, Any]:
    """Those that may be lost and come back, by name: none, as nothing is simulated to fail."""
    return {}

  def submit(self, orders: Sequence[Order]) -> None:
    """Work out when each order will end and push that on the heap."""
    for order in orders:
      self._submit(order)

  def _submit(self, order: Order) -> None:
    match order:
      case StepOrder():
        seconds = self._cost.step_seconds(
          self._model,
          self._workers[order.worker],
          [(chunk.start, chunk.length) for chunk in order.chunks],
          [decode.context for decode in order.decodes],
          order.steps,
        )
        self._check_seconds(seconds, 'step_seconds')
        if order.layer_groups:  # a program for each, and one before and after them
          seconds += (1 + len(order.layer_groups)) * self._cost.dispatch_s
        began_s = self._begin(self._workers[order.worker].devices or (order.worker,), seconds, order.id)
        self._began_s[order.id] = began_s
        self._push(order.id, lambda: self._step_done(order, began_s))
      case TransferOrder():
        source, target = self._workers[order.source], self._workers[order.target]
        seconds = self._cost.transfer_seconds(self._model, source, target, order.num_bytes)
        self._check_seconds(seconds, 'transfer_seconds')
        began_s = self._begin((('way out', order.source),), seconds, order.id, self._ready_s(order))
        self._push(order.id, lambda: self._transfer_done(order, began_s))
      case EndOrder() | AbandonOrder():  # what a given up transfer still brings comes too late
        self._ends_s[order.id] = now_s = self._now_s
        self._push(order.id, lambda: Done(order.id, now_s, self._ends_s.pop(order.id)))

  def _check_seconds(self, seconds: float, method: str) -> None:
    """Raise ValueError unless a cost model's answer is a time that ends."""
    if not is_number(seconds) or not 0 <= seconds < math.inf:
      raise ValueError(
        f'{self._cost.name}.{method} answered {seconds!r}, expected seconds: a finite number, not below 0.'
      )

  def wait(self, until_s: float) -> tuple[float, Sequence[Event]]:
    """Move the clock to the next end, or to `until_s` if that comes first."""
    if self._heap and self._heap[0][0] <= until_s:
      self._now_s = max(self._now_s, self._heap[0][0])
    elif math.isfinite(until_s):
      self._now_s = max(self._now_s, until_s)
    return self._now_s, self._ended(self._now_s)

  def _ended(self, now_s: float) -> list[Event]:
    """Everything on the heap that ends up to now."""
    events = []
    while self._heap and self._heap[0][0] <= now_s:
      events.append(heapq.heappop(self._heap)[2]())
    return events

  def _begin(self, lanes: Sequence[object], seconds: float, order: int, ready_s: float = 0.0) -> float:
    """Queue behind what occupies the lanes; say when it begins and note when it ends."""
    began_s = max(self._now_s, ready_s, *(self._busy_until_s.get(lane, 0.0) for lane in lanes))
    self._ends_s[order] = began_s + seconds
    self._busy_until_s.update(dict.fromkeys(lanes, began_s + seconds))
    return began_s

  def _push(self, order: int, event: Callable[[], Event]) -> None:
    heapq.heappush(self._heap, (self._ends_s[order], next(self._sequence), event))

  def _ready_s(self, order: TransferOrder) -> float:
    """The time its tokens are computed: at the end of their step, or in the middle of it for the first layers."""
    if order.after is None or order.after not in self._ends_s:
      return 0.0
    began_s, ended_s = self._began_s[order.after], self._ends_s[order.after]
    _, stop = order.span.bounds(self._model.num_layers)
    return began_s + (ended_s - began_s) * stop / self._model.num_layers

  def _transfer_done(self, order: TransferOrder, began_s: float) -> Done:
    ended_s = self._ends_s.pop(order.id)
    trip = Trip(began_s, ended_s, pieces=1)
    return Done(order.id, began_s, ended_s, wire_bytes=order.num_bytes, trip=trip)

  def _step_done(self, order: StepOrder, began_s: float) -> Done:
    results = []
    wasted = 0
    for chunk in order.chunks:
      if chunk.is_last:
        self._left[chunk.request.id] = chunk.limit
        results.append(self._generate(chunk.request.id, 1))
    for decode in order.decodes:
      if decode.admission is not None:
        self._left[decode.request] = decode.admission.limit - len(decode.admission.tokens)
      tokens = min(order.steps, self._left.get(decode.request, 0))
      wasted += order.steps - tokens
      if tokens:
        results.append(self._generate(decode.request, tokens))
    del self._began_s[order.id]
    return Done(order.id, began_s, self._ends_s.pop(order.id), tuple(results), wasted)

  def _generate(self, request: str, tokens: int) -> Result:
    self._left[request] -= tokens
    ended = self._left[request] == 0
    if ended:
      del self._left[request]
    return Result(request, (PLACEHOLDER_TOKEN,) * tokens, 'length' if ended else None)


class Replay(Simulator):
  """Reproduces a run from its log: the heap is the simulator's, the ends and outcomes are the recorded ones.

  Feed it to `serve` with the same arrivals and policy and a fresh state: every turn, action and page number must come
  out as recorded, which shows that the state and the policy saw nothing that is not in the log.
  """

  def __init__(self, model: ModelSpec, workers: Sequence[WorkerSpec], events: Iterable[Event]):
    super().__init__(model, workers, cost=_NoCost())
    self._turns_s = []
    self._outcomes: dict[int, Event] = {}
    self._losses: dict[int, list[tuple[int, WorkerLost | WorkerBack]]] = {}  # by turn, with their places among its ends
    place = 0
    for event in events:
      match event:
        case Turn(now_s):
          self._turns_s.append(now_s)
          place = 0
        case Done() | Failed():
          self._outcomes[event.order] = event
          place += 1
        case WorkerLost() | WorkerBack():
          self._losses.setdefault(len(self._turns_s) - 1, []).append((place, event))
          place += 1
    self._turn = -1

  def _submit(self, order: Order) -> None:
    """Push the recorded end of the order; one whose end was never seen stays under way."""
    outcome = self._outcomes.get(order.id)
    if outcome is not None:
      assert isinstance(outcome, Done | Failed)
      self._ends_s[order.id] = outcome.ended_s
      self._push(order.id, lambda: outcome)

  def wait(self, until_s: float) -> tuple[float, Sequence[Event]]:
    """Move to the recorded turn.

    Raises:
      ValueError: if the record has no more turns.
    """
    self._turn += 1
    if self._turn >= len(self._turns_s):
      raise ValueError(f'the record ends after {len(self._turns_s)} turns, but the run goes on: it is another run.')
    self._now_s = self._turns_s[self._turn]
    events = self._ended(self._now_s)
    for place, lost in self._losses.get(self._turn, ()):
      events.insert(place, lost)
    return self._now_s, events


class _NoCost:
  """A record needs no cost model; asking it is our own bug."""

  def step_seconds(self, *args) -> float:
    raise AssertionError('a replay asks for no costs')

  transfer_seconds = step_seconds


def started(events: Iterable[Event]) -> list[tuple[float, Order]]:
  """The (turn, order) pairs of a log: every decision, its page numbers included."""
  return [(event.now_s, event.order) for event in events if isinstance(event, Started)]


__all__ = ['Replay', 'Simulator', 'started']
