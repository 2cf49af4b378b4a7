"""Packed prefill attention in plain XLA: blocks of rows, whosever they are, over the blocks of pages that they see.

A block of rows may hold the chunks of several sequences. It walks over the cached blocks of each of them in turn; rows
of the others see nothing of it.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.online_softmax import NOTHING, gather_values, read, table_blocks, weigh

BLOCKS = (64, 64)  # query tokens and cached tokens a block; on CPU, larger ones do more in vain for short prompts
LARGE_BLOCKS = (256, 128)  # of one long chunk by itself, for which small ones are slower by a third


def prefill_attention(
  q: jax.Array,
  pages: jax.Array,
  tables: jax.Array,
  offsets: jax.Array,
  lengths: jax.Array,
  *,
  softmax_scale: float,
  sliding_window: int | None = None,
  blocks: tuple[int, int] | None = None,
) -> jax.Array:
  """See `pallas_kernels.prefill_attention.prefill_attention`; `blocks` are query tokens and cached tokens a block."""

  def attend(blocks):
    return _attend(q, pages, tables, offsets, lengths, softmax_scale, sliding_window, *blocks)

  if blocks is not None:
    return attend(blocks)
  if q.shape[0] <= LARGE_BLOCKS[0]:
    return attend(BLOCKS)
  alone = jnp.sum(offsets[1:] > offsets[:-1]) == 1
  return jax.lax.cond(alone, lambda: attend(LARGE_BLOCKS), lambda: attend(BLOCKS))


def _attend(q, pages, tables, offsets, lengths, softmax_scale, sliding_window, block_rows, block_tokens):
  tokens, query_heads, head_dim = q.shape
  kv_heads, page_size = pages.shape[2:4]
  group = query_heads // kv_heads
  blocks = table_blocks(tables, page_size, block_tokens)  # [B, M, n]
  block_tokens = blocks.shape[2] * page_size
  block_rows = min(block_rows, tokens)
  padding = -tokens % block_rows
  queries = jnp.pad((q.astype(jnp.float32) * softmax_scale).astype(pages.dtype), ((0, padding), (0, 0), (0, 0)))
  queries = queries.reshape(-1, block_rows, kv_heads, group, head_dim)
  queries = jnp.moveaxis(queries, 1, 3).reshape(-1, kv_heads, group * block_rows, head_dim)  # [blocks, K, R, D]
  starts, stops = offsets[:-1], offsets[1:]
  before = lengths - stops  # a row's position less its number

  def attend(index):
    row = index * block_rows + jnp.arange(block_rows)
    own = jnp.searchsorted(stops, row, side='right')  # whose row it is; past the last for padding
    low, high = jnp.maximum(starts, row[0]), jnp.minimum(stops, row[-1] + 1)
    first_seen = jnp.zeros_like(low) if sliding_window is None else jnp.maximum(before + low - sliding_window + 1, 0)
    first_block = first_seen // block_tokens
    count = jnp.where(high > low, -(-(before + high) // block_tokens) - first_block, 0)
    ends = jnp.cumsum(count)  # of each sequence's blocks in the list of all

    def step(place, carry):
      top, total, out = carry
      sequence = jnp.searchsorted(ends, place, side='right')
      block = first_block[sequence] + place - (ends - count)[sequence]
      keys, values = read(pages, blocks[sequence, block][None])
      cached = block * block_tokens + jnp.arange(block_tokens)
      position = jnp.where(own == sequence, row + before[sequence], -1)[:, None]
      visible = cached <= position  # [rows, S]
      if sliding_window is not None:
        visible &= cached > position - sliding_window
      weights, new_top = weigh(queries[index], keys[0], jnp.tile(visible, (group, 1)), top)
      shrink = jnp.exp(top - new_top)
      total = total * shrink + weights.sum(-1, keepdims=True)
      return new_top, total, out * shrink + gather_values(weights, values[0])

    rows = queries.shape[1:3]
    start = (
      jnp.full((*rows, 1), NOTHING, jnp.float32),
      jnp.zeros((*rows, 1), jnp.float32),
      jnp.zeros((*rows, head_dim), jnp.float32),
    )
    _, total, out = jax.lax.fori_loop(0, ends[-1], step, start)
    return (out / jnp.where(total > 0, total, 1)).astype(q.dtype)

  out = jax.lax.map(attend, jnp.arange(queries.shape[0])).reshape(-1, kv_heads, group, block_rows, head_dim)
  return jnp.moveaxis(out, 3, 1).reshape(-1, query_heads, head_dim)[:tokens]
