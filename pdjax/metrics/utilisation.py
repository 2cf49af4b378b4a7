"""The time that each worker of a run was busy."""

import dataclasses
from collections.abc import Iterable

from pdjax.metrics.stats import ratio
from pdjax.metrics.timeline import BusySpan, Timeline
from pdjax.types.worker import Role, WorkerSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Utilisation:
  """The time that one worker was busy, as shares of the run's duration.

  `busy` covers steps only; pages may travel meanwhile, so `transfer`, in or out, stands beside it. Orders that
  failed leave no span and do not count. None where the run has no duration. `role` is the worker's as the run began.
  """

  worker: str
  role: Role
  busy: float | None
  prefill: float | None
  decode: float | None
  fused: float | None
  transfer: float | None

  @classmethod
  def of(cls, worker: WorkerSpec, timeline: Timeline) -> 'Utilisation':
    """The utilisation of this worker."""
    steps = [span for span in timeline.spans if span.worker == worker.name and span.kind != 'transfer']
    transfers = [s for s in timeline.spans if s.kind == 'transfer' and worker.name in (s.worker, s.target)]

    def share(spans: Iterable[BusySpan]) -> float | None:
      return ratio(_covered_s(spans, timeline.start_s, timeline.end_s), timeline.duration_s)

    return cls(
      worker=worker.name,
      role=worker.role,
      busy=share(steps),
      prefill=share(span for span in steps if span.kind == 'prefill'),
      decode=share(span for span in steps if span.kind == 'decode'),
      fused=share(span for span in steps if span.kind == 'fused'),
      transfer=share(transfers),
    )


def _covered_s(spans: Iterable[BusySpan], start_s: float, end_s: float) -> float:
  """Seconds between start and end that lie in at least one span."""
  covered_s, reached_s = 0.0, start_s
  for began_s, ended_s in sorted((span.began_s, min(span.ended_s, end_s)) for span in spans):
    covered_s += max(0.0, ended_s - max(began_s, reached_s))
    reached_s = max(reached_s, ended_s)
  return covered_s
