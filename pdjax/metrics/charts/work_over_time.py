"""The work of every worker over time: a bar for each step and transfer, or for the share of a time slot they took."""

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pdjax.metrics.charts.rows import rounding, some_of, table, to_digits
from pdjax.metrics.charts.style import FIGURE, MAX_BARS, SECONDS, finish, lane_axis, time_axis, zoom_parameters
from pdjax.metrics.colours import PHASES
from pdjax.metrics.report import Report
from pdjax.metrics.span_rows import SpanKind, SpanRows

if TYPE_CHECKING:
  import altair as alt

_STACK: tuple[SpanKind, ...] = ('prefill', 'fused', 'decode')


def gantt(report: Report, *, zoom: bool = True, beside: Sequence[Report] = ()) -> 'alt.LayerChart':
  """The work of every place over time: its steps, and below them in a thin line the KV that left or reached it.

  Drag to move, pinch or scroll with ctrl to zoom, double-click to see all, unless `zoom` is False. Where a run has more
  steps than `MAX_BARS`, bars are slots of time and their heights the share of it that was spent. Runs that stand
  `beside` it share its seconds: the axis ends with the longest.
  """
  import altair as alt

  ran, transfers = _bars(report)
  workers = [worker.name for worker in report.all_places]
  time = time_axis([report, *beside])
  lanes = lane_axis(len(workers), [[name] for name in workers])
  kinds = [kind for kind in PHASES if any(bar['kind'] == kind for bar in itertools.chain(ran, transfers))]
  scale = alt.Scale(domain=kinds, range=[PHASES[kind] for kind in kinds])
  colour = alt.Color('kind:N', scale=scale, title=None)
  share = [alt.Tooltip('share:Q', title='of this time', format='.0%')] if slot_seconds(report) else []
  steps = (
    alt.Chart(table(ran))
    .mark_rect(clip=True, strokeWidth=0.5)  # a stroke closes the seams between steps that touch
    .encode(
      x=time, x2='b', y=lanes, y2='hi', color=colour, stroke=alt.Stroke('kind:N', scale=scale, title=None),
      opacity=alt.condition('datum.odd == 1', alt.value(0.82), alt.value(1)),  # tells one step from the next
      tooltip=[
        alt.Tooltip('kind:N', title='phase'), alt.Tooltip('worker:N'), *share,
        alt.Tooltip('ms:Q', title='ms', format=FIGURE), alt.Tooltip('a:Q', title='began (s)', format=SECONDS),
        alt.Tooltip('count:Q', title='steps'), alt.Tooltip('prompt:Q', title='prompt tokens', format=','),
        alt.Tooltip('output:Q', title='output tokens', format=','), alt.Tooltip('requests:N'),
      ],
    )
  )  # fmt: skip
  moves = (
    alt.Chart(table(transfers))
    .mark_rect(clip=True, opacity=1, strokeWidth=0.7)  # seen, however short
    .encode(
      x=time, x2='b', y=lanes, y2='hi', color=colour, stroke=alt.Stroke('kind:N', scale=scale, title=None),
      tooltip=[
        alt.Tooltip('kind:N', title='phase'), alt.Tooltip('way:N'), *share,
        alt.Tooltip('ms:Q', title='ms', format=FIGURE), alt.Tooltip('a:Q', title='began (s)', format=SECONDS),
        alt.Tooltip('count:Q', title='transfers'), alt.Tooltip('kilobytes:Q', title='kB', format=',.0f'),
        alt.Tooltip('requests:N'),
      ],
    )
  )  # fmt: skip
  return finish(alt.layer(steps.add_params(*zoom_parameters(zoom)), moves), 'What each worker did', rows=len(workers))


def slot_seconds(report: Report) -> float | None:
  """Seconds of a bar of `gantt` where steps are not drawn one by one, else None."""
  if _num_bars(report) <= MAX_BARS:
    return None
  return report.duration_s / _num_slots(report)


def _num_bars(report: Report) -> int:
  spans = report.timeline.spans
  return len(spans) + int(spans.is_transfer.sum()) + int(spans.is_copy.sum())


def _num_slots(report: Report) -> int:
  return max(MAX_BARS // (len(report.all_places) * max(len(report.timeline.spans.kinds), 1)), 100)


def _bars(report: Report) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """The rectangles of the steps and of the transfers; `lo` and `hi` are heights, a worker's row being 1 high."""
  if slot_seconds(report) is not None:
    return _slots(report)
  rows = {worker.name: row for row, worker in enumerate(report.all_places)}
  start_s, rounded = report.timeline.start_s, rounding(report)
  steps: list[dict[str, Any]] = []
  transfers: list[dict[str, Any]] = []
  counts = dict.fromkeys(rows, 0)
  for span in report.timeline.spans:
    bar = {
      'kind': span.kind, 'worker': span.worker,
      'a': rounded(span.began_s - start_s), 'b': rounded(span.ended_s - start_s),
      'ms': to_digits((span.ended_s - span.began_s) * 1e3), 'count': span.steps, 'requests': some_of(span.requests),
    }  # fmt: skip
    if span.moves:
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
  spans = report.timeline.spans
  steps, transfers = [], []
  for row, worker in enumerate(report.all_places):
    base = np.full(len(edges_s) - 1, row + 0.72)
    for kind in _STACK:
      which = np.flatnonzero(spans.of_worker(worker.name) & spans.of_kind(kind))
      for slot, share, bar in _shares(spans, which, edges_s):
        top = base[slot] - 0.62 * share
        steps.append(bar | {'worker': worker.name, 'kind': kind, 'lo': round(top, 4), 'hi': round(base[slot], 4)})
        base[slot] = top
    for kind, (way, moved) in itertools.product(
      ('transfer', 'copy'),
      (
        (f'{worker.name} →', spans.of_worker(worker.name)),
        (f'→ {worker.name}', spans.to_worker(worker.name)),
      ),
    ):
      for _, share, bar in _shares(spans, np.flatnonzero(moved & spans.of_kind(kind)), edges_s):
        low = round(row + 0.92 - 0.05 - 0.09 * share, 4)
        transfers.append(bar | {'way': way, 'kind': kind, 'lo': low, 'hi': row + 0.92})
  start_s, rounded = edges_s[0], rounding(report)
  for bar in itertools.chain(steps, transfers):
    bar |= {
      'a': rounded(bar['a'] - start_s),
      'b': rounded(bar['b'] - start_s),
      'ms': to_digits(width_s * bar['share'] * 1e3, 4),
    }
  return steps, transfers


def _shares(spans: SpanRows, which: np.ndarray, edges_s: np.ndarray) -> Iterable[tuple[int, float, dict[str, Any]]]:
  """For each slot of time in which some of the spans lie: its number, their share of it, and what they did in all."""
  if not len(which):
    return
  which = which[np.argsort(spans.rows['began_s'][which], kind='stable')]
  rows = spans.rows[which]
  ended_s = np.maximum.accumulate(rows['ended_s'])
  began_s = np.maximum(rows['began_s'], np.concatenate([[-np.inf], ended_s[:-1]]))  # what overlaps counts once
  corners_s = np.stack([began_s, np.maximum(ended_s, began_s)], axis=1).ravel()
  spent_s = np.repeat(np.cumsum(corners_s[1::2] - corners_s[::2]), 2)
  spent_s = np.concatenate([[0.0], spent_s[:-1]])
  share = np.diff(np.interp(edges_s, corners_s, spent_s)) / np.diff(edges_s)
  slots = np.clip(np.searchsorted(edges_s, rows['began_s'], 'right') - 1, 0, len(share) - 1)

  def total(field: str) -> np.ndarray:
    return np.bincount(slots, rows[field], len(share)).astype(np.int64)

  counts, prompt, output, wire = map(total, ('steps', 'prompt_tokens', 'output_tokens', 'wire_bytes'))
  ends = np.searchsorted(slots, np.arange(len(share)), 'right')
  for slot in np.flatnonzero(share > 1e-4).tolist():
    here = which[ends[slot - 1] if slot else 0 : ends[slot]]
    yield slot, min(float(share[slot]), 1.0), {
      'a': edges_s[slot], 'b': edges_s[slot + 1], 'share': round(min(float(share[slot]), 1.0), 4),
      'count': int(counts[slot]), 'prompt': int(prompt[slot]), 'output': int(output[slot]),
      'kilobytes': round(int(wire[slot]) / 1e3), 'requests': some_of(spans.everyone(here)),
    }  # fmt: skip
