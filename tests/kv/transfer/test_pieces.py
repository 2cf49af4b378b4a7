"""Pieces fit both cuts of the heads, and travel in few batches that add up."""

import itertools
import math

import jax
import jax.numpy as jnp
import pytest

from pdjax.kv.transfer import DevicePut
from pdjax.kv.transfer.pieces import Cut, batch_bounds, batch_sizes
from pdjax.types import TransferSpec
from tests.kv.transfer.pools import Pool
from tests.tiny import TINY, TINY_12_12


@pytest.mark.parametrize('kv_heads', [1, 2, 3, 4, 6, 8, 12])
def test_every_piece_of_a_target_comes_from_where_its_heads_are(kv_heads):
  cuts = [shards for shards in range(1, kv_heads + 1) if kv_heads % shards == 0]
  for source_shards, target_shards in itertools.product(cuts, cuts):
    cut = Cut.between(kv_heads, source_shards, target_shards)
    per_source, per_target = kv_heads // source_shards, kv_heads // target_shards
    for target_shard in range(target_shards):
      received = []
      for piece in range(cut.target_pieces):
        source_shard, source_piece = cut.source_of(target_shard, piece)
        assert 0 <= source_shard < source_shards and 0 <= source_piece < cut.source_pieces
        first = source_shard * per_source + source_piece * cut.piece_heads
        received += range(first, first + cut.piece_heads)
      assert received == list(range(target_shard * per_target, (target_shard + 1) * per_target))
    assert cut.piece_heads == math.gcd(per_source, per_target)


@pytest.mark.parametrize('most', [1, 2, 5, 16, 28, 91])
def test_batches_add_up_to_the_units_and_are_few(most):
  sizes = batch_bounds(most, 1000)
  assert sizes[0] == 1 and sizes[-1] == most and sizes == tuple(sorted(set(sizes)))
  for units in range(300):
    batches = batch_sizes(units, sizes)
    assert sum(batches) == units and set(batches) <= set(sizes)
    assert all(batches.count(size) < 4 for size in sizes[:-1])  # four of a size would be one of the next, about


def test_a_batch_is_no_larger_than_the_pool_and_has_a_unit_at_least():
  assert batch_bounds(91, 15) == batch_bounds(91, 4) == (1, 4) and batch_bounds(91, 64) == (1, 4, 16, 64)
  assert batch_bounds(5, 5) == (1, 2, 5) and batch_bounds(6, 5) == (1, 4)
  assert batch_bounds(91, 3) == batch_bounds(0, 1000) == (1,)


def test_pools_of_unlike_models_and_dtypes_that_do_not_travel_are_refused():
  devices = jax.devices()
  with pytest.raises(ValueError, match=r'pools of unlike models: .* \(2, 2, 8\) and \(2, 12, 8\)'):
    DevicePut(Pool.random(TINY, devices[:1], 4, 0), Pool.random(TINY_12_12, devices[1:2], 4, 0), TransferSpec())
  with pytest.raises(ValueError, match='a pool is float8_e4m3fn, expected one of float32'):
    other = Pool.random(TINY, devices[1:2], 4, 0, jnp.dtype('float8_e4m3fn'))
    DevicePut(Pool.random(TINY, devices[:1], 4, 0), other, TransferSpec())
