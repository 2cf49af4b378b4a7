"""Attention of the newest tokens over paged keys and values, in plain jnp: this defines the answer."""

import jax
import jax.numpy as jnp

from pallas_kernels.dense import attend, cached_tokens


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
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `pallas_kernels.paged_attention.paged_attention`."""
  queries = q if q.ndim == 4 else q[:, None]  # [B, Q, H, D]
  out, lse = attend(
    queries,
    cached_tokens(pages, scales, tables, q.shape[-1]),
    lengths[:, None] + jnp.arange(-queries.shape[1], 0),
    softmax_scale=softmax_scale,
    sliding_window=sliding_window,
    soft_cap=soft_cap,
    sinks=sinks,
  )
  out, lse = out.reshape(q.shape), lse.reshape(q.shape[:-1])
  return (out, lse) if return_lse else out
