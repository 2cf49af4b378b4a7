"""Numbers that come one by one and lie in arrays: what a long run keeps takes as few bytes as can be."""

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
    self._packed = 0  # rows in those
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

  def at(self, index: int) -> Any:
    """The row of an index; one of the last is found at once."""
    if index >= self._packed:
      return self._tail[index - self._packed]
    end = self._packed
    for block in reversed(self._blocks):
      if index >= end - len(block):
        return block[index - end + len(block)].item()
      end -= len(block)
    raise IndexError(index)

  @property
  def array(self) -> np.ndarray:
    """All rows so far; rows that come later are not in it."""
    if self._tail:
      self._pack()
    if len(self._blocks) != 1:
      whole = np.concatenate(self._blocks) if self._blocks else np.empty(0, self._dtype)
      self._blocks = [whole]
    view = self._blocks[0].view()
    view.flags.writeable = False
    return view

  @property
  def nbytes(self) -> int:
    """Bytes of the rows."""
    return len(self) * self._dtype.itemsize

  def _pack(self) -> None:
    self._blocks.append(np.array(self._tail, self._dtype))
    self._packed += len(self._tail)
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

  __hash__ = None  # type: ignore[assignment]


def numbered(names: dict[str, int], name: str) -> int:
  """The number of a name, the next one if it is new."""
  number = names.get(name)
  if number is None:
    number = names[name] = len(names)
  return number
