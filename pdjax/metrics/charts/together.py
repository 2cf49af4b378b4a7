"""Several charts in one: a run in one picture, and charts of like systems side by side."""

from typing import TYPE_CHECKING, Any

from pdjax.metrics import wording
from pdjax.metrics.charts.accounts import account
from pdjax.metrics.charts.pages_over_time import pages
from pdjax.metrics.charts.style import WIDTH_PX, without_config
from pdjax.metrics.charts.work_over_time import gantt
from pdjax.metrics.colours import LIGHT, vega_config
from pdjax.metrics.report import Report

if TYPE_CHECKING:
  import altair as alt


def overview(report: Report) -> 'alt.VConcatChart':
  """A run in one picture: what each worker did, the pages in use, and where the time went."""
  import altair as alt

  parts = [without_config(chart) for chart in (gantt(report, zoom=False), pages(report, zoom=False), account(report))]
  chart = alt.vconcat(*parts, spacing=28).resolve_scale(color='independent', stroke='independent')
  return chart.properties(title=alt.TitleParams(**_title(report)), padding=16).configure(**vega_config(LIGHT))


def _title(report: Report) -> dict[str, Any]:
  return {'text': wording.headline(report), 'subtitle': f'{report.ttft_account()};  {report.handoff_account()}'}


def side_by_side(*charts: Any, columns: int = 2) -> 'alt.ConcatChart':
  """Charts of like systems in rows, with one legend for all; of `columns` in a row, each is that much narrower."""
  import altair as alt

  gap_px = 90  # for the axes and titles between two
  width_px = (WIDTH_PX - gap_px * (columns - 1)) // columns
  parts = [without_config(chart).properties(width=width_px) for chart in charts]
  # Flush: the legend, which hangs on the first chart, does not move it away from its row.
  return alt.concat(*parts, columns=columns, spacing=gap_px, bounds='flush').configure(**vega_config(LIGHT))
