"""Tokens appended to pages, in plain jnp: this defines the answer."""

import jax
import jax.numpy as jnp

from pallas_kernels.conversion import cast, quantize
from pallas_kernels.layouts import PageLayout


def append_tokens(
  pages: jax.Array,
  k: jax.Array,
  v: jax.Array,
  page: jax.Array,
  offset: jax.Array,
  scales: jax.Array | None,
  *,
  layout: PageLayout,
) -> tuple[jax.Array, jax.Array | None]:
  """One layer's pool with new tokens in it; see `pallas_kernels.token_append.append_tokens`."""
  tokens = jnp.stack([k, v], axis=1)  # [T, 2, K, D]
  page = jnp.where((page < 0) | (offset < 0) | (offset >= pages.shape[3]), pages.shape[0], page)
  if scales is not None:
    tokens, new_scales = quantize(tokens, pages.dtype)
    scales = scales.at[page, :, :, offset].set(new_scales, mode='drop')
  rows = cast(layout.pack(tokens[..., None, :])[..., 0, :], pages.dtype)  # [T, A, C, W]
  return pages.at[page, :, :, offset].set(rows, mode='drop'), scales
