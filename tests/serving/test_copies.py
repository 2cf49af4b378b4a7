"""Copies of cached blocks from place to place: what travels, what they hold meanwhile, and who finds them there."""

import dataclasses

import pytest

from pdjax.serving import Chunk, PolicyError, Step, Transfer
from pdjax.serving.actions import Abandon
from pdjax.serving.events import BlockStored, WorkerBack, WorkerLost
from pdjax.serving.invariants import check
from pdjax.serving.orders import TransferOrder
from pdjax.types import FaultSpec, PrefixCache, TransferSpec, WorkerSpec, decode_pool, prefill_pool
from pdjax.types.worker import Role
from tests.serving.driver import ONE_OF_EACH, SIZES, TWO_AND_TWO, Driver, fail
from tests.serving.test_books import PAGE_BYTES
from tests.tiny import prompt

CACHE = PrefixCache(block_tokens=2)


def host(num_pages: int = 8, name: str = 'host0', **fields) -> WorkerSpec:
  """A place that only holds pages, of 4 tokens unless said otherwise."""
  return WorkerSpec(name, Role.HOLD, num_pages=num_pages, max_sequences=1, **fields)


def cluster_of(workers=ONE_OF_EACH, places=None, **options) -> Driver:
  places = (host(),) if places is None else places
  return Driver(workers, **{'prefix_cache': CACHE, 'places': places} | options)


def compute(cluster: Driver, name: str, length: int, worker: str = 'prefill0', **fields) -> None:
  """A prompt is computed, its first token delivered, and ends there."""
  cluster.arrive(name, length, max_tokens=1, **fields)
  step = cluster.start(Step(worker, (Chunk(name, 0, length),)))[0]
  cluster.end(step, {name: 1}, {name: 'length'})


def copy(cluster: Driver, name: str, source: str, target: str) -> tuple[TransferOrder, ...]:
  orders = cluster.start(Transfer(cluster.view.blocks(name), target, source))
  check(cluster.state.books)
  return orders


def end(cluster: Driver, *orders) -> None:
  for order in orders:
    cluster.end(order)
    check(cluster.state.books)


def test_blocks_go_to_a_host_and_come_back_to_a_worker_that_never_had_them():
  cluster = cluster_of(TWO_AND_TWO)
  compute(cluster, 'a', 11)
  cluster.arrive('b', 11)
  assert cluster.view.fetchable_tokens('b', 'prefill0', 'prefill1') == 0  # no way between them
  end(cluster, *copy(cluster, 'b', 'prefill0', 'host0'))
  assert cluster.free_pages('host0') == 8 and cluster.view.places['host0'].num_pages == 8
  assert cluster.view.cached_tokens('b', 'prefill1') == 0
  assert cluster.view.fetchable_tokens('b', 'host0', 'prefill1') == 8  # whole pages of both: 10 are 2 and a half
  (order,) = copy(cluster, 'b', 'host0', 'prefill1')
  entry = cluster.view.requests['b']
  assert (entry.fetching, entry.copies_asked) == (1, {'prefill1': 1, 'host0': 1})
  assert (order.source, order.target, order.span.start, order.span.tokens) == ('host0', 'prefill1', 0, 8)
  assert len(order.span.source_pages) == len(order.span.target_pages) == 2 and order.num_bytes == 2 * PAGE_BYTES
  assert cluster.view.cached_tokens('b', 'prefill1') == 0  # not before it has arrived
  end(cluster, order)
  assert cluster.view.cached_tokens('b', 'prefill1') == 8 and entry.fetching == 0
  (step,) = cluster.start(Step('prefill1', (Chunk('b', 8, 3),)))
  assert step.chunks[0].start == 8


def test_what_is_there_does_not_travel_again():
  cluster = cluster_of()
  compute(cluster, 'a', 9)
  cluster.arrive('b', 9)
  end(cluster, *copy(cluster, 'b', 'prefill0', 'host0'))
  assert copy(cluster, 'b', 'prefill0', 'host0') == ()  # all that is whole is there
  compute(cluster, 'c', 17)  # the same beginning, and more
  cluster.arrive('d', 17)
  (order,) = copy(cluster, 'd', 'prefill0', 'host0')
  assert (order.span.start, order.span.tokens) == (8, 8)


def test_pages_of_unlike_sizes_share_the_blocks():
  workers = prefill_pool(1, **SIZES, page_size=6) + decode_pool(1, **SIZES)
  cluster = cluster_of(workers, (host(page_size=4),))
  compute(cluster, 'a', 21)
  cluster.arrive('b', 21)
  (order,) = copy(cluster, 'b', 'prefill0', 'host0')
  assert (order.span.start, order.span.tokens) == (0, 20)  # units of 2 tokens
  assert (len(order.span.source_pages), len(order.span.target_pages)) == (4, 5)
  end(cluster, order)
  assert cluster.view.fetchable_tokens('b', 'host0', 'prefill0') == 20
  compute(cluster, 'c', 27)
  cluster.arrive('d', 27)
  (order,) = copy(cluster, 'd', 'prefill0', 'host0')
  assert (order.span.start, order.span.tokens) == (20, 6)
  assert len(order.span.source_pages) == 2  # tokens 18 to 26


def test_a_target_with_few_pages_takes_the_beginning_and_gives_up_what_is_oldest():
  cluster = cluster_of(places=(host(2),))
  compute(cluster, 'a', 17)
  cluster.arrive('b', 17)
  (order,) = copy(cluster, 'b', 'prefill0', 'host0')
  assert order.span.tokens == 8
  assert cluster.free_pages('host0') == 0
  cluster.arrive('other', prompt=prompt(9, seed=3), max_tokens=1)
  step = cluster.start(Step('prefill0', (Chunk('other', 0, 9),)))[0]
  cluster.end(step, {'other': 1})
  assert copy(cluster, 'other', 'prefill0', 'host0') == ()  # all of its pages are held
  end(cluster, order)
  (second,) = copy(cluster, 'other', 'prefill0', 'host0')
  end(cluster, second)
  assert cluster.view.fetchable_tokens('b', 'host0', 'prefill0') == 0  # the oldest made room


def test_two_that_want_the_same_wait_for_one_copy():
  cluster = cluster_of(TWO_AND_TWO)
  compute(cluster, 'a', 17)
  for name, length in (('b', 17), ('c', 9)):
    cluster.arrive(name, length)
  (there,) = copy(cluster, 'b', 'prefill0', 'host0')
  assert cluster.view.requests['b'].fetching == 0  # nobody prefills on the host
  end(cluster, there)
  (order,) = copy(cluster, 'b', 'host0', 'prefill1')
  assert copy(cluster, 'c', 'host0', 'prefill1') == ()
  assert [cluster.view.requests[name].fetching for name in 'bc'] == [1, 1]
  end(cluster, order)
  assert [cluster.view.requests[name].fetching for name in 'bc'] == [0, 0]
  assert [cluster.view.cached_tokens(name, 'prefill1') for name in 'bc'] == [16, 8]


def test_what_has_ended_is_asked_of_once():
  cluster = cluster_of()
  compute(cluster, 'a', 9)
  assert [*cluster.view.ended] == ['a']
  (order,) = copy(cluster, 'a', 'prefill0', 'host0')
  assert not cluster.view.ended
  end(cluster, order)


def test_one_that_came_with_the_id_of_one_that_has_ended_is_another():
  cluster = cluster_of()
  compute(cluster, 'a', 9)
  cluster.arrive('a', prompt=prompt(12, seed=3))
  old, new = cluster.view.blocks(cluster.view.ended['a']), cluster.view.blocks('a')
  assert (old.tokens, new.tokens) == (8, 12)
  (order,) = cluster.start(Transfer(old, 'host0', 'prefill0'))
  assert not cluster.view.requests['a'].copies_asked and not cluster.view.ended
  end(cluster, order)


def test_what_is_spoilt_is_found_nowhere_and_does_not_arrive_either():
  cluster = cluster_of(places=(host(), host(name='host1')))
  cluster.arrive('a', 16)
  cluster.end(cluster.start(Step('prefill0', (Chunk('a', 0, 8),)))[0])
  end(cluster, *copy(cluster, 'a', 'prefill0', 'host0'))
  (order,) = copy(cluster, 'a', 'prefill0', 'host1')
  step = cluster.start(Step('prefill0', (Chunk('a', 8, 8),)))[0]
  cluster.end(step, {'a': 1}, {'a': 'error'})
  end(cluster, order)
  cluster.arrive('b', 16)
  assert cluster.view.cached_tokens('b', 'prefill0') == 0
  assert [cluster.view.fetchable_tokens('b', place, 'prefill0') for place in ('host0', 'host1')] == [0, 0]


def test_a_transfer_that_is_to_be_tried_again_comes_before_what_is_left_of_copies():
  cluster = cluster_of(
    transfer=TransferSpec(staging_bytes=2 * PAGE_BYTES), faults=FaultSpec(max_attempts=3, backoff_s=1.0),
    places=(host(16),),
  )  # fmt: skip
  compute(cluster, 'a', 17)
  cluster.arrive('b', prompt=prompt(6, seed=2))
  cluster.end(cluster.start(Step('prefill0', (Chunk('b', 0, 6),)))[0], {'b': 1})
  failing, well = cluster.start(Transfer('b', 'decode0'))
  cluster.arrive('c', 17)
  assert copy(cluster, 'c', 'prefill0', 'host0') == ()  # staging is taken
  cluster.end(well)
  fail(cluster, failing)
  first, second = cluster.must()
  cluster.now_s += 2.0
  for timer in cluster.state.timers_due(cluster.now_s):
    cluster.apply(timer)
  assert cluster.must() == ()
  end(cluster, first)
  (again,) = cluster.must()  # and not the next part of the copy
  assert (again.request, again.copy) == ('b', None)
  end(cluster, second, again)
  assert [order.copy is None for order in cluster.must()] == [False, False]


def test_blocks_of_unlike_ways_are_copied_so_that_prompts_can_go_on_from_them():
  """Pages of float32 and of bfloat16 with the same weights: attention is in the dtype of the pages."""
  ours, theirs = (dict(SIZES, weights='bfloat16', kv_dtype=dtype) for dtype in ('float32', 'bfloat16'))
  workers = (WorkerSpec('prefill0', 'prefill', **ours), WorkerSpec('prefill1', 'prefill', **theirs))
  workers = (*workers, WorkerSpec('decode0', 'decode', **theirs))
  cluster = cluster_of(workers, (host(kv_dtype='float32'),))
  compute(cluster, 'a', 9)
  cluster.arrive('b', 9)
  end(cluster, *copy(cluster, 'b', 'prefill0', 'host0'))
  assert cluster.view.fetchable_tokens('b', 'host0', 'prefill0') == 8
  assert cluster.view.fetchable_tokens('b', 'host0', 'prefill1') == 0
  assert copy(cluster, 'b', 'host0', 'prefill1') == ()  # nobody could go on from them
  compute(cluster, 'c', 9, 'prefill1')
  end(cluster, *copy(cluster, 'b', 'prefill1', 'host0'))
  assert cluster.view.fetchable_tokens('b', 'host0', 'prefill1') == 8


@pytest.mark.parametrize('ends', ['fails', 'is given up'])
def test_a_copy_that_fails_leaves_nothing_and_harms_nobody(ends):
  cluster = cluster_of()
  compute(cluster, 'a', 9)
  cluster.arrive('b', 9)
  (order,) = copy(cluster, 'b', 'prefill0', 'host0')
  if ends == 'fails':
    fail(cluster, order)
  else:
    cluster.end(cluster.start(Abandon(order.id))[0])
  check(cluster.state.books)
  assert cluster.view.fetchable_tokens('b', 'host0', 'prefill0') == 0
  assert cluster.view.requests['b'].fetching == 0 and 'b' in cluster.view.waiting
  assert cluster.free_pages('host0') == 8


def test_a_copy_larger_than_staging_goes_in_parts_and_what_arrived_before_a_failure_counts():
  cluster = cluster_of(transfer=TransferSpec(staging_bytes=2 * PAGE_BYTES))
  compute(cluster, 'a', 17)
  cluster.arrive('b', 17)
  first, second = copy(cluster, 'b', 'prefill0', 'host0')
  assert cluster.must() == ()
  end(cluster, first)
  (third,) = cluster.must()
  assert (third.span.start, third.span.tokens) == (8, 4)
  end(cluster, second)
  (fourth,) = cluster.must()
  end(cluster, third)
  fail(cluster, fourth)
  check(cluster.state.books)
  assert cluster.view.fetchable_tokens('b', 'host0', 'prefill0') == 12


@pytest.mark.parametrize('lost', ['prefill0', 'host0'])
def test_a_place_that_is_lost_ends_its_copies(lost):
  cluster = cluster_of(transfer=TransferSpec(staging_bytes=2 * PAGE_BYTES))
  compute(cluster, 'a', 17)
  cluster.arrive('b', 17)
  first, _ = copy(cluster, 'b', 'prefill0', 'host0')
  end(cluster, first)
  cluster.apply(WorkerLost(lost, cluster.now_s, 'gone', returning=True))
  check(cluster.state.books)
  assert not cluster.state.books.copies and cluster.view.requests['b'].fetching == 0
  cluster.apply(WorkerBack(lost, cluster.now_s, 2))
  check(cluster.state.books)
  assert cluster.view.fetchable_tokens('b', 'host0', 'prefill0') == (4 if lost == 'prefill0' else 0)
  if lost == 'prefill0':
    (order,) = copy(cluster, 'b', 'host0', 'prefill0')
    assert order.incarnations == (1, 2)


def test_what_decode_made_goes_back_where_it_is_made_alike_and_is_stored_under_its_way_where_not():
  for dtype, tokens in (('float32', 12), ('int8', 0)):
    workers = prefill_pool(1, **SIZES, kv_dtype='float32') + decode_pool(1, **SIZES, kv_dtype=dtype)
    workers = tuple(dataclasses.replace(one, weights='float32') for one in workers)
    cluster = cluster_of(workers, (host(kv_dtype='float32'),), moves_anywhere=True)
    cluster.arrive('a', 8, max_tokens=6)
    step, transfer = cluster.start(Step('prefill0', (Chunk('a', 0, 8, 'decode0'),)))
    cluster.end(step, {'a': 1})
    cluster.end(transfer)
    cluster.end(cluster.start(Step('decode0', decodes=('a',), steps=5))[0], {'a': 5}, {'a': 'length'})
    assert [*cluster.view.ended] == ['a']
    end(cluster, *copy(cluster, 'a', 'decode0', 'host0'))
    asked = (*range(2, 10), 7, 7, 7, 7, 7, 7, 7)
    cluster.arrive('b', prompt=asked)
    assert cluster.view.fetchable_tokens('b', 'host0', 'prefill0') == tokens
    assert cluster.view.fetchable_tokens('b', 'decode0', 'prefill0') == tokens
    cluster.state.take_occupancy(cluster.now_s)
    assert not cluster.view.ended


def test_int8_pages_that_come_back_over_another_dtype_are_no_hit():
  workers = tuple(
    dataclasses.replace(one, weights='float32')
    for one in prefill_pool(1, **SIZES, kv_dtype='int8') + decode_pool(1, **SIZES, kv_dtype='int8')
  )
  for dtype, tokens in (('int8', 8), ('float32', 0)):  # a scale that is found anew may differ in its last bit
    cluster = cluster_of(workers, (host(kv_dtype=dtype),))
    compute(cluster, 'a', 9)
    cluster.arrive('b', 9)
    end(cluster, *copy(cluster, 'b', 'prefill0', 'host0'))
    assert cluster.view.fetchable_tokens('b', 'host0', 'prefill0') == tokens


def test_the_log_has_what_a_place_stores_with_its_tokens_if_they_are_asked_for():
  cluster = cluster_of(prefix_cache=PrefixCache(block_tokens=2, log_tokens=True))
  compute(cluster, 'a', 9)
  cluster.arrive('b', 9)
  (order,) = copy(cluster, 'b', 'prefill0', 'host0')
  cluster.state.take_told()
  end(cluster, order)
  (stored,) = [event for event in cluster.state.take_told() if isinstance(event, BlockStored)]
  assert (stored.medium, stored.token_ids) == ('host0', tuple(range(2, 10)))


@pytest.mark.parametrize(
  ('action', 'words'),
  [
    (lambda blocks: Transfer(blocks, 'host0'), 'blocks need a source; .* of prefill0, decode0, host0'),
    (lambda blocks: Transfer(blocks, 'host9', 'prefill0'), "place 'host9' is unknown"),
    (lambda blocks: Transfer(blocks, 'prefill0', 'decode0'), "no way from 'decode0' to 'prefill0'; .* moves_anywhere"),
    (lambda blocks: Transfer('b', 'host0'), r"'host0' only holds pages, and runs nothing; .* Transfer\(view.blocks"),
    (lambda blocks: Transfer(blocks, 'host0', 'host0'), 'source and target are one place; name another'),
  ],
)
def test_misuse_names_the_action_and_changes_nothing(action, words):
  cluster = cluster_of()
  compute(cluster, 'a', 9)
  cluster.arrive('b', 9)
  with pytest.raises(PolicyError, match=words):
    cluster.start(action(cluster.view.blocks('b')))
  check(cluster.state.books)


def test_without_a_cache_there_are_no_blocks():
  cluster = Driver()
  cluster.arrive('a')
  with pytest.raises(KeyError, match='a config with prefix_cache'):
    cluster.view.blocks('a')
  with pytest.raises(KeyError, match='unfinished or has ended'):
    cluster.view.blocks('b')
