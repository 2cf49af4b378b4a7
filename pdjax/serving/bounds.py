"""The bounds of the sequences of a worker's batch: all that a backend keeps of it beside their bytes."""

import dataclasses
import math
from collections.abc import Sequence

from pdjax.serving.orders import StepOrder

_NEVER = math.inf


@dataclasses.dataclass(slots=True, eq=False)
class Bound:
  """The bounds of a sequence; the decode steps of a worker are counted on from its first.

  Attributes:
    base: The tokens that it would have cached before the first step of all.
    ends_at: Steps after which it gets no more tokens.
    lacks_at: Steps after which it has no page for the next token.
  """

  base: int
  ends_at: int
  lacks_at: float


class Bounds:
  """The bounds of the sequences in a worker's slots, and the number of decode steps that the worker was given.

  Attributes:
    steps: Decode steps that it was given.
  """

  def __init__(self):
    self.steps = 0
    self._bounds: dict[int, Bound] = {}

  def change(self, order: StepOrder) -> list[Bound]:
    """Let sequences leave and join as an order says, and have more pages; the bounds of its batch."""
    for slot in order.leaves:
      self._bounds.pop(slot, None)
    for join in order.joins:
      lacks_at = _NEVER if join.reach is None else self.steps + join.reach - join.context
      self._bounds[join.slot] = Bound(join.context - self.steps, self.steps + join.left, lacks_at)
    for growth in order.growth:
      bound = self._bounds[growth.slot]
      bound.lacks_at = _NEVER if growth.reach is None else growth.reach - bound.base
    return [self._bounds[slot] for slot in order.batch.slots]


def most_steps(bounds: Sequence[Bound], before: int) -> int:
  """The most steps of a standing order: until none gets a token, or one lacks a page; at least one.

  Args:
    bounds: Of its batch.
    before: Decode steps of the worker before it.
  """
  lacks_at = min((one.lacks_at for one in bounds if one.lacks_at < one.ends_at), default=_NEVER)
  return max(int(min(max(one.ends_at for one in bounds), lacks_at)) - before, 1)
