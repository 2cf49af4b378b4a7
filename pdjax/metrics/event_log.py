"""The event log: every event of a run, in memory and, if wanted, as JSON lines in a file."""

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

from pdjax.metrics.lines_file import LinesFile
from pdjax.serving.events import (
  Arrived,
  Decoded,
  Delivered,
  Done,
  Event,
  Occupancy,
  Result,
  Started,
  Turn,
  WorkerBack,
)
from pdjax.serving.orders import (
  AbandonOrder,
  Admission,
  ChunkOrder,
  EndOrder,
  Join,
  LeaveOrder,
  Order,
  StepOrder,
  TransferOrder,
)
from pdjax.types.json_text import json_text
from pdjax.types.request import Request


class EventLog:
  """Collects events in order; iterate over it to read them.

  With a path, each event also goes to that file as one JSON line, less than a second later, see `read_events` for what
  it holds. The disk is never waited for by whoever appends. Close the log, or use it in a `with` statement, to have the
  last lines on disk. An event that cannot be written ends no serving: the file ends there, a warning and `notes` say
  from when on and why, and the log in memory goes on. The last of a disk's room is left to answers and reports.

  Args:
    path: File to write, such as `events.jsonl`; missing folders are made. None keeps the log in memory only.
    keep: Keep the events in memory; without, the log cannot be read here.

  Raises:
    OSError: if the file cannot be opened.
  """

  def __init__(self, path: str | os.PathLike | None = None, keep: bool = True):
    self._keep = keep
    self._events: list[Event] = []
    self._now_s = 0.0
    self._file = None if path is None else LinesFile(path, yields=True)

  def append(self, event: Event) -> None:
    """Add the event that happened next."""
    if self._keep:
      self._events.append(event)
    if self._file is None or self._file.ended:
      return
    if isinstance(event, Turn) and isinstance(event.now_s, float):
      self._now_s = event.now_s
    try:
      line = json_text(event_to_json(event))
    except Exception as error:  # an event of somebody else's making: nobody's answer depends on it
      self._file.end(error, self._now_s)
    else:
      self._file.add(line, self._now_s)

  def close(self) -> None:
    """Write what is still buffered; nothing more goes into the file after this."""
    if self._file is not None:
      self._file.close()

  @property
  def notes(self) -> tuple[str, ...]:
    """Sentences for readers of a file that is incomplete: the time from which on, and the reason."""
    return () if self._file is None else self._file.notes

  def __iter__(self) -> Iterator[Event]:
    return iter(self._events)

  def __len__(self) -> int:
    return len(self._events)

  def __enter__(self) -> 'EventLog':
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()


def read_events(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
  """Read a file that `EventLog` wrote, one dict per event, in order.

  Each has the name of its event's class under `event` and, but for `Delivered`, the fields that `pdjax.serving.events`
  gives it:

      {"event": "Turn", "now_s": 0.25}
      {"event": "Arrived", "request": {"id": "r0", "prompt_len": 512, "sampling": {...}, "arrival_s": 0.2, ...}}
      {"event": "Started", "now_s": 0.25, "order": {"order": "StepOrder", "id": 3, "worker": "prefill0", ...}}

  A request is written in full when it arrives, with `prompt_len` in place of the tokens, and by its id afterwards.
  Orders keep their page numbers, slots and admissions. Tuples are lists, and a number that is not finite is the text
  "NaN", "Infinity" or "-Infinity". A last line that was cut short is left out. What a step brought is in its `Done`;
  the `Delivered` behind it names the requests for whom that came too `late`, and all others got it. `Occupancy` comes
  at the end of a turn that changed how full the cluster is and names only the workers whose figures changed:

      {"event": "Occupancy", "now_s": 0.25, "waiting": 3, "workers": [{"worker": "decode0", "pages": 4, "decoding": 2}]}
  """
  with open(path, encoding='utf-8') as file:
    for line in file:
      try:
        yield json.loads(line)
      except ValueError:
        if line.endswith('\n'):
          raise
        return  # the end of a log that could not be written on


def event_to_json(event: Event) -> dict[str, Any]:
  """The event as plain dicts, lists, strings and numbers; what one line of the file holds."""
  kind = type(event).__name__
  match event:
    case Arrived(request):
      return {'event': kind, 'request': _request(request)}
    case Started(now_s, order):
      return {'event': kind, 'now_s': now_s, 'order': _order(order)}
    case Done():
      results = [_result(result) for result in event.results]
      decoded = None if event.decoded is None else _decoded(event.decoded)
      trip = event.trip and _fields(event.trip)
      return {'event': kind, **_fields(event), 'results': results, 'decoded': decoded, 'trip': trip}
    case Delivered():
      late = [one.request for one in event.late] if event.late_rows or event.late_firsts else []
      return {'event': kind, 'now_s': event.now_s, 'order': event.order, 'late': late}
    case WorkerBack():
      return {'event': kind, **_fields(event), 'comeback': event.comeback and _fields(event.comeback)}
    case Occupancy():
      return {'event': kind, **_fields(event), 'workers': [_fields(use) for use in event.workers]}
    case _:
      return {'event': kind, **_fields(event)}


def _request(request: Request) -> dict[str, Any]:
  return {
    'id': request.id,
    'prompt_len': request.prompt_len,
    'sampling': _fields(request.sampling),
    'arrival_s': request.arrival_s,
    'slo': request.slo and _fields(request.slo),
    'session': request.session,
    'end_token_ids': request.end_token_ids,
  }


def _order(order: Order) -> dict[str, Any]:
  named = {'order': type(order).__name__, **_fields(order)}
  match order:
    case StepOrder():
      changes = {'joins': [_join(one) for one in order.joins], 'growth': [_fields(one) for one in order.growth]}
      return {**named, 'chunks': [_chunk(chunk) for chunk in order.chunks], **changes}
    case TransferOrder():
      return {**{name: value for name, value in named.items() if name != 'span'}, **_fields(order.span)}
    case EndOrder() | AbandonOrder() | LeaveOrder():
      return named


def _chunk(chunk: ChunkOrder) -> dict[str, Any]:
  return {**_fields(chunk), 'request': chunk.request.id}


def _join(join: Join) -> dict[str, Any]:
  return {**_fields(join), 'admission': join.admission and _admission(join.admission)}


def _decoded(decoded: Decoded) -> dict[str, Any]:
  logprobs = {str(row): [_fields(one) for one in told] for row, told in decoded.logprobs.items()}
  is_one = not any(decoded.tokens.strides) and decoded.tokens.size  # one number stands for all, as a simulator has it
  return {
    'tokens': int(decoded.tokens[0, 0]) if is_one else decoded.tokens.tolist(), 'counts': decoded.counts.tolist(),
    'ended': [_fields(one) for one in decoded.ended], 'texts': decoded.texts, 'logprobs': logprobs,
    'ends_s': decoded.ends_s,
  }  # fmt: skip


def _admission(admission: Admission) -> dict[str, Any]:
  return {**_fields(admission), 'request': admission.request.id}


def _result(result: Result) -> dict[str, Any]:
  return {
    'request': result.request, 'tokens': result.tokens, 'finish_reason': result.finish_reason, 'text': result.text,
    'logprobs': [_fields(logprob) for logprob in result.logprobs] if result.logprobs else [], 'error': result.error,
  }  # fmt: skip


_FIELD_NAMES: dict[type, tuple[str, ...]] = {}


def _fields(message: Any) -> dict[str, Any]:
  """Like `dataclasses.asdict` but one level deep and without copies: half the cost of a line was there."""
  names = _FIELD_NAMES.get(type(message))
  if names is None:
    names = tuple(field.name for field in dataclasses.fields(message) if field.repr)
    _FIELD_NAMES[type(message)] = names
  return {name: getattr(message, name) for name in names}
