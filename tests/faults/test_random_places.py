"""Cached blocks are copied from anywhere to anywhere, sequences move as they decode, and five percent goes wrong."""

import dataclasses
import random
from collections import Counter

import pytest

from pdjax.policies import Colocated, Disaggregated
from pdjax.serving import Action, ClusterState, ClusterView, Preempt, Transfer, serve
from pdjax.serving.events import Failed, Finished, Started, WorkerLost
from pdjax.serving.orders import TransferOrder
from pdjax.simulator import Replay
from pdjax.types import (
  FaultSpec,
  PrefixCache,
  Role,
  TransferSpec,
  WorkerSpec,
  colocated_pool,
  decode_pool,
  prefill_pool,
)
from pdjax.types.cluster import ways
from tests.faults.injection import Again
from tests.faults.oracles import assert_blocks, assert_right, watched
from tests.faults.shadow import ShadowSimulator
from tests.faults.test_matrix_simulated import plain
from tests.faults.test_random_faults import DEADLINE_S, Dying, Leaving, some_requests
from tests.test_simulator import HandCost
from tests.tiny import SIZES, TINY

CACHE = PrefixCache(block_tokens=4)
FEW = SIZES | {'num_pages': 32}


@dataclasses.dataclass(frozen=True)
class Wandering:
  """Beside what a policy wants, some requests move where they need not, and some blocks go where nobody wants them."""

  policy: Disaggregated | Colocated
  moves_anywhere: bool = True

  def decide(self, view: ClusterView) -> list[Action]:
    actions = [*self.policy.decide(view)]
    if any(isinstance(action, Preempt) for action in actions):
      return actions
    taken = {action.request for action in actions if isinstance(action, Transfer)}
    room = view.room()
    for name in [name for name in view.prefilled if name not in taken] if not taken else ():
      if able := room.fitting(name, view.decode_workers, decodes=True):
        room.take(name, able[-1].name, decodes=True)
        taken.add(name)
        actions.insert(0, Transfer(name, able[-1].name))
    if taken:
      return [action for action in actions if isinstance(action, Transfer)]
    for name, entry in [*view.requests.items(), *view.ended.items()]:
      draw = random.Random(f'{name} {entry.phase} {entry.num_tokens} {entry.attempts}')  # of what a replay sees too
      target = draw.choice([*view.places.values()])
      here = entry.target or entry.worker
      if here is None or not target.up or target.draining or target.name == here or draw.random() > 0.3:
        continue
      if not target.role.decodes or name in view.ended:
        if target.name not in entry.copies_asked and view.places[here].up:
          actions.append(Transfer(view.blocks(name), target.name, here))
      elif (
        entry.can_move and entry.num_tokens > len(entry.delivered) and view.could_fit(name, target.name, decodes=True)
      ):
        actions.append(Transfer(name, target.name))
    return actions


CLUSTERS = {
  '2P2D of unlike pages and a host': (
    prefill_pool(2, **FEW) + decode_pool(1, **SIZES) + decode_pool(2, page_size=8, **SIZES)[1:],
    Disaggregated(max_prefill_tokens=24, returns_to='host0'),
    TransferSpec(),
  ),
  '3C, a host and little staging': (
    colocated_pool(3, **FEW),
    Colocated(token_budget=24, returns_to='host0'),
    TransferSpec(staging_bytes=6 * 4 * TINY.cached_token_bytes('float32')),
  ),
}


@pytest.mark.parametrize(('name', 'seed', 'ahead'), [(name, 5 + n, ('all', 1)[n]) for n, name in enumerate(CLUSTERS)])
def test_whatever_wanders_and_fails_every_token_is_right_and_every_page_comes_back(name, seed, ahead):
  rng = random.Random(seed)
  workers, policy, transfer = CLUSTERS[name]
  policy = Wandering(policy)
  workers = [dataclasses.replace(one, page_size=one.page_size or 4) for one in workers]
  host = WorkerSpec('host0', Role.HOLD, num_pages=40, max_sequences=1, page_size=4)
  requests = [dataclasses.replace(one, tenant=rng.choice('ab')) for one in some_requests(300, rng, unlike=4)]
  arrivals = Leaving(requests, rng, within_s=300.0)
  sizes = {place.name: place.page_size for place in (*workers, host)}
  simulator = ShadowSimulator(TINY, (*workers, host), HandCost(), page_sizes=sizes, slow_s=30.0)
  backend = Dying(simulator, rng, late_s=130.0, workers=simulator.incarnations, down_s=50.0)
  between = [(source.name, target.name) for source, target in ways((*workers, host), anywhere=True)]

  def empty_state() -> ClusterState:
    travels = dataclasses.replace(transfer, deadline_s=DEADLINE_S, checksums=True)
    faults = FaultSpec(corruption='retry', max_attempts=30, backoff_s=1.0)
    return ClusterState(
      TINY, workers, 4, travels, faults=faults, pages_ahead=ahead, prefix_cache=CACHE, places=[host], between=between
    )

  state = empty_state()
  events = list(watched(serve(arrivals, policy, backend, state), state, most_turns=100_000))
  ends = Counter(assert_right(events, arrivals.requests.values(), state, plain).values())
  assert set(ends) <= {'length', 'cancelled'} and ends['length'] > 0.9 * ends.total()
  assert_blocks(events, state)
  assert sum(event.cached_tokens for event in events if isinstance(event, Finished)) > 1000
  happened = Counter(type(event) for event in events)
  assert happened[WorkerLost] >= 10 and happened[Failed] >= 10
  orders = [one.order for one in events if isinstance(one, Started) and isinstance(one.order, TransferOrder)]
  copies = Counter((order.source, order.target) for order in orders if order.copy is not None)
  moves = Counter((order.source, order.target) for order in orders if order.copy is None)
  decoders = {worker.name for worker in workers if worker.role.decodes}
  assert sum(count for way, count in copies.items() if 'host0' in way) >= 20 and len(copies) >= 6
  assert sum(count for (source, target), count in moves.items() if {source, target} <= decoders) >= 20
  again = Replay(TINY, (*workers, host), events)
  assert list(serve(Again(arrivals), policy, again, empty_state())) == events
