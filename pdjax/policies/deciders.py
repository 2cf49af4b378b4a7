"""The decision where a prompt is computed: on the worker that will decode it, or on one that only prefills.

It needs decode workers that may prefill too, of role 'both', beside prefill workers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from pdjax.policies.forecast import first_token_seconds
from pdjax.policies.placement import LeastWork
from pdjax.serving.view import RequestView, Room, WorkerView
from pdjax.types.checked import Index, check_fields


class Decider(Protocol):
  """Says which workers may prefill a prompt; a placement chooses among them."""

  def where(self, request: RequestView, workers: Sequence[WorkerView], room: Room) -> Sequence[WorkerView]:
    """Those of `workers` that may prefill a request; if none of them can take it now, it waits for one.

    Args:
      request: A request that waits.
      workers: All that are up and prefill, those that can be given no step now too; never none.
      room: The room that is left, and what was given out in this decision.
    """


@dataclasses.dataclass(frozen=True)
class AlwaysLocal:
  """Every prompt where it will decode; workers that only prefill get those that no other worker could take."""

  def where(self, request: RequestView, workers: Sequence[WorkerView], room: Room) -> Sequence[WorkerView]:
    return local(workers) or workers


@dataclasses.dataclass(frozen=True)
class AlwaysRemote:
  """Every prompt on a worker that only prefills, if there is one: plain disaggregation."""

  def where(self, request: RequestView, workers: Sequence[WorkerView], room: Room) -> Sequence[WorkerView]:
    return remote(workers) or workers


@dataclasses.dataclass(frozen=True)
class UncachedThreshold:
  """A prompt goes to a prefill worker if it has more than `tokens` tokens that no decode worker has cached.

  A rule that knows of no queue (as in the routers that llm-d's blog of June 2026 measures).

  Attributes:
    tokens: Most uncached tokens of a prompt that is computed where it decodes.
  """

  tokens: Index = 512

  def __post_init__(self):
    check_fields(self)

  def where(self, request: RequestView, workers: Sequence[WorkerView], room: Room) -> Sequence[WorkerView]:
    here, there = local(workers), remote(workers)
    if not here or not there:
      return workers
    cached = max(room.cached_tokens(request.request.id, worker.name) for worker in here)
    return there if request.prefill_len - cached > self.tokens else here


@dataclasses.dataclass(frozen=True)
class SoonestFirstToken:
  """The worker that is predicted to have the first token soonest, its queue and what it decodes counted.

  Of either kind the one with the least work is looked at, so that a decision takes the same time whatever the number
  of waiting prompts. Where that worker can take no step now, the prompt waits for it, and the next one finds its queue
  longer; so as many go each way as keep both busy.
  """

  def where(self, request: RequestView, workers: Sequence[WorkerView], room: Room) -> Sequence[WorkerView]:
    kinds = [some for some in (local(workers), remote(workers)) if some]
    best = [LeastWork().choose(request, some, room) for some in kinds]
    if len(best) == 2 and not room.fits(request.request.id, best[0].name, decodes=True):
      return best[1:]  # where it would decode there is no room, for who knows how long
    return [min(best, key=lambda worker: first_token_seconds(request, worker, room))]


def local(workers: Sequence[WorkerView]) -> list[WorkerView]:
  """Those of some workers that decode too."""
  return [worker for worker in workers if worker.role.decodes]


def remote(workers: Sequence[WorkerView]) -> list[WorkerView]:
  """Those of some workers that only prefill."""
  return [worker for worker in workers if not worker.role.decodes]
