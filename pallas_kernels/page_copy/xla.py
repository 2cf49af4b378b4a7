"""Pages copied and tokens appended in plain XLA: what CPU uses."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.page_copy import reference
from pallas_kernels.page_copy.conversion import PageLayout, convert

Layers = Sequence[jax.Array]

gather_pages = reference.gather_pages
append_tokens = reference.append_tokens


def scatter_pages(
  layers: Layers,
  ids: jax.Array,
  values: jax.Array,
  scales: Layers | None,
  value_scales: jax.Array | None,
  *,
  layout: PageLayout | None,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...] | None]:
  """See `reference.scatter_pages`.

  Page by page, in a loop that compiles several times as fast as XLA's scatter. A dropped page writes another one's
  old content back.
  """
  values, value_scales = convert(values, value_scales, layers[0].dtype, scales is not None, layout)
  num_pages, count = layers[0].shape[0], len(layers)
  pools = (*layers, *(scales or ()))

  def put(i, pools):
    rows = [values[i, j] for j in range(count)]
    if value_scales is not None:
      rows += [value_scales[i, j] for j in range(count)]
    page = jnp.clip(ids[i], 0, num_pages - 1)
    kept = page == ids[i]

    def one(pool, row):
      old = jax.lax.dynamic_index_in_dim(pool, page, 0, keepdims=False)
      return jax.lax.dynamic_update_index_in_dim(pool, jnp.where(kept, row, old), page, 0)

    return tuple(map(one, pools, rows))

  pools = jax.lax.fori_loop(0, ids.shape[0], put, pools)
  return pools[:count], None if scales is None else pools[count:]
