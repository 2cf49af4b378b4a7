"""What places hold of a prompt: who finds it, who does not, and what a step takes."""

import dataclasses

import pytest

from pdjax.policies import Colocated, Disaggregated, FewestQueuedTokens, LongestPrefix
from pdjax.serving import Cancel, Chunk, ClusterState, PolicyError, Step, serve
from pdjax.serving.events import BlockRemoved, Finished
from pdjax.serving.invariants import check
from pdjax.simulator import Simulator
from pdjax.types import PrefixCache, Request, SamplingParams, WorkerSpec, colocated_pool, decode_pool, prefill_pool
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
  assert hit(cluster, 'c') == 0 and cluster.state.books.prefixes.index.num_blocks('prefill0') == 2  # a page of its own
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
    ({'weights': 'bfloat16', 'kv_dtype': 'float32'}, {'weights': 'bfloat16', 'kv_dtype': 'bfloat16'}, True),
  ],
)
def test_what_decode_makes_is_a_prompts_only_where_it_is_made_alike(ours, theirs, alike):
  workers = prefill_pool(1, **SIZES, **ours) + decode_pool(1, **SIZES, **theirs)
  workers = tuple(dataclasses.replace(one, weights=one.weights or 'float32') for one in workers)
  prefixes = cluster_of(workers).state.books.prefixes
  assert (prefixes.made_of('prefill0', 'decode0') == prefixes.made_of('decode0', 'decode0')) == alike
  loose = cluster_of(workers, prefix_cache=dataclasses.replace(CACHE, lossy=True)).state.books.prefixes
  assert loose.made_of('prefill0', 'decode0') == loose.made_of('decode0', 'decode0')


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
    if num_pages >= 12:
      assert {end.finish_reason for end in ends} == {'length'}


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
