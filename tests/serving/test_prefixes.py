"""What places hold of a prompt: who finds it, who does not, and what a step takes."""

import dataclasses

import pytest

from pdjax.policies import Colocated, Disaggregated, FewestQueuedTokens, LongestPrefix
from pdjax.serving import ALL, Cancel, Chunk, ClusterState, PolicyError, Step, Transfer, serve
from pdjax.serving.events import BlockRemoved, Event, Finished, PrefixHit, Started, WorkerLost, WorkerUse
from pdjax.serving.invariants import check
from pdjax.serving.orders import TransferOrder
from pdjax.simulator import Simulator
from pdjax.types import (
  FaultSpec,
  PrefixCache,
  Request,
  SamplingParams,
  WorkerSpec,
  colocated_pool,
  decode_pool,
  prefill_pool,
)
from pdjax.workload import Listed
from tests.serving.driver import ONE_OF_EACH, SIZES, TWO_AND_TWO, Driver, fail
from tests.test_simulator import HandCost
from tests.tiny import TINY, prompt

CACHE = PrefixCache(block_tokens=2)


def cluster_of(workers: tuple[WorkerSpec, ...] = ONE_OF_EACH, **options) -> Driver:
  return Driver(workers, **{'prefix_cache': CACHE} | options)


def prefill(cluster: Driver, name: str, length: int, worker: str = 'prefill0', start: int = 0) -> None:
  """Compute a prompt in one step, its first token delivered."""
  step = cluster.start(Step(worker, (Chunk(name, start, length - start),)))[0]
  cluster.end(step, {name: 1})


def hit(cluster: Driver, name: str, worker: str = 'prefill0', source: str | None = None) -> int:
  check(cluster.state.books)
  return cluster.view.cached_tokens(name, worker, source)


def test_a_prompt_finds_what_one_before_it_left_but_its_last_token():
  cluster = cluster_of()
  cluster.arrive('a', 11)
  prefill(cluster, 'a', 11)
  for name, length in (('same', 11), ('shorter', 8), ('one', 1)):
    cluster.arrive(name, length)
  assert [hit(cluster, name) for name in ('same', 'shorter', 'one')] == [10, 6, 0]
  assert hit(cluster, 'same', 'decode0') == hit(cluster, 'same', 'decode0', 'prefill0') == 0


def test_a_request_of_a_single_token_leaves_its_prompt_too():
  cluster = cluster_of()
  cluster.arrive('a', 9, max_tokens=1)
  step = cluster.start(Step('prefill0', (Chunk('a', 0, 9),)))[0]
  cluster.end(step, {'a': 1}, {'a': 'length'})
  cluster.arrive('b', 9)
  assert 'a' not in cluster.view.requests and hit(cluster, 'b') == 8


def test_a_chunk_that_ends_well_does_not_vouch_for_one_before_it_that_failed():
  cluster = cluster_of()
  cluster.arrive('a', 16)
  first = cluster.start(Step('prefill0', (Chunk('a', 0, 8),)))[0]
  second = cluster.start(Step('prefill0', (Chunk('a', 8, 8),)))[0]
  fail(cluster, first)
  cluster.end(second)
  cluster.arrive('b', 16)
  assert hit(cluster, 'b') == 0


def test_the_end_of_a_chunk_of_a_request_that_is_over_says_nothing_of_another_of_its_name():
  cluster = cluster_of()
  cluster.arrive('a', 12)
  late = cluster.start(Step('prefill0', (Chunk('a', 0, 12),)))[0]
  cluster.end(cluster.start(Cancel('a'))[0])
  cluster.arrive('a', prompt=prompt(12, seed=5))
  cluster.start(Step('prefill0', (Chunk('a', 0, 4),)))
  cluster.end(late, {'a': 1})
  cluster.arrive('b', prompt=prompt(12, seed=5))
  assert hit(cluster, 'b') == 0


def test_what_a_request_that_ended_with_an_error_held_is_found_by_nobody_else():
  """Others that hold the same pages keep them, and what they add is of no use without."""
  cluster = cluster_of()
  for name in ('a', 'b', 'c'):
    cluster.arrive(name, 16)
    if name == 'a':
      prefill(cluster, name, 16)
  b, c = (cluster.start(Step('prefill0', (Chunk(name, 12, 4),)))[0] for name in ('b', 'c'))
  assert hit(cluster, 'a') == hit(cluster, 'b') == 14
  cluster.end(b, {'b': 1}, {'b': 'error'})
  assert hit(cluster, 'c') == 0 and cluster.state.books.prefixes.index.num_blocks('prefill0') == 0
  assert isinstance(cluster.state.books.told[-1], BlockRemoved)
  cluster.end(c, {'c': 1})
  cluster.arrive('d', 16)
  assert hit(cluster, 'd') == 0
  prefill(cluster, 'd', 16)
  cluster.arrive('e', 16)
  assert hit(cluster, 'e') == 14


@pytest.mark.parametrize(
  ('ours', 'theirs', 'alike'),
  [
    ({'kv_dtype': 'float32'}, {'kv_dtype': 'float32'}, True),
    ({'kv_dtype': 'float32'}, {'kv_dtype': 'int8'}, False),  # what decode makes attends to int8
    ({'kv_dtype': 'int8'}, {'kv_dtype': 'int8'}, True),
    ({'weights': 'bfloat16', 'kv_dtype': 'bfloat16'}, {'weights': 'float32', 'kv_dtype': 'bfloat16'}, False),
    # attention is in the dtype of the pages
    ({'weights': 'bfloat16', 'kv_dtype': 'float32'}, {'weights': 'bfloat16', 'kv_dtype': 'bfloat16'}, False),
  ],
)
def test_what_decode_makes_is_a_prompts_only_where_it_is_made_alike(ours, theirs, alike):
  workers = prefill_pool(1, **SIZES, **ours) + decode_pool(1, **SIZES, **theirs)
  workers = tuple(dataclasses.replace(one, weights=one.weights or 'float32') for one in workers)
  prefixes = cluster_of(workers).state.books.prefixes
  assert (prefixes.making.made_of('prefill0', 'decode0') == prefixes.making.made_of('decode0', 'decode0')) == alike
  loose = cluster_of(workers, prefix_cache=dataclasses.replace(CACHE, lossy=True)).state.books.prefixes
  assert loose.making.made_of('prefill0', 'decode0') == loose.making.made_of('decode0', 'decode0')


def test_a_chunk_may_start_anywhere_up_to_what_is_cached_in_whole_blocks():
  for start, found in ((0, 0), (4, 4), (6, 6), (10, 10), (12, 10)):
    cluster = cluster_of()
    cluster.arrive('a', 11)
    prefill(cluster, 'a', 11)
    cluster.arrive('b', prompt=(*range(2, 12), *prompt(6, seed=9)))
    step = cluster.start(Step('prefill0', (Chunk('b', start, 2),)))[0]
    (chunk,) = step.chunks
    assert (chunk.start, chunk.length) == (found, 2)
    assert len(chunk.copies.get('kv', ())) == (found % 4 > 0)
    check(cluster.state.books)
  for start in (-2, -16, 3, 1):
    with pytest.raises(PolicyError, match=r'starts at 0 .*; or at view.cached_tokens\(.c., .prefill0.\), which is 10'):
      cluster.arrive('c', 14)
      cluster.start(Step('prefill0', (Chunk('c', start, 2),)))
    cluster.end(cluster.start(Cancel('c'))[0])


def test_names_that_are_none_are_told():
  cluster = cluster_of()
  cluster.arrive('a')
  for arguments in (('nobody', 'prefill0'), ('a', 'nowhere'), ('a', 'decode0', 'nowhere')):
    with pytest.raises(KeyError, match='expected the name of'):
      cluster.view.cached_tokens(*arguments)


def test_without_a_page_for_the_copy_whole_pages_are_found():
  """A prompt that needs every page, and has ten tokens in common with what lies in some of them."""
  workers = colocated_pool(1, **SIZES | {'num_pages': 4})
  cluster = cluster_of(workers)
  cluster.arrive('a', 11, max_tokens=1)
  step = cluster.start(Step('both0', (Chunk('a', 0, 11),)))[0]
  cluster.end(step, {'a': 1}, {'a': 'length'})
  cluster.arrive('b', 11, max_tokens=6)  # 16 tokens
  assert hit(cluster, 'b', 'both0') == 10
  (chunk,) = cluster.start(Step('both0', (Chunk('b', 10, 1),)))[0].chunks
  assert (chunk.start, chunk.length, chunk.copies) == (8, 1, {})
  check(cluster.state.books)


@pytest.mark.parametrize('num_pages', range(8, 20))
def test_small_pools_of_prompts_alike_all_end(num_pages):
  """Hits come and go between a decision and its start, of several samples too; all are served all the same."""
  sizes = SIZES | {'num_pages': num_pages, 'max_step_tokens': 48}
  for workers in (prefill_pool(2, **sizes) + decode_pool(1, **sizes), colocated_pool(1, **sizes)):
    requests = [
      Request(
        f'r{number}', (*prompt(8 + number % 5, seed=1), *prompt(number % 7 + 1, seed=number)),
        SamplingParams(max_tokens=4 + number % 3, n=1 + number % 2), arrival_s=0.7 * number,
      )
      for number in range(40)
    ]  # fmt: skip
    policy = Disaggregated(max_prefill_tokens=40) if len(workers) == 3 else Colocated(token_budget=40)
    state = ClusterState(TINY, workers, 4, prefix_cache=CACHE)
    events, simulator = [], Simulator(TINY, workers, HandCost())
    for event in serve(Listed(requests), policy, simulator, state):
      events.append(event)
      check(state.books)
    ends = [event for event in events if isinstance(event, Finished)]
    assert {end.finish_reason for end in ends} <= {'length', 'rejected'} and len(ends) >= 40
    assert_hits_are_what_is_saved(events)
    if num_pages >= 12:
      assert {end.finish_reason for end in ends} == {'length'}


def assert_hits_are_what_is_saved(events: list[Event]) -> None:
  """Each request is told once a side: of what is not computed, and of what no transfer brings."""
  hits = [event for event in events if isinstance(event, PrefixHit)]
  told = {(hit.request, hit.side): hit.tokens for hit in hits}
  assert len(told) == len(hits) and all(hit.tokens > 0 for hit in hits)
  for event in events:
    if isinstance(event, Finished):
      assert told.get((event.request, 'prefill'), 0) == event.cached_tokens
  sent: dict[str, int] = {}
  for event in events:
    if isinstance(event, Started) and isinstance(event.order, TransferOrder):
      sent.setdefault(event.order.request, event.order.span.start)
  assert all(told.get((request, 'decode'), 0) == start for request, start in sent.items())


def take_hits(cluster: Driver) -> list[tuple[str, str, int, str]]:
  """The hits that were told since the last call."""
  told = cluster.state.take_told()
  return [(one.request, one.place, one.tokens, one.side) for one in told if isinstance(one, PrefixHit)]


def test_a_hit_is_told_where_a_prompt_begins_and_where_it_is_reserved_a_place_to_decode():
  cluster = cluster_of()
  cluster.arrive('a', 11, max_tokens=2)
  step, transfer = cluster.start(Step('prefill0', (Chunk('a', 0, 11, 'decode0'),)))
  cluster.end(step, {'a': 1})
  cluster.end(transfer)
  assert take_hits(cluster) == []
  cluster.arrive('b', 11)
  step, _ = cluster.start(Step('prefill0', (Chunk('b', 10, 1, 'decode0'),)))
  cluster.end(step, {'b': 1})
  assert take_hits(cluster) == [('b', 'prefill0', 10, 'prefill'), ('b', 'decode0', 8, 'decode')]  # whole pages
  cluster.arrive('c', 11)
  (last,) = cluster.start(Step('prefill0', (Chunk('c', 8, 3),)))
  assert take_hits(cluster) == [('c', 'prefill0', 8, 'prefill')]  # as far as the policy takes it
  cluster.end(last, {'c': 1})
  cluster.start(Transfer('c', 'decode0'))
  assert take_hits(cluster) == [('c', 'decode0', 8, 'decode')]


def test_of_what_is_begun_again_nothing_is_told():
  cluster = cluster_of(faults=FaultSpec(max_attempts=3))
  cluster.arrive('a', 12)
  first, second = (cluster.start(Step('prefill0', (Chunk('a', start, 6),)))[0] for start in (0, 6))
  cluster.end(first)
  fail(cluster, second)
  assert cluster.view.requests['a'].attempts == 2 and hit(cluster, 'a') == 6
  prefill(cluster, 'a', 12, start=6)
  assert take_hits(cluster) == []
  cluster.arrive('b', 12)
  prefill(cluster, 'b', 12, start=10)
  assert take_hits(cluster) == [('b', 'prefill0', 10, 'prefill')]


def test_of_what_is_sent_again_nothing_is_told():
  """A decode worker holds all of a prompt, as it was sent there before a step failed."""
  cluster = cluster_of(faults=FaultSpec(max_attempts=3))
  cluster.arrive('a', 12)
  step, transfer = cluster.start(Step('prefill0', (Chunk('a', 0, 12, 'decode0'),)))
  cluster.end(step, {'a': 1})
  cluster.end(transfer)
  fail(cluster, cluster.start(Step('decode0', decodes=ALL))[0])
  assert cluster.view.requests['a'].attempts == 2 and hit(cluster, 'a', 'decode0', 'prefill0') == 12
  _, *transfers = cluster.start(Step('prefill0', (Chunk('a', 10, 2, 'decode0'),)))
  assert transfers == [] and take_hits(cluster) == []


def test_cached_pages_are_told_apart_from_those_that_are_held():
  cluster = cluster_of(colocated_pool(1, **SIZES))
  worker = cluster.view.workers['both0']

  def told() -> WorkerUse:
    (use,) = cluster.state.take_occupancy(cluster.now_s).workers
    assert (worker.num_pages - worker.free_pages, worker.cached_pages) == (use.pages, use.cached)
    return use

  cluster.arrive('a', 11, max_tokens=1)
  step = cluster.start(Step('both0', (Chunk('a', 0, 11),)))[0]
  assert told() == WorkerUse('both0', 3, 1)
  cluster.end(step, {'a': 1}, {'a': 'length'})
  assert told() == WorkerUse('both0', 0, 0, 3)
  cluster.arrive('b', 9, max_tokens=1)
  step = cluster.start(Step('both0', (Chunk('b', 8, 1),)))[0]
  assert told() == WorkerUse('both0', 3, 1, 1)  # two of them are its own now
  cluster.end(step, {'b': 1}, {'b': 'length'})
  assert told() == WorkerUse('both0', 0, 0, 3)
  cluster.arrive('c', prompt=prompt(60, seed=5), max_tokens=1)
  assert cluster.view.room().pages('both0') == 16 and cluster.view.room().fits('c', 'both0', decodes=True)
  cluster.start(Step('both0', (Chunk('c', 0, 32),)))
  assert told() == WorkerUse('both0', 15, 0, 1)  # thirteen are blank, and two are taken from what is cached
  cluster.apply(WorkerLost('both0', cluster.now_s, 'boom'))
  assert told() == WorkerUse('both0', 0, 0, 0)


def test_the_longest_prefix_is_where_a_prompt_goes():
  """Of two workers the second holds it, though the first has nothing to do either."""
  chosen = {}
  for placement in (FewestQueuedTokens(), LongestPrefix()):
    cluster = cluster_of(TWO_AND_TWO)
    cluster.arrive('a', 9)
    prefill(cluster, 'a', 9, 'prefill1')
    cluster.arrive('b', 9)
    room = cluster.view.room()
    able = cluster.view.prefill_workers
    chosen[type(placement).__name__] = placement.choose(cluster.view.requests['b'], able, room).name
  assert chosen == {'FewestQueuedTokens': 'prefill0', 'LongestPrefix': 'prefill1'}
