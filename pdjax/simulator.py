"""The backend with a virtual clock: orders end on a heap, when a cost model or a record says so."""

import collections
import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pdjax.cost.cost_model import CostModel, as_cost
from pdjax.serving.batch import LOOKAHEAD
from pdjax.serving.bounds import Bounds
from pdjax.serving.events import Decoded, Done, Event, Failed, Result, Started, Trip, Turn, WorkerBack, WorkerLost
from pdjax.serving.orders import AbandonOrder, ChunkOrder, EndOrder, LeaveOrder, Order, StepOrder, TransferOrder
from pdjax.standing_run import StandingRun, outcome
from pdjax.types.checks import is_number
from pdjax.types.model import ModelSpec
from pdjax.types.worker import Role, WorkerSpec

PLACEHOLDER_TOKEN = 0  # what a simulated request "generates"
_BLANK = np.broadcast_to(np.int32(PLACEHOLDER_TOKEN), (1 << 12, 1 << 12))  # one number, whatever part is taken
_MOST_KNOWN = 256  # steps of a run whose ends are worked out at once


class Simulator:
  """Carries orders out in virtual time.

  A worker runs its steps one after another, and workers that name the same devices wait for one another; transfers
  that leave one worker go one after another too. Simulated requests generate placeholder tokens up to their true length
  if the workload knows it, else up to `max_tokens`.

  Of a standing order it tells at once of all steps up to the next that changes anything, where the cost model knows the
  seconds of a run of steps (`CostBase.runs`) and the worker has devices of its own. Either way the end of a step
  is the time at which its run began and the seconds of the run up to there, so that no sum depends on what was told.

  Args:
    model: The model.
    workers: The workers, and places that only hold pages, `num_pages` filled in; their cache is float32 if they do not
      say otherwise.
    cost: Says how long things take.
    leaps: Whether several steps may be told of at once; without, each is an event of its own.
  """

  def __init__(self, model: ModelSpec, workers: Sequence[WorkerSpec], cost: CostModel, *, leaps: bool = True):
    self._model = model
    self._workers = {worker.name: worker for worker in workers}
    self._cost = as_cost(cost)
    self._leaps = leaps
    self._is_leaping = False
    devices = collections.Counter(device for worker in workers for device in worker.named_devices)
    shared = {worker.name: any(devices[device] > 1 for device in worker.named_devices) for worker in workers}
    self._run_seconds = {
      worker.name: None if shared[worker.name] or worker.role is Role.HOLD else self._cost.runs(model, worker)
      for worker in workers
    }
    self.start_clock()

  def start_clock(self) -> None:
    """Let a run begin now, at 0 s, with nothing under way."""
    self._now_s = 0.0
    self._answered_s = -math.inf  # the time of the turn before
    self._heap: list[tuple[float, int, int, Callable[[], Event], StandingRun | None, int]] = []
    self._sequence = itertools.count()
    self._busy_until_s: dict[object, float] = {}  # by lane: a device, a worker with devices of its own, a way out
    self._ends_s: dict[int, float] = {}
    self._began_s: dict[int, float] = {}  # of steps
    self._bounds = {name: Bounds() for name in self._workers}
    self._runs: dict[str, list[StandingRun]] = {name: [] for name in self._workers}  # of standing orders in flight
    self._waiting: dict[str, None] = {}  # workers where another step may follow once what was told is answered

  def close(self) -> None:
    """Nothing runs that would have to end."""

  def interrupt(self, note: Callable[[float], None]) -> None:
    """Call `note` with the time now: no wait is ever under way."""
    note(self._now_s)

  @property
  def places(self) -> Mapping[str, Any]:
    """Those that may be lost and come back, by name: none, as nothing is simulated to fail."""
    return {}

  def submit(self, orders: Sequence[Order]) -> None:
    """Work out when each order will end and push that on the heap."""
    for order in orders:
      self._submit(order)

  def _submit(self, order: Order) -> None:
    match order:
      case StepOrder():
        self._submit_step(order)
      case TransferOrder():
        source, target = self._workers[order.source], self._workers[order.target]
        seconds = self._cost.transfer_seconds(self._model, source, target, order.num_bytes)
        self._check_seconds(seconds, 'transfer_seconds')
        began_s = self._begin((('way out', order.source),), seconds, order.id, self._ready_s(order))
        self._push(order.id, lambda: self._transfer_done(order, began_s))
      case LeaveOrder():
        self._halt(order.worker, replaced=False)
        self._end_now(order)
      case EndOrder() | AbandonOrder():  # what a given up transfer still brings comes too late
        self._end_now(order)

  def _end_now(self, order: Order) -> None:
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
    self._answered_s = self._now_s
    self._top_up()
    if (next_s := self._next_s()) <= until_s and math.isfinite(next_s):
      self._now_s = max(self._now_s, next_s)
    elif math.isfinite(until_s):
      self._now_s = max(self._now_s, until_s)
    return self._now_s, self._ended(self._now_s)

  def _ended(self, now_s: float) -> list[Event]:
    """Everything on the heap that ends up to now."""
    if self._is_leaping:
      return self._ended_and_beside(now_s)
    events: list[Event] = []
    while self._next_s() <= now_s:
      events.append(heapq.heappop(self._heap)[3]())
    return events

  def _ended_and_beside(self, now_s: float) -> list[Event]:
    """As `_ended`; where several end at one time, each run tells of its steps up to then, as without leaps."""
    ended: list[tuple[int, Event]] = []
    before: list[Event] = []
    while self._next_s() <= now_s:
      _, order, _, event, run, _ = heapq.heappop(self._heap)
      if run is not None and (ended or self._next_s() <= now_s):
        before += self._caught_up(run, run.ended_before(now_s))
      ended.append((order, event()))
    beside = [
      run for runs in self._runs.values() for run in runs if run.has_end_at(now_s) and run.told < run.chosen - 1
    ]
    for run in beside:
      before += self._caught_up(run, run.ended_before(now_s))
      ended += [(run.order.id, done) for done in self._caught_up(run, run.ended_by(now_s))]
    if beside:
      ended.sort(key=lambda one: one[0])
    return [*before, *(event for _, event in ended)]

  def _next_s(self) -> float:
    """The time of the next end; infinity if there is none."""
    while self._heap and not self._counts(*self._heap[0][4:]):
      heapq.heappop(self._heap)
    return self._heap[0][0] if self._heap else math.inf

  def _counts(self, run: StandingRun | None, version: int) -> bool:
    """Whether an end is still to be told: another step of its run may have been chosen since."""
    return run is None or run.version == version

  def _begin(self, lanes: Sequence[object], seconds: float, order: int, ready_s: float = 0.0) -> float:
    """Queue behind what occupies the lanes; say when it begins and note when it ends."""
    began_s = max(self._now_s, ready_s, *(self._busy_until_s.get(lane, 0.0) for lane in lanes))
    self._ends_s[order] = began_s + seconds
    self._busy_until_s.update(dict.fromkeys(lanes, began_s + seconds))
    return began_s

  def _push(self, order: int, event: Callable[[], Event]) -> None:
    self._push_at(self._ends_s[order], order, event)

  def _push_at(
    self, time_s: float, order: int, event: Callable[[], Event], run: StandingRun | None = None, version: int = 0
  ) -> None:
    """Have an event of an order happen then; one of a run, if no other step of it was chosen by then."""
    heapq.heappush(self._heap, (time_s, order, next(self._sequence), event, run, version))

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

  # -------------------------------------------------------------------------- steps

  def _lanes(self, worker: str) -> Sequence[object]:
    return self._workers[worker].named_devices or (worker,)

  def _free_from_s(self, worker: str) -> float:
    """The time from which on nothing else occupies a worker's devices."""
    return max(self._now_s, *(self._busy_until_s.get(lane, 0.0) for lane in self._lanes(worker)))

  def _occupy(self, worker: str, until_s: float) -> None:
    self._busy_until_s.update(dict.fromkeys(self._lanes(worker), until_s))

  def _submit_step(self, order: StepOrder) -> None:
    self._halt(order.worker, replaced=True)
    batch = self._bounds[order.worker]
    rows = batch.change(order)
    if order.standing:
      can_leap = self._run_seconds[order.worker] is not None
      run = StandingRun(order, rows, batch.steps, self._free_from_s(order.worker), can_leap)
      self._runs[order.worker].append(run)
      self._dispatch(run)
      self._push_next(run)
      self._waiting[order.worker] = None
      return
    seconds = self._step_seconds(order, [row.base + batch.steps for row in rows if row.ends_at > batch.steps])
    if order.layer_groups:  # a program for each, and one before and after them
      seconds += (1 + len(order.layer_groups)) * self._cost.dispatch_s
    decoded = None
    if order.decodes:
      counts, ended = outcome(np.array([row.ends_at for row in rows]), batch.steps, batch.steps + order.steps)
      decoded = Decoded(self._tokens(order, 0, order.steps), counts, ended)
      batch.steps += order.steps
    self._began_s[order.id] = began_s = self._free_from_s(order.worker)
    self._ends_s[order.id] = began_s + seconds
    self._occupy(order.worker, began_s + seconds)
    self._push(order.id, lambda: self._step_done(order, began_s, decoded))

  def _step_seconds(self, order: StepOrder, contexts: Sequence[int]) -> float:
    chunks = [(chunk.start, chunk.length) for chunk in order.chunks]
    seconds = self._cost.step_seconds(self._model, self._workers[order.worker], chunks, contexts, order.steps)
    self._check_seconds(seconds, 'step_seconds')
    return seconds

  def _step_done(self, order: StepOrder, began_s: float, decoded: Decoded | None) -> Done:
    wasted = 0 if decoded is None else order.steps * len(order.batch) - decoded.num_tokens()
    del self._began_s[order.id]
    results = tuple(map(self._first, (chunk for chunk in order.chunks if chunk.is_last)))
    done = Done(order.id, began_s, self._ends_s.pop(order.id), results, decoded, wasted_tokens=wasted)
    self._halt_those_with(done.ended(order.batch), order.worker)
    self._waiting[order.worker] = None
    return done

  def _first(self, chunk: ChunkOrder) -> Result:
    """The outcome of the last chunk of a prompt."""
    return Result(chunk.request.id, (PLACEHOLDER_TOKEN,), 'length' if chunk.limit == 1 else None)

  def _tokens(self, order: StepOrder, before: int, after: int) -> np.ndarray:
    """The tokens of decode steps of an order, all that follow `before` of them up to `after`, `[T, B]`."""
    steps, rows = after - before, len(order.batch)
    if steps <= _BLANK.shape[0] and rows <= _BLANK.shape[1]:
      return _BLANK[:steps, :rows]
    return np.broadcast_to(_BLANK[0, 0], (steps, rows))

  # -------------------------------------------------------------------------- steps that stand

  def _dispatch(self, run: StandingRun) -> None:
    """Steps of a run are with the worker now, up to `run.given`."""
    self._know(run, run.given)

  def _top_up(self) -> None:
    """Let steps of standing orders follow, now that what was told is answered."""
    for worker in self._waiting:
      runs = self._runs[worker]
      if runs and runs[0].last is None and runs[0].began_s <= self._now_s:  # behind others it has its first step there
        run = runs[0]
        run.given = max(run.given, min(run.told + LOOKAHEAD, run.most))
        self._dispatch(run)
    self._waiting.clear()

  def _know(self, run: StandingRun, step: int) -> None:
    """Work out the ends of a run's steps up to this one."""
    worker, run_seconds = run.order.worker, self._run_seconds[run.order.worker]
    while run.known < step:
      contexts = run.contexts()
      if run_seconds is not None:
        ahead = min(run.until_change(run.known), run.most) - run.known
        seconds = run_seconds(contexts, min(ahead, _MOST_KNOWN))
        self._check_seconds(float(seconds[-1]), 'runs')
        run.add((run.last_end_s + seconds).tolist())
        continue
      began_s = max(run.last_end_s, self._free_from_s(worker))
      ended_s = began_s + self._step_seconds(run.order, contexts)
      run.add([ended_s], began_s)
      self._occupy(worker, ended_s)

  def _push_next(self, run: StandingRun) -> None:
    """Have the next step of a run told that must be, or without leaps the next."""
    step = run.next_told() if self._is_leaping and run.can_leap else run.told + 1
    self._know(run, step)
    run.version, run.chosen = run.version + 1, step
    self._push_at(run.end_s(step), run.order.id, lambda: self._tell(run, step), run, run.version)

  def _tell(self, run: StandingRun, step: int) -> Done:
    """The steps of a run up to this one have ended."""
    if run.last is None and (step == run.until_change(run.told) or step >= run.most - 1):
      self._settle(run, min(step + 1, run.most))
    done = self._done_of(run, step)
    if step == run.last:
      self._runs[run.order.worker].remove(run)
    else:
      self._push_next(run)
    self._halt_those_with(done.ended(run.order.batch), run.order.worker, run)
    self._waiting[run.order.worker] = None
    return done

  def _done_of(self, run: StandingRun, step: int) -> Done:
    before, run.told = run.told, step
    counts, ended = run.outcome(before, step)
    ends_s = run.ends_between(before, step)
    told_late = len(ends_s) > 1 or ends_s[-1] < self._now_s
    decoded = Decoded(self._tokens(run.order, before, step), counts, ended, ends_s=ends_s if told_late else ())
    to_come = None if run.last is None else run.last - step
    wasted = (step - before) * len(counts) - decoded.num_tokens()
    return Done(run.order.id, run.begin_s(before + 1), ends_s[-1], (), decoded, to_come, wasted)

  def _settle(self, run: StandingRun, last: int) -> None:
    """Let a step be the last of a run, so that what comes behind it begins at its end."""
    assert last >= run.given, 'a step is with its worker that is none'
    run.last = run.given = last
    self._dispatch(run)
    self._occupy(run.order.worker, run.end_s(last))
    self._bounds[run.order.worker].steps = run.before + last

  def _halt_those_with(self, ended: Sequence[str], worker: str, told: StandingRun | None = None) -> None:
    """Let standing orders end of whose sequences one ended with a step before them."""
    for run in [run for run in self._runs[worker] if run is not told] if ended else ():
      if run.last is None and any(name in run.order.batch.requests for name in ended):
        self._settle(run, run.given_by(self._now_s, self._answered_s))
        self._push_next(run)

  def _halt(self, worker: str, *, replaced: bool) -> None:
    """Let no more steps follow of a standing order: those that are with the worker are its last."""
    for run in self._runs[worker]:
      run.replaced = run.replaced or replaced
      if run.last is None:
        self._settle(run, run.given_by(self._now_s, self._answered_s))
      self._push_next(run)

  def leap(self) -> Callable[[str], list[Done]] | None:
    """Let steps at which nothing changes be told at once from now on, unless this simulator is not to.

    Returns:
      Gives the steps of standing orders of a worker that have ended and were not told yet; whoever looks at what they
      bring must ask first.
    """
    self._is_leaping = self._leaps
    return self._catch_up if self._leaps else None

  def _catch_up(self, worker: str) -> list[Done]:
    return [done for run in self._runs[worker] for done in self._caught_up(run, run.ended_by(self._now_s))]

  def _caught_up(self, run: StandingRun, step: int) -> list[Done]:
    """The steps of a run up to this one that were not told, but for the one that is chosen to be told as it ends."""
    step = min(step, run.chosen - 1)
    return [self._done_of(run, step)] if step > run.told else []


class Replay(Simulator):
  """Reproduces a run from its log: the heap is the simulator's, the ends and outcomes are the recorded ones.

  Feed it to `serve` with the same arrivals and policy and a fresh state: every turn, action and page number must come
  out as recorded, which shows that the state and the policy saw nothing that is not in the log.
  """

  def __init__(self, model: ModelSpec, workers: Sequence[WorkerSpec], events: Iterable[Event]):
    super().__init__(model, workers, cost=_NoCost())
    self._turns_s = []
    self._outcomes: dict[int, list[Done | Failed]] = {}  # by order; of one that stands, several
    self._losses: dict[int, list[tuple[int, WorkerLost | WorkerBack]]] = {}  # by turn, with their places among its ends
    place = 0
    for event in events:
      match event:
        case Turn(now_s):
          self._turns_s.append(now_s)
          place = 0
        case Done() | Failed():
          self._outcomes.setdefault(event.order, []).append(event)
          place += 1
        case WorkerLost() | WorkerBack():
          self._losses.setdefault(len(self._turns_s) - 1, []).append((place, event))
          place += 1
    self._turn = -1

  def _submit(self, order: Order) -> None:
    """Push what was recorded of the order; one whose end was never seen stays under way."""
    for told in self._outcomes.get(order.id, ()):
      self._push_at(told.ended_s, order.id, functools.partial(lambda event: event, told))

  def leap(self) -> None:
    """Tell what was recorded: every turn begins with all that was told up to it."""

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
