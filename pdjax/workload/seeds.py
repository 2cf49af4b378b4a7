"""Seeds of requests that come without one: drawn from the run's seed, in the order of arrival."""

from collections.abc import Sequence

from pdjax.serving.events import Arrived, Finished, Withdrawn
from pdjax.serving.loop import Arrivals


class Seeded:
  """A source of requests in which each has a seed when it comes, see `Request.seeded`; those with one keep it.

  Args:
    arrivals: The source of the requests.
    seed: The run's.
  """

  def __init__(self, arrivals: Arrivals, seed: int):
    self._arrivals = arrivals
    self._seed = seed
    self._num_arrived = 0

  @property
  def closed(self) -> bool:
    return self._arrivals.closed

  def next_s(self) -> float:
    return self._arrivals.next_s()

  def due(self, now_s: float, finished: Sequence[Finished] = ()) -> list[Arrived | Withdrawn]:
    return [self._seeded(event) for event in self._arrivals.due(now_s, finished)]

  def output_len(self, request_id: str) -> int | None:
    return self._arrivals.output_len(request_id)

  def _seeded(self, event: Arrived | Withdrawn) -> Arrived | Withdrawn:
    if not isinstance(event, Arrived):
      return event
    number, self._num_arrived = self._num_arrived, self._num_arrived + 1
    return Arrived(event.request.seeded(self._seed, number))
