"""Growth: pages are taken as sequences grow, who lacks one waits, and preemption frees some; nothing is ever stuck."""

import dataclasses
import random

import pytest

from pdjax.policies import Colocated, Disaggregated
from pdjax.serving import ALL, Chunk, ClusterState, Phase, PolicyError, Preempt, Step, serve
from pdjax.serving.events import Finished, Preempted, Turn
from pdjax.serving.orders import Growth, StepOrder
from pdjax.simulator import Replay
from pdjax.types import FaultSpec, Request, SamplingParams, TransferSpec, colocated_pool, decode_pool, prefill_pool
from pdjax.workload import Listed
from tests.faults.oracles import watched
from tests.faults.shadow import ShadowSimulator, plain_tokens
from tests.serving.driver import TINY, Driver
from tests.test_simulator import HandCost

SIZES = {'max_sequences': 4, 'max_step_tokens': 32, 'max_chunks': 4, 'num_pages': 6, 'page_size': 4}


def grown(num_pages: int = 6, ahead: int = 1, **fields) -> Driver:
  """One worker of both roles with few pages of four tokens."""
  cluster = Driver(colocated_pool(1, **SIZES | {'num_pages': num_pages}))
  cluster.state = ClusterState(
    TINY, colocated_pool(1, **SIZES | {'num_pages': num_pages}), 4, pages_ahead=ahead, **fields
  )
  return cluster


def begin(cluster: Driver, **prompts: int) -> None:
  """Prefill prompts of these lengths, and deliver their first tokens."""
  for name, length in prompts.items():
    cluster.arrive(name, prompt_len=length, max_tokens=20)
  (step,) = cluster.start(Step('both0', tuple(Chunk(name, 0, length) for name, length in prompts.items())))
  cluster.end(step, dict.fromkeys(prompts, 1))


def decode(cluster: Driver, steps: int = 1) -> StepOrder:
  (step,) = cluster.start(Step('both0', decodes=ALL, steps=steps))
  cluster.end(step, dict.fromkeys(step.batch.requests, step.steps))
  return step


def held(cluster: Driver, name: str) -> int:
  return len(cluster.view.requests[name].pages['both0']['kv'])


def test_a_sequence_takes_pages_as_it_grows_and_orders_name_them():
  cluster = grown(num_pages=16)
  begin(cluster, a=4)
  assert held(cluster, 'a') == 3  # four tokens, the next in a second page, and one ahead
  assert not decode(cluster).growth
  growths = [growth for _ in range(8) for growth in decode(cluster).growth]
  assert growths == [Growth(0, {'kv': (3, (3,))}, 16), Growth(0, {'kv': (4, (4,))}, 20)]
  assert held(cluster, 'a') == 5 and cluster.view.workers['both0'].free_pages == 11


def test_with_all_pages_at_once_nothing_grows():
  cluster = Driver(colocated_pool(1, **SIZES | {'num_pages': 16}))
  begin(cluster, a=4)
  assert held(cluster, 'a') == 6 and not any(decode(cluster).growth for _ in range(9))


def test_the_oldest_goes_on_and_whoever_lacks_a_page_waits_until_some_are_freed():
  cluster = grown(num_pages=6, ahead=0)
  begin(cluster, a=4, b=4)  # two pages each
  for _ in range(4):
    decode(cluster)
  assert held(cluster, 'a') == held(cluster, 'b') == 3  # all of them
  for _ in range(4):
    decode(cluster)
  worker = cluster.view.workers['both0']
  assert worker.free_pages == 0 and worker.decodable() == [] and worker.is_short
  with pytest.raises(
    PolicyError, match="'a' has no page for its next token on worker 'both0'; wait for one, or preempt"
  ):
    cluster.start(Step('both0', decodes=('a',)))
  (leave,) = cluster.start(Preempt('b'))
  assert (leave.request, leave.worker) == (
    'b',
    'both0',
  )  # told first: it may begin again there
  cluster.end(leave)
  assert [one.request for one in cluster.state.take_told() if isinstance(one, Preempted)] == ['b']
  assert list(cluster.view.waiting) == ['b'] and worker.decodable() == ['a'] and not worker.is_short
  assert held(cluster, 'a') == 4


def test_a_preempted_request_waits_in_its_old_place_with_its_tokens_and_computes_them_anew():
  cluster = grown(num_pages=16)
  begin(cluster, a=4, b=5)
  decode(cluster)
  cluster.arrive('late', prompt_len=3)
  cluster.start(Preempt('a'))
  (event,) = [one for one in cluster.state.take_told() if isinstance(one, Preempted)]
  assert event == Preempted(cluster.now_s, 'a', 'both0', 5)
  entry = cluster.view.requests['a']
  assert list(cluster.view.waiting) == ['a', 'late'] and entry.phase is Phase.WAITING
  assert (entry.preemptions, entry.attempts, entry.prefill_len) == (1, 1, 5)
  (step,) = cluster.start(Step('both0', (Chunk('a', 0, 5),)))
  assert step.chunks[0].delivered == (7, 7)
  cluster.end(step)
  assert set(decode(cluster).requests) == {'a', 'b'}


def test_what_a_step_under_way_still_brings_to_a_preempted_request_counts():
  cluster = grown(num_pages=16)
  begin(cluster, a=4)
  (step,) = cluster.start(Step('both0', decodes=ALL))
  cluster.start(Preempt('a'))
  assert cluster.view.requests['a'].phase is Phase.RESTARTING and not cluster.view.waiting
  cluster.end(step, {'a': 1})
  assert list(cluster.view.waiting) == ['a'] and cluster.view.requests['a'].delivered == (7, 7)


def test_fused_steps_are_as_many_as_there_are_pages_for():
  cluster = grown(num_pages=16, ahead=0)
  begin(cluster, a=4)  # two pages: up to eight tokens
  step = decode(cluster, steps=16)
  assert step.steps == 4
  assert decode(cluster, steps=16).steps == 4  # within the third page


def test_how_often_a_request_is_preempted_is_bounded_and_then_it_takes_all_its_pages():
  cluster = grown(num_pages=16, max_preemptions=1)
  begin(cluster, a=4)
  cluster.start(Preempt('a'))
  (step,) = cluster.start(Step('both0', (Chunk('a', 0, 4),)))
  cluster.end(step)
  assert held(cluster, 'a') == 6
  with pytest.raises(PolicyError, match='it was preempted 1 times, and max_preemptions is 1; preempt another'):
    cluster.start(Preempt('a'))


def test_only_what_decodes_can_be_preempted():
  cluster = grown(num_pages=16)
  cluster.arrive('a')
  with pytest.raises(PolicyError, match='the request is waiting; only a decoding one can be preempted'):
    cluster.start(Preempt('a'))
  with pytest.raises(PolicyError, match='is unknown or finished'):
    cluster.start(Preempt('b'))


def test_what_others_want_is_not_given_to_new_ones():
  cluster = grown(num_pages=7)
  begin(cluster, a=4, c=4)  # three pages each, and one is free
  cluster.arrive('b', prompt_len=2, max_tokens=1)
  assert cluster.view.room().fits('b', 'both0', decodes=True)
  for _ in range(4):
    decode(cluster)
  assert (held(cluster, 'a'), held(cluster, 'c')) == (4, 3)
  assert cluster.state.books.holdings['both0'].wanted == {'kv': 1}
  assert not cluster.view.room().fits('b', 'both0', decodes=True)
  cluster.start(Preempt('a'))  # what it had is given to the other first
  assert held(cluster, 'c') == 4 and cluster.view.workers['both0'].free_pages == 3
  assert cluster.view.room().fits('b', 'both0', decodes=True)


CLUSTERS = {
  'colocated': (colocated_pool(2, **SIZES | {'num_pages': 32}), Colocated(token_budget=24)),
  '1P1D': (prefill_pool(1, **SIZES | {'num_pages': 32}) + decode_pool(1, **SIZES | {'num_pages': 32}), None),
  '2P2D of unlike pages, fused': (
    prefill_pool(2, **SIZES | {'num_pages': 32})
    + decode_pool(2, **SIZES | {'num_pages': 64, 'page_size': 2, 'max_sequences': 8}),
    Disaggregated(max_prefill_tokens=24, decode_steps=3),
  ),
}


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('ahead', [0, 1, 3])
@pytest.mark.parametrize('name', CLUSTERS)
def test_with_a_third_of_the_pages_everything_ends_with_the_tokens_of_a_plain_loop(name, ahead, seed):
  rng = random.Random(seed)
  workers, policy = CLUSTERS[name]
  policy = policy or Disaggregated(max_prefill_tokens=24)
  requests = [
    Request(
      f'r{index}', tuple(rng.randrange(2, 96) for _ in range(rng.randint(1, 20))),
      SamplingParams(max_tokens=rng.randint(1, 40), n=rng.choice((1, 1, 1, 2)), ignore_eos=True),
      arrival_s=rng.random() * 200,
    )
    for index in range(40)
  ]  # fmt: skip
  requests.sort(key=lambda request: request.arrival_s)

  def empty_state() -> ClusterState:
    spec = TransferSpec(granularity='chunk', deadline_s=1e9)
    return ClusterState(TINY, workers, 4, spec, faults=FaultSpec(), pages_ahead=ahead, max_preemptions=3)

  sizes = {worker.name: worker.page_size for worker in workers}
  state = empty_state()
  simulator = ShadowSimulator(TINY, workers, HandCost(), page_sizes=sizes)
  events = list(watched(serve(Listed(requests), policy, simulator, state), state, most_turns=50_000))
  tokens = {event.request: (event.tokens, event.finish_reason) for event in events if isinstance(event, Finished)}
  samples = [sample for request in requests for sample in request.samples()]
  assert tokens == {sample.id: (plain_tokens(TINY, sample), 'length') for sample in samples}
  assert all(worker.free_pages == worker.num_pages for worker in state.workers.values())
  preempted = [event for event in events if isinstance(event, Preempted)]
  assert max((sum(one.request == event.request for one in preempted) for event in preempted), default=0) <= 3
  again = list(serve(Listed(requests), policy, Replay(TINY, workers, events), empty_state()))
  assert again == events


def test_some_of_these_are_preempted_and_more_decode_at_once_than_with_all_pages():
  workers, policy = CLUSTERS['1P1D'][0], Disaggregated(max_prefill_tokens=24)
  workers = tuple(dataclasses.replace(worker, max_sequences=16) for worker in workers)
  requests = [
    Request(f'r{index}', (5,) * 4, SamplingParams(max_tokens=50, ignore_eos=True)) for index in range(24)
  ]  # fmt: skip
  most, preempted = {}, {}
  for ahead in ('all', 1):
    state = ClusterState(TINY, workers, 4, TransferSpec(deadline_s=1e9), pages_ahead=ahead)
    simulator = ShadowSimulator(TINY, workers, HandCost(), page_sizes={worker.name: 4 for worker in workers})
    most[ahead] = preempted[ahead] = 0
    for event in serve(Listed(requests), policy, simulator, state):
      preempted[ahead] += isinstance(event, Preempted)
      if isinstance(event, Turn):
        most[ahead] = max(most[ahead], len(state.workers['decode0'].decoding))
  assert most['all'] == 2 and most[1] >= 6 and preempted['all'] == 0 < preempted[1]


def test_a_policy_that_preempts_nobody_is_told_that_nothing_can_change():
  class Greedy(Colocated):
    def decide(self, view):
      return [action for action in super().decide(view) if not isinstance(action, Preempt)]

  workers = colocated_pool(1, **SIZES)
  requests = [Request(name, (5,) * 4, SamplingParams(max_tokens=16, ignore_eos=True)) for name in 'ab']
  state = ClusterState(TINY, workers, 4, pages_ahead=0)
  simulator = ShadowSimulator(TINY, workers, HandCost(), page_sizes={'both0': 4})
  with pytest.raises(Exception, match=r'so nothing can change.*preempt'):
    list(serve(Listed(requests), Greedy(), simulator, state))
