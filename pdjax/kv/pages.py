"""The bytes of the KV cache: per-layer pools of pages, and the one place that knows their layout.

A layer's pool is `[P, A, C, G, W]` in one of the layouts of `pallas_kernels.PageLayout`; the plain one is
`[P, 2, K, G, D]`: page, key or value, key/value head, token in the page, head size. A page is one contiguous run that
holds every head, which is what a copy wants. C is cut over a mesh: each device has pages of the same layout with some
of the heads. What is gathered from a pool is plain, so that pools of unlike layouts understand each other.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import PageLayout, devices
from pdjax.types.cluster import PageLayoutName
from pdjax.types.model import ModelSpec

LAYER_SPEC = PartitionSpec(None, None, 'kv', None, None)  # of one layer's pool on a worker's mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVPages:
  """Every cached key and value on one worker."""

  layers: tuple[jax.Array, ...]  # L × [P, A, C, G, W]
  head_dim: int = dataclasses.field(metadata={'static': True})  # D, which with their shape tells their layout

  @property
  def layout(self) -> PageLayout:
    """How a page holds its keys and values; on one device, if these are its shard."""
    return PageLayout.of(self.layers[0].shape, self.head_dim)

  @property
  def num_pages(self) -> int:
    """Pages in the pool."""
    return self.layers[0].shape[0]

  @property
  def page_size(self) -> int:
    """Tokens per page."""
    return self.layout.page_size

  @property
  def kv_heads(self) -> int:
    """Key/value heads."""
    return self.layout.kv_heads

  @property
  def dtype(self) -> jnp.dtype:
    """Of every element."""
    return self.layers[0].dtype

  @classmethod
  def shapes(
    cls,
    model: ModelSpec,
    num_pages: int,
    page_size: int,
    dtype: jnp.dtype,
    mesh: Mesh,
    layout: PageLayoutName = 'auto',
  ) -> 'KVPages':
    """The pool's shapes, dtypes and shardings, without its bytes.

    Raises:
      ValueError: if the heads on each device cannot have such a layout.
    """
    shape = (num_pages, *choose_layout(model, page_size, mesh, layout).page_shape)
    layer = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, LAYER_SPEC))
    layers: Any = (layer,) * model.num_layers
    return cls(layers, model.head_dim)


def choose_layout(model: ModelSpec, page_size: int, mesh: Mesh, layout: PageLayoutName = 'auto') -> PageLayout:
  """The layout of a pool over a mesh: the one that is asked for, or what its devices read fastest.

  Raises:
    ValueError: if the heads on each device cannot have it.
  """
  heads = model.kv_heads // mesh.shape['kv']  # on each device
  name: str = layout
  if layout == 'auto':
    name = PageLayout.best(devices.of(mesh.devices.flat[0]), heads, page_size, model.head_dim).name
  if name == 'paired' and heads % 2:
    raise ValueError(
      f'page_layout is {name!r}, which wants an even number of key/value heads on each device, but with tp={mesh.size} '
      f"there are {heads} of the {model.kv_heads} of {model.name!r}; set page_layout to 'kv' or 'auto', or change tp."
    )
  return PageLayout(name, model.kv_heads, page_size, model.head_dim)


def page_bytes(model: ModelSpec, page_size: int, dtype: jnp.dtype) -> int:
  """Bytes of one page over all layers and heads."""
  return page_size * model.kv_bytes_per_token(jnp.dtype(dtype).itemsize)


GATHERED_HEADS_AXIS = 3  # of what `gather` returns
GATHERED_SPEC = PartitionSpec(None, None, None, 'kv')


def gathered_shape(pages: KVPages, count: int, kv_heads: int) -> tuple[int, ...]:
  """The shape of `count` gathered pages cut down to `kv_heads` heads."""
  return count, len(pages.layers), 2, kv_heads, pages.page_size, pages.head_dim


def gather(pages: KVPages, ids: jax.Array) -> jax.Array:
  """The pages `ids` `[n]` of every layer as one array `[n, L, 2, K, G, D]`, whatever their layout."""
  return pages.layout.unpack(jnp.stack([layer[ids] for layer in pages.layers], axis=1))


def scatter(pages: KVPages, ids: jax.Array, values: jax.Array) -> KVPages:
  """Put `values` `[n, L, 2, K, G, D]` into the pages `ids` `[n]`, whatever their layout.

  Page by page, in a loop that compiles several times as fast as XLA's scatter.
  """
  packed = pages.layout.pack(values)  # [n, L, A, C, G, W]

  def put(i, layers):
    page = packed[i]
    return tuple(jax.lax.dynamic_update_index_in_dim(layer, page[j], ids[i], 0) for j, layer in enumerate(layers))

  return dataclasses.replace(pages, layers=jax.lax.fori_loop(0, ids.shape[0], put, pages.layers))


def copy(pages: KVPages, source: jax.Array, target: jax.Array) -> KVPages:
  """Copy one page over another. For several pages, call it again: a loop compiles twenty times as long."""

  def put(layer):
    page = jax.lax.dynamic_index_in_dim(layer, source, 0, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(layer, page, target, 0)

  return dataclasses.replace(pages, layers=tuple(map(put, pages.layers)))
