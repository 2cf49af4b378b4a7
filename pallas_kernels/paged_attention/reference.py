"""Attention of single new tokens over paged keys and values, in plain jnp: this defines the answer."""

import jax

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
  return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `pallas_kernels.paged_attention.paged_attention`."""
  out, lse = attend(
    q[:, None],
    cached_tokens(pages, tables),
    lengths[:, None] - 1,
    softmax_scale=softmax_scale,
    sliding_window=sliding_window,
    soft_cap=soft_cap,
    sinks=sinks,
  )
  return (out[:, 0], lse[:, 0]) if return_lse else out[:, 0]
