"""Timers: a heap of times, each for one thing that can still be called off."""

import heapq
import itertools
import math

from pdjax.serving.events import TimerDue, TimerName


class Timers:
  """Times at which something is due; nothing that was cancelled is heard of."""

  def __init__(self):
    self._due_s: dict[tuple[TimerName, int | str], float] = {}
    self._heap: list[tuple[float, int, TimerName, int | str]] = []
    self._sequence = itertools.count()  # of equal times the one set first comes first

  def set(self, timer: TimerName, about: int | str, due_s: float) -> None:
    """Let it be due then, and at no other time; at infinity it never is."""
    self._due_s[timer, about] = due_s
    if math.isfinite(due_s):
      heapq.heappush(self._heap, (due_s, next(self._sequence), timer, about))

  def cancel(self, timer: TimerName, about: int | str) -> None:
    """Call it off, if it is set."""
    self._due_s.pop((timer, about), None)

  def due_s(self, timer: TimerName, about: int | str) -> float:
    """The time it is due; infinity if it is not set."""
    return self._due_s.get((timer, about), math.inf)

  @property
  def next_s(self) -> float:
    """The time the next is due; infinity if none is set."""
    while self._heap:
      due_s, _, timer, about = self._heap[0]
      if self._due_s.get((timer, about)) == due_s:
        return due_s
      heapq.heappop(self._heap)
    return math.inf

  def take(self, now_s: float) -> list[TimerDue]:
    """All that are due by now, in order; they are set no longer."""
    due = []
    while self.next_s <= now_s:
      due_s, _, timer, about = heapq.heappop(self._heap)
      del self._due_s[timer, about]
      due.append(TimerDue(due_s, timer, about))
    return due
