"""Which worker takes a request, among those that can."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from pdjax.serving.place import WorkerState
from pdjax.serving.view import Room


class Placement(Protocol):
  """Chooses one of the workers that have room for a request."""

  def choose(self, workers: Sequence[WorkerState], room: Room) -> WorkerState:
    """One of `workers`, which are never none."""


@dataclasses.dataclass(frozen=True)
class FewestQueuedTokens:
  """The worker with the fewest prompt tokens still to compute; of equals, the one with the most free slots."""

  def choose(self, workers: Sequence[WorkerState], room: Room) -> WorkerState:
    return min(workers, key=lambda worker: (room.queued_tokens(worker.name), -room.slots(worker.name)))


@dataclasses.dataclass(frozen=True)
class MostFreePages:
  """The worker with the most free pages; the first of equals."""

  def choose(self, workers: Sequence[WorkerState], room: Room) -> WorkerState:
    return max(workers, key=lambda worker: room.pages(worker.name))


@dataclasses.dataclass(frozen=True)
class MostFreeSlots:
  """The worker with the most free slots, so that batches stay even; the first of equals."""

  def choose(self, workers: Sequence[WorkerState], room: Room) -> WorkerState:
    return max(workers, key=lambda worker: room.slots(worker.name))
