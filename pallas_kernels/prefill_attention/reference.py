"""Attention of packed prompt chunks over paged keys and values, in plain jnp: this defines the answer."""

import jax
import jax.numpy as jnp

from pallas_kernels.dense import attend, cached_tokens


def prefill_attention(
  q: jax.Array,
  pages: jax.Array,
  tables: jax.Array,
  offsets: jax.Array,
  lengths: jax.Array,
  *,
  softmax_scale: float,
  sliding_window: int | None = None,
  soft_cap: float | None = None,
  sinks: jax.Array | None = None,
  scales: jax.Array | None = None,
  return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `pallas_kernels.prefill_attention.prefill_attention`."""
  rows = jnp.arange(q.shape[0])
  sequence = jnp.clip(jnp.searchsorted(offsets, rows, side='right') - 1, 0, lengths.shape[0] - 1)  # [T]
  position = jnp.where(rows < offsets[-1], lengths[sequence] - offsets[sequence + 1] + rows, -1)  # [T]
  out, lse = attend(
    q[:, None],
    cached_tokens(pages, scales, tables, q.shape[-1])[sequence],
    position[:, None],
    softmax_scale=softmax_scale,
    sliding_window=sliding_window,
    soft_cap=soft_cap,
    sinks=sinks,
  )
  return (out[:, 0], lse[:, 0]) if return_lse else out[:, 0]
