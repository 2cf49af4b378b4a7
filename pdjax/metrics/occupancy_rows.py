"""The use of the cluster over time: one by one as `Occupancy`, and all together as arrays."""

from collections.abc import Sequence

import numpy as np

from pdjax.metrics.columns import Column, Read, numbered
from pdjax.serving.events import Occupancy, WorkerUse

_DTYPE = np.dtype([('now_s', 'f8'), ('waiting', 'i4'), ('use_end', 'i8')])
_USE_DTYPE = np.dtype([('now_s', 'f8'), ('worker', 'i2'), ('pages', 'i4'), ('decoding', 'i4'), ('cached', 'i4')])


class OccupancyRows(Read[Occupancy]):
  """The use of the cluster, whenever that changed, each made as it is read.

  Args:
    rows: `[N]`, a row each.
    uses: Those of workers, one row's behind another's.
    workers: The names of the workers.
  """

  def __init__(self, rows: np.ndarray | None = None, uses: np.ndarray | None = None, workers: Sequence[str] = ()):
    self.rows = np.empty(0, _DTYPE) if rows is None else rows
    self._uses = np.empty(0, _USE_DTYPE) if uses is None else uses
    self._workers = workers

  def __len__(self) -> int:
    return len(self.rows)

  def made(self, number: int) -> Occupancy:
    """The one of a number, in their order."""
    now_s, waiting, end = self.rows[number].item()
    start = self.rows['use_end'][number - 1] if number else 0
    uses = (WorkerUse(self._workers[worker], *counts) for _, worker, *counts in self._uses[start:end].tolist())
    return Occupancy(now_s, waiting, tuple(uses))

  def of_worker(self, name: str) -> np.ndarray:
    """The changes of a worker: `now_s`, `pages`, `decoding` and `cached` of each."""
    if name not in self._workers:
      return self._uses[:0]
    return self._uses[self._uses['worker'] == self._workers.index(name)]

  @property
  def nbytes(self) -> int:
    """Bytes of the arrays."""
    return self.rows.nbytes + self._uses.nbytes


class OccupancyColumns:
  """The use of the cluster as it changes, in arrays; it adds to the numbers of workers by name."""

  def __init__(self, workers: dict[str, int]):
    self._workers = workers
    self._rows, self._uses = Column(_DTYPE), Column(_USE_DTYPE)

  def add(self, now: Occupancy) -> None:
    """Add what it is now."""
    for use in now.workers:
      self._uses.append((now.now_s, numbered(self._workers, use.worker), use.pages, use.decoding, use.cached))
    self._rows.append((now.now_s, now.waiting, len(self._uses)))

  def rows(self, workers: Sequence[str]) -> OccupancyRows:
    """All of it so far."""
    return OccupancyRows(self._rows.array, self._uses.array, workers)
