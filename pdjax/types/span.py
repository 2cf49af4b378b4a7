"""The span of a transfer: what one sequence has in the cache, and the pages that hold it on either side."""

import dataclasses

from pdjax.types.cache import KV


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
  """Tokens `start` to `start + tokens` of a sequence; both are multiples of the unit that both page sizes are made of.

  Of a cache kind that does not keep all tokens they are entries, counted from the first one that is sent; where each
  lies in its pages, nobody asks yet, for no engine holds such a kind.

  Attributes:
    source_pages: The pages that hold them at the source, the first of them page `start // page_size` of the sequence.
      Of a cache kind that does not keep all tokens, all its pages of that sequence.
    target_pages: The same on the target, whose pages may be of another size.
    start: The first token.
    tokens: Their number; the last ones may be past the end of the sequence.
    layers: The first layer that travels and the one after the last, a group of the `TransferSpec`; None is all of them.
    kind: The cache kind.
  """

  source_pages: tuple[int, ...]
  target_pages: tuple[int, ...]
  start: int
  tokens: int
  layers: tuple[int, int] | None = None
  kind: str = KV

  def bounds(self, num_layers: int) -> tuple[int, int]:
    """The first layer and the one after the last, of a model with so many."""
    return self.layers or (0, num_layers)
