"""The stretching of rotary position embeddings."""

import dataclasses
from typing import Literal

from pdjax.types.checked import Positive, Size, check_fields


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
  factor: Positive
  low_freq_factor: Positive = 1.0
  high_freq_factor: Positive = 4.0
  original_context_len: Size = 8192

  def __post_init__(self):
    check_fields(self)
    if self.low_freq_factor >= self.high_freq_factor:
      raise ValueError(
        f'RopeScaling has low_freq_factor={self.low_freq_factor} and high_freq_factor={self.high_freq_factor}; '
        'the first must be the smaller.'
      )
