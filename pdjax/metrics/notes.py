"""Sentences that a reader of a report should know before comparing, found in the log and the cluster alone."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

from pdjax.metrics.groups import MOST_GROUPS
from pdjax.metrics.request_rows import MOST_GAPS
from pdjax.metrics.timeline import Timeline
from pdjax.types.worker import WorkerSpec

_MOST_ERRORS = 3  # that are told
_LONGEST_ERROR = 240  # characters


def own_notes(
  workers: Sequence[WorkerSpec],
  calibrated: bool,
  finish_reasons: Mapping[str, int],
  timeline: Timeline,
) -> Iterable[str]:
  """The notes that a report has by itself, beside those of whoever made the run."""
  sharers: dict[tuple[str | None, int], list[str]] = {}
  for worker in workers:
    for device in worker.named_devices:
      sharers.setdefault(device, []).append(worker.name)
  for names in sorted({tuple(names) for names in sharers.values() if len(names) > 1}):
    yield f'{", ".join(names[:-1])} and {names[-1]} share a device: each waits while another computes.'
  dtypes: dict[str, list[str]] = {}
  for worker in workers:
    if worker.weights is not None:
      dtypes.setdefault(worker.weights, []).append(worker.name)
  if len(dtypes) > 1:
    own = '; '.join(f'{", ".join(names)} {dtype}' for dtype, names in dtypes.items())
    yield f'Workers have weights of unlike dtypes ({own}): tokens are those of neither alone.'
  if not calibrated:
    yield 'Uncalibrated estimate: times rest on data sheets or guesses, not on measurements of this machine.'
  for absence in timeline.absences:
    yield _shortened(str(absence))
  if not timeline.spans.are_traced:
    yield f'There is no trace.json: {len(timeline.spans):,} steps and transfers are more than a viewer opens.'
  requests = timeline.requests
  for plural, groups in (('classes', requests.class_names), ('tenants', requests.tenants)):
    if len(groups) > MOST_GROUPS:
      yield f'Of {len(groups):,} {plural} the {MOST_GROUPS} with the most requests have figures of their own.'
  if not requests.gaps_are_told:
    yield f'report.json has no single gaps between deltas (itls): they are more than {MOST_GAPS:,}.'
  others = ', '.join(f'{reason} {n}' for reason, n in finish_reasons.items() if reason not in ('stop', 'length'))
  if others:
    if requests.completed.any():
      yield f'Not every request completed ({others}); latencies and throughput are of those that did.'
    else:
      yield f'No request completed ({others}).'
    told = (error for number, error in requests.errors.items() if not requests.completed[number])
    errors = dict.fromkeys(filter(None, told))
    for error in itertools.islice(errors, _MOST_ERRORS):
      yield f'Error: {_shortened(error)}'
    if len(errors) > _MOST_ERRORS:
      yield f'There were {len(errors) - _MOST_ERRORS:,} other errors; report.json has them all.'


def _shortened(error: str) -> str:
  return error if len(error) <= _LONGEST_ERROR else f'{error[:_LONGEST_ERROR]}...'
