"""Paged decode attention in plain XLA: the blocks of all sequences are one list, of which every step takes B.

Each block is attended to by itself, as in Flash-Decoding (Dao et al. 2023), and joined to what its sequence has so far.
So a step is as wide as the batch whatever the lengths, and no block is read in vain but the last step's spare ones.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.online_softmax import NOTHING, gather_values, read, table_blocks, weigh

BLOCK_TOKENS = 64  # cached tokens a block; on CPU, more are read in vain by short sequences


def paged_attention(
  q: jax.Array,
  pages: jax.Array,
  tables: jax.Array,
  lengths: jax.Array,
  *,
  softmax_scale: float,
  sliding_window: int | None = None,
  block_tokens: int = BLOCK_TOKENS,
) -> jax.Array:
  """See `pallas_kernels.paged_attention.paged_attention`; `block_tokens` cached tokens make a block."""
  batch, _, head_dim = q.shape
  kv_heads, page_size = pages.shape[2:4]
  blocks = table_blocks(tables, page_size, block_tokens)  # [B, M, n]
  block_tokens = blocks.shape[2] * page_size
  queries = (q.astype(jnp.float32) * softmax_scale).astype(pages.dtype).reshape(batch, kv_heads, -1, head_dim)
  first_seen = jnp.zeros_like(lengths) if sliding_window is None else jnp.maximum(lengths - sliding_window, 0)
  first_block = first_seen // block_tokens
  count = jnp.where(lengths > 0, -(-lengths // block_tokens) - first_block, 0)
  ends = jnp.cumsum(count)  # of each sequence's blocks in the list of all

  def step(index, carry):
    top, total, out = carry
    place = index * batch + jnp.arange(batch)
    live = place < ends[-1]
    sequence = jnp.minimum(jnp.searchsorted(ends, place, side='right'), batch - 1)
    block = jnp.where(live, first_block[sequence] + place - (ends - count)[sequence], 0)
    keys, values = read(pages, blocks[sequence, block])
    position = block[:, None] * block_tokens + jnp.arange(block_tokens)
    visible = (position >= first_seen[sequence, None]) & (position < lengths[sequence, None]) & live[:, None]
    weights, block_top = weigh(queries[sequence], keys, visible[:, None, None])

    owner = (sequence == jnp.arange(batch)[:, None]) & live  # [B, W], of the step's blocks
    tops = jnp.where(owner[..., None, None, None], block_top, NOTHING)
    new_top = jnp.maximum(top, tops.max(1))
    share = jnp.exp(block_top - new_top[sequence])

    def join(old, new):
      added = jnp.einsum('bw,wx->bx', owner.astype(jnp.float32), new.reshape(batch, -1), precision='highest')
      return old * jnp.exp(top - new_top) + added.reshape(old.shape)

    total = join(total, weights.sum(-1, keepdims=True) * share)
    return new_top, total, join(out, gather_values(weights, values) * share)

  rows = queries.shape[:3]
  start = (
    jnp.full((*rows, 1), NOTHING, jnp.float32),
    jnp.zeros((*rows, 1), jnp.float32),
    jnp.zeros((*rows, head_dim), jnp.float32),
  )
  _, total, out = jax.lax.fori_loop(0, -(-ends[-1] // batch), step, start)
  return (out / jnp.where(total > 0, total, 1)).reshape(q.shape).astype(q.dtype)
