"""Pages copied: the definition against NumPy in float64, all others against the definition."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import devices
from pallas_kernels.layouts import PageLayout
from pallas_kernels.page_copy import gather_pages, pallas_tpu, reference, scatter_pages
from tests.pallas_kernels.pools import (
  FACTS,
  LAYOUTS,
  QUICK,
  P,
  as_float64,
  assert_same,
  assert_stands_for,
  page_shape,
  races,
  random_pool,
)

FLOATS = ['float32', 'bfloat16', 'float16', 'float8_e4m3fn', 'float8_e5m2']
# from, with scales, to, with scales
CONVERSIONS = [
  ('float32', False, 'bfloat16', False),
  ('bfloat16', False, 'int8', True),
  ('int8', True, 'bfloat16', False),
  ('int8', True, 'int8', True),
  ('float8_e4m3fn', True, 'float32', False),
]


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


def test_a_donated_pool_is_updated_in_place():
  pools, _ = random_pool(np.random.default_rng(5), 'plain', 'float32', False, 3, pages=200)
  values = gather_pages(pools, np.arange(4))
  program = jax.jit(scatter_pages, donate_argnums=0).lower(pools, np.arange(4), values).compile()
  memory = program.memory_analysis()
  assert memory.alias_size_in_bytes == sum(x.nbytes for x in pools) and memory.temp_size_in_bytes < pools[0].nbytes


# ---------------------------------------------------------------------------- the TPU kernels, interpreted


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


# ---------------------------------------------------------------------------- choices and errors


def test_what_a_tpu_cannot_do_is_refused_with_the_values():
  v6e, facts = devices.by_name('v6e'), FACTS | {'function': 'gather_pages', 'scaled': 'values', 'page_size': 20}
  config = pallas_tpu.rule(v6e, FACTS)
  assert '20 tokens' in pallas_tpu.refusal(config, v6e, facts)
  assert 'float16' in pallas_tpu.refusal(config, v6e, facts | {'dtype': 'float16'})
  assert pallas_tpu.refusal(config, v6e, FACTS) is None


@pytest.mark.parametrize('device, cores', [('v5p', 2), ('v6e', 1)])
def test_a_rule_uses_all_cores_of_a_device(device, cores):
  assert pallas_tpu.rule(devices.by_name(device), FACTS).cores == cores


def test_what_suits_one_layer_is_refused_where_it_is_too_much():
  v6e = devices.by_name('v6e')
  many = pallas_tpu.Config(units_in_flight=32)
  assert pallas_tpu.refusal(many, v6e, FACTS | {'layers': 2}) is None
  assert '96 copies at once' in pallas_tpu.refusal(many, v6e, FACTS | {'layers': 3})


POOL = jax.ShapeDtypeStruct((P, 2, 3, 32, 16), jnp.float32)
INT8 = jax.ShapeDtypeStruct(POOL.shape, jnp.int8)
SCALES = jax.ShapeDtypeStruct((P, 2, 3, 32), jnp.float32)
IDS = jax.ShapeDtypeStruct((4,), jnp.int32)


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
  ],
)
def test_what_does_not_fit_is_refused_with_both_values(message, call):
  with pytest.raises(ValueError, match=message):
    call()
