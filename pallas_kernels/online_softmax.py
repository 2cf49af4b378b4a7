"""Attention over one sequence's pages, block by block with an online softmax (Milakov and Gimelshein 2018), in XLA."""

import jax
import jax.numpy as jnp

_HIDDEN = -1e30  # finite, so that a row that sees nothing yet stays free of NaN


def pages_per_block(page_size: int, table_width: int, block_tokens: int) -> int:
  """Pages that one block of about `block_tokens` cached tokens reads."""
  return min(max(block_tokens // page_size, 1), table_width)


def pad_tables(tables: jax.Array, block_pages: int) -> jax.Array:
  """Widen `[B, N]` page tables to whole blocks; a slice past the end would be moved back silently."""
  return jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % block_pages)))


def attend(
  queries: jax.Array,
  last_visible: jax.Array,
  pages: jax.Array,
  table: jax.Array,
  length: jax.Array,
  block_pages: int,
  sliding_window: int | None = None,
) -> jax.Array:
  """Attend from rows of queries to the first `length` cached tokens of one sequence.

  Args:
    queries: `[K, R, D]`, scaled already; R rows for each key/value head.
    last_visible: `[R]`, the position of the last cached token that each row sees.
    pages: `[P, 2, K, G, D]`.
    table: `[N]`, the sequence's pages; N a multiple of `block_pages`.
    length: Cached tokens to walk over; blocks past it are never read.
    block_pages: Pages a block.
    sliding_window: Cached tokens that each row sees up to its last; None is all. Blocks before it are never read.

  Returns:
    `[K, R, D]` in float32; zeros where nothing is visible.
  """
  kv_heads, rows, head_dim = queries.shape
  page_size = pages.shape[3]
  block_tokens = block_pages * page_size

  def block(index, carry):
    top, total, out = carry
    cached = pages[jax.lax.dynamic_slice(table, (index * block_pages,), (block_pages,))]  # [n, 2, K, G, D]
    cached = jnp.moveaxis(cached, 0, 2).reshape(2, kv_heads, block_tokens, head_dim)
    scores = jnp.einsum('krd,ksd->krs', queries, cached[0], preferred_element_type=jnp.float32)
    position = index * block_tokens + jnp.arange(block_tokens)
    visible = position <= last_visible[:, None]  # [R, S]
    if sliding_window is not None:
      visible &= position > last_visible[:, None] - sliding_window
    scores = jnp.where(visible, scores, _HIDDEN)
    new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(scores - new_top), 0)
    shrink = jnp.exp(top - new_top)
    values = jnp.einsum('krs,ksd->krd', weights.astype(pages.dtype), cached[1], preferred_element_type=jnp.float32)
    return new_top, total * shrink + weights.sum(-1, keepdims=True), out * shrink + values

  start = (
    jnp.full((kv_heads, rows, 1), _HIDDEN, jnp.float32),
    jnp.zeros((kv_heads, rows, 1), jnp.float32),
    jnp.zeros((kv_heads, rows, head_dim), jnp.float32),
  )
  first: int | jax.Array = 0
  if sliding_window is not None:
    first = jnp.maximum(last_visible.min() - sliding_window + 1, 0) // block_tokens
  _, total, out = jax.lax.fori_loop(first, -(-length // block_tokens), block, start)
  return out / jnp.where(total > 0, total, 1)
