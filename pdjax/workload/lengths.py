"""The lengths of prompts and outputs: distributions over token counts."""

import dataclasses
import math
from typing import Annotated, Protocol

import numpy as np

from pdjax.types.checked import check_fields
from pdjax.types.fitting import Must, at_least

_MOST_SIGMA = 100  # of which the exponential still is a number
Tokens = Annotated[int, at_least(1, 'an integer of at least 1 token')]


class Length(Protocol):
  """A distribution of a number of tokens."""

  @property
  def upper(self) -> int:
    """The largest number that `sample` can give."""

  def sample(self, rng: np.random.Generator) -> int:
    """Draw one number, at least 1 and at most `upper`."""


_SAMPLES = Must(lambda samples: len(samples) > 0, 'at least one length; give it those that were measured')
_MEDIAN = Must(lambda value: 0 < value < math.inf, 'a positive number of tokens')
_SIGMA = Must(lambda value: 0 <= value <= _MOST_SIGMA, f'0 (always the median), or a positive number to {_MOST_SIGMA}')


@dataclasses.dataclass(frozen=True, slots=True)
class Fixed:
  """Always `tokens` tokens."""

  tokens: Tokens

  def __post_init__(self):
    check_fields(self)

  @property
  def upper(self) -> int:
    return self.tokens

  def sample(self, rng: np.random.Generator) -> int:
    return self.tokens


@dataclasses.dataclass(frozen=True, slots=True)
class Uniform:
  """Any number from `low` to `high`, both included, equally often."""

  low: Tokens
  high: Tokens

  def __post_init__(self):
    check_fields(self)
    _check_range('Uniform', self.low, self.high)

  @property
  def upper(self) -> int:
    return self.high

  def sample(self, rng: np.random.Generator) -> int:
    return int(rng.integers(self.low, self.high, endpoint=True))


@dataclasses.dataclass(frozen=True, slots=True)
class Lognormal:
  """Half below `median` and a long tail above it, as real prompts and answers have.

  Attributes:
    median: The middle value, before clipping.
    sigma: Standard deviation of the logarithm; the unclipped mean is `median·exp(sigma²/2)`.
    low: The least; draws below it become it.
    high: The most; draws above it become it. As `upper` it is also the `max_tokens` of a sampled output.
  """

  median: Annotated[float, _MEDIAN]
  sigma: Annotated[float, _SIGMA]
  low: Tokens = 1
  high: Tokens = 4096

  def __post_init__(self):
    check_fields(self)
    _check_range('Lognormal', self.low, self.high)

  @property
  def upper(self) -> int:
    return self.high

  def sample(self, rng: np.random.Generator) -> int:
    tokens = self.median * np.exp(self.sigma * rng.standard_normal())
    return round(min(max(tokens, self.low), self.high))


@dataclasses.dataclass(frozen=True, slots=True)
class Empirical:
  """One of the `samples` that were seen, each equally often."""

  samples: Annotated[tuple[Tokens, ...], _SAMPLES]

  def __post_init__(self):
    check_fields(self)

  @property
  def upper(self) -> int:
    return max(self.samples)

  def sample(self, rng: np.random.Generator) -> int:
    return self.samples[rng.integers(len(self.samples))]


def _check_range(name: str, low: int, high: int) -> None:
  if low > high:
    raise ValueError(f'{name} has low={low} above high={high}; exchange them or raise high.')
