"""A policy can have itself woken: nothing else needs to happen at that time."""

import dataclasses
import math

import pytest

from pdjax.cost import Roofline
from pdjax.metrics.event_json import event_to_json
from pdjax.policies import Colocated
from pdjax.serving import ALL, Chunk, ClusterState, PolicyError, Step, StuckError, WakeAt, serve
from pdjax.serving.events import Arrived, Failed, Finished, Started, TimerDue, Turn, Withdrawn
from pdjax.simulator import Replay, Simulator
from pdjax.types import FaultSpec, Request, SamplingParams, colocated_pool
from pdjax.workload import Listed
from tests.serving.driver import SIZES, TINY, Driver

WORKERS = colocated_pool(1, **SIZES)


@dataclasses.dataclass(frozen=True)
class Held(Colocated):
  """Lets prompts gather: begins none before the last that came has waited for `hold_s`."""

  hold_s: float = 2.0

  def decide(self, view):
    due_s = max((entry.request.arrival_s + self.hold_s for entry in view.waiting.values()), default=0.0)
    return [WakeAt(due_s)] if view.now_s < due_s else super().decide(view)


def requests(*arrivals_s: float) -> list[Request]:
  return [Request(f'r{i}', (2, 3, 4), SamplingParams(max_tokens=3), at_s) for i, at_s in enumerate(arrivals_s)]


def served(policy, arrivals) -> list:
  state = ClusterState(TINY, WORKERS, 4)
  return list(serve(arrivals, policy, Simulator(TINY, WORKERS, Roofline()), state))


def test_a_policy_is_asked_at_the_time_it_named_and_a_replay_asks_it_then_too():
  events = served(Held(), Listed(requests(0.0, 1.5)))
  assert [event for event in events if isinstance(event, TimerDue)] == [
    TimerDue(2.0, 'wake', 'policy'),  # named when the first had come; the second came before that
    TimerDue(3.5, 'wake', 'policy'),
  ]
  (first, *_) = [event for event in events if isinstance(event, Started)]
  assert first.now_s == 3.5 and [chunk.request.id for chunk in first.order.chunks] == ['r0', 'r1']
  assert sum(isinstance(event, Finished) for event in events) == 2
  again = Replay(TINY, WORKERS, events)
  assert list(serve(Listed(requests(0.0, 1.5)), Held(), again, ClusterState(TINY, WORKERS, 4))) == events
  assert event_to_json(TimerDue(2.0, 'wake', 'policy')) == {
    'event': 'TimerDue', 'due_s': 2.0, 'timer': 'wake', 'about': 'policy',
  }  # fmt: skip


def test_of_several_times_the_earliest_counts_until_the_policy_was_woken():
  cluster = Driver(WORKERS)
  for at_s in (5.0, 3.0, 4.0):
    assert cluster.start(WakeAt(at_s)) == ()
  assert cluster.state.next_timer_s == 3.0
  (event,) = cluster.state.timers_due(3.0)
  assert event == TimerDue(3.0, 'wake', 'policy') and cluster.state.apply(event, 3.0)
  assert cluster.state.next_timer_s == math.inf
  cluster.start(WakeAt(4.5))
  assert cluster.state.next_timer_s == 4.5 and not cluster.state.unfinished


@pytest.mark.parametrize('at_s', [2.0, 1.0, math.inf, math.nan, None, '5', [3], True, 10**400])
def test_a_time_that_is_no_later_one_is_refused(at_s):
  cluster = Driver(WORKERS)
  cluster.now_s = 2.0
  cluster.arrive('a')
  with pytest.raises(PolicyError, match=r'WakeAt.*it is 2\.0 s now; name a later time in seconds, and a finite one'):
    cluster.start(WakeAt(at_s))
  assert cluster.state.next_timer_s == math.inf


def test_a_policy_that_only_wants_to_be_woken_is_asked_once_a_turn():
  asked = []

  class Counting(Held):
    def decide(self, view):
      asked.append(view.now_s)
      return super().decide(view)

  events = served(Counting(hold_s=1.0), Listed(requests(0.0, 0.5)))
  assert asked[:3] == [0.0, 0.5, 1.0]
  assert [event.now_s for event in events if isinstance(event, Turn)][:3] == [0.0, 0.5, 1.0]


def test_to_be_woken_and_to_start_go_together():
  class Both(Colocated):
    def decide(self, view):
      return [*super().decide(view), *([WakeAt(100.0)] if view.now_s < 100.0 else [])]

  events = served(Both(), Listed(requests(0.0, 200.0)))
  assert [event for event in events if isinstance(event, TimerDue)] == [TimerDue(100.0, 'wake', 'policy')]
  assert sum(isinstance(event, Finished) for event in events) == 2


def test_what_is_withdrawn_while_the_policy_wants_to_be_woken_is_ended_in_that_turn():
  class Leaving(Listed):
    """Its request is withdrawn once the policy was asked."""

    left = False

    def due(self, now_s, finished=()):
      if not self.left and not (events := super().due(now_s, finished)):
        self.left = True
        return [Withdrawn('r0')]
      return events if not self.left else []

  events = served(Held(hold_s=50.0), Leaving(requests(0.0)))
  assert [type(event) for event in events][:4] == [Turn, Arrived, Withdrawn, Started]
  assert [event.finish_reason for event in events if isinstance(event, Finished)] == ['cancelled']
  assert max(event.now_s for event in events if isinstance(event, Turn)) == 0.0


def test_a_policy_that_is_woken_over_and_over_and_does_nothing_is_stuck(monkeypatch):
  monkeypatch.setattr('pdjax.serving.progress.MOST_IDLE_WAKES', 50)

  class Dozing:
    def decide(self, view):
      return [WakeAt(view.now_s + 1.0)]

  with pytest.raises(StuckError, match=r'1 requests wait .*\(the policy was woken 50 times and did nothing\): r0'):
    served(Dozing(), Listed(requests(0.0)))

  class Waking(Dozing):
    """Does something in between, every fortieth time."""

    def decide(self, view):
      if view.now_s == 40.0 and view.waiting:
        return [Step('both0', (Chunk('r0', 0, 3),))]
      able = view.workers['both0'].decodable() and not view.workers['both0'].num_steps
      return [Step('both0', decodes=ALL)] if able and view.now_s > 80.0 else super().decide(view)

  assert sum(isinstance(event, Finished) for event in served(Waking(), Listed(requests(0.0)))) == 1


def test_a_policy_that_polls_while_a_transfer_waits_to_be_tried_again_is_not_stuck(monkeypatch):
  monkeypatch.setattr('pdjax.serving.progress.MOST_IDLE_WAKES', 20)
  faults = FaultSpec(transfer='retry', backoff_s=30.0)
  cluster = Driver(faults=faults)
  cluster.arrive('a')
  step, transfer = cluster.start(Step('prefill0', (Chunk('a', 0, 6, 'decode0'),)))
  cluster.end(step, {'a': 1})
  cluster.apply(Failed(transfer.id, cluster.now_s, 'the link broke'))
  for _ in range(50):
    cluster.start(WakeAt(cluster.now_s + 0.1))
    cluster.now_s += 0.1
    for due in cluster.state.timers_due(cluster.now_s):
      cluster.apply(due)
    cluster.state.check_progress()
  assert cluster.state.books.idle_wakes > 20 and cluster.state.books.transfers
