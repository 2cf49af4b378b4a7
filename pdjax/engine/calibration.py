"""Measures what this device can do: matrix products, streaming weights, and the overhead of a step."""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pdjax.types.hardware import ChipSpec, DeviceKind, LinkSpec

_SIZE = 1024
_STREAM_BYTES = 128 * 2**20  # far more than any cache
_LINK_BYTES = 8 * 2**20


def measure_chip(device: jax.Device, dtype: jnp.dtype, precision: str, repeats: int = 5) -> ChipSpec:
  """The device's rates, as medians of a few runs of about a second in all.

  The efficiencies are 1 because the rates are what was reached, not what a data sheet promises.
  """
  a = jax.device_put(np.ones((_SIZE, _SIZE), dtype), device)
  rows = _STREAM_BYTES // (_SIZE * jnp.dtype(dtype).itemsize)
  weights = jax.device_put(np.ones((_SIZE, rows), dtype), device)
  with jax.default_matmul_precision(precision):
    product_s = _median_seconds(jax.jit(lambda a: a @ a), a, repeats=repeats)
    # Few rows against many weights, as decoding does: nothing large is written, so no page is faulted in.
    stream_s = _median_seconds(jax.jit(lambda weights: weights[:2, :_SIZE] @ weights), weights, repeats=repeats)
  overhead_s = _median_seconds(jax.jit(lambda a: a[0, 0] + 1), a, repeats=20 * repeats)
  return ChipSpec(
    name=device.device_kind,
    flops_per_s=2 * _SIZE**3 / product_s,
    memory_bytes_per_s=_STREAM_BYTES / stream_s,
    memory_bytes=0.0,
    matmul_efficiency=1.0,
    memory_efficiency=1.0,
    step_overhead_s=overhead_s,
    source='measured at warm-up',
    calibrated=True,
    dtype=DeviceKind.of(device).fastest_dtype,
  )


def measure_link(source: jax.Device, target: jax.Device, repeats: int = 5) -> LinkSpec:
  """The rate and the latency of a `device_put` from one device to another."""
  large = jax.device_put(np.zeros(_LINK_BYTES // 4, np.float32), source)
  small = jax.device_put(np.zeros(1, np.float32), source)
  large_s = _median_seconds(lambda array: jax.device_put(array, target, may_alias=False), large, repeats=repeats)
  small_s = _median_seconds(lambda array: jax.device_put(array, target, may_alias=False), small, repeats=repeats)
  return LinkSpec(large.nbytes / max(large_s - small_s, 1e-6), small_s, source='measured at warm-up')


def _median_seconds(run: Callable[[jax.Array], jax.Array], argument: jax.Array, repeats: int) -> float:
  run(argument).block_until_ready()
  seconds = []
  for _ in range(repeats):
    begin = time.perf_counter()
    run(argument).block_until_ready()
    seconds.append(time.perf_counter() - begin)
  return statistics.median(seconds)
