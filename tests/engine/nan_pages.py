"""A backend whose free pages are full of NaN, so that whoever looks at what nobody wrote gets no token."""

import types
from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pdjax.engine.worker import Worker
from pdjax.serving import ClusterState
from pdjax.serving.events import Event
from pdjax.serving.loop import Backend
from pdjax.serving.orders import Order, StepOrder


@jax.jit
def _filled(pages, of, value):
  """Pages, of which some hold nothing but this value."""
  return jax.tree.map(
    lambda leaf: jnp.where(of.reshape(-1, *[1] * (leaf.ndim - 1)), jnp.asarray(value, leaf.dtype), leaf), pages
  )


def _copied(orders: Sequence[Order]) -> dict[str, set[int]]:
  """The pages, by worker, that orders copy first: the books let go of them, as whatever comes is written after that."""
  found: dict[str, set[int]] = {}
  for order in orders:
    if isinstance(order, StepOrder):
      copies = [chunk.copies for chunk in order.chunks]
      copies += [join.admission.copies for join in order.joins if join.admission is not None]
      pairs = [pair for one in copies for some in one.values() for pair in some]
      found.setdefault(order.worker, set()).update(source for source, _ in pairs)
  return found


class NaNPages:
  """A backend that fills pages with NaN before every order and every wait.

  Those that nobody holds and that have nothing cached, whatever was left there; and those that somebody has taken
  since, of which the blocks were forgotten. What is to be found there, an order that comes now or later has to write.

  Attributes:
    num_filled: Pages that were filled, counted again each time.
  """

  def __init__(self, backend: Backend, workers: Mapping[str, Worker], state: ClusterState):
    self.num_filled = 0
    self._backend = backend
    self._workers = workers
    self._state = state
    self._was_free: dict[tuple[str, str], np.ndarray] = {}
    for worker in workers.values():  # compiles what there is to be compiled
      for pool in worker.pools.values():
        self._fill(pool, np.ones(0, bool), np.nan)

  def submit(self, orders: Sequence[Order]) -> None:
    self._fill_all(_copied(orders))
    self._backend.submit(orders)

  def wait(self, until_s: float) -> tuple[float, Sequence[Event]]:
    self._fill_all()
    return self._backend.wait(until_s)

  def clean(self) -> None:
    """Let no page have NaN any more."""
    for worker in self._workers.values():
      for pool in worker.pools.values():
        self._fill(pool, np.ones(0, bool), 0.0)

  def _fill_all(self, spared: Mapping[str, Collection[int]] = types.MappingProxyType({})) -> None:
    for name, worker in self._workers.items():
      for kind, place in self._state.books.holdings[name].pages.by_kind.items():
        free = np.array(place.holders) == 0
        cached = np.array([place.is_cached(page) for page in range(place.num_pages)])
        of = ~cached & (free | self._was_free.get((name, kind), free))
        of[[*spared.get(name, ())]] = False
        self._was_free[name, kind] = free
        self.num_filled += int(of.sum())
        if of.any() and not worker.broken:
          self._fill(worker.pools[kind], of, np.nan)

  def _fill(self, pool, of: np.ndarray, value: float) -> None:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, pool.pages)
    size = len(jax.tree.leaves(pool.pages)[0])  # of which the books may know only the first
    filled = _filled(pool.pages, np.pad(of, (0, size - len(of)), constant_values=True), np.float32(value))
    assert jax.tree.map(lambda leaf: leaf.sharding, filled) == shardings
    pool.pages = filled
