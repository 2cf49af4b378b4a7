"""Random prompts that cost nothing until someone reads their tokens, also such that begin alike."""

import abc
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from pdjax.types.checked import Count, Index, check_fields
from pdjax.types.request import BlockHash


class _DrawnTokens(Sequence[int]):
  """`length` token ids that are drawn when someone first reads one."""

  __slots__ = ()

  length: Index

  def __len__(self) -> int:
    return self.length

  @overload
  def __getitem__(self, index: int) -> int: ...
  @overload
  def __getitem__(self, index: slice) -> tuple[int, ...]: ...
  def __getitem__(self, index):
    return self._drawn()[index]

  def __iter__(self) -> Iterator[int]:
    return iter(self._drawn())

  @abc.abstractmethod
  def _drawn(self) -> tuple[int, ...]:
    """All tokens."""


@dataclasses.dataclass(frozen=True, slots=True)
class RandomTokens(_DrawnTokens):
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

  def _drawn(self) -> tuple[int, ...]:
    return _draw(self)


@functools.lru_cache(maxsize=64)
def _draw(tokens: RandomTokens) -> tuple[int, ...]:
  rng = np.random.default_rng(tokens.seed)
  return tuple(rng.integers(tokens.vocab_size, size=tokens.length).tolist())


@dataclasses.dataclass(frozen=True, slots=True)
class BlockTokens(_DrawnTokens):
  """`length` token ids that follow ids of blocks: equal ids have equal tokens, so that prompts begin alike as these do.

  A simulation asks only for its length and never pays for the tokens. A slice is a plain tuple.

  Attributes:
    length: Tokens in all; those behind the last block are drawn by `seed`, and the last block may be cut short.
    vocab_size: Tokens are drawn evenly from `0` to `vocab_size - 1`.
    block_hashes: The id of each block, from 0 to 2**64 - 1.
    block_size: Tokens of a block.
    tenant: The tenant; another has other tokens for the same ids.
    seed: Of the tokens behind the last block.

  Raises:
    ValueError: if the length or the seed is negative, the vocabulary empty, or a block of no token.
  """

  length: Index
  vocab_size: Count
  block_hashes: tuple[BlockHash, ...]
  block_size: Count
  tenant: str = ''
  seed: Index = 0

  def __post_init__(self):
    check_fields(self)

  def _drawn(self) -> tuple[int, ...]:
    return _draw_blocks(self)


@functools.lru_cache(maxsize=64)
def _draw_blocks(tokens: BlockTokens) -> tuple[int, ...]:
  size, vocab_size = tokens.block_size, tokens.vocab_size
  blocks = (_draw_block(vocab_size, size, tokens.tenant, one) for one in tokens.block_hashes)
  behind = max(tokens.length - size * len(tokens.block_hashes), 0)
  everything = itertools.chain(*blocks, RandomTokens(behind, vocab_size, tokens.seed))
  return tuple(itertools.islice(everything, tokens.length))


@functools.lru_cache(maxsize=1 << 12)
def _draw_block(vocab_size: int, size: int, tenant: str, block: int) -> tuple[int, ...]:
  of = hashlib.blake2b(tenant.encode('utf-8', 'surrogatepass'), digest_size=8).digest()
  rng = np.random.default_rng((block, int.from_bytes(of, 'little')))
  return tuple(rng.integers(vocab_size, size=size).tolist())
