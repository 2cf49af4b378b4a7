"""Packed prefill attention in plain XLA: blocks of rows, whosever they are, over the blocks of pages that they see.

A block of rows may hold the chunks of several sequences. It walks over the cached blocks of each of them in turn; rows
of the others see nothing of it. Where there is one sequence, and its table is short, there is one turn and no loop.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.layouts import PageLayout
from pallas_kernels.online_softmax import (
  Seen,
  begin,
  finish,
  gather_values,
  owners,
  prepare,
  read,
  restore,
  see,
  table_blocks,
  weigh,
)

BLOCKS = (64, 64)  # query tokens and cached tokens a block; on CPU, larger ones do more in vain for short prompts
LARGE_BLOCKS = (256, 128)  # of one long chunk by itself, for which small ones are slower by a third
BY_PLATFORM = {'gpu': {'blocks': (256, 1024), 'whole': 2048}}  # where a turn's launches cost more than work in vain


def prefill_attention(
  q: jax.Array,
  pages: jax.Array,
  tables: jax.Array,
  offsets: jax.Array,
  lengths: jax.Array,
  *,
  softmax_scale: float,
  sliding_window: int | None = None,
  soft_cap: float | None = None,
  sinks: jax.Array | None = None,
  scales: jax.Array | None = None,
  return_lse: bool = False,
  blocks: tuple[int, int] | None = None,
  whole: int = 0,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `pallas_kernels.prefill_attention.prefill_attention`.

  `blocks` are query tokens and cached tokens a block; a table of up to `whole` cached tokens is one block.
  """
  table_tokens = tables.shape[1] * pages.shape[-2]
  if blocks is not None and table_tokens <= whole:
    blocks = blocks[0], table_tokens
  attend = functools.partial(
    _attend, q, pages, tables, offsets, lengths, softmax_scale, sliding_window, soft_cap, sinks, scales
  )
  if blocks is not None or q.shape[0] <= LARGE_BLOCKS[0]:
    out, lse = attend(*(blocks or BLOCKS))
  else:
    alone = jnp.sum(offsets[1:] > offsets[:-1]) == 1
    out, lse = jax.lax.cond(alone, lambda: attend(*LARGE_BLOCKS), lambda: attend(*BLOCKS))
  return (out, lse) if return_lse else out


def _attend(
  q, pages, tables, offsets, lengths, softmax_scale, sliding_window, soft_cap, sinks, scales, block_rows, block_tokens
):
  tokens, query_heads, head_dim = q.shape
  layout = PageLayout.of(pages.shape, head_dim)
  dtype = pages.dtype if scales is None else q.dtype
  blocks = table_blocks(tables, layout.page_size, block_tokens)  # [B, M, n]
  block_tokens = blocks.shape[2] * layout.page_size
  block_rows = min(block_rows, tokens)
  group = query_heads // layout.kv_heads
  padded = jnp.pad(q, ((0, -tokens % block_rows), (0, 0), (0, 0))).reshape(-1, block_rows, query_heads, head_dim)
  queries = prepare(padded, layout.kv_heads, softmax_scale, dtype)  # [blocks, K, R, D]
  starts, stops = offsets[:-1], offsets[1:]
  before = lengths - stops  # a row's position less its number

  def attend(index):
    row = index * block_rows + jnp.arange(block_rows)
    own = owners(stops, row)  # whose row it is; past the last for padding
    low, high = jnp.maximum(starts, row[0]), jnp.minimum(stops, row[-1] + 1)
    first_seen = jnp.zeros_like(low) if sliding_window is None else jnp.maximum(before + low - sliding_window + 1, 0)
    first_block = first_seen // block_tokens
    count = jnp.where(high > low, -(-(before + high) // block_tokens) - first_block, 0)
    ends = jnp.cumsum(count)  # of each sequence's blocks in the list of all

    def turn(sequence, block, seen):
      cached = block * block_tokens + jnp.arange(block_tokens)
      held = (cached >= first_seen[sequence]) & (cached < lengths[sequence])
      keys, values = read(pages, blocks[sequence, block][None], held[None], layout, dtype, scales)
      visible = see(cached, jnp.where(own == sequence, row + before[sequence], -1), sliding_window)  # [rows, S]
      mine, visible = (jnp.tile(a, (group, 1)) for a in ((own == sequence)[:, None], visible))  # of [R, ...]
      weights, top = weigh(queries[index], keys[0], visible, seen.top, soft_cap)
      shrink = jnp.exp(seen.top - top)
      total = seen.total * shrink + weights.sum(-1, keepdims=True)
      added = jnp.where(mine, gather_values(weights, values[0]), 0)  # 0 times another's NaN would be NaN
      return Seen(top, total, seen.out * shrink + added)

    def step(place, seen):
      sequence = owners(ends, place)
      return turn(sequence, first_block[sequence] + place - (ends - count)[sequence], seen)

    seen = begin(queries[index], sinks)
    seen = turn(0, 0, seen) if blocks.shape[:2] == (1, 1) else jax.lax.fori_loop(0, ends[-1], step, seen)
    out, lse = finish(seen)
    return out.astype(q.dtype), lse

  one = queries.shape[0] == 1
  out, lse = (a[None] for a in attend(0)) if one else jax.lax.map(attend, jnp.arange(queries.shape[0]))
  out, lse = (restore(rows, block_rows).reshape(-1, *q.shape[1 : rows.ndim - 1])[:tokens] for rows in (out, lse))
  return out, jnp.where((jnp.arange(tokens) < stops[-1])[:, None], lse, -jnp.inf)
