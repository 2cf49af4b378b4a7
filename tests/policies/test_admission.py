"""Requests that would miss their limit are rejected before anything is spent on them."""

import dataclasses

import pytest

from pdjax.policies import Colocated, Disaggregated, RejectLate
from pdjax.serving import Chunk, Preempt, Reject, Step, SwitchRole
from pdjax.serving.events import Arrived, WorkerLost
from pdjax.types import SLO, Request, Role, SamplingParams, colocated_pool, decode_pool, prefill_pool
from tests.policies.test_deciders import Unlike
from tests.serving.driver import ONE_OF_EACH, SIZES, Driver
from tests.switching import EITHER
from tests.test_simulator import HandCost


def driver(policy) -> Driver:
  return Driver(ONE_OF_EACH if policy is Disaggregated else colocated_pool(1, **SIZES), cost=HandCost())


def arrive(cluster: Driver, name: str, length: int, ttft_s: float | None) -> None:
  slo = None if ttft_s is None else SLO(ttft_ms=1000 * ttft_s)
  request = Request(name, tuple(range(2, 2 + length)), SamplingParams(max_tokens=1), arrival_s=cluster.now_s, slo=slo)
  cluster.apply(Arrived(request))


@pytest.mark.parametrize('policy', [Disaggregated, Colocated])
def test_who_would_be_late_is_rejected_with_the_reason_and_those_behind_are_served(policy):
  cluster = driver(policy)
  for name, length, ttft_s in (('fits', 6, 6.0), ('late', 4, 9.0), ('free', 4, None), ('short', 1, 11.0)):
    arrive(cluster, name, length, ttft_s)  # a second a token
  rejected, step = policy(admission=RejectLate()).decide(cluster.view)
  assert isinstance(rejected, Reject) and rejected.request == 'late'
  assert 'would come 10 s after its arrival, later than its limit of 9 s; raise slo.ttft_ms' in rejected.reason
  assert isinstance(step, Step) and [chunk.request for chunk in step.chunks] == ['fits', 'free', 'short']
  (end,) = cluster.start(rejected)
  cluster.end(end)
  assert [(one.request, one.finish_reason) for one in cluster.finished] == [('late', 'rejected')]


def test_what_was_waited_counts_and_slack_gives_more_time():
  cluster = driver(Disaggregated)
  arrive(cluster, 'a', 4, 6.0)
  cluster.now_s = 3.0
  cluster.arrive('other', 4, max_tokens=1)  # at 3 s
  decided = Disaggregated(admission=RejectLate()).decide(cluster.view)
  assert [one.request for one in decided if isinstance(one, Reject)] == ['a']
  decided = Disaggregated(admission=RejectLate(slack=1.2)).decide(cluster.view)
  assert [one for one in decided if isinstance(one, Reject)] == []


def test_who_was_begun_before_is_not_rejected():
  cluster = Driver(cost=HandCost(), pages_ahead=0)
  arrive(cluster, 'a', 4, 5.0)
  cluster.apply(Arrived(dataclasses.replace(cluster.view.requests['a'].request, id='b', sampling=SamplingParams())))
  step, transfer = cluster.start(Step('prefill0', (Chunk('b', 0, 4, 'decode0'),)))
  cluster.end(step, {'b': 1})
  cluster.end(transfer)
  cluster.now_s = 20.0
  cluster.start(Preempt('b'))
  decided = Disaggregated(admission=RejectLate()).decide(cluster.view)
  assert [one.request for one in decided if isinstance(one, Reject)] == ['a']


def test_where_every_prefill_worker_drains_nobody_is_rejected():
  sizes = SIZES | {'may_become': EITHER}
  cluster = Driver(prefill_pool(2, **sizes) + decode_pool(1, **sizes), cost=HandCost())
  cluster.arrive('begun', 20)
  cluster.start(Step('prefill0', (Chunk('begun', 0, 4),)))
  cluster.start(SwitchRole('prefill0', Role.DECODE))
  cluster.apply(WorkerLost('prefill1', cluster.now_s, 'gone', returning=True))
  arrive(cluster, 'late', 9, 0.5)
  assert not any(isinstance(one, Reject) for one in Disaggregated(admission=RejectLate()).decide(cluster.view))


def test_a_faster_worker_with_more_to_do_may_still_be_in_time():
  cluster = Driver(prefill_pool(2, **SIZES) + decode_pool(1, **SIZES), cost=Unlike())
  cluster.arrive('before', 8, max_tokens=1)
  cluster.start(Step('prefill1', (Chunk('before', 0, 8),)))
  arrive(cluster, 'next', 6, 5.0)  # 6 s at the idle worker, 14 / 4 s at the other
  assert not any(isinstance(one, Reject) for one in Disaggregated(admission=RejectLate()).decide(cluster.view))


def test_without_admission_everyone_is_served():
  cluster = driver(Disaggregated)
  arrive(cluster, 'late', 9, 0.5)
  assert [type(one) for one in Disaggregated().decide(cluster.view)] == [Step]


def test_a_slack_of_nothing_is_refused():
  with pytest.raises(ValueError, match='RejectLate has slack=0, expected a positive'):
    RejectLate(slack=0)
