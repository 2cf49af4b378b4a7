"""All that a run leaves of its events while it goes on: their file, its summary, and of a short run they themselves."""

import os
import threading
from typing import Literal

from pdjax.metrics.event_log import EventLog
from pdjax.metrics.timeline import Summary, Timeline, read_timeline
from pdjax.serving.events import Event

LogName = Literal['full', 'summary', 'off']
MOST_KEPT = 20_000  # requests of a run whose events stay in memory unless somebody says so


class RunLog:
  """Takes each event as it comes: into the file, into the summary, and into memory as long as events are kept.

  An event that the summary cannot make sense of ends no serving: `timeline` raises its error.

  Args:
    path: The file of events; None writes none.
    keep_events: Keep the events in memory. None keeps them while there are fewer than `MOST_KEPT` requests.
    expected: The requests that are to come, if that is known: of so many none is kept from the beginning.
    summarises: Follow them for a timeline.

  Raises:
    OSError: if the file cannot be opened.
  """

  def __init__(
    self,
    path: str | os.PathLike | None = None,
    keep_events: bool | None = None,
    expected: int | None = None,
    *,
    summarises: bool = True,
  ):
    self._file = None if path is None else EventLog(path, keep=False)
    self._keep_events = keep_events
    is_short = summarises and (expected is None or expected < MOST_KEPT)
    keeps = is_short if keep_events is None else keep_events
    self._events: list[Event] | None = [] if keeps else None
    self._lock = threading.Lock()  # of the summary
    self._summary = Summary() if summarises else None
    self._last: Event | None = None
    self._followed = True  # whether the summary has the last event
    self._error: Exception | None = None

  def append(self, event: Event) -> None:
    """Add the event that happened next."""
    self._last = event
    if self._events is not None:
      self._events.append(event)
    if self._file is not None:
      self._file.append(event)
    if self._summary is not None and self._error is None:
      with self._lock:
        self._followed = False
        try:
          self._summary.follow(event)
        except Exception as error:  # nobody's answer depends on it
          self._error = error
        self._followed = True
      if self._events is not None and self._keep_events is None and self._summary.num_requests >= MOST_KEPT:
        self._events = None

  @property
  def keeps_events(self) -> bool:
    """Whether all events so far are in memory."""
    return self._events is not None

  @property
  def events(self) -> tuple[Event, ...]:
    """The events so far; none if they are not kept."""
    return tuple(self._events or ())

  @property
  def last(self) -> Event | None:
    """The last event."""
    return self._last

  def timeline(self) -> Timeline:
    """The run so far.

    Raises:
      Exception: if the summary could not follow, whatever it said.
    """
    with self._lock:
      if not self._followed and self._events is not None:  # an exception came in the middle of it
        return read_timeline(self._events)
      if self._error is not None:
        raise self._error
      return Timeline() if self._summary is None else self._summary.timeline()

  @property
  def notes(self) -> tuple[str, ...]:
    """Sentences for readers of a file that is incomplete."""
    return () if self._file is None else self._file.notes

  def close(self) -> None:
    """Have the last lines on disk; nothing more goes into the file after this."""
    if self._file is not None:
      self._file.close()

  def __enter__(self) -> 'RunLog':
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()
