"""Place: pools of pages on one mesh, one for each cache kind."""

import jax
from jax.sharding import Mesh

from pdjax.kv.pages import KVPages
from pdjax.kv.pool import Pool
from pdjax.types.cache import KV
from pdjax.types.model import ModelSpec
from pdjax.types.worker import WorkerSpec


class Place:
  """Holds pages, which transfers read and write; a `Worker` runs steps over them too.

  Attributes:
    spec: Its description.
    model: The model whose cache it holds.
    mesh: Its devices; of memory of the host, a CPU device.
    pools: Its pages, by cache kind.
    incarnation: The number of its incarnation, from 1.
  """

  def __init__(self, spec: WorkerSpec, model: ModelSpec, mesh: Mesh):
    """Make an empty one; `num_pages`, `page_size` and `kv_dtype` must be filled in."""
    assert isinstance(spec.num_pages, int) and spec.page_size and spec.kv_dtype
    self.spec = spec
    self.model = model
    self.mesh = mesh
    self.incarnation = 0
    self.pools = {kind.name: Pool(kind, spec, mesh) for kind in model.cache}

  def reset(self) -> None:
    """Start over with empty pages, as a new incarnation."""
    self.incarnation += 1
    for pool in self.pools.values():
      pool.reset()

  def make_ready(self) -> None:
    """Wait until its pages are there: a large memory takes a while to be filled, which nobody is to wait for later."""
    jax.block_until_ready([pool.pages for pool in self.pools.values()])

  @property
  def broken(self) -> bool:
    """Whether something that failed has consumed the pages it was given."""
    return any(pool.is_deleted for pool in self.pools.values())

  @property
  def pages(self) -> KVPages:
    """The pages of keys and values."""
    return self.pools[KV].pages

  @pages.setter
  def pages(self, pages: KVPages) -> None:
    self.pools[KV].pages = pages

  @property
  def page_shapes(self) -> KVPages:
    """Their shapes, dtypes and shardings."""
    return self.pools[KV].page_shapes

  def forget(self, request: str) -> None:
    """Let go of a request that was ended from outside: pages alone know of none."""

  def forget_all(self) -> None:
    """Let go of all requests."""


def host_device(platform: str, spare: int) -> jax.Device:
  """A CPU device, whose memory is the host's, for a place beside workers on devices of a platform.

  Args:
    platform: Of the workers' devices.
    spare: The index of a device that no worker has, if these are CPU devices; without so many, the last is taken.
  """
  devices = jax.devices('cpu')
  return devices[min(spare, len(devices) - 1)] if platform == 'cpu' else devices[0]
