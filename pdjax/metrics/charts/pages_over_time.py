"""The pages that every worker had in use and cached over time, and the prompts that waited."""

import dataclasses
from collections.abc import Callable, Sequence
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
_PALE = 0.35  # opacity of what is cached
_CACHED_ROW_PX = 58  # with a third line in its label
_COLOURS = {
  Role.PREFILL.value: PHASES['prefill'],
  Role.DECODE.value: PHASES['decode'],
  Role.BOTH.value: PHASES['fused'],
  Role.HOLD.value: PHASES['copy'],
  _WAITING: WAITING,
}


def pages(report: Report, *, zoom: bool = True, beside: Sequence[Report] = ()) -> 'alt.LayerChart':
  """The KV pages that every worker had in use; a row is as high as the fullest pool ever was. Zooms like `gantt`.

  A bar has the colour of the worker's role at that time; a pale one behind it adds the pages that nobody holds and
  whose content is found again. The last row, if any prompt ever had to wait, shows how many waited to be begun. Of a
  long run every slot of time shows its peak. Runs that stand `beside` it share its seconds and heights.
  """
  import altair as alt

  bars, labels = _page_bars(report, beside)
  cached = [alt.Tooltip('cached:Q', title='cached beside them', format=',')] if _most_cached(report) else []
  scale = alt.Scale(domain=list(_COLOURS), range=list(_COLOURS.values()))
  chart = (
    alt.Chart(table(bars))
    .mark_rect(clip=True, strokeWidth=0.5)
    .encode(
      x=time_axis([report, *beside]), x2='b', y=lane_axis(len(labels), labels), y2='hi',
      color=alt.Color('role:N', scale=scale, legend=None), stroke=alt.Stroke('role:N', scale=scale, legend=None),
      opacity=alt.Opacity('opacity:Q', scale=None, legend=None),
      strokeOpacity=alt.condition('datum.opacity == 1', alt.value(1), alt.value(0)),  # pale ones would add up
      tooltip=[
        alt.Tooltip('worker:N'), alt.Tooltip('a:Q', title='from (s)', format=SECONDS),
        alt.Tooltip('b:Q', title='to (s)', format=SECONDS),
        alt.Tooltip('count:Q', title='pages (or prompts)', format=','),
        alt.Tooltip('share:Q', title='of the pool', format='.1%'), *cached, alt.Tooltip('decoding:Q', title='decoding'),
      ],
    )
  )  # fmt: skip
  height = _CACHED_ROW_PX * len(labels) if cached else 0
  return finish(alt.layer(chart.add_params(*zoom_parameters(zoom))), 'Pages in use', rows=len(labels), height=height)


@dataclasses.dataclass(frozen=True, slots=True)
class _Level:
  """From `at_s` to `until_s` so many pages were in use, or prompts waited, and so many others were cached."""

  at_s: float
  until_s: float
  count: int
  decoding: int | None
  cached: int = 0

  @property
  def full(self) -> int:
    """Pages that were in use or cached."""
    return self.count + self.cached


def _page_bars(report: Report, beside: Sequence[Report]) -> tuple[list[dict[str, Any]], list[list[str]]]:
  """The rectangles of pages in use, and each row's label in lines."""
  start_s, end_s, rounded = report.timeline.start_s, report.timeline.end_s, rounding(report)
  occupancy = report.timeline.occupancy
  names = [worker.name for worker in report.all_places]
  peaks, fulls = _peaks(report), _peaks(report, full=True)
  if peaks[_WAITING]:
    names.append(_WAITING)
  sizes, workers = _pool_sizes(report), {worker.name: worker for worker in report.all_places}
  together = [report, *beside]
  shares = (_peaks(run, full=True)[name] / size for run in together for name, size in _pool_sizes(run).items())
  fullest = max(shares, default=0.0) or 1.0
  most_waiting = max(_peaks(run)[_WAITING] for run in together)
  bars, labels, cached = [], [], _most_cached(report)
  for row, name in enumerate(names):
    size = sizes.get(name)
    highest = size * fullest if size is not None else most_waiting if name == _WAITING else fulls[name]
    labels.append([name, f'peak {peaks[name]:,}' + (f' of {size:,}' if size is not None else '')])
    if cached.get(name):
      labels[-1].append(f'{cached[name]:,} cached')
    levels = _levels(_changes(occupancy, name), end_s)
    most = MAX_BARS // len(names) // (2 if cached else 1)
    pale = [level for level in levels if level.cached]
    drawn = [(level, level.full, _PALE) for level in _highest(pale, most, lambda level: level.full)]
    drawn += [(level, level.count, 1) for level in _highest([one for one in levels if one.count], most)]
    for level, height, opacity in drawn:  # what is in use stands in front
      role = _WAITING if name == _WAITING else report.timeline.role(workers[name], level.at_s).value
      bar = {
        'worker': name, 'role': role, 'a': rounded(level.at_s - start_s), 'b': rounded(level.until_s - start_s),
        'count': level.count, 'lo': round(row + 0.94 - 0.84 * height / highest, 4), 'hi': row + 0.94,
        'decoding': level.decoding, 'opacity': opacity,
      }  # fmt: skip
      if cached:
        bar['cached'] = level.cached
      bars.append(bar if size is None else bar | {'share': round(level.count / size, 4)})
  return bars, labels


def _peaks(report: Report, *, full: bool = False) -> dict[str, int]:
  """The most pages that each worker ever had in use, or `full` in use or cached; the most prompts that ever waited."""
  occupancy = report.timeline.occupancy
  uses = {worker.name: occupancy.of_worker(worker.name) for worker in report.all_places}
  pages = {name: use['pages'] + use['cached'] if full else use['pages'] for name, use in uses.items()}
  most = {name: int(used.max(initial=0)) for name, used in pages.items()}
  return most | {_WAITING: int(occupancy.rows['waiting'].max(initial=0))}


def _most_cached(report: Report) -> dict[str, int]:
  """The most pages that were ever cached and held by nobody, on workers that had some."""
  occupancy = report.timeline.occupancy
  most = {worker.name: int(occupancy.of_worker(worker.name)['cached'].max(initial=0)) for worker in report.all_places}
  return {name: cached for name, cached in most.items() if cached}


def _changes(occupancy: OccupancyRows, name: str) -> list[tuple[float, int, int | None, int]]:
  """The changes of a worker's pages, or of the prompts that waited: time, number, sequences that decode, and cached."""
  if name == _WAITING:
    return [(now_s, waiting, None, 0) for now_s, waiting, _ in occupancy.rows.tolist()]
  uses = occupancy.of_worker(name)
  return [(now_s, pages, decoding, cached) for now_s, _, pages, decoding, cached in uses.tolist()]


def _pool_sizes(report: Report) -> dict[str, int]:
  return {worker.name: worker.num_pages for worker in report.all_places if isinstance(worker.num_pages, int)}


def _levels(changes: Sequence[tuple[float, int, int | None, int]], end_s: float) -> list[_Level]:
  """The levels between changes, empty stretches left out."""
  ends_s = [*(change[0] for change in changes[1:]), end_s]
  return [
    _Level(at_s, until_s, count, decoding, cached)
    for (at_s, count, decoding, cached), until_s in zip(changes, ends_s, strict=False)
    if count + cached and until_s > at_s
  ]


def _highest(
  levels: Sequence[_Level], most: int, height: Callable[[_Level], int] = lambda level: level.count
) -> Sequence[_Level]:
  """All levels, or if there are more than `most`, the highest of each of so many slots of time."""
  if len(levels) <= most:
    return levels
  start_s = levels[0].at_s
  slot_s = (levels[-1].until_s - start_s) / most
  slots: dict[int, _Level] = {}
  for level in levels:
    first, last = int((level.at_s - start_s) / slot_s), int((level.until_s - start_s) / slot_s - 1e-9)
    for slot in range(first, max(first, last) + 1):
      if slot not in slots or height(slots[slot]) < height(level):
        at_s = start_s + slot * slot_s
        slots[slot] = dataclasses.replace(level, at_s=at_s, until_s=at_s + slot_s)
  return list(slots.values())
