"""The use of the cluster from turn to turn: what changed since it was last asked for."""

from pdjax.serving.books import Books
from pdjax.serving.events import Occupancy, WorkerUse


class OccupancyWatch:
  """Compares the use of pages and slots, and the length of the queue, with what they were."""

  def __init__(self, books: Books):
    """Watch these books, in which nothing is used yet."""
    self._books = books
    self._uses = dict.fromkeys(books.places, (0, 0, 0))
    self._num_waiting = 0

  def take(self, now_s: float) -> Occupancy | None:
    """The use of the cluster, if any of it changed since the last call."""
    books, changed = self._books, []
    touched = (
      books.touched if len(books.touched) < 2 else sorted(books.touched, key=lambda name: books.places[name].number)
    )
    for name in touched:
      worker = books.places[name]
      use = worker.num_pages - worker.free_pages, len(worker.decoding), worker.cached_pages
      if use != self._uses[name]:
        self._uses[name] = use
        changed.append(WorkerUse(name, *use))
    books.touched.clear()
    num_waiting = len(self._books.waiting)
    if not changed and num_waiting == self._num_waiting:
      return None
    self._num_waiting = num_waiting
    return Occupancy(now_s, num_waiting, tuple(changed))
