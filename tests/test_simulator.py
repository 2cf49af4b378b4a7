"""The simulator's figures by hand, whole runs whose books must balance, and replays of their logs."""

import dataclasses
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest

from pdjax.metrics import Report
from pdjax.policies import Colocated, Disaggregated
from pdjax.serving import ALL, Chunk, ClusterState, PolicyError, Step, StuckError, Transfer, serve
from pdjax.serving.batch import LOOKAHEAD
from pdjax.serving.events import (
  Arrived,
  Done,
  Ended,
  Event,
  Failed,
  Finished,
  Result,
  Started,
  Trip,
  Turn,
  Withdrawn,
  WorkerBack,
  WorkerLost,
)
from pdjax.serving.orders import AbandonOrder, StepOrder, TransferOrder
from pdjax.simulator import Replay, Simulator, started
from pdjax.types import (
  Request,
  SamplingParams,
  TransferSpec,
  WorkerSpec,
  colocated_pool,
  decode_pool,
  parse_split,
  prefill_pool,
)
from pdjax.workload import Bursty, Listed, Uniform, WorkloadContext
from tests.serving.driver import SIZES, TINY, Driver


@dataclasses.dataclass(frozen=True)
class HandCost:
  """A second per prompt token, a quarter per decoded token, half a second per token on the way; exact in binary."""

  dtype_bytes: int = 4

  def step_seconds(self, model, worker, chunks, contexts, steps) -> float:
    return float(sum(new for _, new in chunks)) + 0.25 * len(contexts) * steps

  def transfer_seconds(self, model, source, target, num_bytes) -> float:
    return 0.5 * num_bytes / model.cached_token_bytes('float32')


class ByHand(Driver):
  """A driver whose orders a simulator carries out."""

  def __init__(self, workers, output_lens=None, page_size: int = 4):
    super().__init__(workers, page_size)
    self.simulator = Simulator(TINY, workers, HandCost())
    self.state.expect((output_lens or {}).get)

  def start(self, action):
    orders = super().start(action)
    self.simulator.submit(orders)
    return orders

  def wait(self, until_s: float = math.inf) -> list[Event]:
    self.now_s, events = self.simulator.wait(until_s)
    for event in events:
      self.apply(event)
    return list(events)


def _finished(events: Iterable[Event]) -> list[Finished]:
  return [event for event in events if isinstance(event, Finished)]


ONE_OF_EACH = prefill_pool(1, **SIZES) + decode_pool(1, **SIZES)
TWO_AND_ONE = prefill_pool(2, **SIZES) + decode_pool(1, **SIZES)


def test_steps_of_a_worker_run_one_after_another_and_those_of_two_side_by_side():
  cluster = ByHand(TWO_AND_ONE)
  for name in 'abc':
    cluster.arrive(name, prompt_len=4, max_tokens=1)
  for worker, name in (('prefill0', 'a'), ('prefill0', 'b'), ('prefill1', 'c')):
    cluster.start(Step(worker, (Chunk(name, 0, 4),)))
  assert cluster.wait() == [
    Done(0, 0.0, 4.0, (Result('a', (0,), 'length'),)),
    Done(2, 0.0, 4.0, (Result('c', (0,), 'length'),)),
  ]
  assert cluster.wait() == [Done(1, 4.0, 8.0, (Result('b', (0,), 'length'),))]
  assert cluster.now_s == 8.0
  cluster.assert_idle()


def test_a_transfer_begins_when_its_chunk_has_ended_and_the_link_is_free():
  cluster = ByHand(ONE_OF_EACH)
  for name, prompt_len in (('a', 6), ('b', 2)):
    cluster.arrive(name, prompt_len)
    cluster.start(Step('prefill0', (Chunk(name, 0, prompt_len, 'decode0'),)))
  seen = [event for _ in range(4) for event in cluster.wait()]
  token_bytes = TINY.cached_token_bytes('float32')
  assert seen == [
    Done(0, 0.0, 6.0, (Result('a', (0,)),)),
    Done(2, 6.0, 8.0, (Result('b', (0,)),)),
    Done(1, 6.0, 10.0, wire_bytes=8 * token_bytes, trip=Trip(6.0, 10.0, 1)),  # two pages, half a second a token
    Done(3, 10.0, 12.0, wire_bytes=4 * token_bytes, trip=Trip(10.0, 12.0, 1)),  # ready at 8
  ]


def test_transfers_out_of_two_workers_do_not_wait_for_each_other():
  cluster = ByHand(TWO_AND_ONE)
  for name, worker in (('a', 'prefill0'), ('b', 'prefill1')):
    cluster.arrive(name, prompt_len=4)
    cluster.start(Step(worker, (Chunk(name, 0, 4),)))
  cluster.wait()
  for name in 'ab':
    cluster.start(Transfer(name, 'decode0'))
  assert [(done.began_s, done.ended_s) for done in cluster.wait()] == [(4.0, 6.0), (4.0, 6.0)]


def test_workers_on_the_same_devices_wait_for_one_another():
  shared = prefill_pool(1, devices=(0,), **SIZES) + colocated_pool(1, devices=(0,), **SIZES)
  cluster = ByHand((*shared, WorkerSpec('apart', **SIZES)))
  for name, worker in (('a', 'prefill0'), ('b', 'both0'), ('c', 'apart')):
    cluster.arrive(name, prompt_len=4, max_tokens=1)
    cluster.start(Step(worker, (Chunk(name, 0, 4),)))
  ends = [(done.order, done.began_s, done.ended_s) for _ in range(2) for done in cluster.wait()]
  assert ends == [(0, 0.0, 4.0), (2, 0.0, 4.0), (1, 4.0, 8.0)]


def test_devices_of_unlike_platforms_are_not_waited_for():
  at_once = prefill_pool(1, devices=(0,), platform='cpu', **SIZES) + colocated_pool(
    1, devices=(0,), platform='gpu', **SIZES
  )
  cluster = ByHand(at_once)
  for name, worker in (('a', 'prefill0'), ('b', 'both0')):
    cluster.arrive(name, prompt_len=4, max_tokens=1)
    cluster.start(Step(worker, (Chunk(name, 0, 4),)))
  assert [(done.began_s, done.ended_s) for done in cluster.wait()] == [(0.0, 4.0), (0.0, 4.0)]


def test_an_order_handed_over_late_begins_then():
  cluster = ByHand(ONE_OF_EACH)
  assert cluster.wait(until_s=3.0) == [] and cluster.now_s == 3.0
  cluster.arrive('a', prompt_len=4, max_tokens=1)
  cluster.start(Step('prefill0', (Chunk('a', 0, 4),)))
  assert cluster.wait(until_s=5.0) == [] and cluster.now_s == 5.0
  assert cluster.wait(until_s=7.0)[0].began_s == 3.0


def test_the_clock_never_goes_back_and_stands_still_with_nothing_to_do():
  simulator = Simulator(TINY, ONE_OF_EACH, HandCost())
  assert simulator.wait(2.0) == (2.0, [])
  assert simulator.wait(1.0) == (2.0, [])
  assert simulator.wait(math.inf) == (2.0, [])


def test_what_ends_at_the_same_time_as_an_arrival_is_seen_with_it():
  cluster = ByHand(ONE_OF_EACH)
  cluster.arrive('a', prompt_len=4, max_tokens=1)
  cluster.start(Step('prefill0', (Chunk('a', 0, 4),)))
  assert len(cluster.wait(until_s=4.0)) == 1


@pytest.mark.parametrize(
  'output_len, max_tokens, expected', [(None, 5, 5), (3, 5, 3), (9, 5, 5), (1, 5, 1), (None, 1, 1)]
)
def test_a_request_gets_its_true_length_but_no_more_than_it_asked_for(output_len, max_tokens, expected):
  workers = colocated_pool(1, **SIZES)
  arrivals = Listed(
    [Request('a', (2, 3), SamplingParams(max_tokens=max_tokens))], {} if output_len is None else {'a': output_len}
  )
  simulator = Simulator(TINY, workers, HandCost())
  (end,) = _finished(serve(arrivals, Colocated(), simulator, ClusterState(TINY, workers, 4)))
  assert (len(end.tokens), end.finish_reason) == (expected, 'length')


def test_the_context_ends_a_request_in_the_simulator_as_in_the_state():
  workers = colocated_pool(1, **SIZES | {'max_step_tokens': 64})
  arrivals = Listed([Request('a', tuple(range(2, 64)), SamplingParams(max_tokens=50))])
  simulator = Simulator(TINY, workers, HandCost())
  (end,) = _finished(serve(arrivals, Colocated(64), simulator, ClusterState(TINY, workers, 4)))
  assert len(end.tokens) == 3  # 62 + 3 - 1 = 64


def test_tokens_computed_past_the_end_are_counted_as_wasted():
  cluster = ByHand(colocated_pool(1, **SIZES), {'a': 3, 'b': 9})
  for name in 'ab':
    cluster.arrive(name, prompt_len=2, max_tokens=9)
  cluster.start(Step('both0', (Chunk('a', 0, 2), Chunk('b', 0, 2))))
  cluster.start(Step('both0', decodes=ALL, steps=4))
  cluster.wait()
  cluster.start(Step('both0', decodes=ALL, steps=4))
  (first,) = cluster.wait()
  assert first.decoded.counts.tolist() == [2, 4] and first.decoded.ended == (Ended(0, 'length'),)
  assert first.wasted_tokens == 2
  (second,) = cluster.wait()
  assert second.decoded.counts.tolist() == [0, 4] and second.decoded.ended == (Ended(1, 'length'),)
  assert second.wasted_tokens == 4
  cluster.assert_idle()


# ---------------------------------------------------------------------------- whole runs


@dataclasses.dataclass(frozen=True)
class Case:
  """A cluster under load: prompts of up to 40 and outputs of up to 20 tokens against pools of 128 tokens."""

  split: str
  page_size: int
  seed: int
  decode_steps: int = 1
  decode_page_size: int | None = None  # the same if None

  @property
  def workers(self):
    sizes, decode = (
      SIZES | {'num_pages': 128 // size, 'page_size': size} for size in (self.page_size, self.decode_size)
    )
    if self.split.endswith('C'):
      return colocated_pool(int(self.split[:-1]), **sizes)
    num_prefill, num_decode = parse_split(self.split)
    return prefill_pool(num_prefill, **sizes) + decode_pool(num_decode, **decode)

  @property
  def decode_size(self) -> int:
    return self.decode_page_size or self.page_size

  @property
  def name(self) -> str:
    sizes = self.page_size if self.decode_size == self.page_size else f'{self.page_size}to{self.decode_size}'
    return f'{self.split}-page{sizes}-{self.decode_steps}steps'

  @property
  def policy(self):
    if self.split.endswith('C'):
      return Colocated(token_budget=16, decode_steps=self.decode_steps)
    return Disaggregated(max_prefill_tokens=16, decode_steps=self.decode_steps)

  def arrivals(self) -> Listed:
    workload = Bursty(requests_per_s=0.2, num_requests=24, prompt=Uniform(1, 40), output=Uniform(1, 20), seed=self.seed)
    return workload.arrivals(WorkloadContext(TINY.vocab_size, TINY.context_len))

  def state(self) -> ClusterState:
    # by hand a transfer takes as many seconds as it likes
    return ClusterState(TINY, self.workers, self.page_size, transfer=TransferSpec(deadline_s=math.inf))

  def simulator(self, arrivals) -> Simulator:
    return Simulator(TINY, self.workers, HandCost())

  def recorded(self, events: list[Event]) -> Replay:
    return Replay(TINY, self.workers, events)

  def run(self) -> list[Event]:
    arrivals = self.arrivals()
    return list(serve(arrivals, self.policy, self.simulator(arrivals), self.state()))

  def replay(self, events: list[Event], policy=None) -> list[Event]:
    return list(serve(self.arrivals(), policy or self.policy, self.recorded(events), self.state()))


CASES = [
  Case(split, page_size, seed, decode_steps)
  for seed, (split, page_size, decode_steps) in enumerate(
    (split, page_size, decode_steps)
    for split in ('1P1D', '2P1D', '3P2D', '2C')
    for page_size in (1, 16, 64)
    for decode_steps in (1, 4)
  )
]
CASES += [Case('1P1D', 16, 24, 1, 1), Case('2P1D', 1, 25, 4, 16), Case('3P2D', 6, 26, 2, 4)]
EVERY_CASE = pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)


def _pages_of(entry, worker: str) -> tuple[int, ...]:
  return entry.pages.get(worker, {}).get('kv', ())


def _check_pages(state: ClusterState, transfers: dict[int, TransferOrder]) -> None:
  """Every page is held by one request or by transfers under way, or free."""
  for name, worker in state.workers.items():
    owned = Counter(page for entry in state.view.requests.values() for page in _pages_of(entry, name))
    assert not owned or owned.most_common(1)[0][1] == 1, f'two requests hold one page of {name}'
    moving = {page for order in transfers.values() if order.source == name for page in order.span.source_pages}
    moving |= {page for order in transfers.values() if order.target == name for page in order.span.target_pages}
    assert worker.free_pages == worker.num_pages - len(owned.keys() | moving)
    slots = [entry.slot for entry in state.view.requests.values() if entry.target == name and entry.slot is not None]
    assert sorted([*slots, *state.books.holdings[name].slots]) == list(range(worker.spec.max_sequences))
    assert worker.num_steps <= 2


def _assert_all_free(state: ClusterState) -> None:
  assert not state.unfinished
  for name, worker in state.workers.items():
    assert worker.free_pages == worker.num_pages and worker.queued_tokens == 0
    assert sorted(state.books.holdings[name].slots) == list(range(worker.spec.max_sequences))
    assert not worker.num_steps and not worker.decoding and not worker.prefilling


def _serve_checked(arrivals, policy, backend, state) -> list[Event]:
  """Serve, holding the books up to the log after every turn."""
  events: list[Event] = []
  transfers: dict[int, TransferOrder] = {}
  given_up: dict[int, int] = {}
  for event in serve(arrivals, policy, backend, state):
    match event:
      case Turn():
        _check_pages(state, transfers)
      case Started(_, TransferOrder() as order):
        transfers[order.id] = order
      case Started(_, AbandonOrder(order, transfer)):
        given_up[order] = transfer
      case Done(order) | Failed(order):
        transfers.pop(given_up.get(order, order), None)
      case WorkerLost(lost):
        transfers = {id: order for id, order in transfers.items() if lost not in (order.source, order.target)}
    events.append(event)
  _assert_all_free(state)
  return events


@EVERY_CASE
def test_under_load_every_request_gets_its_tokens_and_all_is_free_in_the_end(case):
  arrivals, state = case.arrivals(), case.state()
  events = _serve_checked(arrivals, case.policy, case.simulator(arrivals), state)
  ends = {end.request: end for end in _finished(events)}
  assert len(ends) == 24
  for name, end in ends.items():
    assert (len(end.tokens), end.finish_reason) == (arrivals.output_len(name), 'length')


@EVERY_CASE
def test_tokens_asked_for_are_delivered_or_counted_as_wasted(case):
  events = case.run()
  steps = [event.order for event in events if isinstance(event, Started) and isinstance(event.order, StepOrder)]
  dones = [event for event in events if isinstance(event, Done)]
  made = Counter[int]()  # decode steps, by order
  for done in dones:
    if done.decoded is not None:
      made[done.order] += done.num_steps if len(done.decoded.ends_s) else len(done.decoded.tokens)
  asked = sum(made[order.id] * len(order.batch) + sum(chunk.is_last for chunk in order.chunks) for order in steps)
  delivered = sum(len(end.tokens) for end in _finished(events))
  assert asked == delivered + sum(done.wasted_tokens for done in dones)
  per_request = Counter()
  for order in steps:
    for chunk in order.chunks:
      per_request[chunk.request.id] += chunk.is_last
    for name in order.batch.requests:
      per_request[name] += made[order.id]
  most = 20 + max(case.decode_steps - 1, LOOKAHEAD)  # a sequence may be dragged along in steps that others need
  assert max(per_request.values()) <= most


@EVERY_CASE
def test_prompts_are_computed_once_and_their_pages_sent_once(case):
  events = case.run()
  next_start: Counter[str] = Counter()
  sent: dict[str, int] = {}
  held: dict[str, tuple[int, ...]] = {}
  for _, order in started(events):
    if isinstance(order, StepOrder):
      for chunk in order.chunks:
        assert chunk.start == next_start[chunk.request.id]
        next_start[chunk.request.id] += chunk.length
        held[chunk.request.id] = chunk.pages['kv']
    elif isinstance(order, TransferOrder):
      assert order.span.start == sent.get(order.request, 0)
      sent[order.request] = order.span.start + order.span.tokens
      first, end = order.span.start // case.page_size, -(-sent[order.request] // case.page_size)
      assert order.span.source_pages == held[order.request][first:end]
  requests = {event.request.id: event.request for event in events if isinstance(event, Arrived)}
  assert next_start == {name: request.prompt_len for name, request in requests.items()}
  unit = math.gcd(case.page_size, case.decode_size)
  assert all(tokens == -(-requests[name].prompt_len // unit) * unit for name, tokens in sent.items())
  decoded = {name for _, order in started(events) if isinstance(order, StepOrder) for name in order.batch.requests}
  assert decoded <= sent.keys() if not case.split.endswith('C') else not sent


@EVERY_CASE
def test_the_accounts_of_a_run_close(case):
  report = Report.from_events(case.run(), workers=case.workers)
  assert report.completed == report.num_prompts == 24
  assert report.account.ttft_closes_s < 1e-9 and report.account.handoff_closes_s < 1e-9
  assert report.host_lag.mean_ms == 0  # virtual turns happen as orders end
  for request in report.timeline.requests:
    assert request.queue_s >= 0 and request.prefill_s > 0
    parts = request.handoff
    assert parts is None or min(parts.wait_s, parts.wire_s, parts.admit_s) >= 0 <= parts.step_s
  assert report.wire_bytes == 0 if case.split.endswith('C') else report.wire_bytes > 0
  assert all(use.busy <= 1 for use in report.utilisation)
  assert sum(use.busy for use in report.utilisation) > 0.5  # the load is real


@pytest.mark.parametrize('split', ['1P1D', '2C'])
def test_small_pools_make_prompts_wait(split):
  case = Case(split, page_size=64, seed=3)
  arrivals, state = case.arrivals(), case.state()
  waited = 0
  for event in serve(arrivals, case.policy, case.simulator(arrivals), state):
    if isinstance(event, Turn):
      waited += bool(state.view.waiting or state.view.prefilled) and all(
        w.free_pages == 0 for w in state.view.decode_workers
      )
  assert waited > 10


@pytest.mark.parametrize('case', CASES[::5], ids=lambda case: case.split)
def test_the_same_seed_gives_the_same_log_and_another_seed_another(case):
  assert case.run() == case.run()
  assert case.run() != dataclasses.replace(case, seed=case.seed + 100).run()


class Withdrawing(Listed):
  """Requests of which every third is withdrawn some time after it came."""

  def __init__(self, listed: Listed, seed: int):
    requests = [one.request for one in listed.due(math.inf)]
    super().__init__(requests, {one.id: listed.output_len(one.id) for one in requests})
    rng = random.Random(seed)
    times = [(one.arrival_s + rng.uniform(0, 300), one.id) for one in requests[::3]]
    self._withdrawals = sorted(times)

  @property
  def closed(self) -> bool:
    return super().closed and not self._withdrawals

  def next_s(self) -> float:
    return min([super().next_s(), *(time_s for time_s, _ in self._withdrawals[:1])])

  def due(self, now_s, finished=()):
    events = super().due(now_s, finished)
    while self._withdrawals and self._withdrawals[0][0] <= now_s:
      events.append(Withdrawn(self._withdrawals.pop(0)[1]))
    return events


@pytest.mark.parametrize('seed', range(3))
@EVERY_CASE
def test_withdrawals_at_any_time_leave_the_books_balanced(case, seed):
  arrivals = Withdrawing(case.arrivals(), seed)
  events = _serve_checked(arrivals, case.policy, case.simulator(arrivals), case.state())
  reasons = Counter(end.finish_reason for end in _finished(events))
  assert reasons['length'] >= 16 and reasons['length'] + reasons['cancelled'] == 24
  assert Report.from_events(events, workers=case.workers).account.ttft_closes_s < 1e-9


class Unlucky(Simulator):
  """Some orders fail, and now and then a worker is lost."""

  def __init__(self, *args, seed: int):
    super().__init__(*args)
    self._rng = random.Random(seed)
    self._lives = dict.fromkeys(self._workers, 1)
    self._given_up: set[int] = set()

  def submit(self, orders):
    super().submit(orders)
    self._given_up |= {order.id for order in orders if isinstance(order, AbandonOrder)}

  def wait(self, until_s: float):
    now_s, events = super().wait(until_s)
    happened: list[Event] = []
    for event in events:
      luck = self._rng.random()
      if luck < 0.02:
        lost = self._rng.choice(list(self._workers))
        self._lives[lost] += 1
        happened += [WorkerLost(lost, now_s, 'lost'), WorkerBack(lost, now_s, self._lives[lost])]
      fails = luck > 0.97 and event.order not in self._given_up  # that never fails
      happened.append(Failed(event.order, now_s, 'failed') if fails else event)
    return now_s, happened


@pytest.mark.parametrize('seed', range(3))
@EVERY_CASE
def test_failures_at_any_time_leave_the_books_balanced(case, seed):
  arrivals = Withdrawing(case.arrivals(), seed)
  backend = Unlucky(TINY, case.workers, HandCost(), seed=seed)
  events = _serve_checked(arrivals, case.policy, backend, case.state())
  reasons = Counter(end.finish_reason for end in _finished(events))
  assert reasons.total() == 24 and set(reasons) <= {'length', 'cancelled', 'error'}


class Slow(Simulator):
  """A worker is lost with the first end of an order, and is back much later, if at all."""

  def __init__(self, *args, worker: str, told: list[tuple[float, Event]]):
    super().__init__(*args)
    self._worker = worker
    self._told = told

  def wait(self, until_s: float):
    now_s, events = super().wait(min(until_s, self._told[0][0] if self._told else math.inf))
    ended = [event for event in events if isinstance(event, Done)]
    while self._told and self._told[0][0] <= now_s:
      ended.append(self._told.pop(0)[1])
    return now_s, ended


@pytest.mark.parametrize('worker', ['prefill0', 'decode0'])
def test_a_worker_that_needs_long_to_come_back_loses_no_request(worker):
  case = Case('1P1D', 4, 1)
  arrivals = case.arrivals()
  told = [(1.0, WorkerLost(worker, 1.0, 'gone', returning=True)), (9000.0, WorkerBack(worker, 9000.0, 2))]
  backend = Slow(TINY, case.workers, HandCost(), worker=worker, told=told)
  events = list(serve(arrivals, case.policy, backend, case.state()))
  assert {end.finish_reason for end in _finished(events)} == {'length'}
  assert max(end.now_s for end in _finished(events)) > 9000.0
  (back,) = Report.from_events(events, workers=case.workers).returns
  assert (back.worker, back.lost_s, back.seconds) == (worker, 1.0, 8999.0)
  assert case.replay(events) == events


def test_a_worker_that_does_not_come_back_ends_its_requests_when_patience_ends_after_the_last_try():
  case = Case('1P1D', 4, 1)
  arrivals = case.arrivals()
  told = [(1.0, WorkerLost('decode0', 1.0, 'gone', returning=True)), (9000.0, WorkerLost('decode0', 9000.0, 'no more'))]
  backend = Slow(TINY, case.workers, HandCost(), worker='decode0', told=told)
  events = list(serve(arrivals, case.policy, backend, case.state()))
  failed = [end for end in _finished(events) if end.finish_reason == 'error']
  assert failed and all("'decode0' (no more)" in end.error and end.now_s == 9060.0 for end in failed)
  assert Report.from_events(events, workers=case.workers).returns == ()
  assert case.replay(events) == events


# ---------------------------------------------------------------------------- replay


class Lagging(Simulator):
  """Turns happen every eight seconds, with all that ended since, as on a host that is slower than its devices."""

  def wait(self, until_s: float):
    next_s = min(until_s, self._next_s())
    self._now_s = max(self._now_s, math.ceil(next_s / 8) * 8.0)
    return self._now_s, self._ended(self._now_s)


REPLAYED = [Case('1P1D', 4, 1), Case('2P1D', 16, 2, 4), Case('3P2D', 1, 3), Case('2C', 16, 4), Case('2C', 4, 5, 4)]
EVERY_REPLAYED = pytest.mark.parametrize('case', REPLAYED, ids=lambda case: f'{case.split}-page{case.page_size}')


@pytest.fixture(scope='module')
def log_of():
  """The log of a case, run once; `lagging` with several ends in one turn."""
  logs: dict[tuple[Case, bool], list[Event]] = {}

  def log(case: Case, lagging: bool = False) -> list[Event]:
    if (case, lagging) not in logs:
      arrivals = case.arrivals()
      kind = Lagging if lagging else Simulator
      backend = kind(TINY, case.workers, HandCost())
      logs[case, lagging] = list(serve(arrivals, case.policy, backend, case.state()))
    return logs[case, lagging]

  return log


@pytest.mark.parametrize('lagging', [False, True])
@EVERY_REPLAYED
def test_a_replay_is_the_whole_log_again(case, lagging, log_of):
  events = log_of(case, lagging)
  assert case.replay(events) == events


@EVERY_REPLAYED
def test_a_replay_of_failures_is_the_whole_log_again(case):
  arrivals = case.arrivals()
  backend = Unlucky(TINY, case.workers, HandCost(), seed=1)
  events = list(serve(arrivals, case.policy, backend, case.state()))
  assert {Failed, WorkerLost} < {type(event) for event in events}
  assert case.replay(events) == events


def _fails(case: Case, tampered: list[Event], policy=None) -> bool:
  """Whether a replay tells that this is no run of the case."""
  try:
    return case.replay(tampered, policy) != tampered
  except (AssertionError, PolicyError, StuckError, ValueError):
    return True


def _dones(events: list[Event]) -> list[int]:
  return [index for index, event in enumerate(events) if isinstance(event, Done)]


def _sample(places: list, count: int) -> list:
  """So many of the places, from the first to the last."""
  return [places[index * (len(places) - 1) // (count - 1)] for index in range(count)]


@pytest.mark.parametrize('lagging', [False, True])
@EVERY_REPLAYED
def test_a_replay_fails_with_two_ends_swapped(case, lagging, log_of):
  events = log_of(case, lagging)
  places = _dones(events)
  took = [place for place in places if events[place].began_s < events[place].ended_s]
  pairs = [(a, b) for a, b in itertools.pairwise(took) if events[a].ended_s != events[b].ended_s]
  assert len(pairs) > 20
  for a, b in _sample(pairs, 8):
    tampered = list(events)
    tampered[a] = dataclasses.replace(events[a], ended_s=events[b].ended_s)
    tampered[b] = dataclasses.replace(events[b], ended_s=events[a].ended_s)
    assert _fails(case, tampered), f'swapping the ends of {events[a]} and {events[b]} went unnoticed'


@pytest.mark.parametrize('more', [True, False])
@EVERY_REPLAYED
def test_a_replay_fails_with_one_token_count_changed(case, more, log_of):
  events = log_of(case)
  places = [place for place in _dones(events) if events[place].results or events[place].decoded]
  for place in _sample(places, 8):
    done, tampered = events[place], list(events)
    if done.decoded is None:
      first, *rest = done.results
      tokens = (*first.tokens, 0) if more else first.tokens[:-1]
      tampered[place] = dataclasses.replace(done, results=(dataclasses.replace(first, tokens=tokens), *rest))
    else:
      counts = done.decoded.counts + (1 if more else -1)
      tampered[place] = dataclasses.replace(done, decoded=dataclasses.replace(done.decoded, counts=counts))
    assert _fails(case, tampered), f'other tokens in {events[place]} went unnoticed'


@EVERY_REPLAYED
def test_a_replay_fails_with_one_finish_reason_changed(case, log_of):
  events = log_of(case)
  places = [
    (place, which)
    for place in _dones(events)
    if events[place].decoded
    for which in np.flatnonzero(events[place].decoded.counts).tolist()
  ]
  ends = [(place, which) for place, which in places if any(one.row == which for one in events[place].decoded.ended)]
  goes_on = [one for one in places if one not in ends]
  for (place, which), reason in [
    *((one, None) for one in _sample(ends, 4)),
    *((one, 'stop') for one in _sample(ends, 4)),
    *((one, 'length') for one in _sample(goes_on, 4)),
  ]:
    decoded, tampered = events[place].decoded, list(events)
    ended = [one for one in decoded.ended if one.row != which] + ([Ended(which, reason)] if reason else [])
    tampered[place] = dataclasses.replace(events[place], decoded=dataclasses.replace(decoded, ended=tuple(ended)))
    assert _fails(case, tampered), f'{reason} in {events[place]} went unnoticed'


@EVERY_REPLAYED
def test_a_replay_fails_with_one_turn_left_out_or_one_page_changed(case, log_of):
  events = log_of(case)
  turns = [index for index, event in enumerate(events) if isinstance(event, Turn)]
  for place in _sample(turns, 4):
    assert _fails(case, [*events[:place], *events[place + 1 :]])
  steps = [i for i, event in enumerate(events) if isinstance(event, Started) and getattr(event.order, 'chunks', ())]
  for place in _sample(steps, 4):
    order = events[place].order
    chunk = dataclasses.replace(order.chunks[0], pages={'kv': tuple(page + 1 for page in order.chunks[0].pages['kv'])})
    order = dataclasses.replace(order, chunks=(chunk, *order.chunks[1:]))
    tampered = [*events[:place], Started(events[place].now_s, order), *events[place + 1 :]]
    assert _fails(case, tampered)


def test_another_policy_is_no_replay(log_of):
  case = REPLAYED[0]
  events = log_of(case)

  class ShortestFirst(Disaggregated):
    def order(self, waiting):
      return sorted(waiting, key=lambda entry: entry.request.prompt_len)

  assert not _fails(case, events) and _fails(case, events, ShortestFirst(max_prefill_tokens=16))


def test_a_record_that_stops_early_says_so(log_of):
  case = REPLAYED[0]
  events = log_of(case)
  half = events[: next(index for index, event in enumerate(events) if isinstance(event, Turn) and index > 100)]
  num_turns = sum(isinstance(event, Turn) for event in half)
  with pytest.raises(ValueError, match=f'the record ends after {num_turns} turns, but the run goes on'):
    case.replay(half)


def test_started_lists_every_decision(log_of):
  events = log_of(REPLAYED[0])
  decisions = started(events)
  assert [order.id for _, order in decisions] == list(range(len(decisions)))
  assert all(now_s <= later_s for (now_s, _), (later_s, _) in itertools.pairwise(decisions))
