"""An online softmax (Milakov and Gimelshein 2018), for all that walks over paged keys and values in blocks."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.layouts import PLAIN, PageLayout

NOTHING = -1e30  # the top of a row that has seen nothing; finite, so that differences stay free of NaN
HIDDEN = 2 * NOTHING  # so far below any top that its exponential is 0
LOG2_E = math.log2(math.e)  # scores in units of it need powers of two alone


class Seen(NamedTuple):
  """The maximum and the sums that rows of queries `[..., R]` have gathered so far."""

  top: jax.Array  # [..., R, 1], the highest score
  total: jax.Array  # [..., R, 1], the sum of weights relative to it
  out: jax.Array  # [..., R, D], values summed by the same weights


def prepare(q: jax.Array, kv_heads: int, softmax_scale: float, dtype: jnp.dtype) -> jax.Array:
  """Queries `[X, Q, H, D]` as scaled rows `[X, K, R, D]`: R = (H/K)·Q rows see one key/value head, Q the faster."""
  count, queries, query_heads, head_dim = q.shape
  q = (q.astype(jnp.float32) * softmax_scale).astype(dtype).reshape(count, queries, kv_heads, -1, head_dim)
  return jnp.moveaxis(q, 1, 3).reshape(count, kv_heads, query_heads // kv_heads * queries, head_dim)


def restore(rows: jax.Array, queries: int) -> jax.Array:
  """Rows `[X, K, R, ...]` as they were before `prepare`: `[X, Q, H, ...]`."""
  count, kv_heads, _, *rest = rows.shape
  rows = jnp.moveaxis(rows.reshape(count, kv_heads, -1, queries, *rest), 3, 1)
  return rows.reshape(count, queries, -1, *rest)


def owners(ends: jax.Array, places: jax.Array) -> jax.Array:
  """The owner of each of `places` `[...]` in a list where owners' parts end at `ends` `[B]`; B beyond the last.

  All are compared at once: a search is a loop, and on a GPU each of its turns is a launch.
  """
  return (ends <= jnp.asarray(places)[..., None]).sum(-1, dtype=jnp.int32)


def table_blocks(tables: jax.Array, page_size: int, block_tokens: int) -> jax.Array:
  """Page tables `[B, N]` cut into blocks `[B, M, n]` of `block_tokens` cached tokens, rounded up to whole pages."""
  width = tables.shape[1]
  block_pages = min(-(-block_tokens // page_size), width)
  return jnp.pad(tables, ((0, 0), (0, -width % block_pages))).reshape(tables.shape[0], -1, block_pages)


def read(
  pages: jax.Array, ids: jax.Array, held: jax.Array, layout: PageLayout, dtype: jnp.dtype, scales: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Keys and values of X blocks of n pages: S = n·G tokens each.

  Args:
    pages: `[P, A, C, G, W]`.
    ids: `[X, n]` page numbers.
    held: `[X, S]`, which tokens the sequence has. Others have a weight of 0, but 0 times NaN would be NaN.
    layout: Of the pages.
    dtype: Of the result.
    scales: `[P, 2, K, G]`, of quantized pages.

  Returns:
    Keys `[X, K, S, D]` as they are and values `[X, K, S, D]` with zeros where they are not held.
  """
  keys, values = _unpacked(pages, ids, layout)
  if scales is not None:
    key_scales, value_scales = _unpacked(scales[..., None], ids, PageLayout.of((*scales.shape, 1), 1))
    keys, values = keys.astype(jnp.float32) * key_scales, values.astype(jnp.float32) * value_scales
  return keys.astype(dtype), jnp.where(held[:, None, :, None], values, 0).astype(dtype)


def _unpacked(pages: jax.Array, ids: jax.Array, layout: PageLayout) -> tuple[jax.Array, jax.Array]:
  """Keys and values `[X, K, S, D]` of pages.

  What a page has of a head is one run of memory, so heads are gathered apart: no transpose follows.
  """
  _, both, heads, page_size, width = pages.shape
  runs = pages.reshape(-1, page_size * width)
  at = ids[:, None, :] * (both * heads) + jnp.arange(heads)[:, None]
  shape = (ids.shape[0], heads, ids.shape[1] * page_size, width)
  parts = [runs.at[(at + part * heads).reshape(-1)].get(mode='clip').reshape(shape) for part in range(both)]
  if layout.name == PLAIN:
    return parts[0], parts[1]
  unpacked = layout.unpack(jnp.stack(parts, axis=1))  # [X, 2, K, S, D]
  return unpacked[:, 0], unpacked[:, 1]


def begin(rows: jax.Array, sinks: jax.Array | None) -> Seen:
  """State of rows `[..., K, R, D]` before any block: nothing, or a sink `[H]`, a token with a score and no value."""
  top = jnp.full((*rows.shape[:-1], 1), NOTHING, jnp.float32)
  total, out = jnp.zeros_like(top), jnp.zeros(rows.shape, jnp.float32)
  if sinks is not None:
    kv_heads, count = rows.shape[-3:-1]
    sinks = jnp.repeat(sinks.reshape(kv_heads, -1), count * kv_heads // sinks.size, axis=1)[..., None]  # [K, R, 1]
    top = jnp.maximum(top, sinks)
    total += jnp.exp(sinks - top)
  return Seen(top, total, out)


def finish(seen: Seen) -> tuple[jax.Array, jax.Array]:
  """Results of rows `[..., R, D]`, zeros if they saw nothing, and the logarithm of each softmax's sum `[..., R]`."""
  return seen.out / jnp.where(seen.total == 0, 1, seen.total), (seen.top + jnp.log(seen.total))[..., 0]


def weigh(
  queries: jax.Array,
  keys: jax.Array,
  visible: jax.Array,
  top: jax.Array | None = None,
  soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Softmax weights over a block, not divided by their sum yet.

  Args:
    queries: `[..., R, D]`, scaled already.
    keys: `[..., S, D]`.
    visible: `[..., R, S]` or what broadcasts to it, whether a row sees a token.
    top: `[..., R, 1]`, the highest score before this block.
    soft_cap: Bounds the scores, or None.

  Returns:
    The weights `[..., R, S]` in float32 relative to the highest score so far, and that score `[..., R, 1]`.
  """
  scores = jnp.einsum('...rd,...sd->...rs', queries, keys, preferred_element_type=jnp.float32)
  scores = jnp.where(visible, cap(scores, soft_cap), HIDDEN)
  top = jnp.maximum(NOTHING if top is None else top, scores.max(-1, keepdims=True))
  return jnp.exp(scores - top), top


def cap(scores: jax.Array, soft_cap: float | None) -> jax.Array:
  """Scores bent smoothly to within ± `soft_cap` (Gemma 2), or as they are if None."""
  return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def see(cached: jax.Array, position: jax.Array, sliding_window: int | None) -> jax.Array:
  """Whether queries at `position` `[..., Q]` see tokens at `cached` `[..., S]`: `[..., Q, S]`; below 0, none."""
  cached, position = cached[..., None, :], position[..., None]
  visible = cached <= position
  return visible if sliding_window is None else visible & (cached > position - sliding_window)


def gather_values(weights: jax.Array, values: jax.Array) -> jax.Array:
  """Values `[..., S, D]` summed by weights `[..., R, S]`, in float32."""
  weights = weights.astype(values.dtype)
  return jnp.einsum('...rs,...sd->...rd', weights, values, preferred_element_type=jnp.float32)
