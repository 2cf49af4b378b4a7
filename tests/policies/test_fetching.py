"""What policies fetch before a prompt begins, what they keep of requests that end, and whom they move on."""

import dataclasses
from collections import Counter
from collections.abc import Iterable

import pytest

from pdjax.policies import Colocated, Disaggregated, PolicyBase
from pdjax.serving import Action, ClusterState, ClusterView, SwitchRole, serve
from pdjax.serving.events import Finished, RoleChanged, Started
from pdjax.serving.orders import TransferOrder
from pdjax.types import (
  PrefixCache,
  Request,
  Role,
  SamplingParams,
  WorkerSpec,
  colocated_pool,
  decode_pool,
  prefill_pool,
)
from pdjax.types.cluster import ways
from pdjax.workload import Listed
from tests.faults.oracles import assert_right, watched
from tests.faults.shadow import ShadowSimulator, plain_tokens
from tests.in_turns import InTurns
from tests.test_simulator import HandCost
from tests.tiny import SIZES, TINY, prompt

CACHE = PrefixCache(block_tokens=4)
HOST = WorkerSpec('host0', Role.HOLD, num_pages=200, max_sequences=1, page_size=4)
FEW = SIZES | {'num_pages': 24, 'page_size': 4}
MANY = SIZES | {'page_size': 4}


def run(workers, policy, groups, places=(HOST,), ahead='all', anywhere=False, arrivals=None):
  """The events of groups of requests, one after another unless `arrivals` has them, and the state; tokens are right."""
  specs = (*workers, *places)
  between = [(source.name, target.name) for source, target in ways(specs, anywhere=anywhere)]
  sizes = {place.name: place.page_size for place in specs}
  simulator = ShadowSimulator(TINY, specs, HandCost(), page_sizes=sizes)
  state = ClusterState(
    TINY, workers, 4, prefix_cache=CACHE, places=places, between=between, pages_ahead=ahead
  )  # fmt: skip
  events = list(watched(serve(arrivals or InTurns(*groups), policy, simulator, state), state, most_turns=20_000))
  requests = [sample for group in groups for request in group for sample in request.samples()]
  assert {*assert_right(events, requests, state, lambda one: plain_tokens(TINY, one)).values()} == {'length'}
  return events, state


def ask(name: str, tokens, max_tokens: int = 4, n: int = 1) -> Request:
  return Request(name, tuple(tokens), SamplingParams(max_tokens=max_tokens, n=n, ignore_eos=True))


def cached(events) -> dict[str, int]:
  return {event.request: event.cached_tokens for event in events if isinstance(event, Finished)}


def copies(events) -> Counter:
  orders = [event.order for event in events if isinstance(event, Started) and isinstance(event.order, TransferOrder)]
  return Counter((order.source, order.target) for order in orders if order.copy is not None)


@pytest.mark.parametrize('split', ['1P1D', '1C'])
def test_a_burst_of_prompts_that_a_host_holds_is_fetched_and_not_computed(split):
  """Twelve chats at once, of which the worker has room for a few at a time."""
  workers = prefill_pool(1, **FEW) + decode_pool(1, **MANY) if split == '1P1D' else colocated_pool(1, **FEW)
  policy = Disaggregated(returns_to='host0') if split == '1P1D' else Colocated(32, returns_to='host0')
  prompts = [prompt(24, seed=seed) for seed in range(12)]
  first = [[ask(f'first-{index}', tokens)] for index, tokens in enumerate(prompts)]
  again = [ask(f'again-{index}', (*tokens, 9, 9)) for index, tokens in enumerate(prompts)]
  events, _ = run(workers, policy, [*first, again])
  assert {tokens for name, tokens in cached(events).items() if name.startswith('again')} == {24}
  assert copies(events)[workers[-1].name, 'host0'] >= 12


def test_what_decode_made_of_a_chat_is_returned_to_where_the_next_turn_is_computed():
  workers = prefill_pool(1, **MANY) + decode_pool(1, **MANY)
  policy = Disaggregated(returns_to='source')
  said = prompt(20)
  groups = []
  for turn in range(4):
    request = ask(f'turn-{turn}', said)
    said = (*said, *plain_tokens(TINY, request), 5)
    groups.append([request])
  events, state = run(workers, policy, groups, places=(), anywhere=True)
  assert state.books.prefixes.index.num_blocks('decode0') > 0
  lengths = [len(group[0].prompt) for group in groups]
  assert copies(events) == {('decode0', 'prefill0'): 3}  # the first answer fills no block with its prompt
  assert [cached(events)[f'turn-{turn}'] for turn in range(1, 4)] == [(length - 2) // 4 * 4 for length in lengths[1:]]


@dataclasses.dataclass(frozen=True)
class Switching(PolicyBase):
  """A decode worker is to prefill for a while, whenever so many requests have ended."""

  policy: Disaggregated
  every: int = 4
  moves_anywhere: bool = True

  def decide(self, view: ClusterView) -> Iterable[Action]:
    turn = min((entry.number for entry in view.requests.values()), default=0) // self.every
    if not any(worker.draining for worker in view.workers.values()):
      name = f'decode{turn // 2 % 2}'
      role = Role.PREFILL if turn % 2 else Role.DECODE
      worker, other = view.workers[name], view.workers['decode1' if name == 'decode0' else 'decode0']
      if worker.role is not role and (role is Role.DECODE or other.role is Role.DECODE):
        return [SwitchRole(name, role)]
    return self.policy.decide(view)


@pytest.mark.parametrize(('steps', 'ahead'), [(1, 'all'), (4, 1)])
def test_what_decodes_where_a_worker_drains_is_moved_on_at_any_time_with_all_samples(steps, ahead):
  workers = prefill_pool(1, **MANY) + decode_pool(2, may_become=(Role.PREFILL,), **MANY)
  policy = Switching(Disaggregated(max_prefill_tokens=24, decode_steps=steps, moves_on=True))
  requests = [
    dataclasses.replace(ask(f'r{index}', prompt(3 + index % 20, seed=index), 2 + index % 11, n=1 + index % 3),
                        arrival_s=8.0 * index)
    for index in range(60)
  ]  # fmt: skip
  arrivals = Listed(requests)
  events, _ = run(workers, policy, [requests], (), ahead=ahead, anywhere=True, arrivals=arrivals)
  assert sum(isinstance(event, RoleChanged) for event in events) >= 6
  orders = [event.order for event in events if isinstance(event, Started) and isinstance(event.order, TransferOrder)]
  assert sum(order.copy is None and order.source.startswith('decode') for order in orders) >= 6
