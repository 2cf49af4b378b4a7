"""The decision where a prompt is computed: on the worker that will decode it, or on one that only prefills.

It needs decode workers that may prefill too, of role 'both', beside prefill workers, and is not asked without either.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from pdjax.policies.forecast import first_token_seconds
from pdjax.policies.placement import LeastWork
from pdjax.serving.view import RequestView, Room, WorkerView
from pdjax.types.checked import Index, check_fields

Workers = Sequence[WorkerView]


class Decider(Protocol):
  """Says which workers may prefill a prompt; a placement chooses among them."""

  def where(self, request: RequestView, local: Workers, remote: Workers, room: Room) -> Workers:
    """Those of the workers that may prefill a request, at least one; if none can take it now, it waits for one.

    Args:
      request: A request that waits.
      local: Workers that prefill what they decode; those that can be given no step now too.
      remote: Workers that only prefill, likewise; there is one of either kind at least.
      room: The room that is left, and what was given out in this decision.
    """


@dataclasses.dataclass(frozen=True)
class AlwaysLocal:
  """Every prompt where it will decode."""

  def where(self, request: RequestView, local: Workers, remote: Workers, room: Room) -> Workers:
    return local


@dataclasses.dataclass(frozen=True)
class AlwaysRemote:
  """Every prompt on a worker that only prefills: plain disaggregation."""

  def where(self, request: RequestView, local: Workers, remote: Workers, room: Room) -> Workers:
    return remote


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

  def where(self, request: RequestView, local: Workers, remote: Workers, room: Room) -> Workers:
    cached = max(room.cached_tokens(request.request.id, worker.name) for worker in local) if room.caches else 0
    return remote if request.prefill_len - cached > self.tokens else local


@dataclasses.dataclass(frozen=True)
class SoonestFirstToken:
  """The worker that is predicted to have the first token soonest, its queue and what it decodes counted.

  Of either kind the one with the least work is looked at, so that a decision takes the same time whatever the number
  of waiting prompts. Where that worker can take no step now, the prompt waits for it, and the next one finds its queue
  longer; so as many go each way as keep both busy.
  """

  def where(self, request: RequestView, local: Workers, remote: Workers, room: Room) -> Workers:
    here, there = (LeastWork().choose(request, some, room) for some in (local, remote))
    if not room.fits(request.request.id, here.name, decodes=True):
      return (there,)  # where it would decode there is no room, for who knows how long
    return (min((here, there), key=lambda worker: first_token_seconds(request, worker, room)),)
