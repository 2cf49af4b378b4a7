"""Pools of pages filled at random, as far as a transfer sees a worker."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pdjax.kv import KVPages
from pdjax.kv.transfer import DevicePut
from pdjax.sharding import make_mesh
from pdjax.types import ModelSpec, TransferSpec

PAGE_SIZE = 4
FLOAT32 = jnp.dtype('float32')


@dataclasses.dataclass
class Pool:
  """A worker, as far as a transfer sees it."""

  mesh: jax.sharding.Mesh
  pages: KVPages
  page_shapes: KVPages

  @classmethod
  def random(
    cls, model: ModelSpec, devices, num_pages: int, seed: int, dtype=FLOAT32, layout='auto', page_size=PAGE_SIZE
  ) -> 'Pool':
    mesh = make_mesh(model, devices)
    shapes = KVPages.shapes(model.cache[0], num_pages, page_size, dtype, mesh, layout)
    rng = np.random.default_rng(seed)

    def fill(leaf):
      values = rng.standard_normal(leaf.shape, np.float32)
      if leaf.dtype == jnp.int8:
        values = np.round(values * 40).clip(-127, 127)
      elif leaf.ndim == 4:  # scales
        values = np.abs(values) / 100
      return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return cls(mesh, jax.tree.map(fill, shapes), shapes)

  def values(self) -> list[np.ndarray]:
    """The elements stored in each layer, `[P, 2, K, G, D]` whatever its layout."""
    return [np.array(self.pages.layout.unpack(np.asarray(layer))) for layer in self.pages.layers]

  def numbers(self) -> np.ndarray:
    """The values they stand for, `[P, G, L, 2, K, D]`."""
    numbers = np.stack(self.values()).astype(np.float32)
    if self.pages.scales:
      numbers *= np.stack([np.asarray(scales) for scales in self.pages.scales])[..., None]
    return numbers.transpose(1, 4, 0, 2, 3, 5)


def four_units_at_most(source: Pool, target: Pool) -> TransferSpec:
  """Batches of one unit and of four."""
  return TransferSpec(
    piece_bytes=4 * DevicePut(source, target, TransferSpec()).pieces.unit_bytes(len(source.pages.layers))
  )
