"""Products with quantized weights: the definition against NumPy, the fast ways against double precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import devices
from pallas_kernels.quantized_matmul import QuantizedWeights, dequantize, pallas_tpu, quantize, quantized_matmul
from pallas_kernels.quantized_matmul.api import quantize_rows
from pallas_kernels.quantized_matmul.storage import pack, unpack

SMALL = pallas_tpu.Config(block_m=32, block_n=256, block_k=256, lead_n=128, tile_n=128, tile_k=128, depth=3)


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


def surplus_tolerance(x, weights: QuantizedWeights) -> float:
  """The error of float32 in the kernel's sums, in which every four-bit weight counts up to 143."""
  return 5e-7 * 143 * float(jnp.abs(x.astype(jnp.float32)).sum(1).max() * weights.scales.max())


def assert_close(actual, wanted, tolerance: float):
  """See that no result is off by more than so much of the largest."""
  assert np.abs(np.asarray(actual, np.float64) - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('group_size', [None, 20])
def test_quantized_weights_are_within_half_a_step(bits, group_size):
  weights = np.random.default_rng(0).standard_normal((100, 33)).astype(np.float32)
  weights[:20, 5] = 0  # a group of zeros stays zeros
  quantized = quantize(jnp.asarray(weights), bits, group_size)
  back = np.asarray(dequantize(quantized, 100))
  steps = np.repeat(np.asarray(quantized.scales), 100 // quantized.scales.shape[0], axis=0)
  assert (np.abs(back - weights) <= steps * 0.5001).all()
  assert quantized.bits == bits
  if group_size:
    assert not back[:20, 5].any()


def test_packing_keeps_all_sixteen_values():
  values = np.random.default_rng(0).integers(-8, 8, (130, 3))
  words = pack(jnp.asarray(values))
  assert words.shape == (24, 3)
  np.testing.assert_array_equal(unpack(words)[:130], values)
  assert not unpack(words)[130:].any()


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize(
  'size_m, size_k, size_n, group_size',
  [(1, 64, 8, None), (3, 200, 33, None), (5, 200, 33, 40), (300, 768, 40, 384), (2, 1000, 17, 500), (7, 130, 5, 65)],
)
def test_plain_implementations_multiply_what_is_stored(implementation, bits, size_m, size_k, size_n, group_size):
  x, weights = activations(size_m, size_k), weights_of(size_k, size_n, bits, group_size)
  run = jax.jit(functools.partial(quantized_matmul, implementation=implementation))
  assert_close(run(x, weights.values, weights.scales), expected(x, weights), 1e-5)


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
@pytest.mark.parametrize('group_size', [None, 50])
def test_integers_by_integers(implementation, group_size):
  x, weights = activations(6, 2000), weights_of(2000, 24, 8, group_size)
  x, x_scales = quantize_rows(x.at[3].set(0))
  run = functools.partial(quantized_matmul, implementation=implementation, out_dtype='float32')
  actual = run(x, weights.values, weights.scales, x_scales=x_scales)
  assert_close(actual, expected(x, weights, x_scales), 1e-6)
  assert not np.asarray(actual)[3].any()


def test_activations_are_quantized_on_the_way():
  x, weights = activations(6, 128, 'bfloat16'), weights_of(128, 24, 8, None)
  actual = quantized_matmul(x, weights.values, weights.scales, quantize_activations=True)
  assert actual.dtype == jnp.bfloat16
  wanted = np.asarray(x, np.float64) @ np.asarray(dequantize(weights), np.float64)
  assert_close(actual, wanted, 2e-2)


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


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'x': jnp.zeros((2, 3, 128))}, r'x \(2, 3, 128\).*reshape'),
    ({'x': jnp.zeros((2, 256))}, 'int32 weights have 16 rows, expected 32'),
    ({'weights': jnp.zeros((128, 8), jnp.float32)}, 'weights are float32'),
    ({'weights': jnp.zeros((100, 8), jnp.int8)}, 'int8 weights have 100 rows, expected 128'),
    ({'scales': jnp.zeros((1, 9))}, 'scales have 9 columns and weights 8'),
    ({'scales': jnp.zeros((3, 8))}, '3 groups of scales do not divide K, which is 128'),
    ({'scales': jnp.zeros((1, 8), jnp.int32)}, 'scales are int32'),
    ({'x': jnp.zeros((2, 128), jnp.int32)}, 'x is int32'),
    ({'x': jnp.zeros((2, 128), jnp.int8)}, 'x is int8 and x_scales are missing'),
    ({'x_scales': jnp.zeros(2)}, 'x is float32 and x_scales are given'),
    ({'x': jnp.zeros((2, 128), jnp.int8), 'x_scales': jnp.zeros(3)}, r'x_scales are \(3,\), expected \(2,\)'),
    ({'quantize_activations': True}, 'int8 activations take int8 weights'),
    ({'x': jnp.zeros((0, 128))}, 'must not be empty'),
    ({'implementation': 'pallas'}, "'pallas' is unknown"),
  ],
)
def test_bad_input_is_refused(changes, message):
  arguments = {'x': jnp.zeros((2, 128)), 'weights': jnp.zeros((16, 8), jnp.int32), 'scales': jnp.ones((1, 8))} | changes
  with pytest.raises(ValueError, match=message):
    quantized_matmul(**arguments)


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({'bits': 5}, 'bits is 5'),
    ({'group_size': 48}, 'group_size 48 does not divide K, which is 100'),
    ({'weights': jnp.zeros((100, 4), jnp.int32)}, r'weights are int32 \(100, 4\)'),
  ],
)
def test_what_cannot_be_quantized_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    quantize(**({'weights': jnp.zeros((100, 4))} | arguments))
