"""The choice of a worker for a request."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from pdjax.policies.forecast import first_token_seconds
from pdjax.serving.view import RequestView, Room, WorkerView
from pdjax.types.checked import Index, check_fields


class Placement(Protocol):
  """Chooses a worker for a request."""

  def choose(self, request: RequestView, workers: Sequence[WorkerView], room: Room) -> WorkerView:
    """One of `workers`, which are never none, for this request.

    It is asked of all that may take the request, and again, of those that have room, if the one it chose has none;
    before that of those where blocks were copied for the request.
    """


@dataclasses.dataclass(frozen=True)
class FewestQueuedTokens:
  """The worker with the fewest prompt tokens still to compute; of equals, the one with the most free slots."""

  def choose(self, request: RequestView, workers: Sequence[WorkerView], room: Room) -> WorkerView:
    equal = _best_of(workers, room.all_queued_tokens(workers), min)
    return equal[0] if len(equal) == 1 else MostFreeSlots().choose(request, equal, room)


@dataclasses.dataclass(frozen=True)
class LongestPrefix:
  """The worker that holds most of the prompt's beginning; of equals, the one with the fewest queued tokens."""

  def choose(self, request: RequestView, workers: Sequence[WorkerView], room: Room) -> WorkerView:
    equal = _best_of(workers, [room.cached_tokens(request.request.id, worker.name) for worker in workers], max)
    return equal[0] if len(equal) == 1 else FewestQueuedTokens().choose(request, equal, room)


@dataclasses.dataclass(frozen=True)
class LeastWork:
  """The worker with the fewest tokens to compute before the prompt's first, its own that are not cached counted."""

  def choose(self, request: RequestView, workers: Sequence[WorkerView], room: Room) -> WorkerView:
    equal = _best_of(workers, _work(request, workers, room), min)
    return equal[0] if len(equal) == 1 else MostFreeSlots().choose(request, equal, room)


@dataclasses.dataclass(frozen=True)
class StickyPrefix:
  """The worker that holds most of the prompt's beginning, until it has `saturated_tokens` more to do than the least.

  Then the one with the least work, so that a popular prefix spreads (Preble, Srivatsa et al. 2024).

  Attributes:
    saturated_tokens: Most tokens of work by which the worker of the prefix may be ahead of the one with the least.
  """

  saturated_tokens: Index = 4096

  def __post_init__(self):
    check_fields(self)

  def choose(self, request: RequestView, workers: Sequence[WorkerView], room: Room) -> WorkerView:
    holder = LongestPrefix().choose(request, workers, room)
    work = _work(request, workers, room)
    ahead = work[workers.index(holder)] - min(work)
    return holder if ahead <= self.saturated_tokens else LeastWork().choose(request, workers, room)


@dataclasses.dataclass(frozen=True)
class SoonestFirst:
  """The worker predicted to have the first token soonest, by its own cost model: for workers that are not alike."""

  def choose(self, request: RequestView, workers: Sequence[WorkerView], room: Room) -> WorkerView:
    return min(workers, key=lambda worker: first_token_seconds(request, worker, room))


@dataclasses.dataclass(frozen=True)
class MostFreePages:
  """The worker with the most free pages; the first of equals."""

  def choose(self, request: RequestView, workers: Sequence[WorkerView], room: Room) -> WorkerView:
    return max(workers, key=lambda worker: room.pages(worker.name))


@dataclasses.dataclass(frozen=True)
class MostFreeSlots:
  """The worker with the most free slots, so that batches stay even; the first of equals."""

  def choose(self, request: RequestView, workers: Sequence[WorkerView], room: Room) -> WorkerView:
    return _best_of(workers, room.all_slots(workers), max)[0]


def _work(request: RequestView, workers: Sequence[WorkerView], room: Room) -> list[int]:
  """Tokens that each worker computes before the request's first one, but for those of it that all lack."""
  name, queued = request.request.id, room.all_queued_tokens(workers)
  if not room.caches:
    return queued
  return [tokens - room.cached_tokens(name, worker.name) for tokens, worker in zip(queued, workers, strict=True)]


def _best_of(
  workers: Sequence[WorkerView], figures: Sequence[int], best: Callable[[Sequence[int]], int]
) -> list[WorkerView]:
  """Those of some workers that have the best figure, in their order."""
  wanted = best(figures)
  if figures.count(wanted) == 1:
    return [workers[figures.index(wanted)]]
  return [worker for worker, figure in zip(workers, figures, strict=True) if figure == wanted]
