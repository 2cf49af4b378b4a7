"""The choice of a worker for a request."""

import pytest

from pdjax.policies import FewestQueuedTokens, MostFreePages, MostFreeSlots
from pdjax.serving import Chunk, Step
from pdjax.types import colocated_pool
from tests.serving.driver import SIZES, Driver


@pytest.fixture
def cluster():
  """Three workers: both0 with a long prompt in its queue, both1 with two short ones, both2 with an idle sequence."""
  cluster = Driver(colocated_pool(3, **SIZES))
  cluster.arrive('long', prompt_len=20, max_tokens=1)  # 5 pages
  cluster.start(Step('both0', (Chunk('long', 0, 4),)))
  for name in ('s', 't'):
    cluster.arrive(name, prompt_len=2, max_tokens=27)  # 7 pages
  cluster.start(Step('both1', (Chunk('s', 0, 2), Chunk('t', 0, 2))))
  cluster.arrive('idle', prompt_len=4, max_tokens=1)  # 1 page
  cluster.end(cluster.start(Step('both2', (Chunk('idle', 0, 4),)))[0])
  return cluster


def _choose(cluster: Driver, placement, names: str = '012') -> str:
  workers = [cluster.state.workers[f'both{name}'] for name in names]
  request = next(iter(cluster.view.requests.values()))
  return placement.choose(request, workers, cluster.view.room()).name


def test_fewest_queued_tokens_counts_what_is_under_way_and_what_is_left(cluster):
  assert [worker.queued_tokens for worker in cluster.state.workers.values()] == [20, 4, 0]
  assert _choose(cluster, FewestQueuedTokens()) == 'both2'
  assert _choose(cluster, FewestQueuedTokens(), '01') == 'both1'


def test_of_equally_long_queues_the_one_with_more_free_slots_is_taken():
  cluster = Driver(colocated_pool(2, **SIZES))
  cluster.arrive('a', prompt_len=4)
  cluster.end(cluster.start(Step('both0', (Chunk('a', 0, 4),)))[0], {'a': 1})
  assert _choose(cluster, FewestQueuedTokens(), '01') == 'both1'


def test_most_free_pages_and_fewest_sequences_look_at_their_own_resource(cluster):
  room = cluster.view.room()
  names = cluster.state.workers
  assert [room.pages(name) for name in names] == [11, 2, 15] and [room.slots(name) for name in names] == [3, 2, 3]
  assert _choose(cluster, MostFreePages()) == 'both2' and _choose(cluster, MostFreePages(), '01') == 'both0'
  assert _choose(cluster, MostFreeSlots()) == 'both0' and _choose(cluster, MostFreeSlots(), '12') == 'both2'


def test_what_a_decision_took_counts():
  cluster = Driver(colocated_pool(2, **SIZES))
  cluster.arrive('a')
  room = cluster.view.room()
  workers = list(cluster.state.workers.values())
  request = cluster.view.requests['a']
  assert {one.choose(request, workers, room).name for one in (MostFreeSlots(), MostFreePages())} == {'both0'}
  room.take('a', 'both0', decodes=True)
  room.take_tokens('both0', 6)
  for placement in (MostFreeSlots(), MostFreePages(), FewestQueuedTokens()):
    assert placement.choose(request, workers, room).name == 'both1'


def test_placements_are_values():
  assert MostFreeSlots() == MostFreeSlots() and hash(MostFreePages()) == hash(MostFreePages())
