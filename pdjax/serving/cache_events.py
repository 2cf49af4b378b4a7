"""Events of the prefix cache: what places hold and hold no more, and who finds it."""

import dataclasses
from typing import Literal

HitSide = Literal['prefill', 'decode']


@dataclasses.dataclass(frozen=True, slots=True)
class BlockStored:
  """A place holds more blocks of a sequence, one behind the other, as vLLM's event of that name says.

  Attributes:
    now_s: The time of the turn.
    medium: The place.
    keys: Their keys, 16 bytes each.
    parent: The key of the block before them; zeros before the first of a sequence.
    block_size: Tokens of each.
    token_ids: Their tokens, if they are asked for (`PrefixCache.log_tokens`).
  """

  now_s: float
  medium: str
  keys: bytes
  parent: bytes
  block_size: int
  token_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class BlockRemoved:
  """A place holds blocks no more: their pages were given to others.

  Attributes:
    now_s: The time of the turn.
    medium: The place.
    keys: Their keys, 16 bytes each.
  """

  now_s: float
  medium: str
  keys: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class AllBlocksCleared:
  """A place that was lost holds no block.

  Attributes:
    now_s: The time of the turn.
    medium: The place.
  """

  now_s: float
  medium: str


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixHit:
  """A request found its beginning at a place; told of those that begin for the first time, as others find their own.

  Attributes:
    now_s: The time of the turn.
    request: The request.
    place: The place.
    tokens: Tokens of its prompt that are there, at least one.
    side: The gain: with 'prefill' they are not computed, with 'decode' not sent to the place, where it is to decode.
  """

  now_s: float
  request: str
  place: str
  tokens: int
  side: HitSide
