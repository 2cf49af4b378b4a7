"""The pool of pages: what is written where, and how much a page weighs."""

import dataclasses
import itertools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PageLayout
from pallas_kernels import append_tokens as write
from pdjax.kv import KVPages
from pdjax.kv.pages import choose_layout, copy, gather, scatter
from pdjax.sharding import make_mesh
from tests.tiny import TINY, TINY_8_2, TINY_12_12

P, K, G, D, L = 6, 4, 4, 8, 3
LAYOUTS = ('plain', 'paired', 'kv')
FLOAT32 = jnp.dtype('float32')


def random_pages(seed: int = 0, layout: str = 'plain') -> KVPages:
  """The same keys and values in any layout."""
  rng = np.random.default_rng(seed)
  pack = PageLayout(layout, K, G, D).pack
  return KVPages(tuple(pack(jnp.asarray(rng.standard_normal((P, 2, K, G, D), np.float32))) for _ in range(L)), D)


def whole(*pages: int) -> np.ndarray:
  """The places of whole pages."""
  return np.array([[page, 0] for page in pages], np.int32)


def test_write_puts_each_token_at_its_place_and_nothing_elsewhere():
  layer = np.asarray(random_pages().layers[0])
  rng = np.random.default_rng(1)
  k, v = (rng.standard_normal((5, K, D), np.float32) for _ in range(2))
  page, offset = np.array([3, 3, 0, 5, 5]), np.array([2, 3, 0, 1, 0])
  expected = layer.copy()
  for token in range(5):
    expected[page[token], 0, :, offset[token]] = k[token]
    expected[page[token], 1, :, offset[token]] = v[token]
  np.testing.assert_array_equal(jax.jit(write)(layer, k, v, page, offset), expected)


def test_write_drops_a_token_whose_page_is_past_the_pool():
  layer = np.asarray(random_pages().layers[0])
  k = np.ones((2, K, D), np.float32)
  written = np.array(jax.jit(write)(layer, k, k, np.array([P, 1]), np.array([0, 2])))
  assert (written[1, :, :, 2] == 1).all()
  written[1, :, :, 2] = layer[1, :, :, 2]
  np.testing.assert_array_equal(written, layer)


def test_write_converts_to_the_type_of_the_pool():
  layer = jnp.zeros((P, 2, K, G, D), jnp.bfloat16)
  k = np.full((1, K, D), 1.001, np.float32)
  written = write(layer, k, k, np.array([0]), np.array([0]))
  assert written.dtype == jnp.bfloat16 and written[0, 0, 0, 0, 0] == jnp.bfloat16(1.001)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_gather_takes_whole_pages_of_every_layer_in_the_order_asked(layout):
  pages = random_pages()
  units = gather(random_pages(layout=layout), whole(4, 0, 2), G, FLOAT32)
  values = units.values
  assert values.shape == (3, L, 2, K, G, D) and units.scales is None
  for row, page in enumerate([4, 0, 2]):
    for layer in range(L):
      np.testing.assert_array_equal(values[row, layer], pages.layers[layer][page])


@pytest.mark.parametrize('layouts', [*itertools.product(LAYOUTS, LAYOUTS)], ids='-'.join)
def test_scatter_undoes_gather_in_any_layout_and_leaves_other_pages_alone(layouts):
  source, target = random_pages(0, layouts[0]), random_pages(1, layouts[1])
  moved = jax.jit(scatter)(target, whole(1, 5, 3), gather(source, whole(4, 0, 2), G, FLOAT32))
  assert moved.layout == target.layout
  moved = [moved.layout.unpack(layer) for layer in moved.layers]
  for before, after, origin in zip(random_pages(1).layers, moved, random_pages(0).layers, strict=True):
    np.testing.assert_array_equal(after[np.array([1, 5, 3])], origin[np.array([4, 0, 2])])
    np.testing.assert_array_equal(after[np.array([0, 2, 4])], before[np.array([0, 2, 4])])


@pytest.mark.parametrize('layout', LAYOUTS)
def test_copy_fills_one_page_of_every_layer_with_another(layout):
  pages = random_pages(layout=layout)
  copied = jax.jit(copy)(pages, np.int32(4), np.int32(1))
  for before, after in zip(pages.layers, copied.layers, strict=True):
    np.testing.assert_array_equal(after[1], before[4])
    others = np.array([0, 2, 3, 4, 5])
    np.testing.assert_array_equal(after[others], before[others])


@pytest.mark.parametrize('layouts', [('plain', 'kv'), ('paired', 'plain'), ('kv', 'paired')], ids='-'.join)
def test_parts_of_pages_move_to_any_place_of_a_page_and_leave_the_rest(layouts):
  source, target = random_pages(0, layouts[0]), random_pages(1, layouts[1])
  units = gather(source, np.array([[4, 2], [0, 0], [4, 0]]), 2, FLOAT32)
  assert units.values.shape == (3, L, 2, K, 2, D)
  moved = jax.jit(scatter)(target, np.array([[1, 0], [5, 2], [1, 2]]), units)
  for before, after, origin in zip(random_pages(1).layers, moved.layers, random_pages(0).layers, strict=True):
    expected = np.array(before)
    expected[1, :, :, 0:2], expected[5, :, :, 2:4] = origin[4, :, :, 2:4], origin[0, :, :, 0:2]
    expected[1, :, :, 2:4] = origin[4, :, :, 0:2]
    np.testing.assert_array_equal(moved.layout.unpack(after), expected)


@pytest.mark.parametrize('tokens', [2, G])
def test_pages_become_int8_and_back_with_a_scale_for_each_token_and_head(tokens):
  source = random_pages()
  int8 = KVPages(
    tuple(jnp.zeros((P, 2, K, G, D), jnp.int8) for _ in range(L)), D, tuple(jnp.zeros((P, 2, K, G)) for _ in range(L))
  )
  places = np.array([[3, at] for at in range(0, G, tokens)])
  units = gather(source, places, tokens, jnp.dtype('int8'))
  assert units.values.dtype == jnp.int8 and units.scales.shape == units.values.shape[:-1]
  int8 = jax.jit(scatter)(int8, places, units)
  back = jax.jit(scatter)(random_pages(1), places, gather(int8, places, tokens, FLOAT32))
  for stored, scales, layer, origin in zip(int8.layers, int8.scales, back.layers, source.layers, strict=True):
    largest = np.abs(np.asarray(origin[3])).max(-1)
    np.testing.assert_allclose(scales[3], largest / 127, rtol=1e-6)
    np.testing.assert_allclose(layer[3], stored[3] * np.asarray(scales[3])[..., None], rtol=1e-6)
    assert (np.abs(layer[3] - origin[3]) <= largest[..., None] / 254 * 1.001).all()
    assert not np.asarray(stored)[:3].any() and not np.asarray(scales)[4:].any()


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_pool_says_its_size_and_its_layout(layout):
  pages = random_pages(layout=layout)
  assert (pages.num_pages, pages.page_size, pages.kv_heads, pages.layout.name) == (P, G, K, layout)


@pytest.mark.parametrize('tp, heads', [(1, 2), (2, 1), (4, 1)])
def test_a_pool_cuts_key_value_heads_and_copies_them_beyond(tp, heads):
  shapes = KVPages.shapes(TINY_8_2.cache[0], 16, 4, jnp.dtype('float32'), make_mesh(TINY_8_2, jax.devices()[:tp]))
  assert len(shapes.layers) == TINY_8_2.num_layers
  layer = shapes.layers[0]
  assert layer.shape == (16, 2, 2, 4, 8)
  assert layer.sharding.shard_shape(layer.shape) == (16, 2, heads, 4, 8)


@pytest.mark.parametrize('tp, layout, shard', [
  (1, 'paired', (16, 2, 6, 4, 16)), (3, 'paired', (16, 2, 2, 4, 16)), (4, 'kv', (16, 1, 3, 4, 16)),
])  # fmt: skip
def test_packed_heads_are_cut_too(tp, layout, shard):
  mesh = make_mesh(TINY_12_12, jax.devices()[:tp])
  layer = KVPages.shapes(TINY_12_12.cache[0], 16, 4, jnp.dtype('float32'), mesh, layout).layers[0]
  assert layer.sharding.shard_shape(layer.shape) == shard


@pytest.mark.parametrize('tp, layout', [(1, 'paired'), (2, 'kv')])  # by the heads of each device
def test_a_tpu_gets_heads_of_64_packed_unless_told_otherwise(tp, layout):
  tpu = types.SimpleNamespace(device_kind='TPU v6 lite', platform='tpu')
  mesh: Any = types.SimpleNamespace(devices=np.full((tp, 1), tpu), shape={'kv': tp}, size=tp)
  model = dataclasses.replace(TINY, head_dim=64)
  assert choose_layout(model.cache[0], 16, mesh).name == layout
  assert choose_layout(model.cache[0], 16, mesh, 'plain').name == 'plain'
  assert choose_layout(model.cache[0], 16, make_mesh(model, jax.devices()[:tp])).name == 'plain'


def test_pairs_of_an_odd_number_of_heads_are_refused():
  found = "page_layout is 'paired', .* even number .* with tp=4 there are 3 of the 12 of the model"
  with pytest.raises(ValueError, match=f"{found}; set page_layout to 'kv'"):
    choose_layout(TINY_12_12.cache[0], 16, make_mesh(TINY_12_12, jax.devices()[:4]), 'paired')


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
def test_page_bytes_are_those_of_one_page_of_every_layer(dtype, layout):
  shapes = KVPages.shapes(TINY.cache[0], 10, 4, jnp.dtype(dtype), make_mesh(TINY, jax.devices()[:1]), layout)
  whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
  assert 10 * 4 * TINY.cached_token_bytes(dtype) == whole


def test_pages_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    random_pages().layers = ()
