"""The batch of a worker's steps, and the rows in which the books keep the tokens of its sequences."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np

LOOKAHEAD = 2  # steps of a standing order that are with the worker at once: one that runs, one that is ready


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
  """The sequences that a step decodes, a row each; one object stands for all steps until an order changes it.

  Attributes:
    requests: Their requests.
    slots: Their slots.
  """

  requests: tuple[str, ...] = ()
  slots: tuple[int, ...] = ()

  def __len__(self) -> int:
    return len(self.slots)

  def changed(self, leaves: Collection[int], joins: Sequence['Joining']) -> 'Batch':
    """This batch without some slots, and with others behind the rest."""
    if not leaves and not joins:
      return self
    stay = [row for row, slot in enumerate(self.slots) if slot not in leaves] if leaves else range(len(self))
    return Batch(
      (*(self.requests[row] for row in stay), *(one.request for one in joins)),
      (*(self.slots[row] for row in stay), *(one.slot for one in joins)),
    )


class Joining(Protocol):
  """A sequence that joins a batch."""

  @property
  def request(self) -> str:
    """The request."""

  @property
  def slot(self) -> int:
    """Its slot."""


NOBODY = Batch()


class TokenRows:
  """Tokens of the sequences in a worker's slots, a row a slot, until somebody takes them out.

  Steps bring them in columns, one for each sequence of the batch.

  Attributes:
    catch_up: Has the backend tell what it has not told yet of a standing order; None where it tells every step.
  """

  def __init__(self, num_slots: int):
    self.catch_up: Callable[[], None] | None = None
    self._tokens = np.zeros((num_slots, 64), np.int32)
    self._counts = np.zeros(num_slots, np.int64)
    self._left = np.zeros(num_slots, np.int64)  # tokens that each may still get
    self._owners = np.zeros(num_slots, np.int64)  # the number of whoever has the row; 0 is nobody
    self._next_owner = 1
    self._most = 0  # no row has more tokens
    self._is_blank = True  # all tokens so far are 0, as a simulator has them
    self._slots: tuple[Batch, np.ndarray] = (NOBODY, np.zeros(0, np.int64))

  def own(self, slot: int, left: int) -> None:
    """Let a row be that of another sequence, which may get so many tokens."""
    self._owners[slot] = self._next_owner
    self._next_owner += 1
    self._counts[slot], self._left[slot] = 0, left

  def disown(self, slot: int) -> None:
    """Let a row be nobody's; what steps in flight still bring it is late."""
    self._owners[slot] = 0

  def owners(self, batch: Batch) -> np.ndarray:
    """The number of whoever has the row of each slot of a batch, `[B]`; it tells later who has left."""
    return self._owners[self._slots_of(batch)]

  def add(self, batch: Batch, owners: np.ndarray, tokens: np.ndarray, counts: np.ndarray) -> np.ndarray | None:
    """Write the tokens of a step into the rows of those that still have them.

    Args:
      batch: The batch of the step.
      owners: The answer of `owners` for it when the order was given.
      tokens: `[T, B]`, those of a sequence first in its column.
      counts: `[B]` of how many each got.

    Returns:
      `[B]` of whether a sequence still has its row; None if all have.
    """
    slots = self._slots_of(batch)
    here = self._owners[slots] == owners
    all_here = np.count_nonzero(here) == len(here)
    if not all_here:
      counts = np.where(here, counts, 0)  # what is written behind a row's tokens counts for nothing
    first = self._counts[slots]
    if not self._is_blank or tokens.strides != (0, 0) or (tokens.size and tokens[0, 0]):
      self._write(slots, first, tokens)
    self._counts[slots] = first + counts
    self._left[slots] -= counts
    return None if all_here else here

  def _write(self, slots: np.ndarray, first: np.ndarray, tokens: np.ndarray) -> None:
    if self._is_blank:
      self._is_blank = False
      self._most = int(self._counts.max())
    if self._most + len(tokens) > self._tokens.shape[1]:
      self._make_room(len(tokens))
    if len(tokens) == 1:
      self._tokens[slots, first] = tokens[0]
    else:
      self._tokens[slots[:, None], first[:, None] + np.arange(len(tokens))] = tokens.T
    self._most += len(tokens)

  def skip(self, slot: int, count: int) -> None:
    """Note so many tokens of a sequence that were written elsewhere."""
    self._left[slot] -= count

  def count(self, slot: int) -> int:
    """Tokens in a row."""
    return int(self._counts[slot])

  def take(self, slot: int) -> list[int]:
    """The tokens of a row, which has none of them any more."""
    count = self._counts[slot]
    if not count:
      return []
    self._counts[slot] = 0
    return [0] * int(count) if self._is_blank else self._tokens[slot, :count].tolist()

  def exhausted(self, batch: Batch, steps: int) -> list[int]:
    """The slots of a batch that get nothing more after so many steps."""
    slots = self._slots_of(batch)
    return slots[self._left[slots] <= steps].tolist()

  def _slots_of(self, batch: Batch) -> np.ndarray:
    if self._slots[0] is not batch:
      self._slots = batch, np.array(batch.slots, np.int64)
    return self._slots[1]

  def _make_room(self, more: int) -> None:
    self._most = int(self._counts.max())
    size = self._tokens.shape[1]
    if self._most + more > size // 2:
      self._tokens = np.pad(self._tokens, ((0, 0), (0, max(size, self._most + more - size))))
