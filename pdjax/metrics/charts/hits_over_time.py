"""The hits of the prefix cache over time, by the place that had what was found."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pdjax.metrics.charts.rows import rounding, table
from pdjax.metrics.charts.style import SECONDS, finish, lane_axis, time_axis, zoom_parameters
from pdjax.metrics.colours import BASELINE, SYSTEMS
from pdjax.metrics.hit_rows import SIDES
from pdjax.metrics.numbers import percent
from pdjax.metrics.report import Report
from pdjax.metrics.stats import ratio
from pdjax.serving.events import HitSide

if TYPE_CHECKING:
  import altair as alt

_ASKED, _OTHERS = 'asked for', 'other places'
_LANE_PX = 96
_FEWEST = 40  # intervals of a run, beside its last


def prefix_hits(report: Report, *, zoom: bool = True, beside: Sequence[Report] = ()) -> 'alt.LayerChart':
  """The prompt tokens of the requests that began in each interval, and those of them that were found, by place.

  A row is what was not computed, or what was not sent to where it decodes. A bar in grey is as high as all that was
  asked for; the tokens that were found stand in front of it, one place above the other. Zooms like `gantt`. Runs that
  stand `beside` it share its seconds, intervals, heights and colours.
  """
  import altair as alt

  together = beside if any(run is report for run in beside) else [report, *beside]  # in one order, for one's colours
  sides = _sides(report)
  bars, labels = _bars(report, together, sides)
  colours = dict(place_colours(together))
  scale = alt.Scale(domain=list(colours), range=list(colours.values()))
  chart = (
    alt.Chart(table(bars))
    .mark_rect(clip=True, opacity=1)
    .encode(
      x=time_axis(together), x2='b', y=lane_axis(len(sides), labels), y2='hi',
      color=alt.Color('of:N', scale=scale, legend=None),
      tooltip=[
        alt.Tooltip('side:N'), alt.Tooltip('place:N'), alt.Tooltip('a:Q', title='from (s)', format=SECONDS),
        alt.Tooltip('b:Q', title='to (s)', format=SECONDS), alt.Tooltip('tokens:Q', format=','),
        alt.Tooltip('share:Q', title='of what was asked', format='.1%'),
      ],
    )
  )  # fmt: skip
  layers = alt.layer(chart.add_params(*zoom_parameters(zoom)))
  return finish(layers, 'Prefix hits by place', height=_LANE_PX * len(sides))


def place_colours(reports: Sequence[Report]) -> list[tuple[str, str]]:
  """The colour of each place where anything was found, of those with few hits together, and of what was asked for."""
  shown, others = _places(reports)
  names = [*shown, _OTHERS] if others else shown
  return [*zip(names, SYSTEMS, strict=False), (_ASKED, BASELINE)]


def interval_s(reports: Sequence[Report]) -> float:
  """Seconds of a bar of `prefix_hits`: 1, 2 or 5 of some power of ten."""
  longest_s = max(report.duration_s for report in reports) or 1e-3
  unit_s = 10.0 ** math.floor(math.log10(longest_s / _FEWEST))
  return max(step * unit_s for step in (1, 2, 5) if step * unit_s * _FEWEST <= longest_s * (1 + 1e-9) or step == 1)


def _places(reports: Sequence[Report]) -> tuple[list[str], list[str]]:
  """The places that have a colour each, if there are too many those with most hits, and the others."""
  counts: dict[str, int] = {worker.name: 0 for report in reports for worker in report.workers}
  for report in reports:
    for found in report.prefix_hits.values():
      for place, tokens in found.items():
        counts[place] = counts.get(place, 0) + tokens
  some = [place for place, tokens in counts.items() if tokens]
  number = len(SYSTEMS) - (len(some) > len(SYSTEMS))
  most = sorted(some, key=lambda place: -counts[place])[:number]
  return [place for place in some if place in most], [place for place in some if place not in most]


def _sides(report: Report) -> list[HitSide]:
  """The rows of a run: where nothing is ever sent, nothing is saved of that."""
  return [side for side in SIDES if side == 'prefill' or report.num_transfers or report.prefix_hits.get(side)]


def _bars(
  report: Report, together: Sequence[Report], sides: Sequence[HitSide]
) -> tuple[list[dict[str, Any]], list[list[str]]]:
  """The rectangles, what is asked for before what is found, and each row's label in lines."""
  width_s, rounded = interval_s(together), rounding(report)
  highest = max((float(_asked(run, width_s).max(initial=0)) for run in together), default=0.0) or 1.0
  shown, _ = _places(together)
  bars: list[dict[str, Any]] = []
  for row, side in enumerate(sides):
    asked, base = _asked(report, width_s), np.zeros(len(_asked(report, width_s)))
    for of, place, tokens in [(_ASKED, _ASKED, asked), *_found(report, side, width_s, shown)]:
      for slot in np.flatnonzero(tokens).tolist():
        low = 0.0 if of == _ASKED else base[slot]
        bar = {
          'of': of, 'side': side, 'place': place, 'tokens': int(tokens[slot]),
          'a': rounded(slot * width_s), 'b': rounded(min((slot + 1) * width_s, max(report.duration_s, slot * width_s))),
          'lo': round(row + 0.94 - 0.84 * (low + tokens[slot]) / highest, 4),
          'hi': round(row + 0.94 - 0.84 * low / highest, 4),
        }  # fmt: skip
        bars.append(bar if of == _ASKED else bar | {'share': round(tokens[slot] / asked[slot], 4)})
      if of != _ASKED:
        base += tokens
  found = [percent(ratio(report.hit_tokens(side), report.begun_tokens)) for side in sides]
  return bars, [[side, f'{share} found'] for side, share in zip(sides, found, strict=True)]


def _asked(report: Report, width_s: float) -> np.ndarray:
  """Prompt tokens of the requests that began in each interval."""
  rows = report.timeline.requests.rows
  begun = rows[~np.isnan(rows['begun_s'])]
  return _sums(report, begun['begun_s'], begun['prompt_len'], width_s)


def _found(
  report: Report, side: HitSide, width_s: float, shown: Sequence[str]
) -> Iterator[tuple[str, str, np.ndarray]]:
  """For each place its name among the colours, its own, and what was found there of the requests of each interval."""
  hits = report.timeline.hits
  rows, begun_s = hits.on(side), report.timeline.requests.rows['begun_s']
  times_s = begun_s[rows['request']]
  times_s = np.where(np.isnan(times_s), rows['now_s'], times_s)  # a sample may be handed a prompt that is computed
  for place in (*shown, *(place for place in hits.places if place not in shown)):
    if place in hits.places:
      here = rows['place'] == list(hits.places).index(place)
      tokens = _sums(report, times_s[here], rows['tokens'][here], width_s)
      yield place if place in shown else _OTHERS, place, tokens


def _sums(report: Report, times_s: np.ndarray, counts: np.ndarray, width_s: float) -> np.ndarray:
  """The sum of counts in each interval of a run."""
  number = max(math.ceil(report.duration_s / width_s - 1e-9), 1)
  slots = np.floor((times_s - report.timeline.start_s) / width_s + 1e-9).astype(np.int64)
  return np.bincount(np.clip(slots, 0, number - 1), counts, number)
