"""The tokens that end a sequence: those that each part of a checkpoint names, joined."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from absl import logging

TURN = 'chat template'


@dataclasses.dataclass(frozen=True)
class EndTokens:
  """The tokens that end a sequence, and the sources that say so.

  A file that names one end seldom knows of all: configurations are copied from base models, and chat models end their
  turns with a token of their own. So all that are named count. Only what the chat template puts behind an assistant's
  message ends chats alone: in raw text it may stand between the turns of a conversation.

  Attributes:
    named: Each source with the ids it names, for sequences of any kind.
    turn: The tokens that the chat template puts behind an assistant's message.
  """

  named: tuple[tuple[str, tuple[int, ...]], ...] = ()
  turn: tuple[int, ...] = ()

  @property
  def ids(self) -> tuple[int, ...]:
    """The tokens that end any sequence, each id once."""
    return tuple(dict.fromkeys(token for _, ids in self.named for token in ids))

  @property
  def chat_ids(self) -> tuple[int, ...]:
    """The tokens that end an answer in a chat."""
    return tuple(dict.fromkeys((*self.ids, *self.turn)))

  def by_source(self) -> dict[str, list[int]]:
    """Each source with the ids it names, as JSON can hold it."""
    told = {source: list(ids) for source, ids in self.named}
    return told | {TURN: list(self.turn)} if self.turn else told

  def joined(self, others: 'EndTokens', vocab_size: int) -> 'EndTokens':
    """These and those that others name; an id that the model cannot give is told and left out."""
    kept = ((source, below(ids, vocab_size, source)) for source, ids in others.named)
    return dataclasses.replace(self, named=(*self.named, *((source, ids) for source, ids in kept if ids)))

  def with_turn(self, ids: Iterable[int], vocab_size: int, source: str) -> 'EndTokens':
    """These and those that the chat template puts behind an assistant's message."""
    return dataclasses.replace(self, turn=below(ids, vocab_size, source))

  @classmethod
  def from_sources(cls, sources: Mapping[str, Any]) -> 'EndTokens':
    """The end tokens out of the mapping that `by_source` gave, without the chat template's.

    Raises:
      ValueError: if it is no mapping from sources to lists of ids.
    """
    named = []
    for source, ids in sources.items():
      if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise ValueError(f'{source!r} names {ids!r}, expected a list of token ids')
      if source != TURN:
        named.append((source, tuple(ids)))
    return cls(tuple(named))


def below(ids: Iterable[int], vocab_size: int, source: str) -> tuple[int, ...]:
  """The ids that a model of this vocabulary can give; the others, which cannot end anything, are told."""
  ids = tuple(ids)
  if beyond := [token for token in ids if token >= vocab_size]:
    logging.warning(
      '%s names token %s as an end of sequence, but the model gives 0 to %d only: it ends nothing.',
      source,
      ', '.join(map(str, beyond)),
      vocab_size - 1,
    )
  return tuple(token for token in ids if token < vocab_size)
