"""The choice of a worker for a request, among those that have room."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from pdjax.serving.view import RequestView, Room, WorkerView


class Placement(Protocol):
  """Chooses one of the workers that have room for a request."""

  def choose(self, request: RequestView, workers: Sequence[WorkerView], room: Room) -> WorkerView:
    """One of `workers`, which are never none, for this request."""


@dataclasses.dataclass(frozen=True)
class FewestQueuedTokens:
  """The worker with the fewest prompt tokens still to compute; of equals, the one with the most free slots."""

  def choose(self, request: RequestView, workers: Sequence[WorkerView], room: Room) -> WorkerView:
    equal = _best_of(workers, [room.queued_tokens(worker.name) for worker in workers], min)
    return equal[0] if len(equal) == 1 else MostFreeSlots().choose(request, equal, room)


@dataclasses.dataclass(frozen=True)
class LongestPrefix:
  """The worker that holds most of the prompt's beginning; of equals, the one with the fewest queued tokens."""

  def choose(self, request: RequestView, workers: Sequence[WorkerView], room: Room) -> WorkerView:
    equal = _best_of(workers, [room.cached_tokens(request.request.id, worker.name) for worker in workers], max)
    return equal[0] if len(equal) == 1 else FewestQueuedTokens().choose(request, equal, room)


@dataclasses.dataclass(frozen=True)
class MostFreePages:
  """The worker with the most free pages; the first of equals."""

  def choose(self, request: RequestView, workers: Sequence[WorkerView], room: Room) -> WorkerView:
    return max(workers, key=lambda worker: room.pages(worker.name))


@dataclasses.dataclass(frozen=True)
class MostFreeSlots:
  """The worker with the most free slots, so that batches stay even; the first of equals."""

  def choose(self, request: RequestView, workers: Sequence[WorkerView], room: Room) -> WorkerView:
    return _best_of(workers, [room.slots(worker.name) for worker in workers], max)[0]


def _best_of(
  workers: Sequence[WorkerView], figures: Sequence[int], best: Callable[[Sequence[int]], int]
) -> list[WorkerView]:
  """Those of some workers that have the best figure, in their order."""
  wanted = best(figures)
  return [worker for worker, figure in zip(workers, figures, strict=True) if figure == wanted]
