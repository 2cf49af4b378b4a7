"""A figure of several systems over the rate of requests."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pdjax.metrics.charts.rows import table, to_digits
from pdjax.metrics.charts.style import FIGURE, finish
from pdjax.metrics.charts.systems import system_scales
from pdjax.metrics.colours import BASELINE

if TYPE_CHECKING:
  import altair as alt


def over_rate(
  curves: Mapping[str, Sequence[tuple[float, float | None]]],
  title: str,
  unit: str,
  *,
  baseline: str | None = None,
  log: bool = False,
  ideal: bool = False,
) -> 'alt.LayerChart':
  """A figure over the rate of requests, a curve for each system; the baseline's is grey and dashed.

  Args:
    curves: For each system its (requests per second, figure); a figure that is None or not finite is left out.
    title: The name of the figure.
    unit: Its unit.
    baseline: The name of the baseline, if one is there.
    log: Whether the figure's axis is logarithmic; then figures of 0 and below are left out.
    ideal: Whether a thin line shows the rate itself, which no figure can exceed.
  """
  import altair as alt

  rows: list[dict[str, Any]] = [
    {'system': name, 'rate': rate, 'value': to_digits(value)}
    for name, points in curves.items()
    for rate, value in points
    if value is not None and math.isfinite(value) and (value > 0 or not log)
  ]
  rates = sorted({rate for points in curves.values() for rate, _ in points})
  colour, dash = system_scales(list(curves), baseline)
  scale = alt.Scale(zero=True, nice=True)
  if log:
    values = [row['value'] for row in rows] or [1.0]
    scale = alt.Scale(type='log', domain=[min(values) / 1.25, max(values) * 1.25], nice=False)
  x = alt.X(
    'rate:Q', title='requests per second',
    scale=alt.Scale(domain=[rates[0], rates[-1]], nice=False, padding=10),
    axis=alt.Axis(values=rates if len(rates) <= 8 else alt.Undefined, format=',~r', grid=False),
  )  # fmt: skip
  y = alt.Y(
    'value:Q', title=unit, scale=scale,
    axis=alt.Axis(tickCount=5, format=',~r'),
  )  # fmt: skip
  tooltip = [
    alt.Tooltip('system:N'), alt.Tooltip('rate:Q', title='requests/s', format=',~r'),
    alt.Tooltip('value:Q', title=unit, format=FIGURE),
  ]  # fmt: skip
  base = alt.Chart(table(rows)).encode(x=x, y=y, color=colour)
  lines = base.mark_line(strokeWidth=2).encode(strokeDash=dash)
  points = base.mark_point(filled=True, size=60, opacity=1, strokeWidth=1).encode(tooltip=tooltip)
  layers = [lines, points]
  if ideal:
    ends = alt.Chart(table([{'rate': rate, 'value': rate} for rate in (rates[0], rates[-1])]))
    layers.insert(0, ends.mark_line(strokeWidth=1, strokeDash=[2, 2], color=BASELINE).encode(x=x, y=y))
  return finish(alt.layer(*layers), title, height=200)
