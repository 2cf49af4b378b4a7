"""Stored four-bit weights as bfloat16 on a TPU, by masks alone, and what the masks add to each value.

A four-bit value n becomes the bfloat16 128 + n by two masks and no conversion (its bits are `0x4300 | n`). Where bytes
become bfloat16 cheaply, words become bytes by a mask, and the surplus is 8 instead of 136; the columns of the
activations then are brought into the order in which the bytes come, 64 by 64, once.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantized_matmul.storage import UNIT

BYTE_BIAS = 8  # what a stored four-bit value is above the value that it stands for
BIAS = 136  # what the bit pattern of a four-bit value, read as a number, is above it: 128, and 8 of the stored value


def unpack(words):
  """Words `[R, n]` as bfloat16 `[8R, n]`, each value 136 too large."""
  height, width = words.shape
  parts = []
  for index in range(4):
    pairs = jax.lax.shift_right_logical(words, jnp.int32(4 * index)) if index else words
    numbers = pltpu.bitcast((pairs & 0x000F000F) | 0x43004300, jnp.bfloat16)  # [2R, n]
    parts.append(numbers.reshape(height // 8, 1, 16, width))
  return jnp.concatenate(parts, axis=1).reshape(8 * height, width)


def unpack_bytes(words):
  """Words `[R, n]` as bfloat16 `[8R, n]`, each value 8 too large, in the order of `permute`."""
  height, width = words.shape
  parts = []
  for index in range(2):
    quads = jax.lax.shift_right_logical(words, jnp.int32(4 * index)) if index else words
    parts.append(pltpu.bitcast(quads & 0x0F0F0F0F, jnp.int8).reshape(height // 8, 1, 32, width))
  return jnp.concatenate(parts, axis=1).reshape(8 * height, width).astype(jnp.bfloat16)


def permute(x):
  """Columns of bfloat16 x `[rows, 64 or 128]`, 64 by 64 in the order in which `unpack_bytes` has rows of weights."""
  width = x.shape[1]
  place, source = (jax.lax.broadcasted_iota(jnp.int32, (width, width), axis) for axis in (1, 0))
  byte, row, high = place & 3, place >> 2 & 7, place >> 5 & 1
  wanted = (place & -UNIT) + 16 * (2 * (byte & 1) + high) + 2 * row + (byte >> 1)
  return jnp.dot(x, (source == wanted).astype(jnp.bfloat16), preferred_element_type=jnp.float32).astype(jnp.bfloat16)
