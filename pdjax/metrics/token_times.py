"""The time each token was delivered: the ends of a worker's steps, kept once for all who got one."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from pdjax.metrics.columns import Column
from pdjax.serving.batch import NOBODY
from pdjax.serving.events import Delivered

_FIRSTS = 0  # the column of the tokens that prompts end with


class Pieces:
  """The token times of one sequence, as pieces of columns that many share.

  Attributes:
    count: Tokens so far.
    flat: Column, start and stop of each piece, one behind the other.
  """

  __slots__ = ('count', 'flat')

  def __init__(self) -> None:
    self.count = 0
    self.flat: list[int] = []

  def add(self, column: int, start: int, stop: int) -> None:
    """Add a piece, or let the last one go on."""
    flat = self.flat
    self.count += stop - start
    if flat and flat[-1] == start and flat[-3] == column:
      flat[-1] = stop
    else:
      flat += (column, start, stop)


class Timed(Protocol):
  """One that has token times."""

  pieces: Pieces


_T = TypeVar('_T', bound=Timed)
Young = list[tuple[_T, int, int]]  # those that have their first or second token now: how many before, and how many come


class _Lane:
  """The decode steps of one worker, with the members of its batch as long as each gets every token."""

  def __init__(self, number: int, times_s: Column):
    self.number = number
    self.times_s = times_s
    self.batch = NOBODY
    self.members: list[Timed] = []
    self.reached = 0  # tokens up to here are in the pieces of the members

  def catch_up(self, until: int) -> None:
    if self.reached < until:
      for one in self.members:
        one.pieces.add(self.number, self.reached, until)
      self.reached = until


class TokenTimes:
  """Follows what is delivered. A batch that stands costs nothing but its times: its members share them.

  Between an event and `settle`, the pieces of sequences with two tokens or more may be behind.
  """

  def __init__(self) -> None:
    self._columns = [Column(np.float64)]
    self._lanes: dict[str, _Lane] = {}
    self._by_column: dict[int, _Lane] = {}

  def deliver(self, worker: str, event: Delivered, find: Callable[[str], _T]) -> 'Young[_T]':
    """Note the tokens of a step.

    Args:
      worker: The worker that ran it.
      event: The delivery.
      find: Gives whoever has the times of a request.

    Returns:
      Those that had fewer than two tokens before.
    """
    young: Young[_T] = []
    if event.firsts:
      self._deliver_firsts(event, find, young)
    decoded = event.decoded
    if decoded is None or not len(decoded.tokens):
      return young
    most = len(decoded.tokens)
    lane = self._lanes.get(worker) or self._open_lane(worker)
    start = len(lane.times_s)
    lane.times_s.extend(event.times_s(most))
    if event.batch is lane.batch and not event.late_rows and (decoded.counts == most).all():
      return young
    lane.catch_up(start)
    members: list[Timed] = []
    for row, (name, count) in enumerate(zip(event.batch.requests, decoded.counts.tolist(), strict=True)):
      if not count or row in event.late_rows:
        continue
      one = find(name)
      if one.pieces.flat and one.pieces.flat[-3] != lane.number:  # it was in the batch of another worker
        self.settle(one.pieces)
      before = one.pieces.count
      one.pieces.add(lane.number, start, start + count)
      if before < 2:
        young.append((one, before, count))
      if count == most and before + count > 1:
        members.append(one)
    lane.batch = event.batch if len(members) == len(event.batch) else NOBODY
    lane.members = members if lane.batch is not NOBODY else []
    lane.reached = start + most
    return young

  def settle(self, pieces: Pieces) -> None:
    """Have all of a sequence's tokens in its pieces."""
    lane = self._by_column.get(pieces.flat[-3]) if pieces.flat else None
    if lane is not None:
      lane.catch_up(len(lane.times_s))

  def last_s(self, pieces: Pieces) -> float:
    """The time of the last token, once they are settled."""
    return float(self._columns[pieces.flat[-3]].part(pieces.flat[-1] - 1, pieces.flat[-1])[0])

  def times_s(self, flat: Sequence[int]) -> np.ndarray:
    """The time of each token of settled pieces."""
    parts = [self._columns[flat[i]].part(flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]
    return np.concatenate(parts) if parts else np.empty(0)

  def drop(self, but: Iterable[Pieces]) -> None:
    """Let go of the times of all sequences but some."""
    least = [len(column) for column in self._columns]
    for pieces in but:
      for i in range(0, len(pieces.flat), 3):
        column, start = pieces.flat[i], pieces.flat[i + 1]
        least[column] = min(least[column], start)
    for times_s, before in zip(self._columns, least, strict=True):
      times_s.drop(before)

  @property
  def columns(self) -> list[np.ndarray]:
    """The columns so far."""
    return [column.array for column in self._columns]

  @property
  def nbytes(self) -> int:
    """Bytes of the columns."""
    return sum(column.nbytes for column in self._columns)

  def _deliver_firsts(self, event: Delivered, find: Callable[[str], _T], young: 'Young[_T]') -> None:
    column, start = self._columns[_FIRSTS], len(self._columns[_FIRSTS])
    most = max(len(result.tokens) for result in event.firsts)
    column.extend((event.now_s,) * most)
    for result in event.firsts:
      count = len(result.tokens)
      if not count:
        continue
      one = find(result.request)
      self.settle(one.pieces)
      if one.pieces.count < 2:
        young.append((one, one.pieces.count, count))
      one.pieces.add(_FIRSTS, start, start + count)

  def _open_lane(self, worker: str) -> _Lane:
    lane = self._lanes[worker] = _Lane(len(self._columns), Column(np.float64))
    self._columns.append(lane.times_s)
    self._by_column[lane.number] = lane
    return lane


def take(columns: Sequence[np.ndarray], flat: Sequence[int]) -> np.ndarray:
  """The times of pieces: column, start and stop of each, one behind the other."""
  parts = [columns[flat[i]][flat[i + 1] : flat[i + 2]] for i in range(0, len(flat), 3)]
  return np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else np.empty(0)
