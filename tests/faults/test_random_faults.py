"""Five percent of everything goes wrong, for hundreds of requests at a time."""

import dataclasses
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import get_args

import pytest

from experiments.faults.chaos import Breakable, Chaos, End, Fault
from pdjax.policies import Colocated, Disaggregated
from pdjax.serving import ClusterState, serve
from pdjax.serving.events import Failed, Finished, Started, TimerDue, Withdrawn, WorkerLost
from pdjax.serving.orders import AbandonOrder
from pdjax.simulator import Replay
from pdjax.types import (
  FaultSpec,
  PrefixCache,
  Request,
  SamplingParams,
  TransferSpec,
  colocated_pool,
  decode_pool,
  prefill_pool,
)
from tests.faults.injection import Again, Asking
from tests.faults.oracles import assert_blocks, assert_right, watched
from tests.faults.shadow import ShadowSimulator
from tests.faults.test_matrix_simulated import plain
from tests.test_simulator import HandCost
from tests.tiny import SIZES, TINY, prompt

SHARE = 0.05
DEADLINE_S = 100.0
CACHE = PrefixCache(block_tokens=4)
PAGE_BYTES = 4 * TINY.cached_token_bytes('float32')
CLUSTERS = {  # workers, policy, and how KV travels
  '2P2D': (prefill_pool(2, **SIZES) + decode_pool(2, **SIZES), Disaggregated(max_prefill_tokens=24), TransferSpec()),
  '3P1D of unlike pages': (
    prefill_pool(3, **SIZES | {'num_pages': 24}) + decode_pool(1, page_size=8, **SIZES | {'max_sequences': 6}),
    Disaggregated(max_prefill_tokens=32, decode_steps=3),
    TransferSpec(granularity='layers', layer_groups=2, staging_bytes=16 * PAGE_BYTES),
  ),
  '1P2D of whole requests': (
    prefill_pool(1, **SIZES) + decode_pool(2, **SIZES),
    Disaggregated(max_prefill_tokens=24),
    TransferSpec(granularity='request', staging_bytes=5 * PAGE_BYTES),
  ),
  '2C': (colocated_pool(2, **SIZES), Colocated(token_budget=24), TransferSpec()),
}


class Leaving(Asking):
  """Some of the requests, or of their samples, are withdrawn within some time after they came."""

  def __init__(self, requests, rng: random.Random, within_s: float):
    super().__init__(requests)
    samples = [sample for request in requests for sample in request.samples()]
    leaving = rng.sample(samples, round(SHARE * len(samples)))
    self._leaving = sorted((one.arrival_s + rng.uniform(0, within_s), one.id) for one in leaving)

  @property
  def closed(self) -> bool:
    return super().closed and not self._leaving

  def next_s(self) -> float:
    return min([super().next_s(), *(time_s for time_s, _ in self._leaving[:1])])

  def due(self, now_s, finished=()):
    gone = [name for time_s, name in self._leaving if time_s <= now_s]
    if gone:
      del self._leaving[: len(gone)]
      self.push(*map(Withdrawn, gone))
    return super().due(now_s, finished)


class Dying(Chaos):
  """Of transfers and of their ends five percent, or another share, go wrong; now and then a worker dies, too."""

  def __init__(
    self,
    backend: Breakable,
    rng: random.Random,
    late_s: float,
    workers: Iterable[str],
    down_s: float,
    share: float = SHARE,
  ):
    super().__init__(
      backend,
      lambda: rng.choice(get_args(Fault)) if rng.random() < share else None,
      lambda: rng.choice(get_args(End)) if rng.random() < share else None,
      late_s,
    )
    self._rng, self._workers, self._down_s = rng, tuple(workers), down_s

  def wait(self, until_s):
    if self._rng.random() < 0.01:
      self.lose(self._rng.choice(self._workers), self._rng.choice((0.0, self._down_s)))
    return super().wait(until_s)


def some_requests(
  count: int,
  rng: random.Random,
  gap_s: float = 25.0,
  max_tokens: Sequence[int] = (1, 4, 12),
  lengths: Sequence[int] = range(1, 49),
  unlike: int = 500,
) -> list[Request]:
  """Requests with prompts of these lengths, `unlike` ones of each, so long after one another on average."""
  now_s, requests = 0.0, []
  for index in range(count):
    now_s += rng.expovariate(1 / gap_s)
    sampling = SamplingParams(max_tokens=rng.choice(max_tokens), n=rng.choice((1, 1, 1, 2, 3)), ignore_eos=True)
    requests.append(Request(f'r{index}', prompt(rng.choice(lengths), index % unlike), sampling, now_s))
  return requests


@pytest.mark.parametrize(
  ('name', 'seed', 'ahead', 'cache'),
  [(name, seed, ahead, None) for name in CLUSTERS for seed, ahead in ((0, 'all'), (1, 1))]
  + [(name, 2 + index % 2, ('all', 1)[index % 2], CACHE) for index, name in enumerate(CLUSTERS)],
)
def test_five_percent_of_500_requests_are_hit_and_all_end_well(name, seed, ahead, cache):
  rng = random.Random(seed)
  workers, policy, transfer = CLUSTERS[name]
  workers = [dataclasses.replace(one, page_size=one.page_size or 4) for one in workers]
  arrivals = Leaving(some_requests(500, rng, unlike=500 if cache is None else 5), rng, within_s=300.0)
  sizes = {worker.name: worker.page_size for worker in workers}
  simulator = ShadowSimulator(TINY, workers, HandCost(), page_sizes=sizes, slow_s=30.0)
  backend = Dying(simulator, rng, late_s=130.0, workers=simulator.incarnations, down_s=50.0)

  def empty_state() -> ClusterState:
    travels = dataclasses.replace(transfer, deadline_s=DEADLINE_S, checksums=True)
    faults = FaultSpec(corruption='retry', max_attempts=20, backoff_s=1.0)
    return ClusterState(TINY, workers, 4, travels, faults=faults, pages_ahead=ahead, prefix_cache=cache)

  state = empty_state()
  events = list(watched(serve(arrivals, policy, backend, state), state, most_turns=100_000))
  ends = Counter(assert_right(events, arrivals.requests.values(), state, plain).values())
  assert set(ends) <= {'length', 'cancelled'} and ends['length'] > 0.9 * ends.total()
  assert (sum(event.cached_tokens for event in events if isinstance(event, Finished)) > 1000) == (cache is not None)
  if cache is not None:
    assert_blocks(events, state)
  happened = Counter(type(event) for event in events)
  assert happened[WorkerLost] >= 10
  if name != '2C':
    assert happened[Failed] >= 10 and happened[TimerDue] >= 20
    assert sum(isinstance(event, Started) and isinstance(event.order, AbandonOrder) for event in events) >= 10
  again = Replay(TINY, workers, events)
  assert list(serve(Again(arrivals), policy, again, empty_state())) == events
