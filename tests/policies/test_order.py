"""The order in which waiting prompts are served, and how long the worst one waits."""

import dataclasses

import pytest

from pdjax.policies import Colocated, Disaggregated, EarliestDeadline, PriorityClasses, ShortestFirst
from pdjax.serving import ClusterState, serve
from pdjax.serving.events import Started
from pdjax.serving.orders import StepOrder
from pdjax.simulator import Simulator
from pdjax.types import SLO, Request, SamplingParams, colocated_pool
from pdjax.workload import Listed
from tests.serving.driver import ONE_OF_EACH, SIZES, TINY, Driver
from tests.test_simulator import HandCost

ONE = SamplingParams(max_tokens=1)


def begun(policy, requests, workers=ONE_OF_EACH) -> list[str]:
  """The ids in the order in which their prompts were begun."""
  state = ClusterState(TINY, workers, page_size=4)
  events = serve(Listed(requests), policy, Simulator(TINY, workers, HandCost()), state)
  steps = [one.order for one in events if isinstance(one, Started) and isinstance(one.order, StepOrder)]
  return [chunk.request.id for step in steps for chunk in step.chunks if chunk.start == 0]


def asked(name: str, length: int, arrival_s: float = 0.0, **options) -> Request:
  return Request(name, tuple(range(2, 2 + length)), ONE, arrival_s=arrival_s, **options)


def test_the_shortest_goes_first_until_a_second_of_waiting_weighs_as_much():
  order = ShortestFirst(tokens_per_s=2.0)
  requests = [asked('long', 20), asked('short', 4, 7.0), asked('too late', 4, 9.0)]
  assert [order.key(one) for one in requests] == [(20.0,), (18.0,), (22.0,)]


@pytest.mark.parametrize('policy', [Disaggregated, Colocated])
def test_a_long_prompt_is_overtaken_only_by_those_that_come_within_its_length_over_the_weight(policy):
  """Short prompts come faster than they can be served, for ever: the worst that can be done to a long one."""
  workers = ONE_OF_EACH if policy is Disaggregated else colocated_pool(1, **SIZES)
  size = {'max_prefill_tokens': 4} if policy is Disaggregated else {'token_budget': 4}
  flood = [asked(f's{number}', 4, 1.0 * number) for number in range(60)]  # each takes 4 s
  aged = begun(policy(**size, order_by=ShortestFirst(tokens_per_s=2.0)), [asked('long', 24, 4.5), *flood], workers)
  came_s = [int(name[1:]) for name in aged[: aged.index('long')]]
  assert 4.5 < max(came_s) <= 4.5 + 24 / 2.0
  starved = begun(policy(**size, order_by=ShortestFirst(tokens_per_s=0.0)), [asked('long', 24, 4.5), *flood], workers)
  assert starved[-1] == 'long'


def test_a_class_before_others_goes_first_until_they_have_waited_for_its_weight():
  requests = [asked('low', 4, 1.0, priority=2), asked('high', 4, 5.0), asked('higher', 4, 9.0, priority=-1)]
  assert [PriorityClasses(3.0).key(one) for one in requests] == [(7.0,), (5.0,), (6.0,)]
  assert [PriorityClasses(None).key(one) for one in requests] == [(2.0,), (0.0,), (-1.0,)]
  at_once = [dataclasses.replace(one, arrival_s=0.0) for one in requests]
  assert begun(Disaggregated(4, order_by=PriorityClasses()), at_once) == ['higher', 'high', 'low']


def test_a_low_class_is_overtaken_only_by_those_that_come_within_the_weight_of_its_classes():
  flood = [asked(f's{number}', 4, 1.0 * number) for number in range(60)]  # each takes 4 s, and they never end
  low = asked('low', 4, 4.5, priority=2)
  aged = begun(Disaggregated(4, order_by=PriorityClasses(ageing_s=5.0)), [low, *flood])
  came_s = [int(name[1:]) for name in aged[: aged.index('low')]]
  assert 4.5 < max(came_s) <= 4.5 + 2 * 5.0
  assert begun(Disaggregated(4, order_by=PriorityClasses(ageing_s=None)), [low, *flood])[-1] == 'low'


def test_the_first_due_goes_first_and_those_without_a_limit_have_the_default():
  order = EarliestDeadline(default_s=5.0)
  requests = [asked('free', 4), asked('loose', 4, slo=SLO(ttft_ms=9000)), asked('tight', 4, 3.0, slo=SLO(ttft_ms=500))]
  assert [order.key(one) for one in requests] == [(5.0,), (9.0,), (3.5,)]
  assert order.key(asked('due', 4, 3.0, slo=SLO(ttft_ms=500), deadline_s=2.0)) == (5.0,)
  requests = [asked('loose', 4, slo=SLO(ttft_ms=9000)), asked('tight', 4, slo=SLO(ttft_ms=500)), asked('free', 4)]
  assert begun(Disaggregated(4, order_by=order), requests) == ['tight', 'free', 'loose']


def test_without_an_order_requests_wait_as_they_came():
  assert Disaggregated().waiting_key is None and Colocated().waiting_key is None
  cluster = Driver()
  for name, length in (('z', 9), ('a', 3)):
    cluster.arrive(name, length)
  assert [chunk.request for chunk in Disaggregated(16).decide(cluster.view)[0].chunks] == ['z', 'a']


@pytest.mark.parametrize(
  ('make', 'words'),
  [
    (lambda: ShortestFirst(tokens_per_s=-1.0), 'tokens_per_s=-1.0, expected 0'),
    (lambda: EarliestDeadline(default_s=0.0), 'default_s=0.0, expected a positive'),
    (lambda: Disaggregated(order_by=3), 'order_by=3, expected an Order'),
  ],
)
def test_what_makes_no_order_is_refused(make, words):
  with pytest.raises(ValueError, match=words):
    make()
