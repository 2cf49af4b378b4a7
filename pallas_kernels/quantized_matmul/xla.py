"""Product with quantized weights in plain XLA: some rows of K after another, so that few weights are ever unpacked.

Integers are multiplied as float32, which CPUs do several times as fast and which holds the sums of a block exactly.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.storage import UNIT, unpack

BLOCK_K = 128  # rows of K a step, about; on CPU, the weights of more fall out of the cache
_LARGE = (256, 512)  # from so many rows of activations on, so many: adding up the result costs more than unpacking


def quantized_matmul(
  x: jax.Array,
  weights: jax.Array,
  scales: jax.Array,
  *,
  x_scales: jax.Array | None = None,
  out_dtype: jax.typing.DTypeLike,
  block_k: int | None = None,
) -> jax.Array:
  """See `pallas_kernels.quantized_matmul.quantized_matmul`; `block_k` rows of K make a step, about."""
  packed = weights.dtype == jnp.int32
  (size_m, size_k), size_n = x.shape, weights.shape[1]
  group = size_k // scales.shape[0]
  if block_k is None:
    block_k = BLOCK_K if size_m < _LARGE[0] else _LARGE[1]
  block = _block(size_k, group, block_k, UNIT if packed else 1)
  short = x.dtype != jnp.float32  # and so are weights without scales: matrix units take every bit of them
  x = x.astype(jnp.float32)

  def add(total, start, rows):
    """Add the product of so many rows of K."""
    runs = -(-rows // group)  # scales that they have
    height = -(-rows // UNIT) * UNIT // 8 if packed else rows
    values = jax.lax.dynamic_slice(weights, (start // 8 if packed else start, 0), (height, size_n))
    values = (unpack(values)[:rows] if packed else values).astype(jnp.float32)
    scale = jax.lax.dynamic_slice(scales, (start // group, 0), (runs, size_n))
    if runs > 1:
      values = (values.reshape(runs, group, size_n) * scale[:, None]).reshape(rows, size_n)
    precision = 'default' if short and runs == 1 else 'highest'
    product = jnp.matmul(jax.lax.dynamic_slice(x, (0, start), (size_m, rows)), values, precision=precision)
    return total + (product if runs > 1 else product * scale)

  steps, rest = divmod(size_k, block)
  out = jnp.zeros((size_m, size_n), jnp.float32)
  out = jax.lax.fori_loop(0, steps, lambda index, total: add(total, index * block, block), out)
  if rest:
    out = add(out, steps * block, rest)
  return (out if x_scales is None else out * x_scales[:, None]).astype(out_dtype)


def _block(size_k: int, group: int, most: int, unit: int) -> int:
  """Rows of K a step: whole groups, or a part that divides them, of whole units; at most `most` if that can be."""
  if group == size_k:
    return min(max(most // unit, 1) * unit, size_k)
  if group > most:
    for block in range(most // unit * unit, 0, -unit):
      if group % block == 0:
        return block
  smallest = math.lcm(group, unit)
  return min(max(most // smallest, 1) * smallest, size_k)
