"""Both ends of every way: tokens move between pages of unlike sizes, dtypes and cuts, and nothing else is touched."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdjax.kv.transfer import CrossProcess, DevicePut, HostStaged
from pdjax.types.span import Span
from tests.kv.transfer.pools import Pool, four_units_at_most
from tests.tiny import TINY_12_12

# Source and target: pages of so many tokens, dtypes and tp; the first token and how many.
SPANS = [
  (16, 4, 'float32', 'float32', 1, 3, 8, 40),
  (4, 16, 'float32', 'float32', 3, 2, 20, 12),
  (1, 16, 'float32', 'bfloat16', 2, 4, 5, 30),
  (6, 4, 'bfloat16', 'float32', 4, 1, 2, 16),
  (64, 1, 'float16', 'bfloat16', 1, 1, 63, 9),
  (8, 8, 'float32', 'int8', 3, 4, 16, 24),
  (16, 8, 'int8', 'float32', 4, 3, 8, 32),
  (4, 8, 'int8', 'int8', 1, 2, 4, 20),
  (8, 16, 'bfloat16', 'int8', 2, 1, 24, 16),
]


@pytest.mark.parametrize('way', [DevicePut, HostStaged, CrossProcess])
@pytest.mark.parametrize('page_size, target_size, dtype, target_dtype, tp, target_tp, start, tokens', SPANS)
def test_a_span_of_tokens_moves_between_pages_of_unlike_sizes_and_dtypes(
  page_size, target_size, dtype, target_dtype, tp, target_tp, start, tokens, way
):
  model, rng = TINY_12_12, np.random.default_rng(3)
  ends = (page_size, dtype, jax.devices()[:tp]), (target_size, target_dtype, jax.devices()[-target_tp:])
  source, target = (
    Pool.random(model, devices, 90 // size + 5, seed, jnp.dtype(name), page_size=size)
    for seed, (size, name, devices) in enumerate(ends)
  )
  transport = way(source, target, four_units_at_most(source, target))
  transport.compile()
  token = np.arange(start, start + tokens)
  pages, targets = (
    rng.permutation(pool.pages.num_pages)[: token[-1] // size - start // size + 1]
    for pool, size in ((source, page_size), (target, target_size))
  )
  sent = source.numbers()[pages[token // page_size - start // page_size], token % page_size]
  place = targets[token // target_size - start // target_size], token % target_size
  expected = target.numbers()
  parcel = transport.send(Span(tuple(pages.tolist()), tuple(targets.tolist()), start, tokens))
  parcel.wait()
  transport.receive(parcel).block_until_ready()

  smaller = dtype if jnp.dtype(dtype).itemsize <= jnp.dtype(target_dtype).itemsize else target_dtype
  assert (transport.pieces.dtype, transport.pieces.unit) == (smaller, math.gcd(page_size, target_size))
  assert parcel.wire_bytes == tokens * model.cached_token_bytes(smaller)
  arrived = target.numbers()
  if target_dtype == 'int8' != dtype:
    error = np.abs(arrived[place] - sent)
    assert (error <= np.abs(sent).max(-1, keepdims=True) / 254 * 1.001).all() and error.any()
  else:
    kept = sent if target_dtype == 'int8' else sent.astype(jnp.dtype(target_dtype)).astype(np.float32)
    np.testing.assert_array_equal(arrived[place], kept)
  arrived[place] = expected[place] = 0
  np.testing.assert_array_equal(arrived, expected)
