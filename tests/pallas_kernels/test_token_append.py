"""Tokens appended: the definition against NumPy in float64, all others against the definition."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import devices
from pallas_kernels.layouts import PageLayout
from pallas_kernels.token_append import append_tokens, pallas_tpu, reference
from tests.pallas_kernels.pools import (
  FACTS,
  LAYOUTS,
  QUICK,
  P,
  as_float64,
  assert_same,
  assert_stands_for,
  each_head,
  races,
  random_pool,
)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', ['float32', 'int8', 'float8_e4m3fn'])
def test_append_puts_each_token_at_its_place_and_nothing_elsewhere(layout, dtype):
  rng = np.random.default_rng(2)
  scaled = dtype != 'float32'
  (pages,), scales = random_pool(rng, layout, dtype, scaled, 1)
  heads, dim = LAYOUTS[layout]
  k, v = (rng.standard_normal((6, heads, dim), np.float32) for _ in range(2))
  page, offset = np.array([3, 3, 0, P, -1, 2]), np.array([31, 30, 0, 1, 1, 32])  # three of them dropped
  expected = as_float64(pages, scales and scales[0], layout)
  for token, (both, head, (a, c, lanes)) in itertools.product(range(3), each_head(layout)):
    expected[page[token], a, c, offset[token], lanes] = (k, v)[both][token, head]
  out = append_tokens(pages, k, v, page, offset, scales=scales and scales[0])
  new, new_scales = out if scaled else (out, None)
  assert_stands_for(expected, new, new_scales, layout)
  untouched = np.ones(pages.shape[:1] + pages.shape[3:4], bool)
  untouched[page[:3], offset[:3]] = False
  np.testing.assert_array_equal(np.moveaxis(new, 3, 1)[untouched], np.moveaxis(pages, 3, 1)[untouched])


def test_a_token_of_zeros_quantizes_to_zeros():
  pages, scales = jnp.ones((2, 2, 1, 4, 8), jnp.int8), jnp.ones((2, 2, 1, 4))
  zeros = jnp.zeros((1, 1, 8))
  pages, scales = append_tokens(pages, zeros, zeros, np.array([1]), np.array([2]), scales=scales)
  assert not pages[1, :, :, 2].any() and not scales[1, :, :, 2].any() and scales.sum() == 14


# ---------------------------------------------------------------------------- the TPU kernel, interpreted


def places(rng, kind: str, tokens: int, page_size: int, pages: int) -> tuple[np.ndarray, np.ndarray]:
  """Pages and offsets of tokens, some of them dropped; garbage lies there until they come."""
  order = rng.permutation(pages * page_size)[:tokens]  # all over, tiles come back
  if kind == 'chunk':  # a prompt's tokens side by side, then one of another
    order = (
      rng.permutation(pages)[(np.arange(tokens) + 5) // page_size] * page_size + (np.arange(tokens) + 5) % page_size
    )
  elif kind == 'decode':
    order = rng.permutation(pages)[:tokens] * page_size + rng.integers(0, page_size, tokens)
  page, offset = order // page_size, order % page_size
  page[rng.random(tokens) < 0.1] = pages
  return page, offset


def check_append(layout, dtype, page_size, tokens, kind, config, interpret=True, given='float32'):
  rng = np.random.default_rng([page_size, tokens])
  (pages,), scales = random_pool(rng, layout, dtype, dtype == 'int8', 1, page_size, 8)
  scales = scales and scales[0]
  heads, dim = LAYOUTS[layout]
  page, offset = places(rng, kind, tokens, page_size, 8)
  if dtype != 'int8':  # what lies beside must neither spread nor change
    pages = jnp.where(rng.random(pages.shape) < 0.2, jnp.nan, pages)
  k, v = (jnp.asarray(rng.standard_normal((tokens, heads, dim)), given) for _ in range(2))
  options = {'layout': PageLayout.of_heads(pages.shape, heads)}
  given = pages, k, v, page, offset, scales
  expected = jax.jit(functools.partial(reference.append_tokens, **options))(*given)
  run = functools.partial(pallas_tpu.append_tokens, config=config, interpret=interpret, **options)
  assert_same(jax.jit(run, compiler_options=QUICK)(*given), expected)


Append = pallas_tpu.Config
APPENDS = [
  ('plain', 'bfloat16', 32, 70, 'chunk', Append(16, block_tokens=32, slots=4, ahead=2)),
  ('paired', 'bfloat16', 16, 64, 'scattered', Append(16, block_tokens=32, slots=3, ahead=2)),
  ('kv', 'float32', 16, 7, 'decode', Append(8, block_tokens=8, slots=2, ahead=1)),
  ('plain', 'float32', 24, 50, 'chunk', Append(24, block_tokens=16, slots=8, ahead=4)),
  ('paired', 'int8', 64, 40, 'scattered', Append(32, block_tokens=64, cores=2)),
  ('kv', 'float8_e4m3fn', 32, 40, 'chunk', Append(32, block_tokens=32, cores=3)),
  ('kv', 'int8', 32, 1, 'decode', Append(32, block_tokens=32, cores=2)),
]


@pytest.mark.parametrize('layout, dtype, page_size, tokens, kind, config', APPENDS)
def test_tpu_append_is_the_reference(layout, dtype, page_size, tokens, kind, config):
  check_append(layout, dtype, page_size, tokens, kind, config)


def test_tpu_append_rounds_as_the_reference_does():
  check_append('plain', 'bfloat16', 16, 9, 'scattered', Append(16, block_tokens=16), given='bfloat16')


@pytest.mark.parametrize('case', [0, 1])
def test_tpu_append_does_not_race(case):
  layout, dtype, page_size, tokens, kind, config = APPENDS[case]
  check_append(layout, dtype, page_size, min(tokens, 40), kind, config, pltpu.InterpretParams(detect_races=True))
  assert not races()


# ---------------------------------------------------------------------------- choices and errors


def test_what_a_tpu_cannot_do_is_refused_with_the_values():
  v6e, facts = devices.by_name('v6e'), FACTS | {'scaled': 'values', 'page_size': 20}
  config = pallas_tpu.rule(v6e, FACTS)
  assert '20 tokens' in pallas_tpu.refusal(config, v6e, facts)
  assert 'float16' in pallas_tpu.refusal(config, v6e, facts | {'dtype': 'float16'})
  assert pallas_tpu.refusal(config, v6e, FACTS) is None


@pytest.mark.parametrize('device, cores', [('v5p', 2), ('v6e', 1)])
def test_a_rule_uses_all_cores_of_a_device(device, cores):
  assert pallas_tpu.rule(devices.by_name(device), FACTS).cores == cores


@pytest.mark.parametrize('page', [(2, 8, 16, 128), (2, 16, 128, 256), (1, 3, 32, 128)])
@pytest.mark.parametrize('tokens', [1, 64, 8192])
def test_the_rule_keeps_appends_within_16_mib_of_vmem(page, tokens):
  layout = 'kv' if page[0] == 1 else 'plain'
  for dtype in map(jnp.dtype, ('float32', 'bfloat16', 'int8')):
    facts = FACTS | {'dtype': dtype.name, 'layout': layout, 'tokens': tokens}
    facts |= {'kv_heads': page[1], 'page_size': page[2], 'head_dim': page[3] // (2 if layout == 'kv' else 1)}
    config = pallas_tpu.rule(devices.by_name('v6e'), facts)
    assert pallas_tpu.vmem_bytes(config, page, dtype) <= 16 * 2**20


def test_what_suits_small_pages_is_refused_where_it_is_too_much():
  v6e = devices.by_name('v6e')
  large = pallas_tpu.Config(16, block_tokens=64, slots=32, ahead=16)
  assert pallas_tpu.refusal(large, v6e, FACTS) is None
  assert 'MiB of vector memory' in pallas_tpu.refusal(large, v6e, FACTS | {'kv_heads': 64, 'head_dim': 256})


POOL = jax.ShapeDtypeStruct((P, 2, 3, 32, 16), jnp.float32)
IDS = jax.ShapeDtypeStruct((4,), jnp.int32)
TOKENS = jax.ShapeDtypeStruct((4, 3, 16), jnp.float32)


@pytest.mark.parametrize(
  'message, call',
  [
    (
      r'k float32 \(4, 3, 16\) and v float32 \(4, 2, 16\)',
      lambda: append_tokens(POOL, TOKENS, jnp.zeros((4, 2, 16)), IDS, IDS),
    ),
    (
      r'page \(4,\) and offset \(5,\) do not belong to 4 tokens',
      lambda: append_tokens(POOL, TOKENS, TOKENS, IDS, jax.ShapeDtypeStruct((5,), jnp.int32)),
    ),
    (
      r'pages \(7, 2, 3, 32, 16\) hold heads of 16, but k \(4, 3, 8\)',
      lambda: append_tokens(POOL, *[jax.ShapeDtypeStruct((4, 3, 8), jnp.float32)] * 2, IDS, IDS),
    ),
    (
      r'do not hold 5 key/value heads',
      lambda: append_tokens(POOL, *[jax.ShapeDtypeStruct((4, 5, 16), jnp.float32)] * 2, IDS, IDS),
    ),
  ],
)
def test_what_does_not_fit_is_refused_with_both_values(message, call):
  with pytest.raises(ValueError, match=message):
    call()
