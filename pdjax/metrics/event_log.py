"""The event log: every event of a run, in memory and, if wanted, as JSON lines in a file."""

import collections
import dataclasses
import functools
import json
import os
import threading
from collections.abc import Iterator
from typing import Any

from pdjax.metrics.event_text import event_text
from pdjax.metrics.lines_file import LinesFile
from pdjax.serving.events import Event, Turn

VERSION = 2
_PIECE = 256  # events that are made lines of at once; fewer, if no more come within half a second


@dataclasses.dataclass
class _Piece:
  """Lines of events, the time of each turn and where its lines begin, and the error of an event that is no line."""

  text: str
  times: list[tuple[int, float]]
  error: Exception | None = None


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
    self._pending: collections.deque[Event] = collections.deque()
    self._lock = threading.Lock()  # of those who take what is pending
    self._is_asked = False  # whether the thread that writes will ask for what is pending
    self._begun = self._added = 0  # pieces that were made here, and those that the file has
    self._now_s = 0.0  # of the events that the file has got
    self._file = None if path is None else LinesFile(path, yields=True)
    if self._file is not None:
      self._file.add(json.dumps({'event': 'Log', 'version': VERSION}))

  def append(self, event: Event) -> None:
    """Add the event that happened next."""
    if self._keep:
      self._events.append(event)
    if self._file is None or self._file.ended:
      return
    self._pending.append(event)
    if len(self._pending) >= _PIECE:
      self._flush()
    elif not self._is_asked:
      self._is_asked = True
      self._ask()

  def close(self) -> None:
    """Write what is still buffered; nothing more goes into the file after this."""
    if self._file is not None:
      self._flush()
      self._file.close()

  def _flush(self) -> None:
    """Hand a piece of lines to the file: made here, that costs less than on two threads that wait for each other."""
    assert self._file is not None
    with self._lock:
      self._begun += 1
      piece = self._take()
    if piece.text:
      self._file.add(piece.text, piece.times)
    if piece.error is not None:
      self._file.end(piece.error, self._now_s)
    self._added += 1

  def _ask(self, *, waits: bool = True) -> None:
    """Have the thread that writes ask for what is pending when it comes to it."""
    assert self._file is not None
    self._file.add(functools.partial(self._asked, self._added), self._now_s, waits=waits)

  def _asked(self, added: int) -> str:
    """On the thread that writes: what is pending, unless pieces before it are on their way; then it asks again."""
    assert self._file is not None
    with self._lock:
      if added == self._added == self._begun:
        self._is_asked = False  # before anything is taken: whoever adds an event behind that asks again
        piece = self._take()
        if piece.error is not None:
          self._file.end(piece.error, self._now_s)
        return piece.text
    self._ask(waits=False)
    return ''

  def _take(self) -> '_Piece':
    """The lines of what is pending, the lock held."""
    lines: list[str] = []
    size, times, problem = 0, [(0, self._now_s)], None
    for event in [self._pending.popleft() for _ in range(len(self._pending))]:
      if isinstance(event, Turn) and isinstance(event.now_s, float):
        self._now_s = event.now_s
        times.append((size, event.now_s))
      try:
        lines.append(event_text(event))
      except Exception as error:  # an event of somebody else's making: nobody's answer depends on it
        problem = error
        break
      size += len(lines[-1]) + 1
    return _Piece('\n'.join(lines), times, problem)

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

  Its first line names the format, `{"event": "Log", "version": 2}`, and is not among them. Each has the name of its
  event's class under `event` and, but for `Delivered`, the fields that `pdjax.serving.events` gives it:

      {"event": "Turn", "now_s": 0.25}
      {"event": "Arrived", "request": {"id": "r0", "prompt_len": 512, "sampling": {...}, "arrival_s": 0.2, ...}}
      {"event": "Started", "now_s": 0.25, "order": {"order": "StepOrder", "id": 3, "worker": "prefill0", ...}}

  A request is written in full when it arrives, with `prompt_len` in place of the tokens, `num_block_hashes` in place of
  ids of blocks, and of a `cache_salt`, which may be secret, only whether there is one; and by its id afterwards. A
  step names who joins and leaves the batch of its worker, and its `Done` has columns for that batch, whose `tokens` are
  one number where all are the same. Orders keep their page numbers, slots and admissions. Tuples are lists, and a
  number that is not finite is the text "NaN", "Infinity" or "-Infinity". A last line that was cut short is left out.
  What a step brought is in its `Done`; the `Delivered` behind it names the requests for whom that came too `late`, and
  all others got it. `Occupancy` comes at the end of a turn that changed how full the cluster is and names only the
  workers whose figures changed; `cached`, which older files lack, are pages beside those that are held:

      {"event": "Occupancy", "now_s": 0.25, "waiting": 3,
       "workers": [{"worker": "decode0", "pages": 4, "decoding": 2, "cached": 3}]}

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the first line names another format, or none.
  """
  if not os.path.exists(path):
    raise FileNotFoundError(
      f'found no events at {os.fspath(path)!r}, expected the events.jsonl of a run; check the path, or run again with '
      "log='full', as 'summary' and 'off' keep no events."
    )
  with open(path, encoding='utf-8') as file:
    _check_version(path, file.readline())
    for line in file:
      try:
        yield json.loads(line)
      except ValueError:
        if line.endswith('\n'):
          raise
        return  # the end of a log that could not be written on


def _check_version(path: str | os.PathLike, line: str) -> None:
  """Raise ValueError unless the first line of a file names this format; a file that has none yet is empty."""
  if not line.endswith('\n'):
    return
  try:
    first = json.loads(line)
  except ValueError:
    first = None
  version = first.get('version') if isinstance(first, dict) and first.get('event') == 'Log' else None
  if version != VERSION:
    found = 'no version' if version is None else f'version {version!r}'
    raise ValueError(
      f'{os.fspath(path)} names {found} of the log in its first line, expected {VERSION}; read it with the release of '
      'pdjax that wrote it, or run again.'
    )
