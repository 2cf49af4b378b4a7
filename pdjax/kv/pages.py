"""The bytes of the KV cache: per-layer pools of pages, and the one place that knows their layout.

A layer's pool is `[P, 2, K, G, D]`: page, key or value, key/value head, token in the page, head size. A page is one
contiguous run that holds every head, which is what a copy wants.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pdjax.types.model import ModelSpec

LAYER_SPEC = PartitionSpec(None, None, 'kv', None, None)  # of one layer's pool on a worker's mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVPages:
  """Every cached key and value on one worker."""

  layers: tuple[jax.Array, ...]  # L × [P, 2, K, G, D]

  @property
  def num_pages(self) -> int:
    """Pages in the pool."""
    return self.layers[0].shape[0]

  @property
  def page_size(self) -> int:
    """Tokens per page."""
    return self.layers[0].shape[3]

  @property
  def kv_heads(self) -> int:
    """Key/value heads."""
    return self.layers[0].shape[2]

  @property
  def dtype(self) -> jnp.dtype:
    """Of every element."""
    return self.layers[0].dtype

  @classmethod
  def shapes(cls, model: ModelSpec, num_pages: int, page_size: int, dtype: jnp.dtype, mesh: Mesh) -> 'KVPages':
    """The pool's shapes, dtypes and shardings, without its bytes."""
    shape = (num_pages, 2, model.kv_heads, page_size, model.head_dim)
    layer = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, LAYER_SPEC))
    layers: Any = (layer,) * model.num_layers
    return cls(layers)


def page_bytes(model: ModelSpec, page_size: int, dtype: jnp.dtype) -> int:
  """Bytes of one page over all layers and heads."""
  return page_size * model.kv_bytes_per_token(jnp.dtype(dtype).itemsize)


GATHERED_HEADS_AXIS = 3  # of what `gather` returns
GATHERED_SPEC = PartitionSpec(None, None, None, 'kv')


def gathered_shape(pages: KVPages, count: int, kv_heads: int) -> tuple[int, ...]:
  """The shape of `count` gathered pages cut down to `kv_heads` heads."""
  _, both, _, page_size, head_dim = pages.layers[0].shape
  return count, len(pages.layers), both, kv_heads, page_size, head_dim


def gather(pages: KVPages, ids: jax.Array) -> jax.Array:
  """The pages `ids` `[n]` of every layer as one array `[n, L, 2, K, G, D]`."""
  return jnp.stack([layer[ids] for layer in pages.layers], axis=1)


def scatter(pages: KVPages, ids: jax.Array, values: jax.Array) -> KVPages:
  """Put `values` `[n, L, 2, K, G, D]` into the pages `ids` `[n]`.

  Page by page, in a loop that compiles several times as fast as XLA's scatter.
  """

  def put(i, layers):
    page = values[i]  # [L, 2, K, G, D]
    return tuple(jax.lax.dynamic_update_index_in_dim(layer, page[j], ids[i], 0) for j, layer in enumerate(layers))

  return KVPages(jax.lax.fori_loop(0, ids.shape[0], put, pages.layers))


def copy(pages: KVPages, source: jax.Array, target: jax.Array) -> KVPages:
  """Copy one page over another. For several pages, call it again: a loop compiles twenty times as long."""

  def put(layer):
    page = jax.lax.dynamic_index_in_dim(layer, source, 0, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(layer, page, target, 0)

  return KVPages(tuple(map(put, pages.layers)))
