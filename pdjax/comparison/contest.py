"""Contests: the figures of two systems that served the same requests, and whether chance decided between them."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pdjax.comparison.systems import System
from pdjax.metrics import Report
from pdjax.metrics.wording import percent, short

RESAMPLES = 1000  # of the requests, to tell a difference from chance
BLOCKS = 10  # of neighbours, that a resampled set is made of
CONFIDENCE = 0.99
NEGLIGIBLE = 0.01  # of the larger figure: less than that is no difference, however sure
FEWEST = BLOCKS  # requests from which a figure is judged
FEWEST_FOR_P99 = 100  # of fewer, the last percentile is the luck of one of them


@dataclasses.dataclass(frozen=True)
class Outcomes:
  """The latencies of each request of a run, in the order of arrival: seconds `[R]`, NaN where there were none."""

  ids: tuple[str, ...]
  ttft_s: np.ndarray
  tpot_s: np.ndarray
  e2el_s: np.ndarray
  good: np.ndarray  # within all limits; without limits, completed

  @classmethod
  def of(cls, report: Report) -> 'Outcomes':
    requests = report.timeline.requests

    def seconds(values_s: np.ndarray) -> np.ndarray:
      return np.where(requests.completed, values_s, math.nan)

    good = requests.meets(report.slo).astype(np.float64)
    ids = tuple(requests.ids)
    return cls(ids, seconds(requests.ttft_s), seconds(requests.tpot_s), seconds(requests.e2el_s), good)

  def of_requests(self, ids: Sequence[str]) -> 'Outcomes':
    """Those of some of the requests, in this order."""
    places = dict(zip(self.ids, range(len(self.ids)), strict=True))
    rows = [places[one] for one in ids]
    return Outcomes(tuple(ids), self.ttft_s[rows], self.tpot_s[rows], self.e2el_s[rows], self.good[rows])

  @property
  def completed(self) -> np.ndarray:
    """Whether each request completed, `[R]`."""
    return np.isfinite(self.e2el_s)


@dataclasses.dataclass(frozen=True)
class Case:
  """One system at one rate.

  Attributes:
    system: The system that ran.
    rate: Requests per second.
    report: Every figure; with times of single requests only for the cases that a page shows.
    outcomes: The latencies of each request.
  """

  system: System
  rate: float
  report: Report = dataclasses.field(repr=False)
  outcomes: Outcomes = dataclasses.field(repr=False)

  @property
  def merit(self) -> tuple[float, float]:
    """The measure of the best: most requests within their limits, then the lowest mean end-to-end latency."""
    completed = self.outcomes.completed
    mean_s = self.outcomes.e2el_s[completed].mean() if completed.any() else math.inf
    return float(self.outcomes.good.sum()), -float(mean_s)


@dataclasses.dataclass(frozen=True)
class Contest:
  """One figure of two systems, over the requests that both completed.

  The requests are drawn anew, the same for both, in blocks that arrived one after another, because those that meet in
  a queue are slow together (a circular block bootstrap; Politis and Romano 1992). A system wins if at least 99 % of
  1,000 draws say so and the figures differ by more than 1 %.

  Attributes:
    figure: The name of the figure.
    unit: Its unit; empty for a share.
    ours: The figure of the first, None if there is none.
    theirs: The figure of the second.
    winner: The division of the better one, None where chance could have decided.
    judged: Whether there were requests enough to look for a winner.
  """

  figure: str
  unit: str
  ours: float | None
  theirs: float | None
  winner: str | None
  judged: bool

  def __str__(self) -> str:
    better_first = sorted((self.ours or 0.0, self.theirs or 0.0), reverse=not self.unit)
    values = map(short if self.unit else percent, better_first)
    return f'{self.figure} ({" against ".join(values)}{self.unit and f" {self.unit}"})'


def paired(ours: Case, theirs: Case) -> tuple[Case, Case]:
  """The cases over the requests that came to both: of a chat that fails, the further turns never come."""
  if ours.outcomes.ids == theirs.outcomes.ids:
    return ours, theirs
  both = set(theirs.outcomes.ids)
  ids = [one for one in ours.outcomes.ids if one in both]
  first, second = (dataclasses.replace(case, outcomes=case.outcomes.of_requests(ids)) for case in (ours, theirs))
  return first, second


def contests(ours: Case, theirs: Case) -> tuple[Contest, ...]:
  """The contests of two systems that served the same requests, one for each figure."""
  share = 'share completed' if ours.report.request_goodput is None else 'share within limits'
  return (
    *_contests(ours, theirs, 'good', {share: None}),
    *_contests(ours, theirs, 'ttft_s', {'TTFT p50': 50, 'TTFT p99': 99}),
    *_contests(ours, theirs, 'tpot_s', {'TPOT p50': 50, 'TPOT p99': 99}),
    *_contests(ours, theirs, 'e2el_s', {'mean E2E': None}),
  )


def _contests(ours: Case, theirs: Case, field: str, figures: Mapping[str, int | None]) -> Iterator[Contest]:
  """Contests over a field of the outcomes: its percentiles, or its mean for None. Of seconds less is better."""
  pair = np.stack([getattr(ours.outcomes, field), getattr(theirs.outcomes, field)])
  pair = pair[:, np.isfinite(pair).all(axis=0)]  # [2, R]
  count = pair.shape[1]
  unit, scale = ('', 1.0) if field == 'good' else ('ms', 1e3)
  if not count:
    yield from (Contest(figure, unit, None, None, None, False) for figure in figures)
    return
  drawn = pair[:, _draws(count)]  # [2, draws, R]
  for figure, percentile in figures.items():
    a, b = (float(_measure(values, percentile)) for values in pair)
    gains = _measure(drawn[0], percentile) - _measure(drawn[1], percentile)
    judged = count >= (FEWEST_FOR_P99 if percentile == 99 else FEWEST)
    sure = np.mean(gains > 0 if a > b else gains < 0) >= CONFIDENCE
    better = ours if (a < b if unit else a > b) else theirs
    wins = judged and sure and abs(a - b) > NEGLIGIBLE * max(abs(a), abs(b))
    yield Contest(figure, unit, a * scale, b * scale, better.system.division if wins else None, judged)


def _measure(values: np.ndarray, percentile: int | None) -> np.ndarray:
  return values.mean(axis=-1) if percentile is None else np.percentile(values, percentile, axis=-1)


def block_length(count: int) -> int:
  """The number of neighbours drawn together out of `count` requests."""
  return -(-count // BLOCKS)


def _draws(count: int) -> np.ndarray:
  """Requests drawn anew, `[draws, R]`."""
  length = block_length(count)
  firsts = np.random.default_rng(0).integers(0, count, (RESAMPLES, -(-count // length), 1))
  return ((firsts + np.arange(length)) % count).reshape(RESAMPLES, -1)[:, :count]
