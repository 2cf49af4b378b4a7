"""Attention of packed prompt chunks over paged keys and values, in plain jnp: this defines the answer."""

import jax
import jax.numpy as jnp


def prefill_attention(
  q: jax.Array,
  pages: jax.Array,
  tables: jax.Array,
  offsets: jax.Array,
  lengths: jax.Array,
  *,
  softmax_scale: float,
  sliding_window: int | None = None,
) -> jax.Array:
  """See `pallas_kernels.prefill_attention.prefill_attention`."""
  tokens, query_heads, head_dim = q.shape
  _, _, kv_heads, page_size, _ = pages.shape
  rows = jnp.arange(tokens)
  sequence = jnp.clip(jnp.searchsorted(offsets, rows, side='right') - 1, 0, lengths.shape[0] - 1)  # [T]
  position = lengths[sequence] - offsets[sequence + 1] + rows  # [T]
  cached = jnp.moveaxis(pages[tables], 1, 3).reshape(lengths.shape[0], 2, kv_heads, -1, head_dim)[sequence]
  queries = q.reshape(tokens, kv_heads, query_heads // kv_heads, head_dim).astype(jnp.float32)
  scores = jnp.einsum('tkrd,tksd->tkrs', queries, cached[:, 0].astype(jnp.float32)) * softmax_scale
  cached_position = jnp.arange(tables.shape[1] * page_size)
  visible = cached_position <= position[:, None]  # [T, S]
  if sliding_window is not None:
    visible &= cached_position > position[:, None] - sliding_window
  weights = jax.nn.softmax(scores, axis=-1, where=visible[:, None, None])
  out = jnp.einsum('tkrs,tksd->tkrd', weights, cached[:, 1].astype(jnp.float32)).reshape(q.shape)
  return jnp.where((rows < offsets[-1])[:, None, None], out, 0).astype(q.dtype)
