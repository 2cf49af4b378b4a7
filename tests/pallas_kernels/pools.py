"""Random pools of pages in every layout, and what they stand for in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

P = 7
LAYOUTS = {'plain': (3, 16), 'paired': (4, 8), 'kv': (3, 8)}  # key/value heads, head size
QUICK = {'xla_backend_optimization_level': 0}  # interpreted kernels are long programs, and run once
FACTS: dict[str, int | str] = {
  'dtype': 'bfloat16', 'values': 'bfloat16', 'scaled': 'neither', 'layout': 'plain', 'kv_heads': 8, 'head_dim': 128,
  'page_size': 16, 'layers': 32, 'tokens': 64,
}  # fmt: skip


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


def races() -> bool:
  return interpret_pallas_call.races.races_found
