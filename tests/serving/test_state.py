"""Prompts on their way through the cluster, order by order and page by page."""

import dataclasses
import math
import random

import pytest

from pdjax.serving import ALL, Chunk, ClusterState, Phase, Step, Transfer
from pdjax.serving.events import Finished
from pdjax.serving.orders import Admission, ChunkOrder, DecodeOrder, EndOrder, StepOrder, TransferOrder
from pdjax.types import WorkerSpec, colocated_pool, decode_pool, prefill_pool
from pdjax.types.span import Span
from tests.serving.driver import ONE_OF_EACH, SIZES, TINY, Driver

EIGHT = 8 * TINY.cached_token_bytes('float32')  # bytes of two pages


def test_one_prompt_goes_through_two_workers():
  cluster = Driver()
  cluster.state.books.holdings['decode0'].pages.take(5)  # so that page numbers differ on the two sides
  request = cluster.arrive('a', prompt_len=6, max_tokens=4)
  assert cluster.phase('a') is Phase.WAITING and list(cluster.view.waiting) == ['a']

  step, transfer = cluster.start(Step('prefill0', (Chunk('a', 0, 6, send_to='decode0'),)))
  assert step == StepOrder(0, 'prefill0', (ChunkOrder(request, 0, 6, pages=(0, 1), limit=4),))
  assert transfer == TransferOrder(
    1, 'a', 'prefill0', 'decode0', Span((0, 1), (5, 6), 0, 8), after=0, staging_bytes=EIGHT
  )
  assert cluster.phase('a') is Phase.PREFILLING and not cluster.view.waiting
  assert cluster.state.workers['prefill0'].queued_tokens == 6
  assert (cluster.free_pages('prefill0'), cluster.free_pages('decode0')) == (14, 8)  # 6 and 6 + 3 tokens

  cluster.end(step, {'a': 1})
  assert cluster.phase('a') is Phase.MOVING and cluster.view.requests['a'].tokens == [7]
  assert cluster.state.workers['prefill0'].queued_tokens == 0
  assert cluster.free_pages('prefill0') == 14  # until the pages have travelled

  cluster.end(transfer)
  assert cluster.phase('a') is Phase.DECODING and list(cluster.state.workers['decode0'].decoding) == ['a']
  assert cluster.free_pages('prefill0') == 16

  (first,) = cluster.start(Step('decode0', decodes=ALL))
  (second,) = cluster.start(Step('decode0', decodes=('a',)))
  admission = Admission(request, pages=(5, 6, 7), tokens=(7,), limit=4)
  assert first == StepOrder(2, 'decode0', (), (DecodeOrder('a', 0, 6, admission),), steps=1)
  assert second == StepOrder(3, 'decode0', (), (DecodeOrder('a', 0, 7),), steps=1)
  cluster.end(first, {'a': 1})
  (third,) = cluster.start(Step('decode0', decodes=ALL))
  assert third.decodes == (DecodeOrder('a', 0, 8),)
  cluster.end(second, {'a': 1})
  cluster.end(third, {'a': 1}, {'a': 'length'})

  assert cluster.finished == [Finished(5.0, 'a', 'length', (7, 7, 7, 7))]
  cluster.state.books.holdings['decode0'].pages.drop(range(5))
  cluster.assert_idle()


def test_a_prompt_without_room_to_decode_waits_with_its_first_token_delivered():
  cluster = Driver()
  cluster.arrive('a', prompt_len=6)
  (step,) = cluster.start(Step('prefill0', (Chunk('a', 0, 6),)))
  cluster.end(step, {'a': 1})
  assert cluster.phase('a') is Phase.PREFILLED and list(cluster.view.prefilled) == ['a']
  assert cluster.free_pages('prefill0') == 14 and cluster.free_pages('decode0') == 16

  (transfer,) = cluster.start(Transfer('a', 'decode0'))
  assert transfer == TransferOrder(
    1, 'a', 'prefill0', 'decode0', Span((0, 1), (0, 1), 0, 8), after=None, staging_bytes=EIGHT
  )
  assert cluster.phase('a') is Phase.MOVING and not cluster.view.prefilled
  cluster.end(transfer)
  assert cluster.phase('a') is Phase.DECODING and cluster.free_pages('prefill0') == 16


def test_a_colocated_prompt_decodes_where_it_is_and_needs_no_admission():
  cluster = Driver(colocated_pool(1, **SIZES))
  request = cluster.arrive('a', prompt_len=5, max_tokens=3)
  (step,) = cluster.start(Step('both0', (Chunk('a', 0, 5),)))
  assert step.chunks == (ChunkOrder(request, 0, 5, pages=(0, 1), limit=3, slot=0),)  # 5 + 2 tokens
  assert cluster.state.workers['both0'].decodable() == ['a']  # its first token stays on the device
  (decode,) = cluster.start(Step('both0', decodes=ALL))
  assert decode.decodes == (DecodeOrder('a', 0, context=5),)
  cluster.end(step, {'a': 1})
  (last,) = cluster.start(Step('both0', decodes=ALL))
  assert last.decodes == (DecodeOrder('a', 0, context=6),)
  assert cluster.state.workers['both0'].decodable() == []  # every token it may have is asked for
  cluster.end(decode, {'a': 1})
  cluster.end(last, {'a': 1}, {'a': 'length'})
  cluster.assert_idle()


def test_one_step_fuses_chunks_with_decodes():
  cluster = Driver(colocated_pool(1, **SIZES))
  cluster.arrive('a', prompt_len=4)
  cluster.end(cluster.start(Step('both0', (Chunk('a', 0, 4),)))[0], {'a': 1})
  request = cluster.arrive('b', prompt_len=12)
  (fused,) = cluster.start(Step('both0', (Chunk('b', 0, 8),), ALL))
  assert fused.chunks == (ChunkOrder(request, 0, 8, pages=(2, 3, 4, 5), limit=4, slot=None),)
  assert [decode.request for decode in fused.decodes] == ['a'] and fused.steps == 1
  cluster.end(fused, {'a': 1})
  assert len(cluster.view.requests['a'].tokens) == 2 and cluster.phase('b') is Phase.PREFILLING
  assert list(cluster.state.workers['both0'].prefilling) == ['b']


def test_the_chunks_of_a_prompt_send_the_pages_they_complete():
  cluster = Driver()
  cluster.arrive('a', prompt_len=10)
  orders = []
  for start, length in ((0, 3), (3, 3), (6, 4)):
    orders.append(cluster.start(Step('prefill0', (Chunk('a', start, length, 'decode0'),))))
    cluster.end(orders[-1][0], {'a': 1} if start == 6 else {})
  assert [len(order) for order in orders] == [1, 2, 2]  # 3 tokens complete no page of 4
  assert [order[1].span.source_pages for order in orders[1:]] == [(0,), (1, 2)]
  assert [order[1].after for order in orders[1:]] == [orders[1][0].id, orders[2][0].id]
  cluster.end(orders[2][1])
  assert cluster.phase('a') is Phase.MOVING  # one transfer is still under way
  cluster.end(orders[1][1])
  assert cluster.phase('a') is Phase.DECODING


@pytest.mark.parametrize('seed', range(40))
def test_however_a_prompt_is_cut_each_token_is_sent_once_and_in_order(seed):
  rng = random.Random(seed)
  ours = rng.choice([1, 3, 4, 16, 64])
  theirs, prompt_len = ours if seed % 2 else rng.choice([1, 2, 6, 8, 64]), rng.randint(1, 60)
  unit = math.gcd(ours, theirs)
  sizes = SIZES | {'num_pages': 70, 'max_step_tokens': 60}
  cluster = Driver(prefill_pool(1, page_size=ours, **sizes) + decode_pool(1, **sizes), page_size=theirs)
  cluster.arrive('a', prompt_len, max_tokens=5)
  sent, start = 0, 0
  while start < prompt_len:
    length = rng.randint(1, prompt_len - start)
    step, *transfers = cluster.start(Step('prefill0', (Chunk('a', start, length, 'decode0'),)))
    start += length
    for transfer in transfers:
      end = transfer.span.start + transfer.span.tokens
      assert (transfer.span.start, transfer.span.tokens % unit) == (sent, 0) and end <= -(-start // unit) * unit
      assert transfer.span.source_pages == tuple(range(sent // ours, -(-end // ours)))
      assert transfer.span.target_pages == tuple(range(sent // theirs, -(-end // theirs)))
      sent = end
    assert start - sent < unit  # nothing waits that could travel
    cluster.end(step, {'a': 1} if start == prompt_len else {})
    for transfer in transfers:
      cluster.end(transfer)
  assert sent == -(-prompt_len // unit) * unit
  assert cluster.phase('a') is Phase.DECODING


def test_a_request_that_ends_with_its_first_token_moves_nothing():
  cluster = Driver()
  cluster.arrive('a', max_tokens=1)
  orders = cluster.start(Step('prefill0', (Chunk('a', 0, 6),)))
  cluster.end(orders[0], {'a': 1}, {'a': 'length'})
  assert len(orders) == 1 and cluster.finished[0].tokens == (7,)
  cluster.assert_idle()


def test_pages_under_way_stay_held_when_the_first_token_is_a_stop():
  cluster = Driver()
  cluster.arrive('a')
  step, transfer = cluster.start(Step('prefill0', (Chunk('a', 0, 6, 'decode0'),)))
  cluster.end(step, {'a': 1}, {'a': 'stop'})
  assert cluster.finished[0].finish_reason == 'stop'
  assert (cluster.free_pages('prefill0'), cluster.free_pages('decode0')) == (14, 14)  # two of each are being copied
  assert len(cluster.state.books.holdings['decode0'].slots) == 4
  cluster.end(transfer)
  cluster.assert_idle()


def test_a_sequence_that_stops_early_leaves_its_second_step_to_run_out():
  cluster = Driver(colocated_pool(1, **SIZES))
  cluster.arrive('a', max_tokens=10)
  (step,) = cluster.start(Step('both0', (Chunk('a', 0, 6),)))
  (decode,) = cluster.start(Step('both0', decodes=ALL))
  cluster.end(step, {'a': 1}, {'a': 'stop'})
  assert cluster.state.unfinished and not cluster.view.requests
  cluster.end(decode, {'a': 1})  # a token past the end changes nothing
  assert cluster.finished == [Finished(1.0, 'a', 'stop', (7,))]
  cluster.assert_idle()


def _decoding(*limits: int) -> Driver:
  """A colocated worker with a sequence for each `max_tokens`, first tokens delivered."""
  cluster = Driver(colocated_pool(1, **SIZES))
  chunks = []
  for index, limit in enumerate(limits):
    cluster.arrive(f'r{index}', prompt_len=4, max_tokens=limit)
    chunks.append(Chunk(f'r{index}', 0, 4))
  cluster.end(cluster.start(Step('both0', tuple(chunks)))[0], {f'r{i}': 1 for i in range(len(limits))})
  return cluster


@pytest.mark.parametrize('limits, steps, expected', [((3,), 8, 2), ((2, 4), 8, 3), ((2, 9), 4, 4)])
def test_steps_are_clipped_to_the_most_tokens_that_any_sequence_has_left(limits, steps, expected):
  (order,) = _decoding(*limits).start(Step('both0', decodes=ALL, steps=steps))
  assert order.steps == expected


def test_two_steps_in_flight_ask_for_no_more_tokens_than_are_left():
  cluster = _decoding(6)
  (first,) = cluster.start(Step('both0', decodes=ALL, steps=3))
  (second,) = cluster.start(Step('both0', decodes=ALL, steps=3))
  assert (first.steps, second.steps) == (3, 2)  # with the first token, six
  assert (first.decodes[0].context, second.decodes[0].context) == (4, 7)
  assert cluster.state.workers['both0'].decodable() == []


def test_a_sequence_asked_for_more_than_it_has_left_is_not_asked_again():
  cluster = _decoding(2, 9)
  (first,) = cluster.start(Step('both0', decodes=ALL, steps=4))
  (second,) = cluster.start(Step('both0', decodes=ALL, steps=4))
  assert [decode.request for decode in first.decodes] == ['r0', 'r1']
  assert [decode.request for decode in second.decodes] == ['r1']
  cluster.end(first, {'r0': 1, 'r1': 4}, {'r0': 'length'})
  cluster.end(second, {'r1': 4}, {'r1': 'length'})
  assert [len(one.tokens) for one in cluster.finished] == [2, 9]
  cluster.assert_idle()


def test_the_context_bounds_what_is_generated():
  cluster = Driver(colocated_pool(1, **SIZES))
  cluster.arrive('a', prompt_len=62, max_tokens=50)
  assert cluster.view.requests['a'].limit == 3  # the last token needs no place in the cache
  assert cluster.view.pages_needed('a', 'both0', decodes=True) == 16  # 64 tokens
  cluster.arrive('b', prompt_len=64, max_tokens=50)
  assert cluster.view.requests['b'].limit == 1


def test_room_counts_what_a_decision_took():
  cluster = Driver()
  cluster.arrive('a', prompt_len=20, max_tokens=1)  # 5 pages
  room = cluster.view.room()
  for _ in range(3):
    assert room.fits('a', 'decode0', decodes=True)
    room.take('a', 'decode0', decodes=True)
  assert (room.pages('decode0'), room.slots('decode0')) == (1, 1)
  assert not room.fits('a', 'decode0', decodes=True)
  assert room.pages('prefill0') == 16 and cluster.view.room().pages('decode0') == 16
  room.take_tokens('prefill0', 20)
  assert (room.queued_tokens('prefill0'), cluster.view.room().queued_tokens('prefill0')) == (20, 0)


def test_slots_bound_the_sequences_that_decode_at_once():
  cluster = _decoding(4, 4, 4, 4)
  cluster.arrive('e', prompt_len=1)
  assert cluster.view.room().pages('both0') > 0
  assert not cluster.view.room().fits('e', 'both0', decodes=True)
  assert cluster.view.room().fits('e', 'both0', decodes=False)


def test_orders_carry_the_slot_that_was_given_back():
  cluster = _decoding(2, 9)
  cluster.end(cluster.start(Step('both0', decodes=('r0',)))[0], {'r0': 1}, {'r0': 'length'})
  cluster.arrive('c')
  (order,) = cluster.start(Step('both0', (Chunk('c', 0, 6),)))
  assert order.chunks[0].slot == 2  # the longest free
  assert list(cluster.state.books.holdings['both0'].slots) == [3, 0]


@pytest.mark.parametrize(
  'workers, words',
  [
    ((WorkerSpec('w', num_pages=4), WorkerSpec('w', num_pages=4)), "two workers are named 'w'"),
    ((WorkerSpec('w'),), "worker 'w' has num_pages='auto'"),
    (prefill_pool(1, num_pages=4), 'no worker decodes; give the cluster at least one'),
    (decode_pool(2, num_pages=4), 'no worker prefills'),
  ],
)
def test_a_cluster_that_cannot_serve_is_refused(workers, words):
  with pytest.raises(ValueError, match=words):
    ClusterState(TINY, workers, page_size=4)


def test_a_second_request_of_the_same_name_is_refused():
  cluster = Driver()
  cluster.arrive('a')
  with pytest.raises(ValueError, match="request 'a' is being served already; ids must be unique"):
    cluster.arrive('a', prompt_len=9)
  assert cluster.view.requests['a'].request.prompt_len == 6


# ---------------------------------------------------------------------------- what can never run


@pytest.mark.parametrize(
  'fields, words',
  [
    ({'prompt_len': 65}, 'the prompt has 65 tokens, but the context of tiny is 64; shorten the prompt'),
    ({'prompt': (5, 96, 7)}, 'token id 96 in the prompt, but the ids of tiny are 0 to 95; use its tokenizer'),
    ({'prompt': (5, -1)}, 'token id -1 in the prompt'),
    ({'prompt': (5, 1.5)}, 'token id 1.5 in the prompt'),
    ({'prompt': ('a',)}, "token id 'a' in the prompt"),
    ({'prompt': (5, None)}, 'token id None in the prompt'),
    ({'prompt': (float('nan'),)}, 'token id nan in the prompt'),
    ({'stop_token_ids': tuple(range(2, 10))}, "9 stop tokens asked for, the model's own included, but at most 8"),
    ({'stop_token_ids': tuple(range(2, 11)), 'ignore_eos': True}, '9 stop tokens asked for'),
    (
      {'prompt_len': 33, 'max_tokens': 1},
      "33 prompt tokens and up to 1 generated ones need 9 pages of 4 tokens, but the largest worker that prefills, "
      "'prefill0', has 8 in all; raise num_pages, shorten the prompt or lower max_tokens",
    ),
    (
      {'prompt_len': 20, 'max_tokens': 30},
      "20 prompt tokens and up to 30 generated ones need 13 pages of 4 tokens, but the largest worker that decodes, "
      "'decode0', has 12 in all",
    ),
  ],
)  # fmt: skip
def test_what_can_never_run_is_rejected_and_the_others_are_served(fields, words):
  small, large = SIZES | {'num_pages': 8}, SIZES | {'num_pages': 12}
  cluster = Driver(prefill_pool(1, **small) + decode_pool(1, **large))
  cluster.arrive('bad', **fields)
  cluster.arrive('good')
  assert list(cluster.view.waiting) == ['good']
  end = cluster.reject_unfit()
  assert (end.request, end.finish_reason, end.tokens) == ('bad', 'rejected', ()) and words in end.error
  step, transfer = cluster.start(Step('prefill0', (Chunk('good', 0, 6, 'decode0'),)))
  cluster.end(step, {'good': 1}, {'good': 'stop'})
  cluster.end(transfer)
  cluster.assert_idle()


@pytest.mark.parametrize(
  'fields',
  [
    {'prompt_len': 64, 'max_tokens': 1},
    {'prompt_len': 64, 'max_tokens': 9},  # cut to one
    {'prompt': (0, 95)},
    {'stop_token_ids': tuple(range(2, 9))},
    {'stop_token_ids': (1, *range(2, 9))},  # the model's own counts once
    {'stop_token_ids': tuple(range(2, 10)), 'ignore_eos': True},
  ],
)
def test_what_just_fits_is_served(fields):
  cluster = Driver()
  cluster.arrive('a', **fields)
  assert list(cluster.view.waiting) == ['a'] and cluster.must() == ()


def test_the_largest_worker_of_a_phase_decides_what_fits():
  small = prefill_pool(1, **SIZES | {'num_pages': 2})
  large = dataclasses.replace(ONE_OF_EACH[0], name='large')
  cluster = Driver((*small, large, ONE_OF_EACH[1]))
  cluster.arrive('a', prompt_len=20)
  assert list(cluster.view.waiting) == ['a']


def test_a_request_for_one_token_needs_no_room_to_decode():
  cluster = Driver(prefill_pool(1, **SIZES) + decode_pool(1, **SIZES | {'num_pages': 2}))
  cluster.arrive('a', prompt_len=20, max_tokens=1)
  assert list(cluster.view.waiting) == ['a']


def test_random_prompts_are_not_read_to_be_checked():
  class Unread(tuple):
    vocab_size = 96

    def __iter__(self):
      raise AssertionError('the prompt was read')

  cluster = Driver()
  cluster.arrive('a', prompt=Unread((1, 2, 3)))
  assert list(cluster.view.waiting) == ['a']


def test_a_rejection_is_an_order_that_names_the_reason():
  cluster = Driver()
  cluster.arrive('a', prompt_len=65)
  (order,) = cluster.must()
  assert isinstance(order, EndOrder) and order.finish_reason == 'rejected' and 'context' in order.reason
  assert cluster.phase('a') is Phase.ENDING and cluster.must() == ()


def test_a_request_of_which_a_trace_says_that_it_generates_nothing_generates_one_token():
  cluster = Driver()
  cluster.state.expect({'a': 0}.get)
  cluster.arrive('a')
  (step,) = cluster.start(Step('prefill0', (Chunk('a', 0, 6),)))
  assert step.chunks[0].limit == 1


def test_what_several_steps_brought_is_kept_until_it_is_taken():
  cluster = Driver(colocated_pool(1, **SIZES))
  cluster.arrive('a')
  first, second = *cluster.start(Step('both0', (Chunk('a', 0, 6),))), *cluster.start(Step('both0', decodes=ALL))
  cluster.end(first, {'a': 1})
  cluster.end(second, {'a': 1})
  assert [one.order for one in cluster.state.take_delivered()] == [first.id, second.id]
  assert cluster.state.take_delivered() == ()
