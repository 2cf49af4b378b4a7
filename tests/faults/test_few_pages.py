"""With pools of 30 % of the pages that requests come to hold, everything ends with its tokens, whatever goes wrong."""

import dataclasses
import functools
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence

import pytest

from experiments.faults.engine_faults import FaultyEngine
from pdjax.serving import ClusterState, serve
from pdjax.serving.events import Event, Failed, Preempted, TimerDue, WorkerLost
from pdjax.simulator import Replay
from pdjax.types import FaultSpec, Request, WorkerSpec
from tests.engine.plain import generate
from tests.faults.injection import Again
from tests.faults.oracles import assert_right, watched
from tests.faults.shadow import ShadowSimulator
from tests.faults.test_matrix_engine import cluster, engine_of
from tests.faults.test_matrix_simulated import plain
from tests.faults.test_random_faults import CLUSTERS, DEADLINE_S, Dying, Leaving, some_requests
from tests.test_simulator import HandCost
from tests.tiny import TINY

SHARE_OF_PAGES = 0.3
PAGE_SIZE = 4


def pages_at_the_end(request: Request, page_size: int) -> int:
  """Pages of a request when it ends; samples share full ones before the prompt's last token, and cache no last one."""
  shared = (request.prompt_len - 1) // page_size if request.sampling.n > 1 else 0
  most = math.ceil((request.prompt_len + request.sampling.max_tokens - 1) / page_size)
  return shared + request.sampling.n * (most - shared)


def with_few_pages(workers: Iterable[WorkerSpec], requests: Sequence[Request]) -> list[WorkerSpec]:
  """Workers with 30 % of what as many requests as they have slots hold at their ends; never less than the largest."""
  some = []
  for worker in workers:
    size = worker.page_size or PAGE_SIZE
    ends = [pages_at_the_end(request, size) for request in requests]
    admitted = worker.max_sequences * sum(ends) / sum(request.sampling.n for request in requests)
    few = max(math.ceil(SHARE_OF_PAGES * admitted), max(ends))
    some.append(dataclasses.replace(worker, page_size=size, num_pages=few))
  return some


def assert_hit(events: Sequence[Event], *, has_transfers: bool) -> None:
  """Requests were preempted, workers died, and transfers failed and came too late."""
  happened = Counter(type(event) for event in events)
  assert happened[Preempted] >= 3 and happened[WorkerLost] >= 3
  assert not has_transfers or (happened[Failed] >= 3 and happened[TimerDue] >= 3)


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('ahead', [0, 1])
@pytest.mark.parametrize('name', CLUSTERS)
def test_everything_ends_with_equal_tokens_in_30_percent_of_the_pages(name, ahead, seed):
  rng = random.Random(seed)
  workers, policy, transfer = CLUSTERS[name]
  requests = some_requests(80, rng, gap_s=8.0, max_tokens=(4, 20, 40), lengths=range(1, 25))
  workers = with_few_pages([dataclasses.replace(one, max_sequences=16) for one in workers], requests)
  arrivals = Leaving(requests, rng, within_s=100.0)
  simulator = ShadowSimulator(
    TINY, workers, HandCost(), page_sizes={worker.name: worker.page_size for worker in workers}, slow_s=30.0
  )
  backend = Dying(simulator, rng, late_s=130.0, workers=simulator.incarnations, down_s=50.0, share=0.1)

  def empty_state() -> ClusterState:
    travels = dataclasses.replace(transfer, deadline_s=DEADLINE_S, checksums=True)
    faults = FaultSpec(corruption='retry', max_attempts=50, backoff_s=1.0)
    return ClusterState(TINY, workers, PAGE_SIZE, travels, faults=faults, pages_ahead=ahead, max_preemptions=4)

  state = empty_state()
  events = list(watched(serve(arrivals, policy, backend, state), state, most_turns=100_000))
  ends = Counter(assert_right(events, arrivals.requests.values(), state, plain).values())
  assert set(ends) <= {'length', 'cancelled'} and ends['length'] > 0.9 * ends.total()
  assert_hit(events, has_transfers=name != '2C')
  again = Replay(TINY, workers, events)
  assert list(serve(Again(arrivals), policy, again, empty_state())) == events


@functools.cache
def plain_on_devices(request: Request) -> tuple[int, ...]:
  return generate(TINY, request)[0]


def likeliest(request: Request) -> tuple[int, ...]:
  """The tokens of a request that takes the likeliest ones, those that are alike worked out at once."""
  sampling = dataclasses.replace(request.sampling, n=1, seed=0)
  return plain_on_devices(Request('alone', request.prompt, sampling))


@pytest.mark.parametrize('ahead', [pytest.param(0, marks=pytest.mark.slow), 1])
def test_everything_ends_with_equal_tokens_in_30_percent_of_the_pages_of_devices(ahead):
  rng = random.Random(ahead)
  requests = [
    dataclasses.replace(
      request, sampling=dataclasses.replace(request.sampling, n=1)
    )  # of more, one would need most pages
    for request in some_requests(60, rng, gap_s=0.01, max_tokens=(28, 34, 40), lengths=(12, 17, 24), unlike=1)
  ]
  ours = cluster().changed(
    faults=FaultSpec(corruption='retry', max_attempts=50, backoff_s=0.01), pages_ahead=ahead, max_preemptions=4
  )
  ours.specs = tuple(with_few_pages(ours.specs, requests))
  arrivals = Leaving(requests, rng, within_s=0.5)
  with engine_of(ours) as (engine, state):
    backend = Dying(FaultyEngine(engine), rng, late_s=0.5, workers=ours.workers, down_s=0.05, share=0.2)
    events = list(watched(serve(arrivals, ours.config.policy, backend, state), state, most_turns=100_000))
  ends = Counter(assert_right(events, arrivals.requests.values(), state, likeliest).values())
  assert set(ends) <= {'length', 'cancelled'} and ends['length'] > 0.8 * ends.total()
  assert_hit(events, has_transfers=True)
