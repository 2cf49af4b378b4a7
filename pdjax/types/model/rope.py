"""The stretching of rotary position embeddings."""

import dataclasses
from typing import Literal

from pdjax.types.model.checks import is_positive, is_size


@dataclasses.dataclass(frozen=True, slots=True)
class RopeScaling:
  """The stretching of a rotary embedding to longer contexts than it was trained for.

  Attributes:
    kind: 'linear' divides every frequency by `factor` (Chen et al. 2023); 'llama3' divides those that turn less than
      `low_freq_factor` times within `original_context_len`, keeps those that turn more than `high_freq_factor` times,
      and blends between (Grattafiori et al. 2024).
    factor: The factor of that.
    low_freq_factor: Turns; for 'llama3'.
    high_freq_factor: Turns; for 'llama3'.
    original_context_len: Tokens; for 'llama3'.

  Raises:
    ValueError: if a number is not positive and finite, or the two frequency factors are not ascending.
  """

  kind: Literal['linear', 'llama3']
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_context_len: int = 8192

  def __post_init__(self):
    if self.kind not in ('linear', 'llama3'):
      raise ValueError(f"rope scaling is of kind {self.kind!r}, expected 'linear' or 'llama3'.")
    for field in ('factor', 'low_freq_factor', 'high_freq_factor', 'original_context_len'):
      if not is_positive(getattr(self, field)):
        raise ValueError(f'rope scaling has {field}={getattr(self, field)!r}, expected a positive number.')
    if not is_size(self.original_context_len):
      raise ValueError(f'rope scaling has original_context_len={self.original_context_len!r}, expected an integer.')
    if self.low_freq_factor >= self.high_freq_factor:
      raise ValueError(
        f'rope scaling has low_freq_factor={self.low_freq_factor} and high_freq_factor={self.high_freq_factor}; '
        'the first must be the smaller.'
      )
