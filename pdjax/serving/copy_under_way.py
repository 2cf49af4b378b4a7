"""A copy of cached blocks that is under way, as the books know it."""

import dataclasses

from pdjax.serving.blocks import Blocks
from pdjax.serving.prefixes import CopyPlan
from pdjax.serving.requests import RequestState


@dataclasses.dataclass(slots=True, eq=False)
class Copy:
  """A copy of blocks that is under way.

  Attributes:
    blocks: The blocks.
    plan: Those of them that travel.
    source: The place that has them; all those pages are held until the copy is over.
    target: The place that gets them.
    pages: The pages of the target that they go into, which are held as long, as are those before them.
    sent: The token behind the last that was sent on.
    under_way: Its transfers that are not over.
    failed_at: The first token that did not arrive; None while none is known.
    entries: The requests that wait for it.
  """

  blocks: Blocks
  plan: CopyPlan
  source: str
  target: str
  pages: tuple[int, ...]
  sent: int
  under_way: int = 0
  failed_at: int | None = None
  entries: list[RequestState] = dataclasses.field(default_factory=list)

  @property
  def is_over(self) -> bool:
    """Whether nothing of it is under way or to come."""
    return not self.under_way and (self.sent >= self.plan.end or self.failed_at is not None)
