"""The loop with a backend and a policy that follow a script."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import pytest

from pdjax.completions import complete
from pdjax.cost import Roofline
from pdjax.metrics import Report
from pdjax.policies import Colocated
from pdjax.serving import ALL, STANDING, Cancel, Chunk, ClusterState, PolicyError, Step, StuckError, serve
from pdjax.serving.events import (
  Arrived,
  Delivered,
  Done,
  Event,
  Failed,
  Finished,
  Occupancy,
  Result,
  Started,
  Turn,
  Withdrawn,
  WorkerUse,
)
from pdjax.serving.orders import EndOrder, Order, StepOrder
from pdjax.simulator import Simulator
from pdjax.types import PrefixCache, Request, SamplingParams, colocated_pool
from pdjax.types.faults import ALL_FAIL
from pdjax.workload import ClosedLoop, Listed
from tests.serving.driver import SIZES, TINY, Driver

WORKERS = colocated_pool(1, **SIZES)


def _request(name: str, arrival_s: float = 0.0, max_tokens: int = 2) -> Request:
  return Request(name, (2, 3, 4), SamplingParams(max_tokens=max_tokens), arrival_s)


class ScriptedBackend:
  """Answers `wait` with (now, events) from a list and remembers what it was asked."""

  def __init__(self, *answers: tuple[float, list[Event]]):
    self.answers = list(answers)
    self.until_s: list[float] = []
    self.orders: list[Order] = []

  def submit(self, orders: Sequence[Order]) -> None:
    self.orders += orders

  def wait(self, until_s: float):
    self.until_s.append(until_s)
    return self.answers.pop(0)


class ScriptedPolicy:
  """Answers with lists of actions in turn, and with nothing when they are used up."""

  def __init__(self, *answers):
    self.answers = list(answers)
    self.asked = 0

  def decide(self, view):
    self.asked += 1
    return self.answers.pop(0) if self.answers else []


class Withdrawing(Listed):
  """A list of requests, one of which is withdrawn at a time."""

  def __init__(self, requests, name: str, at_s: float):
    super().__init__(requests)
    self.name, self.at_s = name, at_s

  @property
  def closed(self) -> bool:
    return super().closed and self.at_s == math.inf

  def next_s(self) -> float:
    return min(super().next_s(), self.at_s)

  def due(self, now_s, finished=()):
    events = super().due(now_s, finished)
    if now_s >= self.at_s:
      self.at_s = math.inf
      events.append(Withdrawn(self.name))
    return events


def test_a_turn_yields_its_clock_then_what_happened_then_what_was_decided():
  a, b = _request('a'), _request('b', arrival_s=1.5)
  chunk_done = Done(0, 0.0, 1.0, (Result('a', (7,)),))
  decode_done = Done(1, 1.0, 2.0, (Result('a', (7,), 'length'),))
  backend = ScriptedBackend(
    (0.0, []), (2.5, [chunk_done, decode_done]), (4.0, [Done(2, 2.5, 4.0, (Result('b', (9,), 'stop'),))])
  )
  policy = ScriptedPolicy(
    [Step('both0', (Chunk('a', 0, 3),))], [Step('both0', decodes=ALL)], [], [Step('both0', (Chunk('b', 0, 3),))]
  )
  events = list(serve(Listed([a, b]), policy, backend, ClusterState(TINY, WORKERS, 4)))
  orders = backend.orders
  assert events == [
    Turn(0.0),
    Arrived(a),
    Started(0.0, orders[0]),
    Started(0.0, orders[1]),
    Occupancy(0.0, 0, (WorkerUse('both0', 1, 1),)),
    Turn(2.5),
    chunk_done,
    Delivered(2.5, 0, chunk_done.results),
    decode_done,
    Delivered(2.5, 1, decode_done.results),
    Finished(2.5, 'a', 'length', (7, 7)),
    Arrived(b),
    Started(2.5, orders[2]),
    Turn(4.0),
    Done(2, 2.5, 4.0, (Result('b', (9,), 'stop'),)),
    Delivered(4.0, 2, (Result('b', (9,), 'stop'),)),
    Finished(4.0, 'b', 'stop', (9,)),
    Occupancy(4.0, 0, (WorkerUse('both0', 0, 0),)),
  ]
  assert [order.id for order in orders] == [0, 1, 2]


def test_the_clock_is_read_once_a_turn_and_no_longer_than_to_the_next_arrival():
  backend = ScriptedBackend((0.0, []), (1.5, []), (2.0, [Done(0, 0.0, 2.0, (Result('a', (7,), 'stop'),))]))
  policy = ScriptedPolicy([Step('both0', (Chunk('a', 0, 3),))])
  arrivals = Withdrawing([_request('a'), _request('b', 1.5)], 'b', at_s=1.5)
  events = serve(arrivals, policy, backend, ClusterState(TINY, WORKERS, 4))
  seen = [next(events) for _ in range(9)]
  assert backend.until_s == [0.0, 1.5, math.inf]
  assert [event.now_s for event in seen if isinstance(event, Turn)] == [0.0, 1.5, 2.0]
  assert [event.now_s for event in seen if isinstance(event, Started)] == [0.0, 1.5]


def test_who_is_withdrawn_while_a_turn_goes_on_is_not_served_on():
  """The policy answers with one chunk at a time; after the first, nobody wants the rest."""

  class Hasty(Listed):
    def due(self, now_s, finished=()):
      events = super().due(now_s, finished)
      return events or [Withdrawn('a')] * (len(backend.orders) == 1)

  backend = ScriptedBackend((0.0, []))
  policy = ScriptedPolicy([Step('both0', (Chunk('a', 0, 1),))], [Step('both0', (Chunk('a', 1, 1),))])
  events = serve(Hasty([_request('a')]), policy, backend, ClusterState(TINY, WORKERS, 4))
  seen = [next(events) for _ in range(5)]
  assert [type(event) for event in seen] == [Turn, Arrived, Started, Withdrawn, Started]
  assert isinstance(seen[-1].order, EndOrder) and policy.asked == 1


def test_the_policy_is_asked_until_it_wants_nothing():
  backend = ScriptedBackend((0.0, []))
  answers = [[Step('both0', (Chunk(name, 0, 3),))] for name in 'ab']
  policy = ScriptedPolicy(*answers)
  events = serve(Listed([_request('a'), _request('b')]), policy, backend, ClusterState(TINY, WORKERS, 4))
  for event in events:
    if isinstance(event, Started) and event.order.id == 1:
      break
  assert isinstance(next(events), Occupancy)  # the turn is over once the policy was asked a third time
  assert policy.asked == 3


def test_every_order_is_handed_over_before_the_log_says_so():
  backend = ScriptedBackend((0.0, []))
  policy = ScriptedPolicy([Step('both0', (Chunk('a', 0, 3),))])
  for event in serve(Listed([_request('a')]), policy, backend, ClusterState(TINY, WORKERS, 4)):
    if isinstance(event, Started):
      assert backend.orders == [event.order]
      break


def test_what_was_withdrawn_is_ended_before_the_policy_is_asked():
  class Asked:
    def decide(self, view):
      assert all(entry.phase.value == 'ending' for entry in view.requests.values())
      return []

  backend = ScriptedBackend((0.0, []), (0.0, [Done(0, 0.0, 0.0)]))
  events = list(
    serve(Withdrawing([_request('a')], 'a', at_s=0.0), Asked(), backend, ClusterState(TINY, WORKERS, page_size=4))
  )
  assert [type(event) for event in events] == [Turn, Arrived, Withdrawn, Started, Turn, Done, Finished]
  assert isinstance(backend.orders[0], EndOrder) and events[-1].finish_reason == 'cancelled'


def test_what_a_step_brings_after_a_request_was_ended_is_too_late_for_all_who_read_the_log():
  in_time, late, other = Result('a', (5,), None, 'x'), Result('a', (6,), None, 'y'), Result('b', (7,), 'length', 'z')
  policy = ScriptedPolicy(
    [Step('both0', (Chunk('a', 0, 3), Chunk('b', 0, 3)))], [], [Step('both0', decodes=ALL)], []
  )  # fmt: skip
  backend = ScriptedBackend(
    (0.0, []),
    (1.0, [Done(0, 0.0, 1.0, (in_time, Result('b', (4,))))]),
    (1.5, []),
    (2.0, [Done(1, 1.0, 2.0, (late, other))]),
    (3.0, [Done(2, 1.5, 3.0)]),
  )
  arrivals = Withdrawing([_request('a'), _request('b')], 'a', at_s=1.5)
  events = list(serve(arrivals, policy, backend, ClusterState(TINY, WORKERS, 4)))
  told = [event for event in events if isinstance(event, Delivered)]
  assert told == [Delivered(1.0, 0, (in_time, Result('b', (4,)))), Delivered(2.0, 1, (other,), (late,))]
  place = events.index(told[1])
  assert events[place - 1 : place + 2] == [
    Done(1, 1.0, 2.0, (late, other)), told[1], Finished(2.0, 'b', 'length', (4, 7)),
  ]  # fmt: skip
  assert {one.request.id: (one.token_ids, one.text) for one in complete(events, has_text=True)} == {
    'a': ((5,), 'x'), 'b': ((4, 7), 'z'),
  }  # fmt: skip
  report = Report.from_events(events, workers=WORKERS)
  assert report.wasted_tokens == 1


def test_a_policy_may_cancel_what_is_withdrawn_in_the_same_turn():
  class Impatient:
    def decide(self, view):
      return [Cancel(name) for name, entry in view.requests.items() if entry.phase.value != 'ending']

  backend = ScriptedBackend((0.0, []), (0.0, [Done(0, 0.0, 0.0)]))
  events = list(serve(Withdrawing([_request('a')], 'a', 0.0), Impatient(), backend, ClusterState(TINY, WORKERS, 4)))
  assert [event.finish_reason for event in events if isinstance(event, Finished)] == ['cancelled']


def test_what_can_never_run_is_refused_and_the_others_are_served():
  bad = Request('bad', tuple(range(2, 67)))
  state = ClusterState(TINY, WORKERS, 4)
  events = list(serve(Listed([bad, _request('good')]), Colocated(), _simulator(Listed([])), state))
  ends = {event.request: event.finish_reason for event in events if isinstance(event, Finished)}
  assert ends == {'bad': 'rejected', 'good': 'length'}
  rejections = [event.order for event in events if isinstance(event, Started) and isinstance(event.order, EndOrder)]
  assert [order.request for order in rejections] == ['bad'] and not state.unfinished


def test_requests_that_nobody_serves_are_reported_not_waited_for():
  backend = ScriptedBackend((0.0, []))
  with pytest.raises(StuckError, match=r'a \(waiting, 1 pages\)'):
    list(serve(Listed([_request('a')]), ScriptedPolicy(), backend, ClusterState(TINY, WORKERS, 4)))
  assert backend.until_s == [0.0]  # it never slept


def test_a_later_arrival_is_waited_for_although_nothing_is_under_way():
  backend = ScriptedBackend((0.0, []), (5.0, []))
  policy = ScriptedPolicy([], [])
  with pytest.raises(StuckError):
    list(serve(Listed([_request('a'), _request('b', 5.0)]), policy, backend, ClusterState(TINY, WORKERS, 4)))
  assert backend.until_s == [0.0, 5.0]


def test_a_finished_request_brings_the_next_of_a_closed_loop_in_the_same_turn():
  arrivals = ClosedLoop([_request('a'), _request('b')], max_concurrency=1)
  events = list(serve(arrivals, Colocated(), _simulator(arrivals), ClusterState(TINY, WORKERS, 4)))
  place = next(index for index, event in enumerate(events) if isinstance(event, Finished))
  assert isinstance(events[place + 1], Arrived) and events[place + 1].request.id == 'b'
  assert events[place].now_s == events[place + 1].request.arrival_s


def test_nothing_happens_without_requests():
  assert list(serve(Listed([]), Colocated(), ScriptedBackend(), ClusterState(TINY, WORKERS, 4))) == []


# ---------------------------------------------------------------------------- ends


def test_what_a_turn_brings_a_request_behind_its_failure_is_not_its():
  """The step of its first chunk failed; that of its last, which was under way by then, brought a token."""
  failed, done = Failed(0, 1.0, 'boom'), Done(1, 0.0, 1.5, (Result('a', (7,), None, 'x'), Result('b', (8,), None, 'y')))
  last = Done(2, 1.5, 2.0, (Result('b', (9,), 'length', 'z'),))
  backend = ScriptedBackend((0.0, []), (2.0, [failed, done]), (3.0, [last]))
  policy = ScriptedPolicy(
    [Step('both0', (Chunk('a', 0, 1),)), Step('both0', (Chunk('a', 1, 2), Chunk('b', 0, 3)))],
    [],
    [Step('both0', decodes=ALL)],
  )
  state = ClusterState(TINY, WORKERS, 4, faults=ALL_FAIL)
  events = list(serve(Listed([_request('a'), _request('b')]), policy, backend, state))
  assert events[events.index(failed) : events.index(done) + 1] == [
    failed,
    Finished(2.0, 'a', 'error', (), 'boom'),
    done,
  ]
  told = {one.request.id: (one.token_ids, one.text) for one in complete(events, has_text=True)}
  assert told == {'a': ((), ''), 'b': ((8, 9), 'yz')}
  assert Report.from_events(events, workers=WORKERS).wasted_tokens == 1


def test_a_request_that_a_result_ends_with_an_error_keeps_its_tokens_and_others_go_on():
  ended = Done(0, 0.0, 1.0, (Result('a', (7,), 'error', 'x', (), 'not finite'), Result('b', (8,), None, 'y')))
  last = Done(1, 1.0, 2.0, (Result('b', (9,), 'length', 'z'),))
  backend = ScriptedBackend((0.0, []), (1.0, [ended]), (2.0, [last]))
  policy = ScriptedPolicy(
    [Step('both0', (Chunk('a', 0, 3), Chunk('b', 0, 3)))], [], [Step('both0', decodes=('b',))]
  )  # fmt: skip
  state = ClusterState(TINY, WORKERS, 4)
  events = list(serve(Listed([_request('a'), _request('b')]), policy, backend, state))
  assert Finished(1.0, 'a', 'error', (7,), 'not finite') in events
  assert Finished(2.0, 'b', 'length', (8, 9)) in events


# ---------------------------------------------------------------------------- answers


class Answers:
  """A policy that gives the same answer every time."""

  def __init__(self, answer):
    self.answer = answer

  def decide(self, view):
    return self.answer() if callable(self.answer) else self.answer


@pytest.mark.parametrize(
  ('answer', 'words'),
  [
    (5, 'answered 5, expected a list of Step'),
    (None, 'answered None, expected a list'),
    (Cancel('a'), r"answered Cancel\(request='a'.*expected a list"),
    ('wait', "answered 'wait', expected a list"),
    ('', "answered '', expected a list"),
    ([Cancel('a'), 'wait'], "with 'wait' in it, expected a list"),
    ([None], 'with None in it, expected'),
    ({'a': 1}, "answered {'a': 1}, expected a list"),
    ({}, 'answered {}, expected a list'),
    ({Cancel('a'): 1}, 'answered {Cancel.*, expected a list'),
    ({Cancel('a')}, 'answered {Cancel.*, expected a list'),
    (frozenset(), 'answered frozenset.*, expected a list'),
    ([[Cancel('a')]], 'with .Cancel.* in it, expected'),
    (lambda: (number for number in range(3)), 'with 0 in it, expected'),
    (lambda: itertools.repeat(Step('both0', decodes=ALL)), 'yields more than 100,000 actions .* the last Step'),
  ],
  ids=lambda value: '' if callable(value) else str(value),
)
def test_an_answer_that_is_no_sequence_of_actions_is_an_error_that_names_policy_and_value(answer, words):
  backend = ScriptedBackend((0.0, []))
  with pytest.raises(PolicyError, match=f'(?s)policy Answers .*{words}'):
    list(serve(Listed([_request('a')]), Answers(answer), backend, ClusterState(TINY, WORKERS, 4)))
  assert backend.orders == []


@pytest.mark.parametrize(
  ('decide', 'words'),
  [
    (lambda self: [], r'decide takes \(\), expected one argument, the view; define decide\(self, view\)'),
    (lambda self, view, now_s: [], r'decide takes \(view, now_s\), expected one argument'),
    (lambda self, *, view: [], r'decide takes \(\*, view\), expected one argument'),
    (None, r'has no method decide\(self, view\)'),
  ],
)
def test_a_policy_that_takes_no_view_is_told_so_before_anything_is_served(decide, words):
  policy = type('Careless', (), {} if decide is None else {'decide': decide})()
  with pytest.raises(PolicyError, match=f'policy Careless.* {words}'):
    list(serve(Listed([_request('a')]), policy, ScriptedBackend(), ClusterState(TINY, WORKERS, 4)))


def test_a_policy_that_yields_its_actions_serves_like_one_that_lists_them():
  class Yielding(Colocated):
    def decide(self, view):
      yield from super().decide(view)

  class Views(Colocated):
    def decide(self, view):
      return dict(enumerate(super().decide(view))).values()

  requests = [_request(name, max_tokens=5) for name in 'abc']
  listed, yielded, viewed = (
    list(serve(Listed(requests), policy(), _simulator(Listed([])), ClusterState(TINY, WORKERS, 4)))
    for policy in (Colocated, Yielding, Views)
  )
  assert listed == yielded == viewed and sum(isinstance(event, Finished) for event in listed) == 3


def test_answers_that_start_nothing_have_an_end_that_names_the_last():
  state = ClusterState(TINY, WORKERS, 4)
  state.start = lambda action: ()
  policy = ScriptedPolicy(*[[Cancel(f'{number}')] for number in range(20_000)])
  with pytest.raises(
    PolicyError, match=r"ScriptedPolicy gave 10,000 answers in one turn .* the last \[Cancel\(.*'9999'"
  ):
    list(serve(Listed([_request('a')]), policy, ScriptedBackend((0.0, [])), state))
  assert policy.asked == 10_000


# ---------------------------------------------------------------------------- long waits


@pytest.mark.parametrize(
  ('arrivals_s', 'told'),
  [
    ([0.0, 30.0], []),
    ([59.0], []),
    ([61.0, 3000.0], ['61.0']),
    ([1764547200.0, 1764547201.0], ['1764547200.0']),
    ([0.0, 0.0, 1764547200123.0], ['1764547200123.0']),
    ([0.0, 1800.0], []),  # someone may think for long
    ([0.0, 4000.0, 8000.0, 12500.0], ['4000.0', '12500.0']),  # a wait that is longer than any
    ([90.0, 1764547200.0], ['90.0', '1764547200.0']),
  ],
)
@pytest.mark.parametrize('waits', [True, False])
def test_a_wait_that_may_be_another_unit_is_told_where_somebody_waits(arrivals_s, told, waits, caplog):
  requests = [_request(f'r{number}', arrival_s) for number, arrival_s in enumerate(arrivals_s)]
  state = ClusterState(TINY, WORKERS, 4)
  list(serve(Listed(requests), Colocated(), _simulator(Listed([])), state, waits=waits))
  lines = [record.getMessage() for record in caplog.records]
  assert len(lines) == (len(told) if waits else 0)
  for line, arrival_s in zip(lines, told, strict=False):
    assert f'{arrival_s} s after the start' in line and 'epoch or milliseconds?' in line


def test_nobody_is_told_of_a_wait_for_what_is_under_way(caplog):
  class Slow(_Second):
    def step_seconds(self, model, worker, chunks, contexts, steps) -> float:
      return 10_000.0

  simulator = Simulator(TINY, WORKERS, Slow())
  requests = [_request('a'), _request('b', 15_000.0)]
  list(serve(Listed(requests), Colocated(), simulator, ClusterState(TINY, WORKERS, 4)))
  assert caplog.records == []


class _Second:
  """Every step takes a second."""

  def step_seconds(self, model, worker, chunks, contexts, steps) -> float:
    return 1.0

  def transfer_seconds(self, model, source, target, num_bytes) -> float:
    return 1.0


def _simulator(arrivals) -> Simulator:
  return Simulator(TINY, WORKERS, _Second())


def test_decisions_depend_on_true_output_lengths_only_once_they_show():
  def run(output_len: int) -> list[Event]:
    arrivals = Listed([_request(name, max_tokens=9) for name in 'abc'], {'b': output_len})
    return list(serve(arrivals, Colocated(), _simulator(arrivals), ClusterState(TINY, WORKERS, 4)))

  def plans(events: list[Event]) -> list[Event]:
    """The events with orders as a policy sees them, without the limits that they hand on to whoever computes."""
    seen = []
    for event in events:
      if isinstance(event, Started) and isinstance(event.order, StepOrder):
        chunks = tuple(dataclasses.replace(one, limit=0) for one in event.order.chunks)
        joins = tuple(dataclasses.replace(one, left=0) for one in event.order.joins)
        event = dataclasses.replace(event, order=dataclasses.replace(event.order, chunks=chunks, joins=joins))
      seen.append(event)
    return seen

  short, long = plans(run(4)), plans(run(7))
  shows = next(index for index, (one, other) in enumerate(zip(short, long, strict=False)) if one != other)
  assert isinstance(short[shows], Done) and [one.row for one in short[shows].decoded.ended] == [1]
  assert sum(isinstance(event, Started) for event in short[:shows]) >= 2


def test_the_driver_of_these_tests_agrees_with_the_loop():
  cluster = Driver(WORKERS)
  cluster.arrive('a', prompt=(2, 3, 4), max_tokens=2)
  by_hand = [
    *cluster.start(Step('both0', (Chunk('a', 0, 3),))),
    *cluster.start(Step('both0', decodes=ALL, steps=STANDING)),
  ]
  events = list(serve(Listed([_request('a')]), Colocated(), _simulator(Listed([])), ClusterState(TINY, WORKERS, 4)))
  assert [event.order for event in events if isinstance(event, Started)] == by_hand
  assert all(isinstance(order, StepOrder) for order in by_hand)


@pytest.mark.parametrize('cache', [None, PrefixCache(block_tokens=2)], ids=['no cache', 'cache'])
def test_the_log_says_how_full_the_cluster_is_whenever_that_changes(cache):
  arrivals = [_request('a'), _request('b', arrival_s=0.5, max_tokens=9), _request('c', arrival_s=0.5)]
  workers = colocated_pool(2, **{**SIZES, 'max_sequences': 1, 'num_pages': 6})
  state = ClusterState(TINY, workers, 4, prefix_cache=cache)
  simulator = Simulator(TINY, workers, Roofline())
  said = {worker.name: (0, 0, 0) for worker in workers}
  num_waiting, changes, most_cached = 0, 0, 0
  for event in serve(Listed(arrivals), Colocated(), simulator, state):
    if isinstance(event, Occupancy):
      assert event.waiting != num_waiting or event.workers
      uses = {use.worker: (use.pages, use.decoding, use.cached) for use in event.workers}
      assert all(said[name] != use for name, use in uses.items())
      said |= uses
      num_waiting, changes = event.waiting, changes + 1
      most_cached = max(most_cached, *(cached for _, _, cached in said.values()))
      for name, worker in state.workers.items():
        pages = state.books.holdings[name].pages.by_kind['kv']
        held = sum(count > 0 for count in pages.holders)
        cached = sum(pages.is_cached(page) for page in pages.free())
        assert said[name] == (held, len(worker.decoding), cached) and worker.cached_pages == cached
        assert worker.free_pages == worker.num_pages - held >= cached
      assert event.waiting == len(state.view.waiting)
  assert changes > 3 and num_waiting == 0 and (most_cached > 0) == (cache is not None)
  assert all((pages, decoding) == (0, 0) for pages, decoding, _ in said.values())
