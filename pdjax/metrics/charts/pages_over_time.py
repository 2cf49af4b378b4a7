"""The pages that every worker had in use over time, and the prompts that waited."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pdjax.metrics.charts.rows import rounding, table
from pdjax.metrics.charts.style import MAX_BARS, SECONDS, finish, lane_axis, time_axis, zoom_parameters
from pdjax.metrics.colours import PHASES, WAITING
from pdjax.metrics.occupancy_rows import OccupancyRows
from pdjax.metrics.report import Report
from pdjax.types.worker import Role

if TYPE_CHECKING:
  import altair as alt

_WAITING = 'waiting'
_COLOURS = {
  Role.PREFILL.value: PHASES['prefill'],
  Role.DECODE.value: PHASES['decode'],
  Role.BOTH.value: PHASES['fused'],
  _WAITING: WAITING,
}


def pages(report: Report, *, zoom: bool = True, beside: Sequence[Report] = ()) -> 'alt.LayerChart':
  """The KV pages that every worker had in use; a row is as high as the fullest pool ever was. Zooms like `gantt`.

  A bar has the colour of the worker's role at that time. The last row, if any prompt ever had to wait, shows how many
  waited to be begun. Of a long run every slot of time shows its peak. Runs that stand `beside` it share its seconds and
  heights.
  """
  import altair as alt

  bars, labels = _page_bars(report, beside)
  scale = alt.Scale(domain=list(_COLOURS), range=list(_COLOURS.values()))
  chart = (
    alt.Chart(table(bars))
    .mark_rect(clip=True, opacity=1, strokeWidth=0.5)
    .encode(
      x=time_axis([report, *beside]), x2='b', y=lane_axis(len(labels), labels), y2='hi',
      color=alt.Color('role:N', scale=scale, legend=None), stroke=alt.Stroke('role:N', scale=scale, legend=None),
      tooltip=[
        alt.Tooltip('worker:N'), alt.Tooltip('a:Q', title='from (s)', format=SECONDS),
        alt.Tooltip('b:Q', title='to (s)', format=SECONDS),
        alt.Tooltip('count:Q', title='pages (or prompts)', format=','),
        alt.Tooltip('share:Q', title='of the pool', format='.1%'), alt.Tooltip('decoding:Q', title='decoding'),
      ],
    )
  )  # fmt: skip
  return finish(alt.layer(chart.add_params(*zoom_parameters(zoom))), 'Pages in use', rows=len(labels))


@dataclasses.dataclass(frozen=True, slots=True)
class _Level:
  """From `at_s` to `until_s` so many pages were in use, or prompts waited."""

  at_s: float
  until_s: float
  count: int
  decoding: int | None


def _page_bars(report: Report, beside: Sequence[Report]) -> tuple[list[dict[str, Any]], list[list[str]]]:
  """The rectangles of pages in use, and each row's label in lines."""
  start_s, end_s, rounded = report.timeline.start_s, report.timeline.end_s, rounding(report)
  occupancy = report.timeline.occupancy
  names = [worker.name for worker in report.workers]
  peaks = _peaks(report)
  if peaks[_WAITING]:
    names.append(_WAITING)
  sizes, workers = _pool_sizes(report), {worker.name: worker for worker in report.workers}
  together = [report, *beside]
  shares = (_peaks(run)[name] / size for run in together for name, size in _pool_sizes(run).items())
  fullest = max(shares, default=0.0) or 1.0
  most_waiting = max(_peaks(run)[_WAITING] for run in together)
  bars, labels = [], []
  for row, name in enumerate(names):
    size = sizes.get(name)
    highest = size * fullest if size is not None else most_waiting if name == _WAITING else peaks[name]
    labels.append([name, f'peak {peaks[name]:,}' + (f' of {size:,}' if size is not None else '')])
    for level in _highest(_levels(_changes(occupancy, name), end_s), MAX_BARS // len(names)):
      role = _WAITING if name == _WAITING else report.timeline.role(workers[name], level.at_s).value
      bar = {
        'worker': name, 'role': role, 'a': rounded(level.at_s - start_s), 'b': rounded(level.until_s - start_s),
        'count': level.count, 'lo': round(row + 0.94 - 0.84 * level.count / highest, 4), 'hi': row + 0.94,
        'decoding': level.decoding,
      }  # fmt: skip
      bars.append(bar if size is None else bar | {'share': round(level.count / size, 4)})
  return bars, labels


def _peaks(report: Report) -> dict[str, int]:
  """The most pages that each worker ever had in use, and the most prompts that ever waited."""
  occupancy = report.timeline.occupancy
  pages = {worker.name: occupancy.of_worker(worker.name)['pages'] for worker in report.workers}
  most = {name: int(used.max(initial=0)) for name, used in pages.items()}
  return most | {_WAITING: int(occupancy.rows['waiting'].max(initial=0))}


def _changes(occupancy: OccupancyRows, name: str) -> list[tuple[float, int, int | None]]:
  """The changes of a worker's pages, or of the prompts that waited: time, number, and sequences that decode."""
  if name == _WAITING:
    return [(now_s, waiting, None) for now_s, waiting, _ in occupancy.rows.tolist()]
  return [(now_s, pages, decoding) for now_s, _, pages, decoding in occupancy.of_worker(name).tolist()]


def _pool_sizes(report: Report) -> dict[str, int]:
  return {worker.name: worker.num_pages for worker in report.workers if isinstance(worker.num_pages, int)}


def _levels(changes: Sequence[tuple[float, int, int | None]], end_s: float) -> list[_Level]:
  """The levels between changes, empty stretches left out."""
  ends_s = [*(at_s for at_s, _, _ in changes[1:]), end_s]
  return [
    _Level(at_s, until_s, count, decoding)
    for (at_s, count, decoding), until_s in zip(changes, ends_s, strict=False)
    if count and until_s > at_s
  ]


def _highest(levels: Sequence[_Level], most: int) -> Sequence[_Level]:
  """All levels, or if there are more than `most`, the highest of each of so many slots of time."""
  if len(levels) <= most:
    return levels
  start_s = levels[0].at_s
  slot_s = (levels[-1].until_s - start_s) / most
  slots: dict[int, _Level] = {}
  for level in levels:
    first, last = int((level.at_s - start_s) / slot_s), int((level.until_s - start_s) / slot_s - 1e-9)
    for slot in range(first, max(first, last) + 1):
      if slot not in slots or slots[slot].count < level.count:
        at_s = start_s + slot * slot_s
        slots[slot] = _Level(at_s, at_s + slot_s, level.count, level.decoding)
  return list(slots.values())
