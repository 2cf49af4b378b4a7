"""Finds the rule behind the factors by which GGUF files slow each frequency of the rotary embedding."""

from collections.abc import Iterator

import numpy as np

from pdjax.types.model import RopeScaling

# Converters compute the factors in float32, whose rounding the blend between the two bands magnifies.
_ROUNDING = 1e-5
# The rule knows the original context only in ratios to the two frequency factors, so any length will do where they are
# free: that of Llama 3.
_ORIGINAL = 8192


def scaling_from_factors(factors: np.ndarray, rope_theta: float) -> RopeScaling | None:
  """The scaling that divides every frequency by its factor.

  Factors that several rules explain, as those of a small head with one frequency or none between the two bands, give
  one of these rules: all of them compute the same.

  Args:
    factors: `[D/2]`, from the fastest frequency to the slowest.
    rope_theta: Base of the rotary embedding.

  Returns:
    None if every factor is 1.

  Raises:
    ValueError: if neither linear scaling nor Llama 3's rule (Grattafiori et al. 2024) gives these factors.
  """
  factors = factors.astype(np.float64)
  if np.allclose(factors, factors[0], rtol=_ROUNDING):
    return None if np.isclose(factors[0], 1.0, rtol=_ROUNDING) else RopeScaling('linear', float(factors[0]))
  frequencies = rope_theta ** (-np.arange(len(factors)) / len(factors))
  for scaling in _candidates(frequencies, factors):
    if np.allclose(_llama3_factors(frequencies, scaling), factors, rtol=_ROUNDING):
      return scaling
  raise ValueError(f'factors from {factors.min():.6g} to {factors.max():.6g} that do not follow the rule of Llama 3')


def _candidates(frequencies: np.ndarray, factors: np.ndarray) -> Iterator[RopeScaling]:
  factor = float(factors.max())
  if not factor > 1:
    return
  if np.isclose(factor, round(factor, 4), rtol=_ROUNDING):
    factor = round(factor, 4)
  yield RopeScaling('llama3', factor)  # as all models of Llama 3 have it
  kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
  # kept = (original · frequency / 2π - low) / (high - low) between the bands: a line.
  whole, slowed = (np.isclose(factors, end, rtol=_ROUNDING) for end in (1.0, factors.max()))
  blended = (kept > 1e-3) & (kept < 1 - 1e-3)  # nearer to an end, rounding hides where they lie
  if blended.sum() < 2:
    blended = ~whole & ~slowed
  if blended.sum() > 1:
    slope, offset = np.polyfit(frequencies[blended], kept[blended], 1)
  else:
    slope, offset = _free_line(frequencies, kept, whole, slowed)
  if slope > 0 > offset:
    yield from _rules(factor, float(slope), float(offset), frequencies[blended], kept[blended])


def _free_line(frequencies: np.ndarray, kept: np.ndarray, whole: np.ndarray, slowed: np.ndarray) -> tuple[float, float]:
  """A line that is 0 at all slowed frequencies, 1 at all whole ones and right at the one between them, if any."""
  fastest_slowed = frequencies[slowed].max()
  slowest_whole = frequencies[whole].min() if whole.any() else np.inf
  between = ~whole & ~slowed
  if between.any():
    at, share = frequencies[between][0], kept[between][0]
    if not fastest_slowed < at < slowest_whole:
      return 0.0, 0.0
    # Half as steep again as it must be, to be clear of both ends.
    slope = 1.5 * max(share / (at - fastest_slowed), (1 - share) / (slowest_whole - at))
    return slope, share - slope * at
  if not fastest_slowed < slowest_whole:
    return 0.0, 0.0
  slope = 3 / (slowest_whole - fastest_slowed)  # from 0 to 1 in the middle third of the gap
  return slope, -slope * fastest_slowed - 1


def _rules(
  factor: float, slope: float, offset: float, frequencies: np.ndarray, kept: np.ndarray
) -> Iterator[RopeScaling]:
  """The rules of one line: with round numbers, as a config.json would have them, or else with any."""
  high = round(1 - 1 / offset, 2)  # the line says nothing of the scale, so low is 1
  if len(frequencies) and high > 1:
    turns = kept * (high - 1) + 1
    original = round(float(np.median(2 * np.pi * turns / frequencies)))
    if original > 0:
      yield RopeScaling('llama3', factor, 1.0, high, original)
  turns_of = _ORIGINAL / (2 * np.pi)
  low, high = -offset / slope * turns_of, (1 - offset) / slope * turns_of
  if 0 < low < high:
    yield RopeScaling('llama3', factor, low, high, _ORIGINAL)


def _llama3_factors(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
  turns = scaling.original_context_len * frequencies / (2 * np.pi)
  kept = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
  return 1 / (kept + (1 - kept) / scaling.factor)
