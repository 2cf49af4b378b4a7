"""Workers that are lost on purpose: for how long each is away, and what is told of it meanwhile."""

import dataclasses
from collections.abc import Callable

from experiments.faults.engine_faults import FaultyEngine
from pdjax.serving.events import Event, WorkerBack, WorkerLost

NOBODY_BRINGS_IT_BACK = 'it is gone, and nobody brings it back'


@dataclasses.dataclass(frozen=True)
class Loss:
  """A way in which a worker is lost.

  Attributes:
    kind: The kind of fault.
    down_s: Seconds until it is told to be back.
    returning: Whether it is told to be on its way back meanwhile.
    given_up_after_s: Seconds until it is told that nobody brings it back any longer; None if that is not told.
  """

  kind: str
  down_s: float = 0.0
  returning: bool = False
  given_up_after_s: float | None = None


class Losses:
  """Lets workers be lost, and replaces the events that tell of it.

  Args:
    engine: The engine, in which a worker begins another incarnation at once.
    later: Has an event told so many seconds from now.
    acted: Told of the kind of a fault as it happens.
  """

  def __init__(self, engine: FaultyEngine, later: Callable[[float, Event], None], acted: Callable[[str], None]):
    self._engine = engine
    self._later = later
    self._acted = acted
    self._losses: dict[tuple[str, int], Loss] = {}  # by worker and the incarnation that begins then
    self._to_give_up: set[str] = set()

  def lose(self, worker: str, loss: Loss) -> None:
    """A worker dies now, as one does whose step fails."""
    self._losses[worker, self._engine.incarnation(worker) + 1] = loss
    self._engine.break_worker(worker)

  def told(self, event: Event) -> list[Event]:
    """The events that the loop is told in place of `event`."""
    match event:
      case WorkerLost(error=error) if error == NOBODY_BRINGS_IT_BACK:
        if event.worker not in self._to_give_up:  # it is back, by another loss since
          return []
        self._to_give_up.remove(event.worker)
      case WorkerLost():
        loss = self._losses.get((event.worker, self._engine.incarnation(event.worker)))
        if loss is not None:
          if 'it is gone' in event.error:  # and not by a step that failed before
            self._acted(loss.kind)
          return [dataclasses.replace(event, returning=loss.returning)]
      case WorkerBack():
        loss = self._losses.pop((event.worker, event.incarnation), None)
        if loss is not None and loss.down_s:
          self._later(loss.down_s, event)
          if loss.given_up_after_s is not None:
            self._to_give_up.add(event.worker)
            self._later(loss.given_up_after_s, WorkerLost(event.worker, event.ended_s, NOBODY_BRINGS_IT_BACK))
          return []
        self._to_give_up.discard(event.worker)
    return [event]
