"""One queue of what has ended, stamped as it is posted, with the clock of the run."""

import dataclasses
import math
import threading
import time
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Interrupt:
  """Ends a wait; what it is about was noted elsewhere."""


class Mailbox:
  """Collects what any thread posts.

  Stamps are taken under the lock under which the queue is emptied: what a turn at time t finds is exactly what was
  stamped up to t, so that a replay can tell turns from ends alone. No two stamps are equal.
  """

  def __init__(self):
    self._condition = threading.Condition()
    self._items: list[Any] = []
    self._start_s = time.perf_counter()
    self._last_s = 0.0

  def start_clock(self, start_s: float | None = None) -> float:
    """Let the run begin now, at 0 s, or when `time.perf_counter` showed `start_s`; what it showed at 0 s."""
    with self._condition:
      self._start_s, self._last_s = time.perf_counter() if start_s is None else start_s, 0.0
      return self._start_s

  def now_s(self) -> float:
    """Seconds since the run began."""
    return time.perf_counter() - self._start_s

  def post(self, make: Callable[[float], Any]) -> None:
    """Add `make(stamp)`."""
    with self._condition:
      self._items.append(make(self._stamp()))
      self._condition.notify()

  def interrupt(self, note: Callable[[float], None]) -> None:
    """Call `note` with a stamp and add an `Interrupt` with it."""

    def make(stamp_s: float) -> Interrupt:
      note(stamp_s)
      return Interrupt()

    self.post(make)

  def collect(self, until_s: float) -> tuple[float, list[Any]]:
    """Wait until something is there or `until_s` has come; the time, and everything posted so far."""
    with self._condition:
      while not self._items and (left_s := until_s - self.now_s()) > 0:
        self._condition.wait(min(left_s, threading.TIMEOUT_MAX) if math.isfinite(left_s) else None)
      items, self._items = self._items, []
      return self._stamp(), items

  def _stamp(self) -> float:
    self._last_s = max(self.now_s(), math.nextafter(self._last_s, math.inf))
    return self._last_s
