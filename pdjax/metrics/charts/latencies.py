"""Latencies as curves: the share of requests, or of gaps, that took at most so long."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pdjax.metrics import wording
from pdjax.metrics.charts.rows import table, to_digits
from pdjax.metrics.charts.style import FIGURE, finish
from pdjax.metrics.charts.systems import named, system_scales
from pdjax.metrics.report import Report

if TYPE_CHECKING:
  import altair as alt

METRICS = {
  'ttft': 'Time to first token',
  'tpot': 'Time per output token',
  'itl': 'Inter-token latency: delta to delta',
  'e2el': 'End-to-end latency',
  'handoff': 'Hand-off: first to second token',
}


def latency(*reports: Report, metric: str = 'ttft', names: Sequence[str] = ()) -> 'alt.LayerChart':
  """The share of requests (of gaps between deltas, for `itl`) that took at most so long; dots at p50, p90 and p99.

  Args:
    reports: A run, and others to compare it with.
    metric: One of `METRICS`.
    names: Names of the runs; by default the shorthands of their clusters.

  Raises:
    ValueError: if there is no such metric.
  """
  import altair as alt

  if metric not in METRICS:
    raise ValueError(f'metric {metric!r} is unknown; choose one of {", ".join(METRICS)}.')
  curves, dots = [], []
  systems = named(reports, names)
  for name, report in systems.items():
    found = report.timeline.requests.distribution(metric)
    if not len(found.curve_ms):
      continue
    shares = np.linspace(0, 1, len(found.curve_ms))
    curves += [
      {'system': name, 'ms': to_digits(x), 'share': round(y, 4)} for x, y in zip(found.curve_ms, shares, strict=True)
    ]
    for percent in (50, 90, 99):
      value = getattr(found.stats, f'p{percent}_ms')
      dots.append({'system': name, 'ms': to_digits(value), 'share': percent / 100, 'percentile': f'p{percent}'})
  longest = _longest_ms(reports, metric)
  x = alt.X('ms:Q', title='ms', scale=alt.Scale(domain=[0, longest], nice=False), axis=alt.Axis(tickCount=5))
  y = alt.Y(
    'share:Q',
    title=None,
    scale=alt.Scale(domain=[0, 1.03], nice=False),
    axis=alt.Axis(format='.0%', values=[0, 0.25, 0.5, 0.75, 1]),
  )
  colour, dash = system_scales(list(systems))
  lines = (
    alt.Chart(table(curves))
    .mark_line(strokeWidth=2, clip=True)
    .encode(x=x, y=y, color=colour, strokeDash=dash, order='share:Q')
  )
  points_ = (
    alt.Chart(table(dots))
    .mark_point(filled=True, size=55, opacity=1, strokeWidth=1, clip=True)
    .encode(
      x=x, y=y, color=colour,
      tooltip=[alt.Tooltip('system:N'), alt.Tooltip('percentile:N'), alt.Tooltip('ms:Q', format=FIGURE)],
    )
  )  # fmt: skip
  layers = [lines, points_]
  limit, drawn = limit_ms(*reports, metric=metric)
  if limit is not None and drawn:
    rule = alt.Chart(table([{'ms': limit, 'what': f'limit {wording.plain(limit)} ms'}]))
    layers.append(rule.mark_rule(strokeDash=[3, 3]).encode(x='ms:Q', tooltip=alt.Tooltip('what:N', title='limit')))
  return finish(alt.layer(*layers), METRICS[metric], height=170)


def limit_ms(*reports: Report, metric: str) -> tuple[float | None, bool]:
  """The runs' limit on a metric, if they have one, and whether `latency` has room to draw it."""
  limit = next((getattr(r.slo, f'{metric}_ms', None) for r in reports if r.slo is not None), None)
  return limit, limit is not None and limit <= _longest_ms(reports, metric)


def _longest_ms(reports: Iterable[Report], metric: str) -> float:
  """The end of the axis of a latency: a little beyond the longest p99."""
  every = [report.timeline.requests.distribution(metric).stats.p99_ms for report in reports]
  return max((p99_ms * 1.08 for p99_ms in every if p99_ms is not None), default=0.0) or 1.0
