"""Quantized weights as they are stored, and the way there and back.

Eight bits: int8 `[K, N]`, in `[-127, 127]`. Four bits: int32 words `[8·⌈K/64⌉, N]`, each of eight values of one column.
64 rows of weights make 8 rows of words: row `16·s + 2·r + h` of the 64 is bits `4·s + 16·h` and up of word row r. So
shifting a row of words by `4·s` puts two neighbouring rows of weights at the bottom of its half words, where a TPU
holds neighbouring rows of bfloat16. A stored four bits is the value plus 8; rows past K hold the value 0.
"""

import dataclasses

import jax
import jax.numpy as jnp

UNIT = 64  # rows of weights that are packed together
_LIMIT = {8: 127, 4: 7}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeights:
  """A weight matrix `[K, N]` in few bits; value = stored · scale of its group and column."""

  values: jax.Array  # int8 [K, N], or int32 [8·⌈K/64⌉, N] of four-bit values
  scales: jax.Array  # float32 [K/group_size, N]; [1, N] is one scale a column

  @property
  def bits(self) -> int:
    """Of one weight: 8 or 4."""
    return 4 if self.values.dtype == jnp.int32 else 8


def quantize(weights: jax.Array, bits: int = 8, group_size: int | None = None) -> QuantizedWeights:
  """Round weights to few bits, symmetrically: the largest magnitude of a group becomes 127 (8 bits) or 7 (4 bits).

  Args:
    weights: `[K, N]`, floating.
    bits: 8 or 4.
    group_size: Rows of K that share a scale in each column; divides K. None is all of them.

  Returns:
    The weights to hand to `quantized_matmul`.

  Raises:
    ValueError: if weights are no matrix of floats, bits is neither 8 nor 4, or group_size does not divide K.
  """
  if weights.ndim != 2 or not jnp.issubdtype(weights.dtype, jnp.floating):
    raise ValueError(f'weights are {weights.dtype} {weights.shape}, expected floats [K, N].')
  if bits not in _LIMIT:
    raise ValueError(f'bits is {bits}, expected 8 or 4.')
  size_k, size_n = weights.shape
  group_size = size_k if group_size is None else group_size
  if group_size < 1 or size_k % group_size:
    raise ValueError(f'group_size {group_size} does not divide K, which is {size_k}.')
  groups = weights.astype(jnp.float32).reshape(size_k // group_size, group_size, size_n)
  scales = jnp.abs(groups).max(1) / _LIMIT[bits]  # [K / group_size, N]
  rounded = jnp.round(groups / jnp.where(scales > 0, scales, 1)[:, None]).astype(jnp.int32).reshape(size_k, size_n)
  return QuantizedWeights(pack(rounded) if bits == 4 else rounded.astype(jnp.int8), scales)


def dequantize(weights: QuantizedWeights, size_k: int | None = None) -> jax.Array:
  """The weights that `weights` stands for.

  Args:
    weights: As `quantize` made them.
    size_k: K, where it is no multiple of 64 and there are four bits: the stored values do not tell.

  Returns:
    `[K, N]` float32.
  """
  values = weights.values
  if weights.bits == 4:
    values = unpack(values)[:size_k]
  size_k, size_n = values.shape
  grouped = values.astype(jnp.float32).reshape(weights.scales.shape[0], -1, size_n)
  return (grouped * weights.scales[:, None]).reshape(size_k, size_n)


def pack(values: jax.Array) -> jax.Array:
  """Four-bit values, integers `[K, N]` in [-8, 7], as int32 words `[8·⌈K/64⌉, N]`."""
  size_k, size_n = values.shape
  stored = jnp.pad(values, ((0, -size_k % UNIT), (0, 0))).astype(jnp.int32) + 8
  stored = stored.reshape(-1, 4, 8, 2, size_n)  # [units, s, r, h, N]
  shifts = (4 * jnp.arange(4)[:, None, None] + 16 * jnp.arange(2))[..., None]  # [s, 1, h, 1]
  return jnp.sum(stored << shifts, axis=(1, 3), dtype=jnp.int32).reshape(-1, size_n)


def unpack(words: jax.Array) -> jax.Array:
  """The four-bit values in words `[R, N]`, as int8 `[8R, N]`."""
  size_n = words.shape[1]
  halves = words.reshape(-1, 1, 8, 1, size_n)
  shifts = (4 * jnp.arange(4)[:, None, None] + 16 * jnp.arange(2))[..., None]
  return (((halves >> shifts) & 15) - 8).astype(jnp.int8).reshape(-1, size_n)
