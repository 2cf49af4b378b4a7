"""The parts in which a prompt travels: whole, by chunk or by layers, and no more at once than staging holds."""

import pytest

from pdjax.serving import Cancel, Chunk, ClusterState, Phase, Step, Transfer
from pdjax.serving.events import Failed, WorkerLost
from pdjax.serving.orders import StepOrder, TransferOrder
from pdjax.types import TransferSpec, colocated_pool, decode_pool, prefill_pool
from tests.serving.driver import ONE_OF_EACH, SIZES, TINY, Driver

TOKEN_BYTES = TINY.cached_token_bytes('float32')
PAGE_BYTES = 4 * TOKEN_BYTES
GROUPS = ((0, 1), (1, 2))  # of two layers


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
  assert all(order.after == step.id and order.staging_bytes == PAGE_BYTES // 2 for order in transfers)
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


def test_staging_that_holds_no_unit_of_a_way_is_refused():
  with pytest.raises(ValueError, match="unit of 4 tokens from 'prefill0' to 'decode0' has 1024 bytes"):
    ClusterState(TINY, ONE_OF_EACH, 4, TransferSpec(staging_bytes=PAGE_BYTES - 1))
  unlike = prefill_pool(1, page_size=8, **SIZES) + decode_pool(1, page_size=2, **SIZES)
  ClusterState(TINY, unlike, 4, TransferSpec(staging_bytes=2 * TOKEN_BYTES))  # units of two tokens
