"""Prompts sent on: whole, by chunk or by layers, each token once, and no more at once than staging holds."""

import math
import random

import pytest

from pdjax.serving import Cancel, Chunk, Phase, Step, Transfer
from pdjax.serving.events import Failed, WorkerLost
from pdjax.serving.orders import StepOrder, TransferOrder
from pdjax.types import TransferSpec, colocated_pool, decode_pool, prefill_pool
from pdjax.types.span import Span
from tests.serving.driver import SIZES, TINY, Driver

TOKEN_BYTES = TINY.cached_token_bytes('float32')
PAGE_BYTES = 4 * TOKEN_BYTES
GROUPS = ((0, 1), (1, 2))  # of two layers


def test_a_prompt_without_room_to_decode_waits_with_its_first_token_delivered():
  cluster = Driver()
  cluster.arrive('a', prompt_len=6)
  (step,) = cluster.start(Step('prefill0', (Chunk('a', 0, 6),)))
  cluster.end(step, {'a': 1})
  assert cluster.phase('a') is Phase.PREFILLED and list(cluster.view.prefilled) == ['a']
  assert cluster.free_pages('prefill0') == 14 and cluster.free_pages('decode0') == 16

  (transfer,) = cluster.start(Transfer('a', 'decode0'))
  assert transfer == TransferOrder(
    1, 'a', 'prefill0', 'decode0', Span((0, 1), (0, 1), 0, 8), after=None, num_bytes=2 * PAGE_BYTES
  )
  assert cluster.phase('a') is Phase.MOVING and not cluster.view.prefilled
  cluster.end(transfer)
  assert cluster.phase('a') is Phase.DECODING and cluster.free_pages('prefill0') == 16


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


# ---------------------------------------------------------------------------- the parts in which a prompt travels


def _prefill(cluster: Driver, name: str, *lengths: int) -> list[tuple[TransferOrder, ...]]:
  """Chunks of these lengths one after another, each ended before the next; the transfers that left with each."""
  sent, start = [], 0
  for length in lengths:
    step, *transfers = cluster.start(Step('prefill0', (Chunk(name, start, length, 'decode0'),)))
    assert isinstance(step, StepOrder)
    start += length
    is_last = start == cluster.view.requests[name].request.prompt_len
    cluster.end(step, {name: 1} if is_last else {})
    sent.append(tuple(transfers))
  return sent


def _spans(orders) -> list[tuple]:
  return [(order.span.start, order.span.tokens, order.span.layers) for order in orders]


def test_a_request_travels_whole_after_its_last_chunk():
  cluster = Driver(transfer=TransferSpec(granularity='request'))
  cluster.arrive('a', prompt_len=10)
  first, second, last = _prefill(cluster, 'a', 4, 4, 2)
  assert first == second == () and _spans(last) == [(0, 12, None)]
  assert last[0].after == 2 and cluster.phase('a') is Phase.MOVING
  cluster.end(last[0])
  assert cluster.phase('a') is Phase.DECODING


def test_each_chunk_sends_the_pages_it_completes():
  cluster = Driver(transfer=TransferSpec(granularity='chunk'))
  cluster.arrive('a', prompt_len=12)
  sent = _prefill(cluster, 'a', 6, 5, 1)
  assert [_spans(orders) for orders in sent] == [[(0, 4, None)], [(4, 4, None)], [(8, 4, None)]]


def test_layers_of_every_chunk_travel_by_groups_and_its_step_runs_in_them():
  cluster = Driver(transfer=TransferSpec(granularity='layers'))
  cluster.arrive('a', prompt_len=8)
  step, *transfers = cluster.start(Step('prefill0', (Chunk('a', 0, 4, 'decode0'),)))
  assert step.layer_groups == GROUPS and _spans(transfers) == [(0, 4, (0, 1)), (0, 4, (1, 2))]
  assert all(order.after == step.id and order.num_bytes == PAGE_BYTES // 2 for order in transfers)
  cluster.end(step)
  last, *rest = cluster.start(Step('prefill0', (Chunk('a', 4, 4, 'decode0'),)))
  cluster.end(last, {'a': 1})
  for order in (*transfers, *rest[:1]):
    cluster.end(order)
  assert cluster.phase('a') is Phase.MOVING
  cluster.end(rest[1])
  assert cluster.phase('a') is Phase.DECODING


@pytest.mark.parametrize('chunks, by_layers', [((4, 8), (False, True)), ((8, 3), (False, False)), ((11,), (True,))])
def test_auto_sends_a_long_last_chunk_layer_by_layer_and_all_others_whole(chunks, by_layers):
  cluster = Driver(transfer=TransferSpec(layers_from=5))
  cluster.arrive('a', prompt_len=sum(chunks))
  sent = _prefill(cluster, 'a', *chunks)
  assert [tuple(order.span.layers for order in orders) for orders in sent] == [
    GROUPS if layered else (None,) for layered in by_layers
  ]


def test_a_worker_that_may_have_decodes_in_its_step_runs_it_whole():
  cluster = Driver(colocated_pool(1, **SIZES) + decode_pool(1, **SIZES), transfer=TransferSpec(granularity='layers'))
  cluster.arrive('a', prompt_len=8)
  step, transfer = cluster.start(Step('both0', (Chunk('a', 0, 8, 'decode0'),)))
  assert step.layer_groups == () and transfer.span.layers is None


# ---------------------------------------------------------------------------- staging


def test_no_more_travels_at_once_than_staging_holds_and_the_rest_follows_in_turn():
  cluster = Driver(transfer=TransferSpec(granularity='chunk', staging_bytes=3 * PAGE_BYTES))
  for name, length in (('a', 22), ('b', 4)):
    cluster.arrive(name, length)
  step, *under_way = cluster.start(Step('prefill0', (Chunk('a', 0, 22, 'decode0'), Chunk('b', 0, 4, 'decode0'))))
  assert [(order.request, *_spans([order])[0][:2]) for order in under_way] == [('a', 0, 4), ('a', 4, 4), ('a', 8, 4)]
  cluster.end(step, {'a': 1, 'b': 1})
  staging = cluster.state.books.holdings['prefill0'].staging_out
  assert staging.free_bytes == 0 and cluster.must() == ()
  seen = []
  while under_way:
    order = under_way.pop(0)
    seen.append((order.request, order.span.start))
    cluster.end(order)
    under_way += cluster.must()
    assert staging.free_bytes == (3 - len(under_way)) * PAGE_BYTES
  assert seen == [('a', 0), ('a', 4), ('a', 8), ('a', 12), ('a', 16), ('a', 20), ('b', 0)]
  assert cluster.phase('a') is cluster.phase('b') is Phase.DECODING
  for name in 'ab':
    cluster.end(cluster.start(Cancel(name))[0])
  cluster.assert_idle()


@pytest.mark.parametrize('end', ['cancelled', 'lost', 'failed'])
def test_what_is_due_is_forgotten_with_its_request(end):
  cluster = Driver(transfer=TransferSpec(staging_bytes=PAGE_BYTES))
  cluster.arrive('a', prompt_len=12)
  (step,) = cluster.start(Step('prefill0', (Chunk('a', 0, 12),)))
  cluster.end(step, {'a': 1})
  (transfer,) = cluster.start(Transfer('a', 'decode0'))
  if end == 'cancelled':
    (ending,) = cluster.start(Cancel('a'))
    cluster.end(ending)
  elif end == 'lost':
    cluster.apply(WorkerLost('decode0', 1.0, 'gone'))
  else:
    cluster.apply(Failed(transfer.id, 1.0, 'boom'))
  cluster.end(transfer)
  assert cluster.must() == ()
  cluster.assert_idle()
