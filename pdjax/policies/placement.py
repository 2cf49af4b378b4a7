"""The choice of a worker for a request, among those that have room."""

import dataclasses
from collections.abc import Sequence
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
    tokens = [room.queued_tokens(worker.name) for worker in workers]
    fewest = min(tokens)
    equal = [worker for worker, count in zip(workers, tokens, strict=True) if count == fewest]
    return equal[0] if len(equal) == 1 else MostFreeSlots().choose(request, equal, room)


@dataclasses.dataclass(frozen=True)
class LongestPrefix:
  """The worker that holds most of the prompt's beginning; of equals, the one with the fewest queued tokens."""

  def choose(self, request: RequestView, workers: Sequence[WorkerView], room: Room) -> WorkerView:
    cached = [room.cached_tokens(request.request.id, worker.name) for worker in workers]
    most = max(cached)
    equal = [worker for worker, count in zip(workers, cached, strict=True) if count == most]
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
    slots = [room.slots(worker.name) for worker in workers]
    return workers[slots.index(max(slots))]
