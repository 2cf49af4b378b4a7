"""Pages copied, in plain jnp: this defines the answer."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.conversion import convert
from pallas_kernels.layouts import PageLayout

Layers = Sequence[jax.Array]


def gather_pages(
  layers: Layers,
  ids: jax.Array,
  scales: Layers | None,
  *,
  dtype: jnp.dtype,
  scaled: bool,
  layout: PageLayout,
) -> tuple[jax.Array, jax.Array | None]:
  """`[n, L, A, C, G, W]` and scales `[n, L, 2, K, G]` or None; see `pallas_kernels.page_copy.gather_pages`."""
  ids = jnp.clip(ids, 0, layers[0].shape[0] - 1)
  pages = jnp.stack([layer[ids] for layer in layers], axis=1)
  return convert(pages, None if scales is None else jnp.stack([s[ids] for s in scales], 1), dtype, scaled, layout)


def scatter_pages(
  layers: Layers,
  ids: jax.Array,
  values: jax.Array,
  scales: Layers | None,
  value_scales: jax.Array | None,
  *,
  layout: PageLayout,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...] | None]:
  """The pools with `values` `[n, L, A, C, G, W]` in them; see `pallas_kernels.page_copy.scatter_pages`."""
  values, value_scales = convert(values, value_scales, layers[0].dtype, scales is not None, layout)
  ids = jnp.where(ids < 0, layers[0].shape[0], ids)
  layers = tuple(layer.at[ids].set(values[:, i], mode='drop') for i, layer in enumerate(layers))
  if scales is not None and value_scales is not None:
    scales = tuple(layer.at[ids].set(value_scales[:, i], mode='drop') for i, layer in enumerate(scales))
  return layers, None if scales is None else tuple(scales)
