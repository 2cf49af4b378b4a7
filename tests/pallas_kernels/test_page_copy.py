"""Pages copied, tokens appended: the definition against NumPy in float64, all others against the definition."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import devices
from pallas_kernels.layouts import PageLayout
from pallas_kernels.page_copy import (
  append_tokens,
  gather_pages,
  pallas_tpu,
  pallas_tpu_append,
  reference,
  scatter_pages,
)

P = 7
LAYOUTS = {'plain': (3, 16), 'paired': (4, 8), 'kv': (3, 8)}  # key/value heads, head size
FLOATS = ['float32', 'bfloat16', 'float16', 'float8_e4m3fn', 'float8_e5m2']
# from, with scales, to, with scales
CONVERSIONS = [
  ('float32', False, 'bfloat16', False),
  ('bfloat16', False, 'int8', True),
  ('int8', True, 'bfloat16', False),
  ('int8', True, 'int8', True),
  ('float8_e4m3fn', True, 'float32', False),
]


def page_shape(layout: str, page_size: int) -> tuple[int, ...]:
  heads, dim = LAYOUTS[layout]
  return {
    'plain': (2, heads, page_size, dim),
    'paired': (2, heads // 2, page_size, 2 * dim),
    'kv': (1, heads, page_size, 2 * dim),
  }[layout]


def place(layout: str, both: int, head: int) -> tuple[int, int, slice]:
  """The indices in `[A, C, G, W]` of the keys (0) or values (1) of a head: A, C and the lanes."""
  dim = LAYOUTS[layout][1]
  if layout == 'plain':
    return both, head, slice(0, dim)
  if layout == 'paired':
    return both, head // 2, slice(head % 2 * dim, head % 2 * dim + dim)
  return 0, head, slice(both * dim, both * dim + dim)


def each_head(layout: str):
  for both, head in itertools.product(range(2), range(LAYOUTS[layout][0])):
    yield both, head, place(layout, both, head)


def random_pool(rng, layout: str, dtype: str, scaled: bool, layers: int, page_size: int = 32, pages: int = P):
  """Pools of L layers and their scales, or None."""
  shape = (pages, *page_shape(layout, page_size))
  if dtype == 'int8':
    pools = [jnp.asarray(rng.integers(-127, 128, shape), jnp.int8) for _ in range(layers)]
  else:
    pools = [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(layers)]
  if not scaled:
    return pools, None
  shape = (pages, 2, LAYOUTS[layout][0], page_size)
  return pools, [jnp.asarray(rng.uniform(0.01, 0.1, shape), jnp.float32) for _ in range(layers)]


def as_float64(pages, scales, layout: str) -> np.ndarray:
  """`[..., A, C, G, W]` and scales `[..., 2, K, G]` as the float64 numbers they stand for."""
  out = np.asarray(pages).astype(np.float64)
  if scales is not None:
    for both, head, (a, c, lanes) in each_head(layout):
      out[..., a, c, :, lanes] *= np.asarray(scales, np.float64)[..., both, head, :, None]
  return out


def step_of(pages, scales, layout: str) -> np.ndarray:
  """The distance of neighbouring values of quantized pages, as large as `as_float64` of them."""
  ones = np.ones(pages.shape)
  return as_float64(ones, scales, layout)


def assert_stands_for(expected, pages, scales, layout: str):
  """Stored pages stand for `expected` as nearly as their dtype can."""
  actual = as_float64(pages, scales, layout)
  if pages.dtype == jnp.int8:
    assert (np.abs(actual - expected) <= 0.502 * step_of(pages, scales, layout)).all()
  else:
    eps = float(jnp.finfo(pages.dtype).eps)
    np.testing.assert_allclose(actual, expected, rtol=eps, atol=eps * 2e-2)


def assert_same(actual, expected):
  for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    tolerance = 1e-6 if one.dtype == jnp.float32 else 0
    np.testing.assert_allclose(np.asarray(one).astype(np.float64), np.asarray(other).astype(np.float64), rtol=tolerance)


# ---------------------------------------------------------------------------- the definition


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('conversion', CONVERSIONS, ids=str)
def test_gather_takes_pages_in_the_order_asked_and_converts_them(layout, conversion):
  source, scaled, target, _ = conversion
  pools, scales = random_pool(np.random.default_rng(0), layout, source, scaled, 2)
  ids = np.array([5, 0, 5, P + 3])  # the last reads page P - 1
  out = gather_pages(pools, ids, scales=scales, dtype=target, head_dim=LAYOUTS[layout][1], implementation='reference')
  values, value_scales = out if isinstance(out, tuple) else (out, None)
  assert values.shape == (4, 2, *page_shape(layout, 32)) and values.dtype == target
  for row, page in enumerate([5, 0, 5, P - 1]):
    for layer in range(2):
      expected = as_float64(pools[layer][page], None if scales is None else scales[layer][page], layout)
      got_scales = None if value_scales is None else value_scales[row, layer]
      assert_stands_for(expected, values[row, layer], got_scales, layout)


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('conversion', CONVERSIONS, ids=str)
def test_scatter_puts_pages_in_drops_some_and_leaves_the_rest(layout, conversion, implementation):
  target, target_scaled, source, source_scaled = conversion
  rng = np.random.default_rng(1)
  pools, scales = random_pool(rng, layout, target, target_scaled, 2)
  values, value_scales = (
    None if x is None else jnp.stack(x, 1) for x in random_pool(rng, layout, source, source_scaled, 2, pages=4)
  )
  run = jax.jit(functools.partial(scatter_pages, implementation=implementation))
  out = run(pools, np.array([3, P, 0, -1]), values, scales=scales, value_scales=value_scales)
  new, new_scales = (out, [None] * 2) if scales is None else out
  for layer in range(2):
    for page in range(P):
      if page in (3, 0):
        row = {3: 0, 0: 2}[page]
        given = as_float64(values[row, layer], None if value_scales is None else value_scales[row, layer], layout)
        assert_stands_for(given, new[layer][page], None if scales is None else new_scales[layer][page], layout)
      else:
        np.testing.assert_array_equal(new[layer][page], pools[layer][page])
        if scales is not None:
          np.testing.assert_array_equal(new_scales[layer][page], scales[layer][page])


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


@pytest.mark.parametrize('source, target', list(itertools.permutations(FLOATS, 2)))
def test_float_types_convert_into_each_other(source, target):
  pages, _ = random_pool(np.random.default_rng(3), 'plain', source, False, 1)
  values = gather_pages(pages[0], np.array([1]), dtype=target)
  assert values.dtype == target
  assert_stands_for(as_float64(pages[0][1], None, 'plain'), values[0], None, 'plain')


def test_one_layer_and_a_list_of_layers_differ_by_an_axis():
  pools, scales = random_pool(np.random.default_rng(4), 'plain', 'int8', True, 2)
  ids = np.array([2, 4])
  many = gather_pages(pools, ids, scales=scales)
  one = gather_pages(pools[1], ids, scales=scales[1])
  assert_same(one, [x[:, 1] for x in many])
  back = scatter_pages(tuple(pools), ids, many[0], scales=scales, value_scales=many[1])
  assert isinstance(back[0], tuple)
  assert_same(back, (tuple(pools), tuple(scales)))
  assert_same(scatter_pages(pools[1], ids, one[0], scales=scales[1], value_scales=one[1]), [pools[1], scales[1]])


def test_a_token_of_zeros_quantizes_to_zeros():
  pages, scales = jnp.ones((2, 2, 1, 4, 8), jnp.int8), jnp.ones((2, 2, 1, 4))
  zeros = jnp.zeros((1, 1, 8))
  pages, scales = append_tokens(pages, zeros, zeros, np.array([1]), np.array([2]), scales=scales)
  assert not pages[1, :, :, 2].any() and not scales[1, :, :, 2].any() and scales.sum() == 14


def test_a_donated_pool_is_updated_in_place():
  pools, _ = random_pool(np.random.default_rng(5), 'plain', 'float32', False, 3, pages=200)
  values = gather_pages(pools, np.arange(4))
  program = jax.jit(scatter_pages, donate_argnums=0).lower(pools, np.arange(4), values).compile()
  memory = program.memory_analysis()
  assert memory.alias_size_in_bytes == sum(x.nbytes for x in pools) and memory.temp_size_in_bytes < pools[0].nbytes


# ---------------------------------------------------------------------------- the TPU kernels, interpreted


QUICK = {'xla_backend_optimization_level': 0}  # these programs are long, and run once


def races() -> bool:
  return interpret_pallas_call.races.races_found


def check_copies(layout, conversion, layers, count, config, interpret=True):
  source, source_scaled, target, target_scaled = conversion
  rng = np.random.default_rng([layers, count])
  kv_heads = LAYOUTS[layout][0]
  pools, scales = random_pool(rng, layout, source, source_scaled, layers)
  shape = PageLayout.of_heads(pools[0].shape, kv_heads)
  ids = jnp.asarray(rng.permutation(P)[:count], jnp.int32)
  options = {'dtype': jnp.dtype(target), 'scaled': target_scaled, 'layout': shape}
  gathered = jax.jit(functools.partial(reference.gather_pages, **options))(pools, ids, scales)
  run = functools.partial(pallas_tpu.gather_pages, config=config, interpret=interpret, **options)
  assert_same(jax.jit(run, compiler_options=QUICK)(pools, ids, scales), gathered)
  ids = jnp.where(jnp.arange(count) % 3 == 1, P, ids)
  pools, scales = random_pool(rng, layout, source, source_scaled, layers)
  given = pools, ids, gathered[0], scales, gathered[1]
  expected = jax.jit(functools.partial(reference.scatter_pages, layout=shape))(*given)
  run = functools.partial(pallas_tpu.scatter_pages, layout=shape, config=config, interpret=interpret)
  assert_same(jax.jit(run, compiler_options=QUICK)(*given), expected)


SMALL = pallas_tpu.Config(units_in_flight=2, slice_pages=3, buffer_bytes=2**18)
TWO_CORES = pallas_tpu.Config(units_in_flight=4, cores=2)
COPIES = [
  ('plain', ('bfloat16', False, 'bfloat16', False), 3, 7, SMALL),
  ('kv', ('float32', False, 'float32', False), 1, 1, TWO_CORES),
  ('paired', CONVERSIONS[0], 3, 5, TWO_CORES),
  ('kv', CONVERSIONS[1], 3, 4, SMALL),
  ('plain', CONVERSIONS[2], 3, 7, SMALL),
  ('kv', CONVERSIONS[4], 3, 3, SMALL),
  ('plain', CONVERSIONS[3], 2, 4, TWO_CORES),
  ('plain', CONVERSIONS[3], 2, 4, pallas_tpu.Config(direct=False)),
]


@pytest.mark.parametrize('layout, conversion, layers, count, config', COPIES)
def test_tpu_copies_are_the_reference(layout, conversion, layers, count, config):
  check_copies(layout, conversion, layers, count, config)


@pytest.mark.parametrize('case', [0, 4])
def test_tpu_copies_do_not_race(case):
  layout, conversion, _, _, config = COPIES[case]
  check_copies(layout, conversion, 2, 5, config, pltpu.InterpretParams(detect_races=True))
  assert not races()


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
  run = functools.partial(pallas_tpu_append.append_tokens, config=config, interpret=interpret, **options)
  assert_same(jax.jit(run, compiler_options=QUICK)(*given), expected)


Append = pallas_tpu_append.Config
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


FACTS = {
  'dtype': 'bfloat16', 'values': 'bfloat16', 'scaled': 'neither', 'layout': 'plain', 'kv_heads': 8, 'head_dim': 128,
  'page_size': 16, 'layers': 32, 'tokens': 64,
}  # fmt: skip


@pytest.mark.parametrize('module', [pallas_tpu, pallas_tpu_append])
def test_what_a_tpu_cannot_do_is_refused_with_the_values(module):
  v6e, facts = devices.by_name('v6e'), FACTS | {'function': 'gather_pages', 'scaled': 'values', 'page_size': 20}
  config = module.rule(v6e, FACTS)
  assert '20 tokens' in module.refusal(config, v6e, facts)
  assert 'float16' in module.refusal(config, v6e, facts | {'dtype': 'float16'})
  assert module.refusal(config, v6e, FACTS) is None


@pytest.mark.parametrize('device, cores', [('v5p', 2), ('v6e', 1)])
def test_a_rule_uses_all_cores_of_a_device(device, cores):
  assert pallas_tpu.rule(devices.by_name(device), FACTS).cores == cores
  assert pallas_tpu_append.rule(devices.by_name(device), FACTS).cores == cores


@pytest.mark.parametrize('page', [(2, 8, 16, 128), (2, 16, 128, 256), (1, 3, 32, 128)])
@pytest.mark.parametrize('tokens', [1, 64, 8192])
def test_the_rule_keeps_appends_within_16_mib_of_vmem(page, tokens):
  layout = 'kv' if page[0] == 1 else 'plain'
  for dtype in map(jnp.dtype, ('float32', 'bfloat16', 'int8')):
    facts = FACTS | {'dtype': dtype.name, 'layout': layout, 'tokens': tokens}
    facts |= {'kv_heads': page[1], 'page_size': page[2], 'head_dim': page[3] // (2 if layout == 'kv' else 1)}
    config = pallas_tpu_append.rule(devices.by_name('v6e'), facts)
    assert pallas_tpu_append.vmem_bytes(config, page, dtype) <= 16 * 2**20


def test_what_suits_one_layer_or_small_pages_is_refused_where_it_is_too_much():
  v6e = devices.by_name('v6e')
  many = pallas_tpu.Config(units_in_flight=32)
  assert pallas_tpu.refusal(many, v6e, FACTS | {'layers': 2}) is None
  assert '96 copies at once' in pallas_tpu.refusal(many, v6e, FACTS | {'layers': 3})
  large = pallas_tpu_append.Config(16, block_tokens=64, slots=32, ahead=16)
  assert pallas_tpu_append.refusal(large, v6e, FACTS) is None
  assert 'MiB of vector memory' in pallas_tpu_append.refusal(large, v6e, FACTS | {'kv_heads': 64, 'head_dim': 256})


POOL = jax.ShapeDtypeStruct((P, 2, 3, 32, 16), jnp.float32)
INT8 = jax.ShapeDtypeStruct(POOL.shape, jnp.int8)
SCALES = jax.ShapeDtypeStruct((P, 2, 3, 32), jnp.float32)
IDS = jax.ShapeDtypeStruct((4,), jnp.int32)
TOKENS = jax.ShapeDtypeStruct((4, 3, 16), jnp.float32)


@pytest.mark.parametrize(
  'message, call',
  [
    (r'ids float32 \(4,\)', lambda: gather_pages(POOL, jax.ShapeDtypeStruct((4,), jnp.float32))),
    (r'int8 .* scales None', lambda: gather_pages(INT8, IDS)),
    (r'float32, but scales \(7, 2, 3, 32\)', lambda: gather_pages(POOL, IDS, scales=SCALES)),
    (r'1 layers of scales .* 2 layers', lambda: gather_pages([INT8] * 2, IDS, scales=[SCALES])),
    (r'layers of one pool differ: float32 .* int8', lambda: gather_pages([POOL, INT8], IDS)),
    (r'head_dim is 8', lambda: gather_pages(INT8, IDS, scales=SCALES, head_dim=8)),
    (r'pages \(7, 2, 3, 32, 16\) do not hold 5', lambda: gather_pages(POOL, IDS, dtype='int8', head_dim=9.6)),
    (r'float32 to int16', lambda: gather_pages(POOL, IDS, dtype='int16')),
    (r"'nothing' is unknown; there are pallas_tpu, xla", lambda: gather_pages(POOL, IDS, implementation='nothing')),
    (
      r'values \(4, 2, 3, 32, 8\) are not the \(4, 1, 2, 3, 32, 16\)'.replace('4, 2, 3, 32, 8', '4, 1, 2, 3, 32, 8'),
      lambda: scatter_pages(POOL, IDS, jnp.zeros((4, 2, 3, 32, 8))),
    ),
    (
      r'int8 to float32: int8 without scales',
      lambda: scatter_pages(POOL, IDS, jnp.zeros((4, *POOL.shape[1:]), 'int8')),
    ),
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
