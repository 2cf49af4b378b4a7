"""Finds the rule behind the factors by which GGUF files slow each frequency of the rotary embedding."""

from collections.abc import Iterator

import numpy as np

from pdjax.types.model import RopeScaling

# Converters compute the factors in float32, whose rounding the blend between the two bands magnifies.
_ROUNDING = 1e-5


def scaling_from_factors(factors: np.ndarray, rope_theta: float) -> RopeScaling | None:
  """The scaling that divides every frequency by its factor.

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
  factor = round(float(factors.max()), 4)
  if not factor > 1:
    return
  yield RopeScaling('llama3', factor)  # as all models of Llama 3 have it
  kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
  blended = (kept > 1e-3) & (kept < 1 - 1e-3)
  if blended.sum() < 2:
    return
  # kept = (original · frequency / 2π - low) / (high - low) says nothing of their scale, so low is 1.
  _, offset = np.polyfit(frequencies[blended], kept[blended], 1)
  high = round(float(1 - 1 / offset), 2)
  turns = kept[blended] * (high - 1) + 1
  original = round(float(np.median(2 * np.pi * turns / frequencies[blended])))
  if high > 1 and original > 0:
    yield RopeScaling('llama3', factor, 1.0, high, original)


def _llama3_factors(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
  turns = scaling.original_context_len * frequencies / (2 * np.pi)
  kept = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
  return 1 / (kept + (1 - kept) / scaling.factor)
