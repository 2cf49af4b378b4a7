"""Numbers that come one by one and lie in arrays: what a long run keeps takes as few bytes as can be."""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import DTypeLike

_T = TypeVar('_T')
_BLOCK = 1 << 13  # rows that wait as they came


class Column:
  """Rows of one dtype, each a number or, where that has fields, a tuple of them; rows are added, and never change.

  Args:
    dtype: Of a row.
  """

  def __init__(self, dtype: DTypeLike):
    self._dtype = np.dtype(dtype)
    self._blocks: list[np.ndarray] = []
    self._ends: list[int] = []  # of those
    self._first = 0  # row that was not dropped
    self._tail: list[Any] = []

  def append(self, row: Any) -> None:
    """Add a row."""
    self._tail.append(row)
    if len(self._tail) >= _BLOCK:
      self._pack()

  def extend(self, rows: Iterable[Any]) -> None:
    """Add rows."""
    self._tail += rows
    if len(self._tail) >= _BLOCK:
      self._pack()

  def __len__(self) -> int:
    return self._packed + len(self._tail)

  def part(self, start: int, stop: int) -> np.ndarray:
    """The rows from `start` to before `stop`."""
    packed, found = self._packed, []
    block = bisect.bisect_right(self._ends, start)
    while start < min(stop, packed):
      begin = self._ends[block] - len(self._blocks[block])
      found.append(self._blocks[block][start - begin : stop - begin])
      start, block = self._ends[block], block + 1
    if stop > packed:
      found.append(np.array(self._tail[max(start - packed, 0) : stop - packed], self._dtype))
    return found[0] if len(found) == 1 else np.concatenate([np.empty(0, self._dtype), *found])

  def drop(self, before: int) -> None:
    """Let go of rows before one, as far as no other lies in a block with them."""
    count = bisect.bisect_right(self._ends, before)
    if count:
      self._first = self._ends[count - 1]
      self._blocks, self._ends = self._blocks[count:], self._ends[count:]

  @property
  def array(self) -> np.ndarray:
    """All rows so far; rows that come later are not in it."""
    if self._tail:
      self._pack()
    if len(self._blocks) != 1:
      whole = np.concatenate(self._blocks) if self._blocks else np.empty(0, self._dtype)
      self._blocks, self._ends = [whole], [self._first + len(whole)]
    view = self._blocks[0].view()
    view.flags.writeable = False
    return view

  @property
  def nbytes(self) -> int:
    """Bytes of the rows that it has."""
    return (len(self) - self._first) * self._dtype.itemsize

  @property
  def _packed(self) -> int:
    return self._ends[-1] if self._ends else self._first

  def _pack(self) -> None:
    block = np.array(self._tail, self._dtype)
    self._ends.append(self._packed + len(block))
    self._blocks.append(block)
    self._tail = []


class Read(Sequence[_T]):
  """Objects of which the numbers lie in arrays, each made as it is read; `made` makes one."""

  def made(self, number: int) -> _T:
    """The object of a number from 0 on."""
    raise NotImplementedError

  @overload
  def __getitem__(self, index: int) -> _T: ...
  @overload
  def __getitem__(self, index: slice) -> tuple[_T, ...]: ...
  def __getitem__(self, index: int | slice) -> _T | tuple[_T, ...]:
    if isinstance(index, slice):
      return tuple(map(self.made, range(*index.indices(len(self)))))
    return self.made(range(len(self))[index])

  def __iter__(self) -> Iterator[_T]:
    return map(self.made, range(len(self)))

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Sequence) or len(self) != len(other):
      return False
    return all(one == another for one, another in zip(self, other, strict=True))

  def __repr__(self) -> str:
    return repr(tuple(self))

  __hash__ = None  # type: ignore[assignment]


def numbered(names: dict[str, int], name: str) -> int:
  """The number of a name, the next one if it is new."""
  number = names.get(name)
  if number is None:
    number = names[name] = len(names)
  return number
