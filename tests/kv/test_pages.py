"""The pool of pages: what is written where, and how much a page weighs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import append_tokens as write
from pdjax.kv import KVPages, page_bytes
from pdjax.kv.pages import copy, gather, scatter
from pdjax.sharding import make_mesh
from tests.tiny import TINY, TINY_8_2

P, K, G, D, L = 6, 2, 4, 8, 3


def random_pages(seed: int = 0) -> KVPages:
  rng = np.random.default_rng(seed)
  return KVPages(tuple(jnp.asarray(rng.standard_normal((P, 2, K, G, D), np.float32)) for _ in range(L)))


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


def test_gather_takes_whole_pages_of_every_layer_in_the_order_asked():
  pages = random_pages()
  values = gather(pages, np.array([4, 0, 2]))
  assert values.shape == (3, L, 2, K, G, D)
  for row, page in enumerate([4, 0, 2]):
    for layer in range(L):
      np.testing.assert_array_equal(values[row, layer], pages.layers[layer][page])


def test_scatter_undoes_gather_and_leaves_other_pages_alone():
  source, target = random_pages(0), random_pages(1)
  moved = jax.jit(scatter)(target, np.array([1, 5, 3]), gather(source, np.array([4, 0, 2])))
  for before, after, origin in zip(target.layers, moved.layers, source.layers, strict=True):
    np.testing.assert_array_equal(after[np.array([1, 5, 3])], origin[np.array([4, 0, 2])])
    np.testing.assert_array_equal(after[np.array([0, 2, 4])], before[np.array([0, 2, 4])])


def test_copy_fills_one_page_of_every_layer_with_another():
  pages = random_pages()
  copied = jax.jit(copy)(pages, np.int32(4), np.int32(1))
  for before, after in zip(pages.layers, copied.layers, strict=True):
    np.testing.assert_array_equal(after[1], before[4])
    others = np.array([0, 2, 3, 4, 5])
    np.testing.assert_array_equal(after[others], before[others])


def test_a_pool_says_its_size():
  assert (random_pages().num_pages, random_pages().page_size) == (P, G)


@pytest.mark.parametrize('tp, heads', [(1, 2), (2, 1), (4, 1)])
def test_a_pool_cuts_key_value_heads_and_copies_them_beyond(tp, heads):
  shapes = KVPages.shapes(TINY_8_2, 16, 4, jnp.dtype('float32'), make_mesh(TINY_8_2, jax.devices()[:tp]))
  assert len(shapes.layers) == TINY_8_2.num_layers
  layer = shapes.layers[0]
  assert layer.shape == (16, 2, 2, 4, 8)
  assert layer.sharding.shard_shape(layer.shape) == (16, 2, heads, 4, 8)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_page_bytes_are_those_of_one_page_of_every_layer(dtype):
  shapes = KVPages.shapes(TINY, 10, 4, jnp.dtype(dtype), make_mesh(TINY, jax.devices()[:1]))
  whole = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes.layers)
  assert 10 * page_bytes(TINY, 4, jnp.dtype(dtype)) == whole


def test_pages_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    random_pages().layers = ()
