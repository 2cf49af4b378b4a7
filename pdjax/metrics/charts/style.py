"""The style of every chart: its size and theme, the axis of time, a row for each worker, and moving and zooming."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pdjax.metrics.colours import LIGHT, vega_config
from pdjax.metrics.report import Report

if TYPE_CHECKING:
  import altair as alt

MAX_BARS = 6000  # of one chart; more are drawn as shares of time slots, so that files stay small and charts quick
WIDTH_PX = 760
FIGURE, SECONDS = ',.5~r', ',.6~f'  # of tooltips: digits of a figure count from its first, so that none reads as 0

_ROW_PX = 46
_LINE_PX = 15  # of labels


def time_axis(reports: Sequence[Report]) -> 'alt.X':
  """The seconds of runs that share an axis: it ends with the longest."""
  import altair as alt

  longest_s = max(report.duration_s for report in reports) or 1e-3
  scale = alt.Scale(domain=[0, longest_s], nice=False)
  return alt.X('a:Q', title='seconds after the first arrival', scale=scale, axis=alt.Axis(grid=True, tickCount=8))


def lane_axis(count: int, labels: Sequence[Sequence[str]]) -> 'alt.Y':
  """A row 1 high for each worker, from above, and its label in lines."""
  import altair as alt

  axis = alt.Axis(
    values=[row + 0.5 for row in range(count)], labelExpr=f'{json.dumps(labels)}[floor(datum.value)]',
    grid=False, ticks=False, domain=False, labelLimit=132, labelPadding=8, labelLineHeight=_LINE_PX, minExtent=96,
    labelOffset=-_LINE_PX * (max(map(len, labels), default=1) - 1) / 2,  # else the first line stands in the middle
  )  # fmt: skip
  return alt.Y('lo:Q', title=None, scale=alt.Scale(domain=[0, count], reverse=True, nice=False), axis=axis)


def zoom_parameters(wanted: bool) -> list[Any]:
  """The selection that moves and zooms; both charts over time call it alike, so that a page can move them together."""
  import altair as alt

  if not wanted:
    return []
  wheel = 'wheel![event.ctrlKey || event.metaKey]'  # without a key it scrolls the page
  return [alt.selection_interval(name='zoom', encodings=['x'], bind='scales', zoom=wheel)]


def finish(chart: Any, title: str, *, rows: int = 0, height: int = 0) -> Any:
  """The chart with its title, its size (of so many rows, or a height in pixels) and the light theme."""
  return chart.properties(title=title, width=WIDTH_PX, height=height or max(rows * _ROW_PX, 60)).configure(
    **vega_config(LIGHT)
  )


def without_config(chart: Any) -> Any:
  """A copy without a theme of its own, as part of another chart or of the page."""
  import altair as alt

  copy = chart.copy(deep=False)
  copy.config = alt.Undefined
  return copy
