"""Random products with quantized weights, and what they are in double precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul import QuantizedWeights, quantize


@functools.lru_cache
def weights_of(size_k: int, size_n: int, bits: int, group_size: int | None) -> QuantizedWeights:
  rng = np.random.default_rng([size_k, size_n, bits])
  return quantize(jnp.asarray(rng.standard_normal((size_k, size_n), np.float32)), bits, group_size)


def activations(size_m: int, size_k: int, dtype: str = 'float32') -> jax.Array:
  x = np.random.default_rng([size_m, size_k]).standard_normal((size_m, size_k), np.float32)
  return jnp.asarray(x + 0.5, dtype)  # a mean, which shows any surplus that is not taken away


def expected(x, weights: QuantizedWeights, x_scales=None) -> np.ndarray:
  """The product in double precision, of stored values taken apart one by one."""
  values = np.asarray(weights.values)
  size_k = x.shape[1]
  if weights.bits == 4:
    k = np.arange(size_k)
    shift, half, row = k % 64 // 16 * 4, k % 2 * 16, k // 64 * 8 + k % 16 // 2
    values = (values[row] >> (shift + half)[:, None] & 15) - 8
  scales = np.repeat(np.asarray(weights.scales, np.float64), size_k // weights.scales.shape[0], axis=0)
  out = np.asarray(x, np.float64) @ (values * scales)
  return out if x_scales is None else out * np.asarray(x_scales, np.float64)[:, None]


def assert_close(actual, wanted, tolerance: float):
  """See that no result is off by more than so much of the largest."""
  assert np.abs(np.asarray(actual, np.float64) - wanted).max() <= tolerance * np.abs(wanted).max()
