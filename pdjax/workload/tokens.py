"""Random prompts that cost nothing until someone reads their tokens."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from pdjax.types.checked import Count, Index, check_fields


@dataclasses.dataclass(frozen=True, slots=True)
class RandomTokens(Sequence[int]):
  """`length` token ids drawn evenly from `0` to `vocab_size - 1`; the same fields always give the same tokens.

  A simulation asks only for its length and never pays for the tokens. A slice is a plain tuple.

  Raises:
    ValueError: if the length or the seed is negative, or the vocabulary empty.
  """

  length: Index
  vocab_size: Count
  seed: Index = 0

  def __post_init__(self):
    check_fields(self)

  def __len__(self) -> int:
    return self.length

  @overload
  def __getitem__(self, index: int) -> int: ...
  @overload
  def __getitem__(self, index: slice) -> tuple[int, ...]: ...
  def __getitem__(self, index):
    return _draw(self)[index]

  def __iter__(self) -> Iterator[int]:
    return iter(_draw(self))


@functools.lru_cache(maxsize=64)
def _draw(tokens: RandomTokens) -> tuple[int, ...]:
  rng = np.random.default_rng(tokens.seed)
  return tuple(rng.integers(tokens.vocab_size, size=tokens.length).tolist())
