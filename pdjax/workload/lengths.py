"""The lengths of prompts and outputs: distributions over token counts."""

import dataclasses
import math
from typing import Protocol

import numpy as np


class Length(Protocol):
  """A distribution of a number of tokens."""

  @property
  def upper(self) -> int:
    """The largest number that `sample` can give."""

  def sample(self, rng: np.random.Generator) -> int:
    """Draw one number, at least 1 and at most `upper`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fixed:
  """Always `tokens` tokens."""

  tokens: int

  def __post_init__(self):
    _check_count('Fixed', 'tokens', self.tokens)

  @property
  def upper(self) -> int:
    return self.tokens

  def sample(self, rng: np.random.Generator) -> int:
    return self.tokens


@dataclasses.dataclass(frozen=True, slots=True)
class Uniform:
  """Any number from `low` to `high`, both included, equally often."""

  low: int
  high: int

  def __post_init__(self):
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

  median: float
  sigma: float
  low: int = 1
  high: int = 4096

  def __post_init__(self):
    if not (self.median > 0 and math.isfinite(self.median)):
      raise ValueError(f'Lognormal has median={self.median}, expected a positive number of tokens.')
    if not (self.sigma >= 0 and math.isfinite(self.sigma)):
      raise ValueError(f'Lognormal has sigma={self.sigma}, expected 0 (always the median) or a positive number.')
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

  samples: tuple[int, ...]

  def __post_init__(self):
    object.__setattr__(self, 'samples', tuple(self.samples))
    if not self.samples:
      raise ValueError('Empirical has no samples, expected at least one length; give it those that were measured.')
    for index, tokens in enumerate(self.samples):
      _check_count('Empirical', f'samples[{index}]', tokens)

  @property
  def upper(self) -> int:
    return max(self.samples)

  def sample(self, rng: np.random.Generator) -> int:
    return self.samples[rng.integers(len(self.samples))]


def _check_count(name: str, field: str, tokens: int) -> None:
  if tokens < 1 or tokens != int(tokens):
    raise ValueError(f'{name} has {field}={tokens}, expected a whole number of tokens, at least 1.')


def _check_range(name: str, low: int, high: int) -> None:
  _check_count(name, 'low', low)
  _check_count(name, 'high', high)
  if low > high:
    raise ValueError(f'{name} has low={low} above high={high}; exchange them or raise high.')
