"""Five percent of everything goes wrong on devices too, for hundreds of requests, in real time."""

import random
from collections import Counter

import pytest

from pdjax.serving import serve
from pdjax.serving.messages import Failed, TimerDue, WorkerLost
from pdjax.types import FaultSpec, Request, SamplingParams
from tests.faults.engine_faults import FaultyEngine
from tests.faults.oracles import assert_right, watched
from tests.faults.test_matrix_engine import begin_of_plain, cluster, engine_of
from tests.faults.test_random_faults import ENDS, FAULTS, SHARE, Dying, Leaving
from tests.tiny import prompt


@pytest.mark.slow
def test_five_percent_of_500_requests_are_hit_and_all_end_well():
  rng = random.Random(0)
  ours = cluster().changed(faults=FaultSpec(corruption='retry', max_attempts=50, backoff_s=0.01))
  arrivals = Leaving(some_requests(500, rng), rng, within_s=0.5)
  with engine_of(ours) as (engine, state):
    backend = Dying(
      FaultyEngine(engine),
      lambda: rng.choice(FAULTS) if rng.random() < SHARE else None,
      lambda: rng.choice(ENDS) if rng.random() < SHARE else None,
      late_s=0.5,
      rng=rng,
      workers=ours.workers,
      down_s=0.05,
    )
    events = list(watched(serve(arrivals, ours.config.policy, backend, state), state, most_turns=200_000))
  ends = Counter(assert_right(events, arrivals.requests.values(), state, begin_of_plain).values())
  assert set(ends) <= {'length', 'cancelled'} and ends['length'] > 0.9 * ends.total()
  happened = Counter(type(event) for event in events)
  assert happened[WorkerLost] >= 10 and happened[Failed] >= 10 and happened[TimerDue] >= 20


def some_requests(count: int, rng: random.Random) -> list[Request]:
  now_s, requests = 0.0, []
  for index in range(count):
    now_s += rng.expovariate(20.0)
    length = rng.choice((1, 9, 17, 40))
    sampling = SamplingParams(max_tokens=rng.choice((1, 3, 10)), n=rng.choice((1, 1, 1, 2, 3)), ignore_eos=True)
    requests.append(Request(f'r{index}', prompt(length, length), sampling, now_s))
  return requests
