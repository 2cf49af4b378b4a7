"""The bytes of the KV cache: per-layer pools of pages, and the one place that knows their layout.

A layer's pool is `[P, A, C, G, W]` in one of the layouts of `pallas_kernels.PageLayout`; the plain one is
`[P, 2, K, G, D]`: page, key or value, key/value head, token in the page, head size. A page is one contiguous run that
holds every head, which is what a copy wants. C is cut over a mesh: each device has pages of the same layout with some
of the heads. Units gathered from a pool are plain, so that pools of unlike layouts understand each other.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import PageLayout, devices, gather_pages, scatter_pages
from pallas_kernels.conversion import convert
from pdjax.types.cache import CacheKind
from pdjax.types.worker import PageLayoutName

LAYER_SPEC = PartitionSpec(None, None, 'kv')  # of one layer's pool on a worker's mesh, and of its scales


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVPages:
  """Every cached key and value on one worker."""

  layers: tuple[jax.Array, ...]  # L × [P, A, C, G, W]
  head_dim: int = dataclasses.field(metadata={'static': True})  # D, which with their shape tells their layout
  scales: tuple[jax.Array, ...] = ()  # L × [P, 2, K, G] float32, of int8 pages: one for each token and head

  @property
  def layout(self) -> PageLayout:
    """The layout of keys and values in a page; on one device, if these are its shard."""
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
    """The dtype of every element."""
    return self.layers[0].dtype

  def part(self, first: int, stop: int) -> 'KVPages':
    """The layers from `first` up to `stop`."""
    return dataclasses.replace(self, layers=self.layers[first:stop], scales=self.scales[first:stop])

  def with_part(self, first: int, part: 'KVPages') -> 'KVPages':
    """All layers, those from `first` on replaced by a part."""
    stop = first + len(part.layers)
    layers = (*self.layers[:first], *part.layers, *self.layers[stop:])
    return dataclasses.replace(self, layers=layers, scales=(*self.scales[:first], *part.scales, *self.scales[stop:]))

  @classmethod
  def shapes(
    cls,
    kind: CacheKind,
    num_pages: int,
    page_size: int,
    dtype: jnp.dtype,
    mesh: Mesh | AbstractMesh,
    layout: PageLayoutName = 'auto',
  ) -> 'KVPages':
    """The shapes, dtypes and shardings of a cache kind's pool, without its bytes.

    Raises:
      ValueError: if the heads on each device cannot have such a layout.
    """
    kv_heads, head_dim = _heads(kind)
    shape = (num_pages, *choose_layout(kind, page_size, mesh, layout).page_shape)
    layer = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, LAYER_SPEC))
    layers: Any = (layer,) * len(kind.layers)
    if jnp.dtype(dtype) != jnp.int8:
      return cls(layers, head_dim)
    of_scales = (num_pages, 2, kv_heads, page_size)
    scale: Any = jax.ShapeDtypeStruct(of_scales, jnp.float32, sharding=layer.sharding)
    return cls(layers, head_dim, (scale,) * len(kind.layers))


def _heads(kind: CacheKind) -> tuple[int, int]:
  """Key/value heads and head size of a cache kind of keys and values."""
  (array,) = kind.arrays
  assert kind.grows and array.cut == 1 and len(array.shape) == 3 and array.shape[0] == 2, f'{kind} is not computed'
  _, kv_heads, head_dim = array.shape
  return kv_heads, head_dim


def choose_layout(
  kind: CacheKind, page_size: int, mesh: Mesh | AbstractMesh, layout: PageLayoutName = 'auto'
) -> PageLayout:
  """The layout of a pool over a mesh: the one that is asked for, or what its devices read fastest.

  Raises:
    ValueError: if the heads on each device cannot have it.
  """
  kv_heads, head_dim = _heads(kind)
  heads = kv_heads // mesh.shape['kv']  # on each device
  name: str = layout
  if layout == 'auto':
    assert not isinstance(mesh, AbstractMesh), 'devices that are elsewhere are not asked'
    name = PageLayout.best(devices.of(mesh.devices.flat[0]), heads, page_size, head_dim).name
  if name == 'paired' and heads % 2:
    raise ValueError(
      f'page_layout is {name!r}, which wants an even number of key/value heads on each device, but with tp={mesh.size} '
      f"there are {heads} of the {kv_heads} of the model; set page_layout to 'kv' or 'auto', or change tp."
    )
  return PageLayout(name, kv_heads, page_size, head_dim)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Units:
  """Cached tokens outside of a pool, as equal pieces of pages: plain, whatever the layout of the pool."""

  values: jax.Array  # [n, L, 2, K, U, D]
  scales: jax.Array | None = None  # [n, L, 2, K, U] float32, of int8 values

  HEADS_AXIS = 3
  SPEC = PartitionSpec(None, None, None, 'kv')

  @classmethod
  def shapes(
    cls, pages: KVPages, count: int, kv_heads: int, tokens: int, dtype: jnp.dtype, copies: int, sharding: NamedSharding
  ) -> 'Units':
    """Shapes of `count` units of a pool cut down to `kv_heads` heads, behind an axis of copies."""
    shape = copies, count, len(pages.layers), 2, kv_heads, tokens, pages.head_dim
    values: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    scales: Any = jax.ShapeDtypeStruct(shape[:-1], jnp.float32, sharding=sharding)
    return cls(values, scales if jnp.dtype(dtype) == jnp.int8 else None)


def gather(pages: KVPages, places: jax.Array, tokens: int, dtype: jnp.dtype) -> Units:
  """Units of so many tokens out of every layer, in another dtype if it differs.

  Args:
    pages: The pool.
    places: `[n, 2]` the page of each unit, and the first of its tokens there.
    tokens: U, which divides the page size.
    dtype: To convert to.
  """
  layers, scales, ids = list(pages.layers), list(pages.scales), places[:, 0]
  if tokens < pages.page_size:
    layers, scales = ([_cut(layer, places, tokens) for layer in pools] for pools in (layers, scales))
    ids = jnp.arange(places.shape[0])
  found = gather_pages(layers, ids, scales=scales or None, dtype=dtype, head_dim=pages.head_dim)
  values, value_scales = found if isinstance(found, tuple) else (found, None)
  return Units(pages.layout.unpack(values), value_scales)


def _cut(layer: jax.Array, places: jax.Array, tokens: int) -> jax.Array:
  """Units `[n, A, C, U, W]` of a layer `[P, A, C, G, W]`, or the scales `[n, 2, K, U]` of one."""
  size = 1, *layer.shape[1:3], tokens, *layer.shape[4:]

  def cut(place):
    return jax.lax.dynamic_slice(layer, (place[0], 0, 0, place[1], 0)[: layer.ndim], size)[0]

  return jax.vmap(cut)(places)


def scatter(pages: KVPages, places: jax.Array, units: Units) -> KVPages:
  """Put units into the places `[n, 2]` of a pool: page, and first token there. They become what the pool is."""
  layout, layers, scales = pages.layout, list(pages.layers), list(pages.scales)
  tokens = units.values.shape[-2]
  if tokens == pages.page_size:
    packed = layout.pack(units.values)  # [n, L, A, C, G, W]
    put = scatter_pages(layers, places[:, 0], packed, scales=scales or None, value_scales=units.scales)
    layers, scales = put if scales else (put, [])
    return dataclasses.replace(pages, layers=tuple(layers), scales=tuple(scales))
  plain = PageLayout('plain', layout.kv_heads, tokens, layout.head_dim)
  values, value_scales = convert(units.values, units.scales, pages.dtype, bool(scales), plain)
  packed = layout.pack(values)

  def put_one(i, pools):
    page, first = places[i]
    rows = [*packed[i], *(() if value_scales is None else value_scales[i])]
    return tuple(
      jax.lax.dynamic_update_slice(pool, row[None], (page, 0, 0, first, 0)[: pool.ndim])
      for pool, row in zip(pools, rows, strict=True)
    )

  pools = jax.lax.fori_loop(0, places.shape[0], put_one, (*layers, *scales))
  return dataclasses.replace(pages, layers=pools[: len(layers)], scales=pools[len(layers) :])


def copy(pages: KVPages, source: jax.Array, target: jax.Array) -> KVPages:
  """Copy one page over another. For several pages, call it again: a loop compiles twenty times as long."""

  def put(layer):
    page = jax.lax.dynamic_index_in_dim(layer, source, 0, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(layer, page, target, 0)

  return dataclasses.replace(pages, layers=tuple(map(put, pages.layers)), scales=tuple(map(put, pages.scales)))
