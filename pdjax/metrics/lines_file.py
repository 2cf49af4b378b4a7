"""A file of lines that grows while a run goes on: a thread of its own writes it, at most a second behind."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Sequence

from absl import logging

Line = str | Callable[[], str]
Times = float | Sequence[tuple[int, float]]  # of a line, or of several: the characters from which on, and the time

_DELAY_S = 0.5  # what comes meanwhile is written at once
_AGAIN_S = 1.0  # until what could not be written is tried again
_STALL_S = 5.0  # a disk that takes nothing for so long is waited for no longer in a run
_CLOSE_S = 30.0  # and this long when it is over
_PIECE_BYTES = 1 << 20
_MOST_WAITING = 1 << 26  # characters
_FREE_BYTES, _FREE_SHARE = 1 << 26, 0.1  # of a disk, whichever is less: what a file that yields leaves free


class LinesFile:
  """Writes lines in the order in which they come, each less than a second later, so that a killed process loses little.

  Whoever adds a line waits for no disk, unless one is so slow that 64 MiB are waiting. Nothing here raises once the
  file is open: what cannot be written is told in the log, once, and in `note`. The file then ends with its last whole
  line, or, if it insists, it gets the others as soon as they can be written.

  Args:
    path: The file; missing folders are made.
    behind: Whether what it has stays, but for a last line that was cut short, and lines come behind it. A last line
      that is whole JSON lacks its end alone, and gets it.
    insist: Whether lines that cannot be written wait until they can.
    yields: Whether the file ends before it takes the last 64 MiB of its disk, or the last tenth of a small one, which
      others need more.

  Raises:
    OSError: if it cannot be opened.
  """

  def __init__(self, path: str | os.PathLike[str], *, behind: bool = False, insist: bool = False, yields: bool = False):
    self.path = pathlib.Path(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    if behind:
      _mend_last_line(self.path)
    self._file = self.path.open('ab' if behind else 'wb', buffering=0)
    self._size = self._file.seek(0, os.SEEK_END) if self._file.seekable() else 0  # up to the last whole line
    self._insist = insist
    self._yields = yields
    self._changed = threading.Condition()
    self._lines: list[tuple[Line, Times]] = []
    self._waiting = 0  # characters of lines that are not written yet; those that are made late do not count
    self._written = 0  # steps forward, of whatever size
    self._unwritten: list[tuple[bytes, Times]] = []  # what the thread could not write and will try again
    self._missing: tuple[float, str] | None = None  # from when on lines are not in the file, and why
    self._lost = False  # whether one of them never will be
    self._told = self._ended = self._closing = False
    self._thread: threading.Thread | None = None

  def add(self, line: Line, time_s: Times = 0.0, *, waits: bool = True) -> None:
    """Have a line written, or what a function makes of it by then.

    Args:
      line: Without its end, or several at once; a function is called on the thread that writes, and one that makes no
        text adds none.
      time_s: The time of the event that it tells of, seconds after the start of the run; of several, see `Times`.
      waits: Whether to wait while too much is waiting; the thread that writes would wait for itself.
    """
    with self._changed:
      if self._ended or self._closing:
        return
      try:
        self._start_thread()
        if waits:
          self._wait_for_room()
      except (RuntimeError, TimeoutError) as error:
        self._end(error, _time_at(time_s))
      if self.ended:  # while room was waited for, too: nothing comes behind what is missing
        return
      self._lines.append((line, time_s))
      if isinstance(line, str):
        self._waiting += len(line)
      if len(self._lines) == 1 or self._waiting > _PIECE_BYTES:
        self._changed.notify_all()

  def end(self, error: Exception, time_s: float) -> None:
    """Take no more lines, because of an error at that time; those that came before are written."""
    with self._changed:
      self._end(error, time_s)

  @property
  def ended(self) -> bool:
    """Whether it takes no more lines."""
    return self._ended

  @property
  def note(self) -> str | None:
    """A sentence for readers of a file that lacks lines: the time from which on, and the reason."""
    if self._missing is None:
      return None
    from_s, why = self._missing
    return f'{self.path} ends early: it has nothing from {from_s:.3f} s on, as it cannot be written ({why}).'

  @property
  def notes(self) -> tuple[str, ...]:
    """`note` as a report adds it to others: a sentence, or none."""
    return () if self.note is None else (self.note,)

  def close(self) -> None:
    """Write what is left, and close the file."""
    with self._changed:
      closed, self._closing = self._closing, True
      self._changed.notify_all()
    if closed:
      return
    while self._thread is not None and self._thread.is_alive():
      before = self._written
      self._thread.join(_CLOSE_S)
      if self._thread.is_alive() and before == self._written:
        self._lack(TimeoutError(f'nothing was taken for {_CLOSE_S:g} s'), self._first_waiting_s())
        return
    self._close_file()

  # -------------------------------------------------------------------------- with `_changed` held

  def _start_thread(self) -> None:
    """Begin to write, with the first line; a process that may have no more threads raises RuntimeError."""
    if self._thread is None:
      thread = threading.Thread(target=self._run, name=f'pdjax-{self.path.name}', daemon=True)
      thread.start()
      self._thread = thread

  def _wait_for_room(self) -> None:
    """Wait while the disk is behind but goes on; raises TimeoutError if it stands still."""
    while self._waiting > _MOST_WAITING and not self._ended:
      before = self._written
      self._changed.wait(_STALL_S)
      if before == self._written and not self._ended:
        raise TimeoutError(f'nothing was taken for {_STALL_S:g} s')

  def _end(self, error: Exception, time_s: float) -> None:
    self._ended = True
    self._lack(error, time_s)

  # -------------------------------------------------------------------------- the thread

  def _run(self) -> None:
    while True:
      with self._changed:
        again_s = _AGAIN_S if self._unwritten else None
        self._changed.wait_for(lambda: self._closing or (self._lines and not self._unwritten), again_s)
        self._changed.wait_for(lambda: self._closing or self._waiting > _PIECE_BYTES, _DELAY_S)
        lines, self._lines = self._lines, []
        closing = self._closing
      self._write([*self._unwritten, *self._encoded(lines)])
      if closing:
        self._close_file()  # here, as `close` may have given up
        return

  def _encoded(self, lines: list[tuple[Line, Times]]) -> list[tuple[bytes, Times]]:
    found = []
    for line, time_s in lines:
      self._written += 1
      try:
        text = line if isinstance(line, str) else line()
        if text:
          found.append((text.encode() + b'\n', time_s))
      except Exception as error:  # one line less; the others have their place
        self._lost = True
        self._lack(error, _time_at(time_s))
    return found

  def _write(self, lines: list[tuple[bytes, Times]]) -> None:
    """Write these, and keep or drop what cannot be written."""
    self._unwritten = []
    data = memoryview(b''.join(line for line, _ in lines))
    place = 0
    try:
      if self._yields:
        self._leave_room(len(data))
      while place < len(data):
        place += self._file.write(data[place : place + _PIECE_BYTES]) or 0
        self._progress(place)
    except Exception as error:  # a full disk, mostly
      self._keep_whole_lines(lines, place, error)
    else:
      self._size += len(data)
      if self._insist and self._missing is not None and not self._lost:
        logging.info('%s has all lines again.', self.path)
        self._missing = None
    self._progress(None)

  def _leave_room(self, size: int) -> None:
    try:
      disk = shutil.disk_usage(self.path)
    except OSError:  # then it is seen when it is full
      return
    if disk.total > 0 and disk.free - size < min(_FREE_BYTES, disk.total * _FREE_SHARE):
      raise OSError(errno.ENOSPC, f'{os.strerror(errno.ENOSPC)} but what is kept for answers and reports')

  def _keep_whole_lines(self, lines: list[tuple[bytes, Times]], place: int, error: Exception) -> None:
    whole = 0
    while whole < len(lines) and place >= len(lines[whole][0]):
      place -= len(lines[whole][0])
      self._size += len(lines[whole][0])
      whole += 1
    torn = None
    if whole < len(lines):  # of several lines at once, those that are there stay
      text, times = lines[whole]
      kept = text.rfind(b'\n', 0, place) + 1
      self._size += kept
      torn = text[kept:], _time_at(times, kept)
    with contextlib.suppress(Exception):  # of the torn one that follows; a device cannot be cut
      self._file.truncate(self._size)
      self._file.seek(self._size)
    first_s = _time_at(torn[1]) if torn is not None else 0.0
    if self._insist:
      self._unwritten = [] if torn is None else [torn, *lines[whole + 1 :]]
      self._lack(error, first_s)
      return
    with self._changed:
      self._lines.clear()
      self._end(error, first_s)

  def _progress(self, place: int | None) -> None:
    """Tell those who wait for room; None at the end of all that was to be written."""
    with self._changed:
      self._written += 1
      if place is None:
        self._waiting = sum(len(line) for line, _ in self._lines if isinstance(line, str))
      self._changed.notify_all()

  def _lack(self, error: Exception, from_s: float) -> None:
    self._missing = self._missing or (from_s, f'{type(error).__name__}: {error}')
    if not self._told:
      self._told = True
      logging.error('%s', self.note)

  def _close_file(self) -> None:
    try:
      self._file.close()
    except OSError as error:  # some file systems tell only now
      self._lack(error, 0.0)

  def _first_waiting_s(self) -> float:
    return next((_time_at(time_s) for _, time_s in (*self._unwritten, *self._lines)), 0.0)


def _time_at(times: Times, place: int = 0) -> float:
  """The time of what stands at a place of a line, or of several."""
  if not isinstance(times, Sequence):
    return times
  return next((time_s for begin, time_s in reversed(times) if begin <= place), 0.0)


def _mend_last_line(path: pathlib.Path) -> None:
  """Take off what follows the last end of a line, as a killed process leaves it, or end it there if it is whole."""
  if not path.is_file():
    return
  with path.open('r+b') as file:
    end = file.seek(0, os.SEEK_END)
    place = end
    while place:
      begin = max(place - _PIECE_BYTES, 0)
      file.seek(begin)
      found = file.read(place - begin).rfind(b'\n')
      if found >= 0:
        place = begin + found + 1
        break
      place = begin
    if place == end:
      return
    file.seek(place)
    try:
      json.loads(file.read())
    except ValueError:
      file.truncate(place)
    else:
      file.write(b'\n')
