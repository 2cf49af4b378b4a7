"""Five percent of everything goes wrong on devices too, for hundreds of requests, in real time."""

import random
from collections import Counter

import pytest

from experiments.faults.engine_faults import FaultyEngine
from pdjax.serving import serve
from pdjax.serving.events import Failed, Finished, TimerDue, WorkerLost
from pdjax.types import FaultSpec
from tests.faults.oracles import assert_blocks, assert_right, watched
from tests.faults.test_matrix_engine import begin_of_plain, cluster, engine_of
from tests.faults.test_random_faults import CACHE, Dying, Leaving, some_requests


@pytest.mark.slow
@pytest.mark.parametrize('cache', [None, CACHE], ids=['', 'cached'])
def test_five_percent_of_500_requests_are_hit_and_all_end_well(cache):
  rng = random.Random(0)
  faults = FaultSpec(corruption='retry', max_attempts=50, backoff_s=0.01)
  ours = cluster().changed(faults=faults, prefix_cache=cache)
  requests = some_requests(500, rng, gap_s=0.05, max_tokens=(1, 3, 10), lengths=(1, 9, 17, 40), unlike=1)
  arrivals = Leaving(requests, rng, within_s=0.5)
  with engine_of(ours) as (engine, state):
    backend = Dying(FaultyEngine(engine), rng, late_s=0.5, workers=ours.workers, down_s=0.05)
    events = list(watched(serve(arrivals, ours.config.policy, backend, state), state, most_turns=200_000))
  ends = Counter(assert_right(events, arrivals.requests.values(), state, begin_of_plain).values())
  assert set(ends) <= {'length', 'cancelled'} and ends['length'] > 0.9 * ends.total()
  assert (sum(event.cached_tokens for event in events if isinstance(event, Finished)) > 1000) == (cache is not None)
  if cache is not None:
    assert_blocks(events, state)
  happened = Counter(type(event) for event in events)
  least = 10 if cache is None else 4  # what is cached is not sent, and nothing of that can fail
  assert happened[WorkerLost] >= 10 and happened[Failed] >= least and happened[TimerDue] >= 2 * least
