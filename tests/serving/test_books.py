"""Pages, slots and staging: sized when a cluster is made, and held until the last order about them has ended."""

import pytest

from pdjax.serving import Cancel, Chunk, ClusterState, Phase, Step
from pdjax.types import TransferSpec, WorkerSpec, decode_pool, prefill_pool
from tests.serving.driver import ONE_OF_EACH, SETUPS, SIZES, TINY, Driver

TOKEN_BYTES = TINY.cached_token_bytes('float32')
PAGE_BYTES = 4 * TOKEN_BYTES


@pytest.mark.parametrize(
  'workers, words',
  [
    ((WorkerSpec('w', num_pages=4), WorkerSpec('w', num_pages=4)), "two places are named 'w'"),
    ((WorkerSpec('w'),), "worker 'w' has num_pages='auto'"),
    (prefill_pool(1, num_pages=4), 'no worker decodes; give the cluster at least one'),
    (decode_pool(2, num_pages=4), 'no worker prefills'),
  ],
)
def test_a_cluster_that_cannot_serve_is_refused(workers, words):
  with pytest.raises(ValueError, match=words):
    ClusterState(TINY, workers, page_size=4)


def test_staging_that_holds_no_unit_of_a_way_is_refused():
  with pytest.raises(ValueError, match="unit of 4 tokens from 'prefill0' to 'decode0' has 1024 bytes"):
    ClusterState(TINY, ONE_OF_EACH, 4, TransferSpec(staging_bytes=PAGE_BYTES - 1))
  unlike = prefill_pool(1, page_size=8, **SIZES) + decode_pool(1, page_size=2, **SIZES)
  ClusterState(TINY, unlike, 4, TransferSpec(staging_bytes=2 * TOKEN_BYTES))  # units of two tokens


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


def test_pages_of_a_cancelled_transfer_are_free_only_when_it_has_ended():
  cluster, (transfer,) = SETUPS[Phase.MOVING]()
  (end,) = cluster.start(Cancel('a'))
  cluster.end(end)
  assert (cluster.free_pages('prefill0'), cluster.free_pages('decode0')) == (13, 13)
  cluster.end(transfer)
  cluster.assert_idle()
