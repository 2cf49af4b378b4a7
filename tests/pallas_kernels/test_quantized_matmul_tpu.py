"""The TPU form of products with quantized weights, interpreted, against double precision; its rule and its refusals."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import devices
from pallas_kernels.quantized_matmul import QuantizedWeights, pallas_tpu, quantized_matmul
from pallas_kernels.quantized_matmul.api import quantize_rows
from tests.pallas_kernels.products import activations, assert_close, expected, weights_of

SMALL = pallas_tpu.Config(block_m=32, block_n=256, block_k=256, lead_n=128, tile_n=128, tile_k=128, depth=3)


def surplus_tolerance(x, weights: QuantizedWeights) -> float:
  """The error of float32 in the kernel's sums, in which every four-bit weight counts up to 143."""
  return 5e-7 * 143 * float(jnp.abs(x.astype(jnp.float32)).sum(1).max() * weights.scales.max())


def run_kernel(x, weights: QuantizedWeights, config=SMALL, x_scales=None, interpret=True, out_dtype='float32'):
  facts = pallas_tpu.problem(x, weights.values, weights.scales)
  refusal = pallas_tpu.refusal(config, devices.by_name('v5e'), facts)
  assert refusal is None, refusal
  options = {'x_scales': x_scales, 'out_dtype': out_dtype, 'config': config, 'interpret': interpret}
  return pallas_tpu.quantized_matmul(x, weights.values, weights.scales, **options)


@pytest.mark.parametrize(
  'size_m, size_k, size_n, bits, group_size, dtype, changes',
  [
    (1, 256, 256, 4, None, 'bfloat16', {}),
    (5, 200, 300, 4, None, 'bfloat16', {}),  # nothing divides
    (40, 512, 700, 4, None, 'bfloat16', {'depth': 2}),  # several blocks of rows and of K
    (40, 512, 384, 4, 128, 'bfloat16', {'depth': 4}),
    (3, 512, 1024, 4, 256, 'float32', {'lead_n': 256}),  # no narrower steps
    (3, 768, 100, 4, 384, 'bfloat16', {'tile_k': 256}),  # less than a block of columns
    (3, 2048, 300, 4, 128, 'bfloat16', {'block_k': 2048, 'correction': 'sums', 'by_bytes': True}),
    (40, 512, 512, 4, 128, 'float32', {'cores': 2, 'by_bytes': True}),
    (3, 2048, 128, 4, 128, 'bfloat16', {'block_k': 2048, 'correction': 'sums'}),
    (3, 200, 300, 4, None, 'bfloat16', {'by_bytes': True}),
    (5, 200, 300, 8, None, 'bfloat16', {'block_k': 128}),
    (40, 512, 700, 8, 256, 'float32', {'block_k': 128, 'lead_blocks': 2}),
    (40, 512, 1500, 4, None, 'bfloat16', {'depth': 4, 'copies': 2, 'lead_copies': 3, 'last_n': 128}),
    (3, 512, 900, 8, 128, 'bfloat16', {'depth': 4, 'copies': 3, 'lead_copies': 8, 'last_n': 256, 'block_n': 512}),
  ],
)
def test_kernel_multiplies_what_is_stored(size_m, size_k, size_n, bits, group_size, dtype, changes):
  x, weights = activations(size_m, size_k, dtype), weights_of(size_k, size_n, bits, group_size)
  wanted = expected(x, weights)
  tolerance = 1e-6 if bits == 8 else surplus_tolerance(x, weights) / np.abs(wanted).max()
  assert tolerance < 1e-3
  assert_close(run_kernel(x, weights, dataclasses.replace(SMALL, **changes)), wanted, tolerance)


@pytest.mark.parametrize('integer', [True, False])
def test_kernel_multiplies_integers(integer):
  x, weights = activations(40, 512), weights_of(512, 300, 8, None)
  x, x_scales = quantize_rows(x)
  actual = run_kernel(x, weights, dataclasses.replace(SMALL, integer=integer), x_scales)
  assert_close(actual, expected(x, weights, x_scales), 1e-6)


SIDE_BY_SIDE: dict[str, int] = {'depth': 4, 'copies': 2, 'lead_copies': 3, 'last_n': 128}


@pytest.mark.parametrize(
  'size_m, size_k, size_n, bits, changes',
  [
    (5, 256, 1024, 4, {}),
    (5, 512, 1024, 8, {}),
    (5, 256, 1408, 4, SIDE_BY_SIDE),
    (40, 512, 700, 8, {**SIDE_BY_SIDE, 'block_k': 128}),  # several blocks of rows and of K
  ],
)
def test_kernel_has_no_races(size_m, size_k, size_n, bits, changes):
  x, weights = activations(size_m, size_k, 'bfloat16'), weights_of(size_k, size_n, bits, None)
  interpret = pltpu.InterpretParams(detect_races=True)
  actual = run_kernel(x, weights, dataclasses.replace(SMALL, **changes), interpret=interpret)
  assert_close(actual, expected(x, weights), 1e-3)
  assert not interpret_races()


def interpret_races() -> bool:
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  return interpret_pallas_call.races.races_found


@pytest.mark.parametrize('device', ['v5e', 'v5p', 'v6e', 'tpu7x', 'v4'])
@pytest.mark.parametrize(
  'kind, dtype', [('int4', 'bfloat16'), ('int4', 'float32'), ('int8', 'bfloat16'), ('w8a8', 'int8')]
)
def test_the_rule_fits_any_problem_into_vmem(device, kind, dtype):
  chip = devices.by_name(device)
  for size_m in (1, 64, 4096):
    for size_k, size_n, group_size in ((4096, 14336, 4096), (14336, 4096, 128), (28672, 8192, 28672), (576, 1536, 576)):
      facts = {'kind': kind, 'dtype': dtype, 'm': size_m, 'k': size_k, 'n': size_n, 'group_size': group_size}
      assert pallas_tpu.refusal(pallas_tpu.rule(chip, facts), chip, facts) is None, facts


def test_what_the_kernel_refuses_says_why():
  x, weights = activations(2, 128), weights_of(128, 128, 8, 64)
  facts = pallas_tpu.problem(x, weights.values, weights.scales)
  assert 'groups of 64 rows' in (pallas_tpu.refusal(SMALL, devices.by_name('v5e'), facts) or '')
  facts['group_size'] = 128
  for changes, said in (({'lead_copies': 0}, 'copies are 1 and 0'), ({'last_n': 64}, 'last_n is 64')):
    assert said in (pallas_tpu.refusal(dataclasses.replace(SMALL, **changes), devices.by_name('v5e'), facts) or '')
  with pytest.raises(ValueError, match='pallas_tpu: it is for TPUs'):
    quantized_matmul(x, weights.values, weights.scales, implementation='pallas_tpu')
  quantized_matmul(x, weights.values, weights.scales, implementation=('pallas_tpu', 'xla'))
