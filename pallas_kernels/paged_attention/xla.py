"""Paged decode attention in plain XLA: one sequence after another, each no further than its own length."""

import jax
import jax.numpy as jnp

from pallas_kernels.online_softmax import attend, pad_tables, pages_per_block

BLOCK_TOKENS = 128  # cached tokens a block; on CPU, more are read in vain by short sequences


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
  _, query_heads, head_dim = q.shape
  kv_heads, page_size = pages.shape[2:4]
  block_pages = pages_per_block(page_size, tables.shape[1], block_tokens)
  group = query_heads // kv_heads
  queries = (q.astype(jnp.float32) * softmax_scale).astype(pages.dtype)

  def one_sequence(row):
    queries, table, length = row
    last_visible = jnp.full((group,), length - 1)
    queries = queries.reshape(kv_heads, group, head_dim)
    return attend(queries, last_visible, pages, table, length, block_pages, sliding_window)

  out = jax.lax.map(one_sequence, (queries, pad_tables(tables, block_pages), lengths))
  return out.reshape(q.shape).astype(q.dtype)
