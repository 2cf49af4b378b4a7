"""Charts of runs, each as an Altair chart: steps and pages over time, latencies, accounts, figures over the rate.

    from pdjax.metrics import charts
    charts.gantt(result.report)                         # a notebook shows it, drawn by the reader's browser
    charts.picture(charts.gantt(result.report))         # the same as a PNG, which shows wherever the notebook goes
    charts.latency(ours.report, baseline.report, metric='ttft')
    charts.save(charts.overview(result.report), 'run.svg')

Altair is loaded when a chart is made.
"""

import csv
import dataclasses
import io
import itertools
import json
import math
import os
import pathlib
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pdjax.metrics import wording
from pdjax.metrics.colours import BASELINE, DARK, LIGHT, PARTS, PHASES, SYSTEMS, WAITING, vega_config
from pdjax.metrics.report import Report
from pdjax.metrics.timeline import BusySpan, RequestTimeline
from pdjax.types.json_text import json_text
from pdjax.types.worker import Role

if TYPE_CHECKING:
  import altair as alt

MAX_BARS = 6000  # of one chart; more are drawn as shares of time slots, so that files stay small and charts quick

METRICS: dict[str, tuple[str, Callable[[RequestTimeline], Iterable[float | None]]]] = {
  'ttft': ('Time to first token', lambda request: (request.ttft_s,)),
  'tpot': ('Time per output token', lambda request: (request.tpot_s,)),
  'itl': ('Inter-token latency: delta to delta', lambda request: request.itls_s),
  'e2el': ('End-to-end latency', lambda request: (request.e2el_s,)),
  'handoff': ('Hand-off: first to second token', lambda request: (request.handoff_s,)),
}

_ROW_PX = 46
_WIDTH_PX = 760
_PNG_SCALE = 2
_PNG_HEAD = b'\x89PNG\r\n\x1a\n'
_ROLES = {Role.PREFILL: PHASES['prefill'], Role.DECODE: PHASES['decode'], Role.BOTH: PHASES['fused']}
_WAITING = 'waiting'
_STACK = ('prefill', 'fused', 'decode')
_MAX_POINTS = 200  # of one curve
_FIGURE, _SECONDS = ',.5~r', ',.6~f'  # of tooltips: digits of a figure count from its first, so that none reads as 0


# ---------------------------------------------------------------------------- over time


def gantt(report: Report, *, zoom: bool = True, beside: Sequence[Report] = ()) -> 'alt.LayerChart':
  """The work of every worker over time: its steps, and below them in a thin line the KV that left or reached it.

  Drag to move, pinch or scroll with ctrl to zoom, double-click to see all, unless `zoom` is False. Where a run has more
  steps than `MAX_BARS`, bars are slots of time and their heights the share of it that was spent. Runs that stand
  `beside` it share its seconds: the axis ends with the longest.
  """
  import altair as alt

  ran, transfers = _bars(report)
  workers = [worker.name for worker in report.workers]
  time = _time_axis([report, *beside])
  lanes = _lanes(len(workers), [[name] for name in workers])
  kinds = [kind for kind in PHASES if any(bar['kind'] == kind for bar in itertools.chain(ran, transfers))]
  scale = alt.Scale(domain=kinds, range=[PHASES[kind] for kind in kinds])
  colour = alt.Color('kind:N', scale=scale, title=None)
  share = [alt.Tooltip('share:Q', title='of this time', format='.0%')] if slot_seconds(report) else []
  steps = (
    alt.Chart(_table(ran))
    .mark_rect(clip=True, strokeWidth=0.5)  # a stroke closes the seams between steps that touch
    .encode(
      x=time, x2='b', y=lanes, y2='hi', color=colour, stroke=alt.Stroke('kind:N', scale=scale, title=None),
      opacity=alt.condition('datum.odd == 1', alt.value(0.82), alt.value(1)),  # tells one step from the next
      tooltip=[
        alt.Tooltip('kind:N', title='phase'), alt.Tooltip('worker:N'), *share,
        alt.Tooltip('ms:Q', title='ms', format=_FIGURE), alt.Tooltip('a:Q', title='began (s)', format=_SECONDS),
        alt.Tooltip('count:Q', title='steps'), alt.Tooltip('prompt:Q', title='prompt tokens', format=','),
        alt.Tooltip('output:Q', title='output tokens', format=','), alt.Tooltip('requests:N'),
      ],
    )
  )  # fmt: skip
  moves = (
    alt.Chart(_table(transfers))
    .mark_rect(clip=True, opacity=1, stroke=PHASES['transfer'], strokeWidth=0.7)  # seen, however short
    .encode(
      x=time, x2='b', y=lanes, y2='hi', color=colour,
      tooltip=[
        alt.Tooltip('kind:N', title='phase'), alt.Tooltip('way:N'), *share,
        alt.Tooltip('ms:Q', title='ms', format=_FIGURE), alt.Tooltip('a:Q', title='began (s)', format=_SECONDS),
        alt.Tooltip('count:Q', title='transfers'), alt.Tooltip('kilobytes:Q', title='kB', format=',.0f'),
        alt.Tooltip('requests:N'),
      ],
    )
  )  # fmt: skip
  return _finish(alt.layer(steps.add_params(*_zoom(zoom)), moves), 'What each worker did', rows=len(workers))


def pages(report: Report, *, zoom: bool = True, beside: Sequence[Report] = ()) -> 'alt.LayerChart':
  """The KV pages that every worker had in use; a row is as high as the fullest pool ever was. Zooms like `gantt`.

  The last row, if any prompt ever had to wait, shows how many waited to be begun. Of a long run every slot of time
  shows its peak. Runs that stand `beside` it share its seconds and heights.
  """
  import altair as alt

  bars, labels = _page_bars(report, beside)
  colours = {worker.name: _ROLES[worker.role] for worker in report.workers} | {_WAITING: WAITING}
  scale = alt.Scale(domain=list(colours), range=list(colours.values()))
  chart = (
    alt.Chart(_table(bars))
    .mark_rect(clip=True, opacity=1, strokeWidth=0.5)
    .encode(
      x=_time_axis([report, *beside]), x2='b', y=_lanes(len(labels), labels), y2='hi',
      color=alt.Color('worker:N', scale=scale, legend=None), stroke=alt.Stroke('worker:N', scale=scale, legend=None),
      tooltip=[
        alt.Tooltip('worker:N'), alt.Tooltip('a:Q', title='from (s)', format=_SECONDS),
        alt.Tooltip('b:Q', title='to (s)', format=_SECONDS),
        alt.Tooltip('count:Q', title='pages (or prompts)', format=','),
        alt.Tooltip('share:Q', title='of the pool', format='.1%'), alt.Tooltip('decoding:Q', title='decoding'),
      ],
    )
  )  # fmt: skip
  return _finish(alt.layer(chart.add_params(*_zoom(zoom))), 'Pages in use', rows=len(labels))


def slot_seconds(report: Report) -> float | None:
  """Seconds of a bar of `gantt` where steps are not drawn one by one, else None."""
  if _num_bars(report) <= MAX_BARS:
    return None
  return report.duration_s / _num_slots(report)


def _num_bars(report: Report) -> int:
  return sum(2 if span.kind == 'transfer' else 1 for span in report.timeline.spans)


def _num_slots(report: Report) -> int:
  kinds = {span.kind for span in report.timeline.spans}
  return max(MAX_BARS // (len(report.workers) * max(len(kinds), 1)), 100)


def _bars(report: Report) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """The rectangles of the steps and of the transfers; `lo` and `hi` are heights, a worker's row being 1 high."""
  if slot_seconds(report) is not None:
    return _slots(report)
  rows = {worker.name: row for row, worker in enumerate(report.workers)}
  start_s, rounded = report.timeline.start_s, _rounding(report)
  steps: list[dict[str, Any]] = []
  transfers: list[dict[str, Any]] = []
  counts = dict.fromkeys(rows, 0)
  for span in report.timeline.spans:
    bar = {
      'kind': span.kind, 'worker': span.worker,
      'a': rounded(span.began_s - start_s), 'b': rounded(span.ended_s - start_s),
      'ms': _digits((span.ended_s - span.began_s) * 1e3), 'count': 1, 'requests': _some(span.requests),
    }  # fmt: skip
    if span.kind == 'transfer':
      moved = {'way': f'{span.worker} → {span.target}', 'kilobytes': round(span.wire_bytes / 1e3, 1)}
      for worker in (span.worker, span.target):
        transfers.append(bar | moved | {'lo': rows[worker or ''] + 0.78, 'hi': rows[worker or ''] + 0.92})
    else:
      row = rows[span.worker]
      counts[span.worker] += 1
      steps.append(
        bar | {
          'prompt': span.prompt_tokens, 'output': span.output_tokens, 'lo': row + 0.1, 'hi': row + 0.72,
          'odd': counts[span.worker] % 2,
        }
      )  # fmt: skip
  return steps, transfers


def _slots(report: Report) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """The same for a long run: per slot of time and phase one rectangle as high as the share of time it took."""
  edges_s = np.linspace(report.timeline.start_s, report.timeline.end_s, _num_slots(report) + 1)
  width_s = edges_s[1] - edges_s[0]
  steps, transfers = [], []
  for row, worker in enumerate(report.workers):
    base = np.full(len(edges_s) - 1, row + 0.72)
    for kind in _STACK:
      spans = [span for span in report.timeline.spans if span.worker == worker.name and span.kind == kind]
      for slot, share, bar in _shares(spans, edges_s):
        top = base[slot] - 0.62 * share
        steps.append(bar | {'worker': worker.name, 'kind': kind, 'lo': round(top, 4), 'hi': round(base[slot], 4)})
        base[slot] = top
    for way, spans in (
      (f'{worker.name} →', [s for s in report.timeline.spans if s.kind == 'transfer' and s.worker == worker.name]),
      (f'→ {worker.name}', [s for s in report.timeline.spans if s.kind == 'transfer' and s.target == worker.name]),
    ):
      for _, share, bar in _shares(spans, edges_s):
        low = round(row + 0.92 - 0.05 - 0.09 * share, 4)
        transfers.append(bar | {'way': way, 'kind': 'transfer', 'lo': low, 'hi': row + 0.92})
  start_s, rounded = edges_s[0], _rounding(report)
  for bar in itertools.chain(steps, transfers):
    bar |= {
      'a': rounded(bar['a'] - start_s),
      'b': rounded(bar['b'] - start_s),
      'ms': _digits(width_s * bar['share'] * 1e3, 4),
    }
  return steps, transfers


def _shares(spans: Sequence[BusySpan], edges_s: np.ndarray) -> Iterable[tuple[int, float, dict[str, Any]]]:
  """For each slot of time in which some of the spans lie: its number, their share of it, and what they did in all."""
  if not spans:
    return
  spans = sorted(spans, key=lambda span: span.began_s)
  began_s = np.array([span.began_s for span in spans])
  ended_s = np.maximum.accumulate([span.ended_s for span in spans])
  began_s = np.maximum(began_s, np.concatenate([[-np.inf], ended_s[:-1]]))  # what overlaps counts once
  corners_s = np.stack([began_s, np.maximum(ended_s, began_s)], axis=1).ravel()
  spent_s = np.repeat(np.cumsum(corners_s[1::2] - corners_s[::2]), 2)
  spent_s = np.concatenate([[0.0], spent_s[:-1]])
  share = np.diff(np.interp(edges_s, corners_s, spent_s)) / np.diff(edges_s)
  slots = np.clip(np.searchsorted(edges_s, [span.began_s for span in spans], 'right') - 1, 0, len(share) - 1)

  def total(values: Sequence[int]) -> np.ndarray:
    return np.bincount(slots, values, len(share)).astype(np.int64)

  counts, prompt = np.bincount(slots, minlength=len(share)), total([span.prompt_tokens for span in spans])
  output, wire = total([span.output_tokens for span in spans]), total([span.wire_bytes for span in spans])
  requests: dict[int, dict[str, None]] = {}
  for slot, span in zip(slots.tolist(), spans, strict=True):
    requests.setdefault(slot, {}).update(dict.fromkeys(span.requests))
  for slot in np.flatnonzero(share > 1e-4).tolist():
    yield slot, min(float(share[slot]), 1.0), {
      'a': edges_s[slot], 'b': edges_s[slot + 1], 'share': round(min(float(share[slot]), 1.0), 4),
      'count': int(counts[slot]), 'prompt': int(prompt[slot]), 'output': int(output[slot]),
      'kilobytes': round(int(wire[slot]) / 1e3), 'requests': _some(tuple(requests.get(slot, ()))),
    }  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class _Level:
  """From `at_s` to `until_s` so many pages were in use, or prompts waited."""

  at_s: float
  until_s: float
  count: int
  decoding: int | None


def _page_bars(report: Report, beside: Sequence[Report]) -> tuple[list[dict[str, Any]], list[list[str]]]:
  """The rectangles of pages in use, and each row's label in lines."""
  start_s, end_s, rounded = report.timeline.start_s, report.timeline.end_s, _rounding(report)
  changes: dict[str, list[tuple[float, int, int | None]]] = {worker.name: [] for worker in report.workers}
  changes[_WAITING] = [(now.now_s, now.waiting, None) for now in report.timeline.occupancy]
  for now in report.timeline.occupancy:
    for use in now.workers:
      changes[use.worker].append((now.now_s, use.pages, use.decoding))
  peaks = _peaks(report)
  if not peaks[_WAITING]:
    del changes[_WAITING]
  sizes = _pool_sizes(report)
  together = [report, *beside]
  shares = (_peaks(run)[name] / size for run in together for name, size in _pool_sizes(run).items())
  fullest = max(shares, default=0.0) or 1.0
  most_waiting = max(_peaks(run)[_WAITING] for run in together)
  bars, labels = [], []
  for row, (name, seen) in enumerate(changes.items()):
    size = sizes.get(name)
    highest = size * fullest if size is not None else most_waiting if name == _WAITING else peaks[name]
    labels.append([name, f'peak {peaks[name]:,}' + (f' of {size:,}' if size is not None else '')])
    for level in _highest(_levels(seen, end_s), MAX_BARS // len(changes)):
      bar = {
        'worker': name, 'a': rounded(level.at_s - start_s), 'b': rounded(level.until_s - start_s), 'count': level.count,
        'lo': round(row + 0.94 - 0.84 * level.count / highest, 4), 'hi': row + 0.94, 'decoding': level.decoding,
      }  # fmt: skip
      bars.append(bar if size is None else bar | {'share': round(level.count / size, 4)})
  return bars, labels


def _peaks(report: Report) -> dict[str, int]:
  """The most pages that each worker ever had in use, and the most prompts that ever waited."""
  peaks = dict.fromkeys([*(worker.name for worker in report.workers), _WAITING], 0)
  for now in report.timeline.occupancy:
    peaks[_WAITING] = max(peaks[_WAITING], now.waiting)
    for use in now.workers:
      peaks[use.worker] = max(peaks[use.worker], use.pages)
  return peaks


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


# ---------------------------------------------------------------------------- latencies


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
  title, _ = METRICS[metric]
  curves, dots = [], []
  systems = _named(reports, names)
  for name, report in systems.items():
    values_ms = _values_ms(report, metric)
    if not len(values_ms):
      continue
    shares = np.linspace(0, 1, max(min(len(values_ms), _MAX_POINTS), 2))
    points = np.quantile(values_ms, shares)
    curves += [{'system': name, 'ms': _digits(x), 'share': round(y, 4)} for x, y in zip(points, shares, strict=True)]
    for percent in (50, 90, 99):
      value = float(np.percentile(values_ms, percent))
      dots.append({'system': name, 'ms': _digits(value), 'share': percent / 100, 'percentile': f'p{percent}'})
  longest = _longest_ms(reports, metric)
  x = alt.X('ms:Q', title='ms', scale=alt.Scale(domain=[0, longest], nice=False), axis=alt.Axis(tickCount=5))
  y = alt.Y(
    'share:Q',
    title=None,
    scale=alt.Scale(domain=[0, 1.03], nice=False),
    axis=alt.Axis(format='.0%', values=[0, 0.25, 0.5, 0.75, 1]),
  )
  colour, dash = _system_scales(list(systems))
  lines = (
    alt.Chart(_table(curves))
    .mark_line(strokeWidth=2, clip=True)
    .encode(x=x, y=y, color=colour, strokeDash=dash, order='share:Q')
  )
  points_ = (
    alt.Chart(_table(dots))
    .mark_point(filled=True, size=55, opacity=1, strokeWidth=1, clip=True)
    .encode(
      x=x, y=y, color=colour,
      tooltip=[alt.Tooltip('system:N'), alt.Tooltip('percentile:N'), alt.Tooltip('ms:Q', format=_FIGURE)],
    )
  )  # fmt: skip
  layers = [lines, points_]
  limit, drawn = limit_ms(*reports, metric=metric)
  if limit is not None and drawn:
    rule = alt.Chart(_table([{'ms': limit, 'what': f'limit {wording.plain(limit)} ms'}]))
    layers.append(rule.mark_rule(strokeDash=[3, 3]).encode(x='ms:Q', tooltip=alt.Tooltip('what:N', title='limit')))
  return _finish(alt.layer(*layers), title, height=170)


def limit_ms(*reports: Report, metric: str) -> tuple[float | None, bool]:
  """The runs' limit on a metric, if they have one, and whether `latency` has room to draw it."""
  limit = next((getattr(r.slo, f'{metric}_ms', None) for r in reports if r.slo is not None), None)
  return limit, limit is not None and limit <= _longest_ms(reports, metric)


def _longest_ms(reports: Iterable[Report], metric: str) -> float:
  """The end of the axis of a latency: a little beyond the longest p99."""
  every = [values_ms for report in reports if len(values_ms := _values_ms(report, metric))]
  return max((float(np.percentile(values_ms, 99)) * 1.08 for values_ms in every), default=0.0) or 1.0


def _values_ms(report: Report, metric: str) -> np.ndarray:
  done = [request for request in report.timeline.requests if request.completed]
  _, of = METRICS[metric]
  return np.sort([value * 1e3 for request in done for value in of(request) if value is not None])


def account(*reports: Report, names: Sequence[str] = ()) -> 'alt.LayerChart':
  """The parts of the mean time to the first token and from the first to the second, in stacked bars.

  Args:
    reports: A run, and others to compare it with.
    names: Names of the runs; by default the shorthands of their clusters.
  """
  import altair as alt

  systems = _named(reports, names)
  several = len(systems) > 1
  bars: list[dict[str, Any]] = []
  totals: list[dict[str, Any]] = []
  for what, parts in (('TTFT', ('queue', 'prefill')), ('hand-off', ('wait', 'wire', 'admit', 'step'))):
    for name, report in systems.items():
      label = f'{what} · {name}' if several else what
      reached, known = 0.0, False
      for part in parts:
        length = getattr(report.account, f'{part}_ms')
        if length is None:
          continue
        bars.append(
          {'bar': label, 'part': part, 'of': what, 'system': name, 'from': _digits(reached),
           'to': _digits(reached + length), 'ms': _digits(length)}
        )  # fmt: skip
        reached, known = reached + length, True
      totals.append({'bar': label, 'to': _digits(reached), 'ms': wording.number(reached if known else None)})
  rows = [total['bar'] for total in totals]
  parts_seen = [part for part in PARTS if any(bar['part'] == part for bar in bars)]
  y = alt.Y('bar:N', sort=rows, title=None, axis=alt.Axis(domain=False, ticks=False, labelLimit=150))
  longest = max((total['to'] for total in totals), default=0.0) or 1.0
  x = alt.X('from:Q', title='ms', scale=alt.Scale(domain=[0, longest * 1.16], nice=False), axis=alt.Axis(tickCount=5))
  stack = (
    alt.Chart(_table(bars))
    .mark_bar(height={'band': 0.6})
    .encode(
      x=x, x2='to', y=y,
      color=alt.Color(
        'part:N', scale=alt.Scale(domain=parts_seen, range=[PARTS[part] for part in parts_seen]), title=None
      ),
      tooltip=[
        alt.Tooltip('of:N', title='part of'), alt.Tooltip('part:N'), alt.Tooltip('system:N'),
        alt.Tooltip('ms:Q', title='mean (ms)', format=_FIGURE),
      ],
    )
  )  # fmt: skip
  text = alt.Chart(_table(totals)).mark_text(align='left', dx=6).encode(x='to:Q', y=y, text='ms:N')
  return _finish(alt.layer(stack, text), 'Where the time went', height=34 * len(rows))


# ---------------------------------------------------------------------------- over the rate


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
    {'system': name, 'rate': rate, 'value': _digits(value)}
    for name, points in curves.items()
    for rate, value in points
    if value is not None and math.isfinite(value) and (value > 0 or not log)
  ]
  rates = sorted({rate for points in curves.values() for rate, _ in points})
  colour, dash = _system_scales(list(curves), baseline)
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
    alt.Tooltip('value:Q', title=unit, format=_FIGURE),
  ]  # fmt: skip
  base = alt.Chart(_table(rows)).encode(x=x, y=y, color=colour)
  lines = base.mark_line(strokeWidth=2).encode(strokeDash=dash)
  points = base.mark_point(filled=True, size=60, opacity=1, strokeWidth=1).encode(tooltip=tooltip)
  layers = [lines, points]
  if ideal:
    ends = alt.Chart(_table([{'rate': rate, 'value': rate} for rate in (rates[0], rates[-1])]))
    layers.insert(0, ends.mark_line(strokeWidth=1, strokeDash=[2, 2], color=BASELINE).encode(x=x, y=y))
  return _finish(alt.layer(*layers), title, height=200)


# ---------------------------------------------------------------------------- together, and in files


def overview(report: Report) -> 'alt.VConcatChart':
  """A run in one picture: what each worker did, the pages in use, and where the time went."""
  import altair as alt

  parts = [_without_config(chart) for chart in (gantt(report, zoom=False), pages(report, zoom=False), account(report))]
  chart = alt.vconcat(*parts, spacing=28).resolve_scale(color='independent', stroke='independent')
  return chart.properties(title=alt.TitleParams(**_title(report)), padding=16).configure(**vega_config(LIGHT))


def _title(report: Report) -> dict[str, Any]:
  return {'text': wording.headline(report), 'subtitle': f'{report.ttft_account()};  {report.handoff_account()}'}


def side_by_side(*charts: Any, columns: int = 2) -> 'alt.ConcatChart':
  """Charts of like systems in rows, with one legend for all; of `columns` in a row, each is that much narrower."""
  import altair as alt

  gap_px = 90  # for the axes and titles between two
  width_px = (_WIDTH_PX - gap_px * (columns - 1)) // columns
  parts = [_without_config(chart).properties(width=width_px) for chart in charts]
  # Flush: the legend, which hangs on the first chart, does not move it away from its row.
  return alt.concat(*parts, columns=columns, spacing=gap_px, bounds='flush').configure(**vega_config(LIGHT))


@dataclasses.dataclass(frozen=True)
class Picture:
  """A chart as a PNG that a notebook shows by itself: what is in it, its size as shown, and twice as many pixels."""

  title: str
  width: int
  height: int
  png: bytes = dataclasses.field(repr=False)

  def _repr_png_(self) -> tuple[bytes, dict[str, Any]]:
    return self.png, {'width': self.width, 'height': self.height, 'alt': self.title}


def picture(chart: Any) -> Picture:
  """A chart drawn here and now, without a browser: for notebooks that are read where no script runs."""
  import vl_convert

  spec = {'padding': 8} | chart.to_dict(validate=False)
  png = vl_convert.vegalite_to_png(spec, scale=_PNG_SCALE)
  width, height = struct.unpack('>II', png[16:24])  # where every PNG says it
  return Picture('; '.join(_titles(spec)), width // _PNG_SCALE, height // _PNG_SCALE, _deflate(png))


def _titles(spec: Mapping[str, Any]) -> Iterable[str]:
  title = spec.get('title')
  if title:
    yield title['text'] if isinstance(title, Mapping) else title
  for part in spec.get('concat', spec.get('vconcat', ())):
    yield from _titles(part)


def _deflate(png: bytes) -> bytes:
  """The same PNG at a third of the length: its renderer compresses in a hurry."""
  chunks: list[tuple[bytes, bytes]] = []
  at = len(_PNG_HEAD)
  while at < len(png):
    length, kind = struct.unpack('>I4s', png[at : at + 8])
    chunks.append((kind, png[at + 8 : at + 8 + length]))
    at += length + 12  # length, kind and checksum
  pixels = zlib.decompress(b''.join(body for kind, body in chunks if kind == b'IDAT'))
  chunks = [chunk for chunk in chunks if chunk[0] != b'IDAT']
  chunks.insert(-1, (b'IDAT', zlib.compress(pixels, 9)))
  return _PNG_HEAD + b''.join(
    struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body)) for kind, body in chunks
  )


def save(chart: Any, path: str | os.PathLike) -> pathlib.Path:
  """Write a chart as `.svg` or `.png`, without a browser; an SVG follows its reader's light or dark theme.

  Raises:
    ValueError: if the path has another ending.
  """
  import vl_convert

  path = pathlib.Path(path)
  spec = chart.to_dict(validate=False)
  path.parent.mkdir(parents=True, exist_ok=True)
  match path.suffix:
    case '.svg':
      path.write_text(_follow_theme(vl_convert.vegalite_to_svg(spec)), encoding='utf-8')
    case '.png':
      path.write_bytes(_deflate(vl_convert.vegalite_to_png(spec, scale=_PNG_SCALE)))
    case _:
      raise ValueError(f'a chart cannot be written to {str(path)!r}; end the name in .svg or .png.')
  return path


def _follow_theme(svg: str) -> str:
  """Give each colour of the light page its dark counterpart where the reader prefers dark."""
  rules = ''.join(
    f'[{paint}="{LIGHT[name]}"]{{{paint}:{DARK[name]}}}' for name in LIGHT for paint in ('fill', 'stroke')
  )
  return re.sub('(<svg[^>]*>)', rf'\1<style>@media (prefers-color-scheme: dark){{{rules}}}</style>', svg, count=1)


def page_spec(chart: Any) -> str:
  """A chart as JSON for the page, which gives it width, theme, title and legend."""
  spec = _without_config(chart).to_dict(validate=False)
  spec['width'] = 'container'
  spec['autosize'] = {'type': 'fit-x', 'contains': 'padding'}
  spec.pop('title', None)
  for layer in spec.get('layer', ()):
    for channel in ('color', 'stroke', 'strokeDash'):
      layer.get('encoding', {}).get(channel, {}).update(legend=None)
  return json_text(spec, separators=(',', ':'))


# ---------------------------------------------------------------------------- shared


def _named(reports: Sequence[Report], names: Sequence[str] = ()) -> dict[str, Report]:
  """Each run under its name, or else the shorthand of its cluster; numbered where that repeats."""
  systems: dict[str, Report] = {}
  for report, given in zip(reports, names or [report.split for report in reports], strict=True):
    name, number = given, 2
    while name in systems:
      name, number = f'{given} ({number})', number + 1
    systems[name] = report
  return systems


def system_colours(names: Sequence[str], baseline: str | None = None) -> list[tuple[str, str]]:
  """The colour of each system that is compared; without a named baseline the second of two is one."""
  if baseline is None and len(names) == 2:
    baseline = names[1]
  others = itertools.cycle(SYSTEMS)
  return [(name, BASELINE if name == baseline else next(others)) for name in names]


def _system_scales(names: Sequence[str], baseline: str | None = None) -> tuple[Any, Any]:
  """Colour and dash of each system."""
  import altair as alt

  colours = [colour for _, colour in system_colours(names, baseline)]
  dashes = [[5, 4] if colour == BASELINE else [1, 0] for colour in colours]
  legend = None if len(names) < 2 else alt.Legend(symbolType='stroke')
  return (
    alt.Color('system:N', scale=alt.Scale(domain=names, range=colours), title=None, legend=legend),
    alt.StrokeDash('system:N', scale=alt.Scale(domain=names, range=dashes), title=None, legend=legend),
  )


def _time_axis(reports: Sequence[Report]) -> 'alt.X':
  import altair as alt

  longest_s = max(report.duration_s for report in reports) or 1e-3
  scale = alt.Scale(domain=[0, longest_s], nice=False)
  return alt.X('a:Q', title='seconds after the first arrival', scale=scale, axis=alt.Axis(grid=True, tickCount=8))


def _lanes(count: int, labels: Sequence[Sequence[str]]) -> 'alt.Y':
  import altair as alt

  axis = alt.Axis(
    values=[row + 0.5 for row in range(count)], labelExpr=f'{json.dumps(labels)}[floor(datum.value)]',
    grid=False, ticks=False, domain=False, labelLimit=110, labelPadding=8, labelLineHeight=15, minExtent=96,
  )  # fmt: skip
  return alt.Y('lo:Q', title=None, scale=alt.Scale(domain=[0, count], reverse=True, nice=False), axis=axis)


def _zoom(wanted: bool) -> list[Any]:
  """Both charts over time call their selection alike, so that a page can move them together."""
  import altair as alt

  if not wanted:
    return []
  wheel = 'wheel![event.ctrlKey || event.metaKey]'  # without a key it scrolls the page
  return [alt.selection_interval(name='zoom', encodings=['x'], bind='scales', zoom=wheel)]


def _finish(chart: Any, title: str, *, rows: int = 0, height: int = 0) -> Any:
  return chart.properties(title=title, width=_WIDTH_PX, height=height or max(rows * _ROW_PX, 60)).configure(
    **vega_config(LIGHT)
  )


def _without_config(chart: Any) -> Any:
  import altair as alt

  copy = chart.copy(deep=False)
  copy.config = alt.Undefined
  return copy


def _table(rows: Sequence[Mapping[str, Any]]) -> 'alt.InlineData':
  """Rows as CSV in the chart: a third as long as JSON, and Altair need not walk through it."""
  import altair as alt

  columns = list(dict.fromkeys(name for row in rows for name in row))
  numbers = {name: 'number' for row in rows for name, value in row.items() if isinstance(value, int | float)}
  text = io.StringIO()
  writer = csv.DictWriter(text, columns, lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return alt.InlineData(values=text.getvalue(), format=alt.CsvDataFormat(type='csv', parse=numbers or None))


def _some(requests: Sequence[str], most: int = 4) -> str:
  more = f' and {len(requests) - most} more' if len(requests) > most else ''
  return ', '.join(requests[:most]) + more


def _digits(figure: float, digits: int = 6) -> float:
  """A figure with so many digits, wherever its point is: rounded behind the point, tiny ones would all be 0."""
  return float(f'{figure:.{digits}g}')


def _rounding(report: Report) -> Callable[[float], float]:
  """Rounds seconds of a run: to microseconds, or to a millionth of a run that is shorter than a second."""
  duration_s = report.duration_s
  places = 6 - math.floor(math.log10(duration_s)) if 0 < duration_s < 1 else 6
  return lambda seconds: round(seconds, places)
