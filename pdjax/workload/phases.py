"""A load that changes: one workload after another, each for so many seconds."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pdjax.types.checked import SOME, Index, Positive, check_fields
from pdjax.types.fitting import Must
from pdjax.workload.parts import AnyWorkload, Merged, Placed, has_field, repeats, with_fields, with_own_seed
from pdjax.workload.workload import Workload, WorkloadContext

_LASTING = Must(lambda value: value > 0, 'a positive number of seconds; inf for the last goes on as long as it can')


@dataclasses.dataclass(frozen=True)
class Phase:
  """A workload for so many seconds of a run, see `Phases`.

  Attributes:
    workload: The workload, whose time counts from the beginning of the phase.
    seconds: The time for which its requests come; infinite, for the last phase, until it has no more.
  """

  workload: AnyWorkload
  seconds: Annotated[float, _LASTING]

  def __post_init__(self):
    check_fields(self)
    if isinstance(self.workload, Phases):
      raise ValueError(
        "Phase has workload=Phases(...), expected one of another kind; put its phases among the others'."
      )


@dataclasses.dataclass(frozen=True)
class Phases:
  """One workload after another, for a load that changes.

      Phases((Phase(Poisson(requests_per_s=2), 60), Phase(Poisson(requests_per_s=8), 30)))

  Of each phase come the requests that fall into its seconds. A workload with a rate (Poisson, Bursty, Constant, a
  `Mix`) fills them, however many requests it has by itself (`num_requests` counts where the phase has no end). Any
  other may have no more before they are over, which leaves a pause, or have more, which do not come: so ends a chat, or
  a user of a closed loop, with a phase. Requests that have come go on whatever phase it is. Ids begin with the number
  of the phase, `phase-0/request-3`, and the same workload draws other requests in each.

  Attributes:
    phases: The phases, in order.
    requests_per_s: Mean rate over all, to which the rates of all are scaled, so that the same phases have more or fewer
      requests; None takes the rates as they are.
    seed: Fixes, with the seeds of the workloads, everything.

  Raises:
    ValueError: if there is no phase, one but the last has no end, or `requests_per_s` is given and one has no rate.
  """

  phases: Annotated[tuple[Phase, ...], SOME]
  _: dataclasses.KW_ONLY
  requests_per_s: Positive | None = None
  seed: Index = 0
  burstiness: ClassVar[None] = None

  def __post_init__(self):
    check_fields(self)
    for number, phase in enumerate(self.phases[:-1]):
      if math.isinf(phase.seconds):
        raise ValueError(f'Phases has phases[{number}].seconds=inf, but others follow; only the last may have no end.')
    if self.requests_per_s is not None and self._own_rate() is None:
      name = next((type(one.workload).__name__ for one in self.phases if _rate(one.workload) is None), '')
      raise ValueError(
        f'Phases has requests_per_s={self.requests_per_s}, but a phase of {name} has no rate that could be scaled; '
        'leave requests_per_s out, or use Poisson, Bursty, Constant or Mix with finite rates alone.'
      )

  @property
  def num_requests(self) -> int:
    """Requests that come, at most."""
    return sum(workload.num_requests for workload in self._workloads())

  @property
  def request_rate(self) -> float | None:
    """Mean rate over all phases; None if one has no rate."""
    return self._own_rate() if self.requests_per_s is None else self.requests_per_s

  @property
  def max_concurrency(self) -> int | None:
    """Most requests in flight that one phase allows; None if one does not ask."""
    allowed = [phase.workload.max_concurrency for phase in self.phases]
    known = [one for one in allowed if one is not None]
    return max(known) if len(known) == len(allowed) else None

  @property
  def repeats(self) -> bool:
    """Whether prompts of any phase may begin alike."""
    return repeats([phase.workload for phase in self.phases])

  def arrivals(self, context: WorkloadContext) -> Merged:
    sources, start_s = [], 0.0
    for number, (phase, workload) in enumerate(zip(self.phases, self._workloads(), strict=True)):
      apart = 0 if has_field(workload, 'seed') else number
      source, prefix = workload.arrivals(context), f'phase-{number}/'
      sources.append(Placed(source, prefix, start_s=start_s, seconds=phase.seconds, number=apart))
      start_s += phase.seconds
    return Merged(sources)

  def _workloads(self) -> Sequence[Workload]:
    """The workload of each phase as it is served: at its rate, with a seed of its own, of as many as fill the phase."""
    own = self._own_rate()
    scale = 1.0 if self.requests_per_s is None or own is None else self.requests_per_s / own
    found = []
    for number, phase in enumerate(self.phases):
      workload = with_own_seed(phase.workload, self.seed, number)
      if (rate := _rate(workload)) is not None:
        workload = with_fields(workload, requests_per_s=rate * scale)
        if math.isfinite(phase.seconds):
          workload = workload.lasting(phase.seconds)
      found.append(workload)
    return found

  def _own_rate(self) -> float | None:
    """The mean rate by the rates of the workloads; None if one has none."""
    count = whole_s = 0.0
    for phase in self.phases:
      if (rate := _rate(phase.workload)) is None:
        return None
      seconds = phase.seconds if math.isfinite(phase.seconds) else phase.workload.num_requests / rate
      count, whole_s = count + rate * seconds, whole_s + seconds
    return count / whole_s


def _rate(workload: Workload) -> float | None:
  """The finite rate of a workload that fills any time; None of any other."""
  if not has_field(workload, 'requests_per_s') or not hasattr(workload, 'lasting'):
    return None
  rate = workload.request_rate
  return rate if rate is not None and math.isfinite(rate) else None
