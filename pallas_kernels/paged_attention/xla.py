"""Paged decode attention in plain XLA: the blocks of all sequences are one list, of which every step takes B.

Each block is attended to by itself, as in Flash-Decoding (Dao et al. 2023), and joined to what its sequence has so far.
So a step is as wide as the batch whatever the lengths, and no block is read in vain but the last step's spare ones.
Where a table is one block, there is one step, and nothing to join.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.layouts import PageLayout
from pallas_kernels.online_softmax import (
  NOTHING,
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

BLOCK_TOKENS = 64  # cached tokens a block; on CPU, more are read in vain by short sequences
BY_PLATFORM = {'gpu': {'block_tokens': 1024, 'whole': 2048}}  # where a turn's launches cost more than reads in vain
_LOST = 1e38  # stands for what is not finite, in sums that never come near it


def paged_attention(
  q: jax.Array,
  pages: jax.Array,
  tables: jax.Array,
  lengths: jax.Array,
  *,
  softmax_scale: float,
  sliding_window: int | None = None,
  soft_cap: float | None = None,
  sinks: jax.Array | None = None,
  scales: jax.Array | None = None,
  return_lse: bool = False,
  block_tokens: int = BLOCK_TOKENS,
  whole: int = 0,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `pallas_kernels.paged_attention.paged_attention`.

  `block_tokens` cached tokens make a block, and a table of up to `whole` cached tokens is one.
  """
  layout = PageLayout.of(pages.shape, q.shape[-1])
  table_tokens = tables.shape[1] * layout.page_size
  if table_tokens <= whole:
    block_tokens = table_tokens
  dtype = pages.dtype if scales is None else q.dtype
  blocks = table_blocks(tables, layout.page_size, block_tokens)  # [B, M, n]
  block_tokens = blocks.shape[2] * layout.page_size
  batch, queries = q.shape[0], q.shape[1] if q.ndim == 4 else 1
  rows = prepare(q.reshape(batch, queries, *q.shape[-2:]), layout.kv_heads, softmax_scale, dtype)  # [B, K, R, D]
  position = lengths[:, None] + jnp.arange(-queries, 0)  # [B, Q]
  first_seen = jnp.zeros_like(lengths)
  if sliding_window is not None:
    first_seen = jnp.maximum(position[:, 0] + 1 - sliding_window, 0)
  first_block = first_seen // block_tokens
  count = jnp.where(lengths > 0, -(-lengths // block_tokens) - first_block, 0)
  ends = jnp.cumsum(count)  # of each sequence's blocks in the list of all

  def turn(sequence, block, live, top=None):
    """Attend from each block's sequence to it alone: weights, their highest score, values."""
    cached = block[:, None] * block_tokens + jnp.arange(block_tokens)
    held = (cached >= first_seen[sequence, None]) & (cached < lengths[sequence, None]) & live[:, None]
    keys, values = read(pages, blocks[sequence, block], held, layout, dtype, scales)
    visible = see(cached, jnp.where(live[:, None], position[sequence], -1), sliding_window)  # [X, Q, S]
    visible = jnp.tile(visible, (1, rows.shape[2] // queries, 1))[:, None]  # [X, 1, R, S]
    return *weigh(rows[sequence], keys, visible, top, soft_cap), values

  def step(index, seen):
    place = index * batch + jnp.arange(batch)
    live = place < ends[-1]
    sequence = jnp.minimum(owners(ends, place), batch - 1)
    block = jnp.where(live, first_block[sequence] + place - (ends - count)[sequence], 0)
    weights, block_top, values = turn(sequence, block, live)

    owner = (sequence == jnp.arange(batch)[:, None]) & live  # [B, X], of the step's blocks
    tops = jnp.where(owner[..., None, None, None], block_top, NOTHING)
    top = jnp.maximum(seen.top, tops.max(1))
    share = jnp.exp(block_top - top[sequence])

    def join(old, new):
      new = jnp.where(jnp.isfinite(new), new, _LOST).reshape(batch, -1)  # 0 times another's NaN would be NaN
      added = jnp.einsum('bx,xy->by', owner.astype(jnp.float32), new, precision='highest')
      added = jnp.where(added > _LOST / 2, jnp.nan, added)  # in its own sequence it is one again
      return old * jnp.exp(seen.top - top) + added.reshape(old.shape)

    total = join(seen.total, weights.sum(-1, keepdims=True) * share)
    return Seen(top, total, join(seen.out, gather_values(weights, values) * share))

  def at_once(seen):
    weights, top, values = turn(jnp.arange(batch), jnp.zeros_like(lengths), lengths > 0, seen.top)
    total = seen.total * jnp.exp(seen.top - top) + weights.sum(-1, keepdims=True)
    return Seen(top, total, gather_values(weights, values))

  seen = begin(rows, sinks)
  seen = at_once(seen) if blocks.shape[1] == 1 else jax.lax.fori_loop(0, -(-ends[-1] // batch), step, seen)
  out, lse = finish(seen)
  out = restore(out, queries).reshape(q.shape).astype(q.dtype)
  lse = jnp.where(position[..., None] >= 0, restore(lse, queries), -jnp.inf).reshape(q.shape[:-1])
  return (out, lse) if return_lse else out
