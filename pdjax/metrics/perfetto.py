"""A run as a trace for ui.perfetto.dev and chrome://tracing: a track per worker and link, arrows along a request's way.

The format is the Trace Event Format (JSON): https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from pdjax.metrics.report import Report
from pdjax.metrics.timeline import BusySpan
from pdjax.serving.events import PrefixHit, RoleChanged
from pdjax.types.json_text import json_text

_REQUESTS = 1  # the process of all that belongs to no worker; to viewers 0 is the idle task
_STEPS = 1  # the thread of a worker that runs its steps; links come after it
_CATEGORY = 'pdjax'


def trace_events(report: Report) -> list[dict[str, Any]]:
  """The run as trace events, times in microseconds and ascending, names of tracks first.

  Each worker is a process with a thread `steps` and one for each place that it sends KV to, or several where transfers
  overlap; places that only hold pages are processes too. Counters say how many pages are in use, how many others are
  cached, how many sequences decode and how many prompts wait. A worker that takes another role has an instant there,
  and so has what was found in the prefix cache. For every transfer of a request an arrow (a flow) leads from the step
  that computed the pages over the transfer to the first step that decodes the request.
  """
  spans = list(report.timeline.spans)
  processes = {worker.name: number for number, worker in enumerate(report.all_places, start=_REQUESTS + 1)}
  names = [_name('process_name', _REQUESTS, 0, 'requests')]
  for worker in report.workers:
    changes = any(change.worker == worker.name for change in report.role_changes)
    label = f'{worker.name} ({worker.role.value}{" at first" if changes else ""}, tp={worker.tp})'
    names.append(_name('process_name', processes[worker.name], 0, label))
    names.append(_name('thread_name', processes[worker.name], _STEPS, 'steps'))
  names += [_name('process_name', processes[place.name], 0, f'{place.name} (holds pages)') for place in report.places]
  tracks = {span.order: (processes[span.worker], _STEPS) for span in spans if not span.moves}
  threads = dict.fromkeys(processes, _STEPS)  # of each worker the last
  for (source, target), lanes in _links(spans).items():
    for number, lane in enumerate(lanes):
      threads[source] += 1
      thread = threads[source]
      label = f'KV to {target}' + (f' ({number + 1})' if number else '')
      names.append(_name('thread_name', processes[source], thread, label))
      tracks |= {span.order: (processes[source], thread) for span in lane}
  events = [_slice(span, *tracks[span.order]) for span in spans]
  events += _counters(report, processes)
  events += [_instant(change, processes[change.worker]) for change in report.role_changes]
  events += [_hit(hit, processes.get(hit.place, _REQUESTS)) for hit in report.timeline.hits]
  slices = {event['args']['order']: event for event in events if event['ph'] == 'X'}
  events += _flows(spans, slices)
  return names + sorted(events, key=lambda event: event['ts'])


def save_trace(report: Report, path: str | os.PathLike) -> pathlib.Path:
  """Write the run as a file that ui.perfetto.dev opens, and return its path.

  Args:
    report: The run.
    path: A file that ends in `.json`, or a folder, which gets a `trace.json`; missing folders are made.
  """
  path = pathlib.Path(path)
  if path.suffix != '.json':
    path = path / 'trace.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = ',\n'.join(json_text(event, separators=(',', ':')) for event in trace_events(report))
  path.write_text(f'{{"displayTimeUnit":"ms","traceEvents":[\n{lines}\n]}}\n', encoding='utf-8')
  return path


def _name(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
  return {'ph': 'M', 'name': what, 'pid': process, 'tid': thread, 'ts': 0, 'args': {'name': name}}


def _links(spans: Sequence[BusySpan]) -> dict[tuple[str, str], list[list[BusySpan]]]:
  """The transfers of each (source, target), dealt out to lanes in which none overlaps another."""
  links: dict[tuple[str, str], list[list[BusySpan]]] = {}
  for span in sorted(spans, key=lambda span: span.began_s):
    if not span.moves:
      continue
    assert span.target is not None
    lanes = links.setdefault((span.worker, span.target), [])
    free = next((lane for lane in lanes if lane[-1].ended_s <= span.began_s), None)
    if free is None:
      lanes.append([span])
    else:
      free.append(span)
  return links


def _slice(span: BusySpan, process: int, thread: int) -> dict[str, Any]:
  args: dict[str, Any] = {'order': span.order}
  if span.moves:
    args |= {'request': span.requests[0], 'target': span.target, 'wire_bytes': span.wire_bytes}
    if span.trip is not None:
      stamps = (span.submitted_s, span.began_s, span.trip.wire_began_s, span.trip.arrived_s, span.ended_s)
      parts = ('queued_us', 'posted_us', 'wire_us', 'admitting_us')
      args |= dict(zip(parts, (_microseconds(b - a) for a, b in itertools.pairwise(stamps)), strict=True))
      args['pieces'] = span.trip.pieces
  else:
    if span.num_prompts:
      args |= {'prompts': ' '.join(span.requests[: span.num_prompts]), 'prompt_tokens': span.prompt_tokens}
    if decodes := span.requests[span.num_prompts :]:
      args |= {'batch': len(decodes), 'decodes': ' '.join(decodes)}
    args |= {'output_tokens': span.output_tokens}
  began = _microseconds(span.began_s)
  duration = round(max(_microseconds(span.ended_s) - began, 0.0), 3)
  return {
    'ph': 'X', 'name': span.kind, 'cat': _CATEGORY, 'pid': process, 'tid': thread, 'ts': began, 'dur': duration,
    'args': args,
  }  # fmt: skip


def _counters(report: Report, processes: dict[str, int]) -> Iterator[dict[str, Any]]:
  """The use of the cluster, whenever that changed."""
  before: dict[tuple[str, int], dict[str, int]] = {}
  for now in report.timeline.occupancy:
    counts = [('prompts waiting', _REQUESTS, {'prompts': now.waiting})]
    for use in now.workers:
      counts.append(('pages in use', processes[use.worker], {'pages': use.pages}))
      if use.cached or ('pages cached', processes[use.worker]) in before:
        counts.append(('pages cached', processes[use.worker], {'pages': use.cached}))
      counts.append(('sequences decoding', processes[use.worker], {'sequences': use.decoding}))
    for name, process, values in counts:
      if before.get((name, process)) != values:
        before[name, process] = values
        yield _counter(name, process, _microseconds(now.now_s), values)


def _instant(change: RoleChanged, process: int) -> dict[str, Any]:
  """A line through all tracks of a worker where it takes another role."""
  return {
    'ph': 'i', 'name': f'becomes {change.role.value}', 'cat': _CATEGORY, 's': 'p', 'pid': process, 'tid': _STEPS,
    'ts': _microseconds(change.now_s), 'args': {'asked_us': _microseconds(change.asked_s)},
  }  # fmt: skip


def _hit(hit: PrefixHit, process: int) -> dict[str, Any]:
  """A mark where a request found something; at a place that is no worker, among what belongs to none."""
  return {
    'ph': 'i', 'name': f'prefix hit, {hit.side}', 'cat': _CATEGORY, 's': 't', 'pid': process,
    'tid': 0 if process == _REQUESTS else _STEPS, 'ts': _microseconds(hit.now_s),
    'args': {'request': hit.request, 'place': hit.place, 'tokens': hit.tokens},
  }  # fmt: skip


def _counter(name: str, process: int, ts: float, values: dict[str, int]) -> dict[str, Any]:
  return {'ph': 'C', 'name': name, 'pid': process, 'ts': ts, 'args': values}


def _flows(spans: Sequence[BusySpan], slices: dict[int, dict[str, Any]]) -> Iterator[dict[str, Any]]:
  """For every transfer three points on one arrow; an order's id grows with the time of its decision."""
  prefills: dict[str, list[int]] = {}  # orders with prompt tokens, by request
  decodes: dict[tuple[str, str], int] = {}  # the first order that decodes a request on a worker
  for span in spans:
    if span.moves:
      continue
    for request in span.requests[: span.num_prompts]:
      prefills.setdefault(request, []).append(span.order)
    for request in span.requests[span.num_prompts :]:
      decodes[request, span.worker] = min(span.order, decodes.get((request, span.worker), span.order))
  for span in spans:
    if span.kind != 'transfer':
      continue
    request, target = span.requests[0], span.target
    before = max((order for order in prefills.get(request, ()) if order < span.order), default=None)
    after = decodes.get((request, target or ''))
    if before is None or after is None:  # the request ended on the way
      continue
    for phase, order in (('s', before), ('t', span.order), ('f', after)):
      at = slices[order]
      yield {
        'ph': phase, 'name': 'KV', 'cat': _CATEGORY, 'id': span.order, 'pid': at['pid'], 'tid': at['tid'],
        'ts': at['ts'], **({'bp': 'e'} if phase == 'f' else {}),
      }  # fmt: skip


def _microseconds(seconds: float) -> float:
  return round(seconds * 1e6, 3)
