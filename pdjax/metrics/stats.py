"""The statistics of many latencies, and shares and rates that may not be there."""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
  """A latency over many requests, in milliseconds; None where there was nothing to measure."""

  mean_ms: float | None = None
  median_ms: float | None = None
  std_ms: float | None = None
  p50_ms: float | None = None
  p90_ms: float | None = None
  p99_ms: float | None = None

  @classmethod
  def of_seconds(cls, values_s: Sequence[float]) -> 'Stats':
    """Statistics of these seconds; percentiles interpolate linearly."""
    if not len(values_s):
      return cls()
    values_ms = np.asarray(values_s, np.float64) * 1e3
    p50, p90, p99 = (float(p) for p in np.percentile(values_ms, (50, 90, 99)))
    return cls(float(values_ms.mean()), p50, float(values_ms.std()), p50, p90, p99)


def ratio(amount: float, whole: float) -> float | None:
  """An amount as a share of the whole, or a rate over it; None where the whole is nothing."""
  return amount / whole if whole > 0 else None
