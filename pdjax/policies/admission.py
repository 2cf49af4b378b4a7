"""Admission: whether a request that waits is served at all."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Protocol

from pdjax.policies.forecast import first_token_seconds
from pdjax.policies.placement import LeastWork
from pdjax.serving.view import RequestView, Room, WorkerView
from pdjax.types.checked import check_fields
from pdjax.types.fitting import Must

_Factor = Annotated[float, Must(lambda value: value > 0, 'a positive number; 1 rejects what is predicted to be late')]


class Admission(Protocol):
  """Says why a request is not to be served; None, where a policy takes one, admits all."""

  def refusal(self, request: RequestView, workers: Sequence[WorkerView], room: Room, waited_s: float) -> str | None:
    """The reason why the next request that waits is rejected, or None.

    Args:
      request: The request.
      workers: All that are up and could prefill it; never none.
      room: The room that is left, and what was given out in this decision.
      waited_s: Seconds since it came.
    """


@dataclasses.dataclass(frozen=True)
class RejectLate:
  """Rejects a request whose first token would come too late, before anything is spent on it.

  Early rejection (Mooncake, Qin et al. 2025): under overload, work for requests that miss their limits anyway is taken
  from those that could meet theirs. The limit is that of TTFT in the request's `slo`; one without is admitted.

  Attributes:
    slack: The limit is multiplied by it.
  """

  slack: _Factor = 1.0

  def __post_init__(self):
    check_fields(self)

  def refusal(self, request: RequestView, workers: Sequence[WorkerView], room: Room, waited_s: float) -> str | None:
    slo = request.request.slo
    if slo is None or slo.ttft_ms is None:
      return None
    limit_s = self.slack * slo.ttft_ms / 1000
    least = LeastWork().choose(request, workers, room)
    if waited_s + first_token_seconds(request, least, room) <= limit_s:
      return None
    seconds = waited_s + min(first_token_seconds(request, worker, room) for worker in workers)
    if seconds <= limit_s:  # workers are not all alike
      return None
    return (
      f'its first token would come {seconds:.3g} s after its arrival, later than its limit of {limit_s:.3g} s; raise '
      'slo.ttft_ms, or send fewer requests.'
    )
