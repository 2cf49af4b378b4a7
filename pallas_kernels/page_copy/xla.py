"""Pages copied in plain XLA: what CPU uses."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.conversion import convert
from pallas_kernels.layouts import PageLayout
from pallas_kernels.page_copy import reference

Layers = Sequence[jax.Array]

gather_pages = reference.gather_pages


def scatter_pages(
  layers: Layers,
  ids: jax.Array,
  values: jax.Array,
  scales: Layers | None,
  value_scales: jax.Array | None,
  *,
  layout: PageLayout,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...] | None]:
  """See `reference.scatter_pages`.

  Page by page, in a loop over those that stay, which compiles several times as fast as XLA's scatter.
  """
  values, value_scales = convert(values, value_scales, layers[0].dtype, scales is not None, layout)
  count = len(layers)
  stays = (ids >= 0) & (ids < layers[0].shape[0])
  order = jnp.argsort(~stays, stable=True)

  def put(step, pools):
    i = order[step]
    rows = [*values[i], *(() if value_scales is None else value_scales[i])]
    return tuple(
      jax.lax.dynamic_update_index_in_dim(pool, row, ids[i], 0) for pool, row in zip(pools, rows, strict=True)
    )

  pools = jax.lax.fori_loop(0, stays.sum(), put, (*layers, *(scales or ())))
  return pools[:count], None if scales is None else pools[count:]
