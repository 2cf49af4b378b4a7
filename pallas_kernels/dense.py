"""Attention over whole sequences at once, in plain jnp: what the references of both attentions share."""

import jax
import jax.numpy as jnp

from pallas_kernels.layouts import PageLayout


def cached_tokens(pages: jax.Array, scales: jax.Array | None, tables: jax.Array, head_dim: int) -> jax.Array:
  """Keys and values of pages `[P, A, C, G, W]` in the order of their sequences: `[B, 2, K, S, D]` in float32."""
  cached = PageLayout.of(pages.shape, head_dim).unpack(pages[tables]).astype(jnp.float32)  # [B, N, 2, K, G, D]
  if scales is not None:
    cached *= scales[tables][..., None]
  cached = jnp.moveaxis(cached, 1, 3)  # [B, 2, K, N, G, D]
  return cached.reshape(*cached.shape[:3], -1, head_dim)


def attend(
  q: jax.Array,
  cached: jax.Array,
  position: jax.Array,
  *,
  softmax_scale: float,
  sliding_window: int | None,
  soft_cap: float | None,
  sinks: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Attend from queries to their sequences' tokens.

  Args:
    q: `[B, Q, H, D]`.
    cached: `[B, 2, K, S, D]`.
    position: `[B, Q]`, where in its sequence each query stands: it sees the tokens up to there; below 0, none.
    softmax_scale: Multiplies the scores.
    sliding_window: Tokens that a query sees, or None for all.
    soft_cap: Bounds the scores, or None.
    sinks: `[H]`, scores of a token more that has no value, or None.

  Returns:
    `[B, Q, H, D]` in q's dtype and the logarithm of each softmax's sum `[B, Q, H]`.
  """
  batch, queries, query_heads, head_dim = q.shape
  keys, values = cached[:, 0], cached[:, 1]  # [B, K, S, D]
  kv_heads = keys.shape[1]
  grouped = q.reshape(batch, queries, kv_heads, -1, head_dim).astype(jnp.float32)
  scores = jnp.einsum('bqkrd,bksd->bqkrs', grouped, keys) * softmax_scale
  if soft_cap is not None:
    scores = soft_cap * jnp.tanh(scores / soft_cap)
  token = jnp.arange(keys.shape[2])
  visible = token <= position[..., None]  # [B, Q, S]
  if sliding_window is not None:
    visible &= token > position[..., None] - sliding_window
  scores = jnp.where(visible[:, :, None, None], scores, -jnp.inf)
  if sinks is not None:
    sink = jnp.broadcast_to(sinks.reshape(kv_heads, -1, 1), (*scores.shape[:-1], 1))
    scores = jnp.concatenate([scores, sink], axis=-1)
  top = jnp.maximum(scores.max(-1, keepdims=True), -1e30)  # finite where nothing is seen
  weights = jnp.exp(scores - top)
  total = weights.sum(-1, keepdims=True)
  weights = weights[..., : token.size] / jnp.where(total == 0, 1, total)
  seen = visible.any(1)[:, None, :, None]  # what no query sees may be NaN, of which 0 times is NaN too
  values = jnp.where(seen, values, 0)
  out = jnp.einsum('bqkrs,bksd->bqkrd', weights, values)
  lse = (top + jnp.log(total)).reshape(batch, queries, query_heads)
  return out.reshape(q.shape).astype(q.dtype), jnp.where((position >= 0)[..., None], lse, -jnp.inf)
