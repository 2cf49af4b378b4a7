"""Attention of single new tokens over paged keys and values, in plain jnp: this defines the answer."""

import jax
import jax.numpy as jnp


def paged_attention(
  q: jax.Array,
  pages: jax.Array,
  tables: jax.Array,
  lengths: jax.Array,
  *,
  softmax_scale: float,
  sliding_window: int | None = None,
) -> jax.Array:
  """See `pallas_kernels.paged_attention.paged_attention`."""
  batch, query_heads, head_dim = q.shape
  _, _, kv_heads, page_size, _ = pages.shape
  cached = pages[tables]  # [B, N, 2, K, G, D]
  cached = jnp.moveaxis(cached, 1, 3).reshape(batch, 2, kv_heads, -1, head_dim)  # [B, 2, K, S, D]
  queries = q.reshape(batch, kv_heads, query_heads // kv_heads, head_dim).astype(jnp.float32)
  scores = jnp.einsum('bkrd,bksd->bkrs', queries, cached[:, 0].astype(jnp.float32)) * softmax_scale
  position = jnp.arange(tables.shape[1] * page_size)
  visible = position < lengths[:, None]  # [B, S]
  if sliding_window is not None:
    visible &= position >= lengths[:, None] - sliding_window
  weights = jax.nn.softmax(scores, axis=-1, where=visible[:, None, None])
  out = jnp.einsum('bkrs,bksd->bkrd', weights, cached[:, 1].astype(jnp.float32))
  return jnp.where(lengths[:, None, None] > 0, out.reshape(q.shape), 0).astype(q.dtype)
