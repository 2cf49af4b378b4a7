"""Pages in vector memory converted from one buffer into another, tile by tile, with their scales."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.conversion import QUANTIZED, SMALLEST_ABSMAX, cast
from pallas_kernels.page_copy.tpu_loops import loop

_TILE_ELEMENTS = 64 * 1024  # converted in one go: 64 registers of float32


def convert_pages(size, slot, sources, targets, layout):
  """Convert `size` layers' pages in the buffers' slot; a side with scales has two buffers."""
  _, _, both, blocks, tokens, width = sources[0].shape
  chunk = max(c for c in range(1, blocks + 1) if blocks % c == 0 and (c == 1 or c * tokens * width <= _TILE_ELEMENTS))

  def tile(layer, half, first):
    where = (slot, layer, half, pl.ds(first, chunk))
    x = sources[0][where]
    if len(sources) == len(targets):
      targets[0][where] = _cast(x, targets[0].dtype)
    elif len(targets) == 2:
      stored, scales = _quantize(x.astype(jnp.float32), targets[0].dtype, layout)
      targets[0][where] = stored
      for c in range(chunk):
        for part in range(layout.halves):
          both_index, head = _place(half, first + c, part, layout)
          targets[1][slot, layer, both_index, pl.ds(head, 1), :] = scales[part][c]
    else:
      rows = [
        [sources[1][(slot, layer, *_row(half, first + c, part, layout))] for part in range(layout.halves)]
        for c in range(chunk)
      ]
      targets[0][where] = _cast(_scale(x, rows, layout), targets[0].dtype)

  def block_step(layer, half, index):
    tile(layer, half, index * chunk)

  def layer_step(layer):
    if len(sources) == len(targets) == 2:
      targets[1][slot, layer] = sources[1][slot, layer]
    for half in range(both):
      if chunk == blocks:
        tile(layer, half, 0)
      else:
        loop(0, blocks // chunk, functools.partial(block_step, layer, half))

  loop(0, size, layer_step)


def _place(half, block, part, layout):
  """The indices of the scales of part `part` of the lanes of `[half, block]`: key or value, and head."""
  if layout.page_shape[0] == 1:
    return part, block
  return half, block * layout.halves + part


def _row(half, block, part, layout):
  both_index, head = _place(half, block, part, layout)
  return both_index, pl.ds(head, 1), slice(None)


def _cast(x, dtype):
  if x.dtype == dtype:
    return x
  if x.dtype not in (jnp.float32, jnp.bfloat16) or (dtype not in (jnp.float32, jnp.bfloat16)):
    x = x.astype(jnp.float32)
  if dtype == jnp.int8:  # by way of int32, whole numbers already
    return x.astype(jnp.int32).astype(jnp.int8)
  return cast(x, dtype)


def _diagonal(size):
  return jax.lax.broadcasted_iota(jnp.int32, (size, size), 0) == jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)


def _quantize(x, dtype, layout):
  """`[c, G, W]` float32 as stored elements, and for each part of the lanes c rows `[1, G]` of scales."""
  largest = QUANTIZED[jnp.dtype(dtype)]
  tokens, width = x.shape[1:]
  part_of = jax.lax.broadcasted_iota(jnp.int32, (1, 1, width), 2) // layout.head_dim
  inverse, scales = None, []
  for part in range(layout.halves):
    mine = jnp.abs(x) if layout.halves == 1 else jnp.where(part_of == part, jnp.abs(x), 0)
    absmax = jnp.max(mine, axis=-1, keepdims=True)  # [c, G, 1]
    this = largest / jnp.maximum(absmax, SMALLEST_ABSMAX)
    inverse = this if inverse is None else jnp.where(part_of == part, this, inverse)
    turned = jnp.where(_diagonal(tokens)[None], absmax, 0)  # tokens from rows to lanes
    scales.append(jnp.sum(turned, axis=1, keepdims=True) * (1 / largest))  # [c, 1, G]
  stored = x * inverse
  if dtype == jnp.int8:
    stored = jnp.round(stored)  # 127 at most: the inverse is a rounding error too large at worst
  return _cast(stored, dtype), scales


def _scale(x, rows, layout):
  """`[c, G, W]` stored elements times their scales, which are `[1, G]` by block and part of the lanes."""
  tokens, width = x.shape[1:]
  part_of = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1) // layout.head_dim
  out = []
  for block, parts in zip(x.astype(jnp.float32), rows, strict=True):
    factor = None
    for part, row in enumerate(parts):
      turned = jnp.where(_diagonal(tokens), row, 0)  # tokens from lanes to rows
      column = jnp.sum(turned, axis=1, keepdims=True)  # [G, 1]
      factor = column if factor is None else jnp.where(part_of == part, column, factor)
    out.append(block * factor)
  return jnp.stack(out)
