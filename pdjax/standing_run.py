"""The steps of an order that stands, in virtual time."""

import bisect
import math
from collections.abc import Sequence

import numpy as np

from pdjax.serving.batch import LOOKAHEAD
from pdjax.serving.bounds import Bound, most_steps
from pdjax.serving.events import Ended
from pdjax.serving.orders import StepOrder


def outcome(ends: np.ndarray, before: int, after: int) -> tuple[np.ndarray, tuple[Ended, ...]]:
  """Tokens of each sequence between two numbers of steps, `[B]`, and those that end there.

  Args:
    ends: `[B]` of steps after which each gets no more tokens.
    before: The one number.
    after: The other.
  """
  ended = tuple([Ended(row, 'length') for row, end in enumerate(ends.tolist()) if before < end <= after])
  return _counts(ends, before, after), ended


def _counts(ends: np.ndarray, before: int, after: int) -> np.ndarray:
  return np.minimum(np.maximum(ends - before, 0), after - before)


class StandingRun:
  """The steps of an order that stands, numbered from 1.

  Attributes:
    order: The order.
    before: Decode steps of the worker before its first.
    began_s: The time at which its first step begins.
    can_leap: Whether the seconds of several steps are known at once.
    most: The last step that brings a token, or that all have a page for.
    last: Its last step, once that is known.
    replaced: Whether another step is behind it.
    told: Steps that were told.
    given: Steps that are or were with the worker.
    chosen: The step that is to be told next.
    version: Counts how often another step was chosen to be told next.
  """

  def __init__(self, order: StepOrder, rows: Sequence[Bound], before: int, began_s: float, can_leap: bool):
    """Begin with nothing told; `rows` are the bounds of the sequences of its batch."""
    self.order = order
    self.before = before
    self.began_s = began_s
    self.can_leap = can_leap
    self.most = most_steps(rows, before)
    self.last: int | None = None
    self.replaced = False
    self.told = 0
    self.given = 1
    self.chosen = 1
    self.version = 0
    self._cached = [row.base + before for row in rows]  # tokens of each when the first step begins
    self._ends = [row.ends_at - before for row in rows]  # steps after which each gets no more tokens
    self._ends_at = np.array(self._ends, np.int64)
    self._changes = sorted({end for end in self._ends if end > 0})
    self._ends_s: list[float] = []
    self._next_end_s = math.inf  # the first that no time asked about has reached
    self._begins_s: list[float] = []  # where they are not the ends of the steps before

  @property
  def known(self) -> int:
    """Steps whose ends are known."""
    return len(self._ends_s)

  @property
  def last_end_s(self) -> float:
    """The end of the last of these, or the time at which the run begins."""
    return self._ends_s[-1] if self._ends_s else self.began_s

  def contexts(self) -> list[int]:
    """Cached tokens of each sequence that the step behind those known brings a token."""
    known = len(self._ends_s)
    return [cached + known for cached, end in zip(self._cached, self._ends, strict=True) if end > known]

  def until_change(self, after: int) -> int:
    """The step with which the next sequence ends behind a step; the last of all if none does."""
    place = bisect.bisect_right(self._changes, after)
    return self._changes[place] if place < len(self._changes) else self.most

  def outcome(self, before: int, step: int) -> tuple[np.ndarray, tuple[Ended, ...]]:
    """Tokens of each sequence in the steps behind one up to another, `[B]`, and those that end there."""
    if step < self.until_change(before):
      return _counts(self._ends_at, before, step), ()
    return outcome(self._ends_at, before, step)

  def add(self, ends_s: Sequence[float], began_s: float | None = None) -> None:
    """Note the ends of the steps that follow, and where it is not the end before, when the first begins."""
    self._ends_s += ends_s
    self._next_end_s = min(self._next_end_s, ends_s[0])
    if began_s is not None:
      self._begins_s.append(began_s)

  def end_s(self, step: int) -> float:
    """The end of a step."""
    return self._ends_s[step - 1]

  def begin_s(self, step: int) -> float:
    """The time at which a step begins."""
    if self._begins_s:
      return self._begins_s[step - 1]
    return self._ends_s[step - 2] if step > 1 else self.began_s

  def ends_between(self, told: int, step: int) -> tuple[float, ...]:
    """The ends of the steps behind one up to another."""
    return tuple(self._ends_s[told:step])

  def ended_by(self, now_s: float) -> int:
    """Steps that have ended."""
    return bisect.bisect_right(self._ends_s, now_s)

  def has_end_at(self, now_s: float) -> bool:
    """Whether a step ends at this very time, asked of times that never fall."""
    if now_s < self._next_end_s:
      return False
    place = bisect.bisect_left(self._ends_s, now_s)
    is_end = place < len(self._ends_s) and self._ends_s[place] == now_s
    place += is_end
    self._next_end_s = self._ends_s[place] if place < len(self._ends_s) else math.inf
    return is_end

  def ended_before(self, now_s: float) -> int:
    """Steps that had ended before a time."""
    return bisect.bisect_left(self._ends_s, now_s)

  def given_by(self, now_s: float, answered_s: float) -> int:
    """Steps that are or were with the worker.

    Args:
      now_s: The time of the turn.
      answered_s: The time of the turn before: a step that ends now lets another follow when this turn is answered,
        or if it was at this time too, has let it.
    """
    if now_s <= self.began_s:
      return self.given
    count = bisect.bisect_right if answered_s == now_s else bisect.bisect_left
    return min(count(self._ends_s, now_s) + LOOKAHEAD, self.most)

  def next_told(self) -> int:
    """The next step that must be told of: with it a sequence ends, or it is the last or the one before."""
    if self.last is None:
      return min(self.until_change(self.told), max(self.most - 1, self.told + 1))
    if self.replaced:
      return min(self.until_change(self.told), self.last)
    return min(self.until_change(self.told), max(self.last - 1, self.told + 1))
