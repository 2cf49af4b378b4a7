"""PrefixCache: the settings of the cache of prompts' prefixes."""

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

from pdjax.types.checked import Count, check_fields
from pdjax.types.model import ModelSpec


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixCache:
  """Pages of prompts and answers stay where they are until others need them, and are used by prompts that begin alike.

  Attributes:
    block_tokens: Tokens of a block, the least that is found again; it divides the page size of every worker.
    log_tokens: Whether the log has the tokens of the blocks that are stored, which may be private, beside their keys.
    trusts_block_hashes: Whether `Request.block_hashes` stand for the tokens of a prompt, which nobody knows; set in
      simulations. On devices the tokens that are computed count.
    lossy: Whether a place takes blocks too that other weights or dtypes have made than would have without a cache; then
      tokens may differ.

  Raises:
    ValueError: if a field is of another type or out of range.
  """

  _said: ClassVar[str] = '{kind}.{field} is {value}'

  block_tokens: Count = 16
  log_tokens: bool = False
  trusts_block_hashes: bool = False
  lossy: bool = False

  def __post_init__(self):
    check_fields(self)

  def fits(self, model: ModelSpec, page_sizes: Iterable[int]) -> bool:
    """Whether prefixes can be kept: a model has one cache of all tokens, and pages of these sizes are whole blocks."""
    if len(model.cache) != 1 or not model.cache[0].grows:
      return False
    (kind,) = model.cache
    return all(kind.entries_per_page(size) % self.block_tokens == 0 for size in page_sizes)
