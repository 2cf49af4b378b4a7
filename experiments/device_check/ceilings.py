"""The ceilings of a device, which all other figures are held against, beside what its maker says."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.device_check.context import Context
from experiments.device_check.timing import COPY, PRODUCT, measure_ceilings, median_s
from pallas_kernels import devices


def nominal(device: jax.Device) -> tuple[float, float] | None:
  """Bytes per second and FLOP/s in bfloat16 as the maker says, or None if the device is not known."""
  known = devices.of(device)
  return (known.hbm_bandwidth, known.bf16_flops) if known.bf16_flops else None


def run(context: Context) -> None:
  """Measure."""
  figures, device = context.figures, jax.devices()[0]
  found, said = measure_ceilings(context.sizes), nominal(device)
  pairs = ((COPY, found.copy_bytes_per_s / 1e9, 'GB/s'), (PRODUCT, found.flops_per_s / 1e12, 'TFLOP/s'))
  for place, (name, value, unit) in enumerate(pairs):
    most = None if said is None else said[place] / (1e9, 1e12)[place]
    share = None if most is None else value / most
    figures.add(name, value, unit, peer=None if most is None else 'data sheet', peer_value=most, floor_share=share)
  small = jnp.asarray(np.random.default_rng(0).standard_normal(8, np.float32))
  call = jax.jit(jnp.negative)
  figures.add('starting a small program', 1e6 * median_s(lambda _: call(small), context.sizes), 'us')
