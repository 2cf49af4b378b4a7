"""The span of a transfer: cached tokens of one sequence, and the pages that hold them on either side."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
  """Tokens `start` to `start + tokens` of a sequence; both are multiples of the unit that both page sizes are made of.

  Attributes:
    source_pages: The pages that hold them at the source, the first of them page `start // page_size` of the sequence.
    target_pages: The same on the target, whose pages may be of another size.
    start: The first token.
    tokens: Their number; the last ones may be past the end of the sequence.
    layers: The first layer that travels and the one after the last, a group of the `TransferSpec`; None is all of them.
  """

  source_pages: tuple[int, ...]
  target_pages: tuple[int, ...]
  start: int
  tokens: int
  layers: tuple[int, int] | None = None

  def bounds(self, num_layers: int) -> tuple[int, int]:
    """The first layer and the one after the last, of a model with so many."""
    return self.layers or (0, num_layers)

  def share(self, num_layers: int) -> float:
    """The layers that travel, as a share of all."""
    first, stop = self.bounds(num_layers)
    return (stop - first) / num_layers
