"""The statistics of many latencies, and shares and rates that may not be there."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

CURVE_POINTS = 200
_MANY = 1 << 22


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
  def of_seconds(cls, values_s: Sequence[float] | np.ndarray) -> 'Stats':
    """Statistics of these seconds; percentiles interpolate linearly."""
    if not len(values_s):
      return cls()
    values_ms = np.asarray(values_s, np.float64) * 1e3
    p50, p90, p99 = (float(p) for p in np.percentile(values_ms, (50, 90, 99)))
    return cls(float(values_ms.mean()), p50, _std(values_ms), p50, p90, p99)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Distribution:
  """A latency over many requests: its statistics, and its curve.

  Attributes:
    stats: Its statistics.
    curve_ms: Quantiles at equal distances from the least to the largest, at most `CURVE_POINTS`; none of nothing.
  """

  stats: Stats
  curve_ms: np.ndarray

  @classmethod
  def of_seconds(cls, values_s: np.ndarray) -> 'Distribution':
    """The distribution of these seconds, whose array is used up: of millions there is no room for a copy."""
    if not len(values_s):
      return cls(Stats(), values_s)
    values_ms = np.multiply(values_s, 1e3, out=values_s)
    mean_ms, std_ms = float(values_ms.mean()), _std(values_ms)
    values_ms.sort()
    p50, p90, p99 = (float(p) for p in np.percentile(values_ms, (50, 90, 99), overwrite_input=True))
    shares = np.linspace(0, 1, max(min(len(values_ms), CURVE_POINTS), 2))
    curve_ms = np.quantile(values_ms, shares, overwrite_input=True)
    return cls(Stats(mean_ms, p50, std_ms, p50, p90, p99), curve_ms)


def _std(values: np.ndarray) -> float:
  """The standard deviation; of very many without a copy of them."""
  if len(values) <= _MANY:
    return float(values.std())
  mean = values.mean()
  squares = sum(float(((values[i : i + _MANY] - mean) ** 2).sum()) for i in range(0, len(values), _MANY))
  return math.sqrt(squares / len(values))


def ratio(amount: float, whole: float) -> float | None:
  """An amount as a share of the whole, or a rate over it; None where the whole is nothing."""
  return amount / whole if whole > 0 else None
