"""The time that each worker of a run was busy."""

import dataclasses

import numpy as np

from pdjax.metrics.stats import ratio
from pdjax.metrics.timeline import Timeline
from pdjax.types.worker import Role, WorkerSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Utilisation:
  """The time that one worker was busy, as shares of the run's duration.

  `busy` covers steps only; pages may travel meanwhile, so `transfer` and, of cached blocks, `copy`, in or out, stand
  beside it. Orders that
  failed leave no span and do not count. None where the run has no duration. `role` is the worker's as the run began.
  """

  worker: str
  role: Role
  busy: float | None
  prefill: float | None
  decode: float | None
  fused: float | None
  transfer: float | None
  copy: float | None = None

  @classmethod
  def of(cls, worker: WorkerSpec, timeline: Timeline) -> 'Utilisation':
    """The utilisation of this worker."""
    spans = timeline.spans
    steps = spans.of_worker(worker.name) & ~spans.is_transfer & ~spans.is_copy
    moves = spans.of_worker(worker.name) | spans.to_worker(worker.name)

    def share(which: np.ndarray) -> float | None:
      rows = spans.rows[which]
      covered_s = _covered_s(rows['began_s'], rows['ended_s'], timeline.start_s, timeline.end_s)
      return ratio(covered_s, timeline.duration_s)

    return cls(
      worker=worker.name,
      role=worker.role,
      busy=share(steps),
      prefill=share(steps & spans.of_kind('prefill')),
      decode=share(steps & spans.of_kind('decode')),
      fused=share(steps & spans.of_kind('fused')),
      transfer=share(moves & spans.is_transfer),
      copy=share(moves & spans.is_copy),
    )


def _covered_s(began_s: np.ndarray, ended_s: np.ndarray, start_s: float, end_s: float) -> float:
  """Seconds between start and end that lie in at least one span."""
  ended_s = np.minimum(ended_s, end_s)
  order = np.lexsort((ended_s, began_s))
  began_s, ended_s = began_s[order], ended_s[order]
  reached_s = np.maximum.accumulate(np.concatenate([[start_s], ended_s]))[:-1]
  return float(np.cumsum(np.concatenate([[0.0], np.maximum(0.0, ended_s - np.maximum(began_s, reached_s))]))[-1])
