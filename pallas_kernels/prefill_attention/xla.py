"""Packed prefill attention in plain XLA: blocks of query rows, each over the blocks of pages that it can see."""

import jax
import jax.numpy as jnp

from pallas_kernels.online_softmax import attend, pad_tables, pages_per_block

BLOCK_ROWS = 128  # query tokens a block
BLOCK_TOKENS = 256  # cached tokens a block; on CPU, more are read in vain by short prompts, fewer slow long ones down


def prefill_attention(
  q: jax.Array,
  pages: jax.Array,
  tables: jax.Array,
  offsets: jax.Array,
  lengths: jax.Array,
  *,
  softmax_scale: float,
  sliding_window: int | None = None,
  block_tokens: int = BLOCK_TOKENS,
) -> jax.Array:
  """See `pallas_kernels.prefill_attention.prefill_attention`; `block_tokens` cached tokens make a block."""
  tokens, query_heads, head_dim = q.shape
  kv_heads, page_size = pages.shape[2:4]
  block_pages = pages_per_block(page_size, tables.shape[1], block_tokens)
  tables = pad_tables(tables, block_pages)
  group = query_heads // kv_heads
  block_rows = min(BLOCK_ROWS, tokens)
  # A sequence's last block may reach into the next sequence's rows, or past the end: those rows are written again by
  # the next sequence, or cut off below.
  queries = jnp.pad((q.astype(jnp.float32) * softmax_scale).astype(pages.dtype), ((0, block_rows), (0, 0), (0, 0)))

  def one_sequence(sequence, out):
    first, end, length = offsets[sequence], offsets[sequence + 1], lengths[sequence]

    def one_block(index, out):
      row = first + index * block_rows
      position = length - end + row + jnp.arange(block_rows)
      block = jax.lax.dynamic_slice_in_dim(queries, row, block_rows)  # [R, H, D]
      block = block.reshape(block_rows, kv_heads, group, head_dim)
      block = jnp.moveaxis(block, 0, 2).reshape(kv_heads, group * block_rows, head_dim)
      seen = jnp.minimum(length, position[-1] + 1)
      last_visible = jnp.tile(position, group)
      attended = attend(block, last_visible, pages, tables[sequence], seen, block_pages, sliding_window)
      attended = attended.reshape(kv_heads, group, block_rows, head_dim)
      attended = jnp.moveaxis(attended, 2, 0).reshape(block_rows, query_heads, head_dim)
      return jax.lax.dynamic_update_slice_in_dim(out, attended.astype(q.dtype), row, 0)

    return jax.lax.fori_loop(0, -(-(end - first) // block_rows), one_block, out)

  out = jnp.zeros((tokens + block_rows, query_heads, head_dim), q.dtype)
  out = jax.lax.fori_loop(0, lengths.shape[0], one_sequence, out)[:tokens]
  return jnp.where((jnp.arange(tokens) < offsets[-1])[:, None, None], out, 0)
