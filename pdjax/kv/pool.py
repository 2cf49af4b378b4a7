"""Pool: the pages of one cache kind on the devices of one worker."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pdjax.kv.pages import KVPages
from pdjax.types.cache import CacheKind
from pdjax.types.pools import grown_pages
from pdjax.types.worker import WorkerSpec


class Pool:
  """The pages of one cache kind on one worker.

  Attributes:
    kind: The kind.
    mesh: The worker's devices.
    page_shapes: Shape, dtype, layout and sharding of the pages.
    pages: The pages, replaced by every program that updates them; there are none before `reset`.
  """

  pages: KVPages

  def __init__(self, kind: CacheKind, worker: WorkerSpec, mesh: Mesh):
    """Lay out the pages of a worker whose `num_pages`, `page_size` and `kv_dtype` are filled in.

    Raises:
      ValueError: if the heads on each device cannot have the worker's page layout.
    """
    assert worker.page_size is not None
    self.kind = kind
    self.mesh = mesh
    page_size = kind.entries_per_page(worker.page_size)
    num_pages = grown_pages(kind, worker)
    dtype = jnp.dtype(worker.cached_dtype)
    self.page_shapes = KVPages.shapes(kind, num_pages, page_size, dtype, mesh, worker.page_layout)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.page_shapes)
    zeros = functools.partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.page_shapes)
    self._make = jax.jit(zeros, out_shardings=shardings)

  def reset(self) -> None:
    """Begin with empty pages; those before are let go of first, as there may be no room for both."""
    if hasattr(self, 'pages'):
      self.delete()
    self.pages = self._make()

  def delete(self) -> None:
    """Let go of the pages' memory."""
    for leaf in jax.tree.leaves(self.pages):
      leaf.delete()

  @property
  def is_deleted(self) -> bool:
    """Whether a program has consumed some of its pages and brought none back."""
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(self.pages))
