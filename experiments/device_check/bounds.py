"""Ceilings of a device, against which all other figures are held: measured, and as rows of a result."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from experiments.device_check.figures import Figures
from experiments.device_check.sizes import Sizes
from experiments.device_check.timing import draw, median_s
from pallas_kernels import devices

COPY, READ, PRODUCT = 'copy, read and written', 'read, summed up', 'product in bfloat16'  # names of their rows
START = 'starting a small program'


@dataclasses.dataclass(frozen=True)
class Ceilings:
  """The best that the device reached.

  Attributes:
    copy_bytes_per_s: Bytes per second that a copy read and wrote.
    read_bytes_per_s: Bytes per second that a sum read.
    flops_per_s: FLOP/s of a product in bfloat16.
    start_s: Seconds from one start of a small program to the next.
  """

  copy_bytes_per_s: float
  read_bytes_per_s: float
  flops_per_s: float
  start_s: float

  @property
  def bytes_per_s(self) -> float:
    """The ceiling of reading: a sum's bandwidth or a copy's, whichever is higher."""
    return max(self.copy_bytes_per_s, self.read_bytes_per_s)

  @classmethod
  def of_rows(cls, values: Mapping[str, float]) -> 'Ceilings':
    """From the figures of rows by name.

    Raises:
      KeyError: if they are not there.
    """
    return cls(values[COPY] * 1e9, values[READ] * 1e9, values[PRODUCT] * 1e12, values[START] / 1e6)


def measure_ceilings(sizes: Sizes) -> Ceilings:
  """Copy and sum up one large array, each in the fastest of two ways, and multiply two large matrices."""
  rows = max(1, sizes.copy_bytes // 2 // _ROW)
  array = draw((rows, _ROW), 'bfloat16', 0)
  copies = [jax.jit(jnp.copy), jax.jit(jnp.negative)]  # the second reads and writes as much, in a program of its own
  sums = [jax.jit(lambda array: jnp.sum(array, axis=1, dtype=jnp.float32)), jax.jit(jnp.max)]
  copy_s, read_s = (
    min(median_s(lambda _, call=call: call(array), sizes) for call in calls)  # type: ignore[misc]
    for calls in (copies, sums)
  )
  num_bytes = array.nbytes
  array.delete()
  a, b = (draw((sizes.product_size,) * 2, 'bfloat16', seed) for seed in (1, 2))
  multiply = jax.jit(jnp.matmul)
  product_s = median_s(lambda _: multiply(a, b), sizes)
  small = jnp.asarray(np.random.default_rng(0).standard_normal(8, np.float32))
  negate = jax.jit(jnp.negative)
  start_s = median_s(lambda _: negate(small), sizes)
  return Ceilings(2 * num_bytes / copy_s, num_bytes / read_s, 2 * sizes.product_size**3 / product_s, start_s)


_ROW = 4096  # numbers of the large array that are summed up together


def nominal(device: jax.Device) -> tuple[float, float] | None:
  """Bytes per second and FLOP/s in bfloat16 as the maker says, or None if the device is not known."""
  known = devices.of(device)
  return (known.hbm_bandwidth, known.bf16_flops) if known.bf16_flops else None


def unknown(device: jax.Device) -> str:
  """A note that the data sheet of a device is not known."""
  return f'{device.device_kind!r} is in no table of pallas_kernels/devices.py'


def hand_over(figures: Figures, found: Ceilings) -> None:
  """Add the rows of ceilings, beside what the maker says."""
  device = jax.devices()[0]
  said = nominal(device)
  if said is None:
    figures.note(f'nothing beside it of a data sheet: {unknown(device)}')
  bandwidth, flops = (None, None) if said is None else (said[0] / 1e9, said[1] / 1e12)
  for name, value, unit, most in (
    (COPY, found.copy_bytes_per_s / 1e9, 'GB/s', bandwidth),
    (READ, found.read_bytes_per_s / 1e9, 'GB/s', bandwidth),
    (PRODUCT, found.flops_per_s / 1e12, 'TFLOP/s', flops),
  ):
    share = None if most is None else value / most
    figures.add(name, value, unit, peer=None if most is None else 'data sheet', peer_value=most, floor_share=share)
  figures.add(START, 1e6 * found.start_s, 'us')
