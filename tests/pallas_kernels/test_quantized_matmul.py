"""Products with quantized weights: the definition against NumPy, the plain ways against double precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import dequantize, quantize, quantized_matmul
from pallas_kernels.quantized_matmul.api import quantize_rows
from pallas_kernels.quantized_matmul.storage import pack, unpack
from tests.pallas_kernels.products import activations, assert_close, expected, weights_of


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
