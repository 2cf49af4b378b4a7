"""Workers that can be given another step, kept as things change and not searched."""

from collections.abc import Callable

from pdjax.serving.orders import MAX_ORDERS
from pdjax.serving.place import WorkerState


class AbleWorkers:
  """Those that have work of one phase and can be given another step for it.

  Args:
    has_work: Whether a worker has work of the phase.
  """

  def __init__(self, has_work: Callable[[WorkerState], bool]):
    self._has_work = has_work
    self._able: tuple[WorkerState, ...] = ()
    self._changed: dict[int, WorkerState] = {}  # since it was last asked for them, by position in the config

  def look_at(self, worker: WorkerState) -> None:
    """Note that something about a worker changed."""
    self._changed[worker.number] = worker

  def found(self) -> tuple[WorkerState, ...]:
    """Those that are able now, in the order of the config; only workers that changed are looked at."""
    if changed := self._changed:
      able = [worker for worker in self._able if worker.number not in changed]
      able += [one for one in changed.values() if one.up and one.num_steps < MAX_ORDERS and self._has_work(one)]
      able.sort(key=_number)
      self._able = tuple(able)
      changed.clear()
    return self._able


def _number(worker: WorkerState) -> int:
  return worker.number
