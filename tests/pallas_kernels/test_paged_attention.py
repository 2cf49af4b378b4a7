"""Decode attention over pages: the definition against dense attention, the fast way against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged_attention
from pallas_kernels.paged_attention import xla
from tests.pallas_kernels.dense import Paged, attend, attend_with_sum

HEAD_DIM = 8
CASES = [(1, 6, 2), (4, 4, 4), (16, 8, 1), (64, 6, 2), (16, 12, 3)]  # page size, query heads, key/value heads


def lengths_for(page_size: int) -> list[int]:
  """Not in use, one token, a page, a page and a token, a block to the token, and two blocks with a rest."""
  return [0, 1, page_size, page_size + 1, xla.BLOCK_TOKENS, 2 * xla.BLOCK_TOKENS + 37]


@functools.lru_cache
def inputs(page_size: int, query_heads: int, kv_heads: int) -> tuple[np.ndarray, Paged, np.ndarray]:
  rng = np.random.default_rng([page_size, query_heads, kv_heads])
  lengths = lengths_for(page_size)
  paged = Paged.random(rng, lengths, kv_heads, HEAD_DIM, page_size)
  return rng.standard_normal((len(lengths), query_heads, HEAD_DIM), np.float32), paged, np.array(lengths, np.int32)


def run(implementation: str | None, q, paged: Paged, lengths, **options):
  call = jax.jit(functools.partial(paged_attention, implementation=implementation, **options))
  with jax.default_matmul_precision('highest'):
    return jax.tree.map(np.asarray, call(q, paged.pages, paged.tables, lengths))


@pytest.mark.parametrize('page_size, query_heads, kv_heads', CASES)
def test_reference_is_dense_attention(page_size, query_heads, kv_heads):
  q, paged, lengths = inputs(page_size, query_heads, kv_heads)
  actual = run('reference', q, paged, lengths)
  assert not actual[0].any()  # a row that is not in use
  for row in range(1, len(lengths)):
    expected = attend(q[row], paged.keys[row], paged.values[row], HEAD_DIM**-0.5)
    np.testing.assert_allclose(actual[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('page_size, query_heads, kv_heads', CASES)
def test_xla_matches_reference(page_size, query_heads, kv_heads):
  q, paged, lengths = inputs(page_size, query_heads, kv_heads)
  actual = run('xla', q, paged, lengths)
  np.testing.assert_allclose(actual, run('reference', q, paged, lengths), rtol=1e-5, atol=1e-5)
  assert not actual[0].any()


@pytest.mark.parametrize('window', [1, 5, 128, 200, 1000])
def test_a_sliding_window_hides_what_lies_before_it(window):
  q, paged, lengths = inputs(*CASES[1])
  reference = run('reference', q, paged, lengths, sliding_window=window)
  np.testing.assert_allclose(run('xla', q, paged, lengths, sliding_window=window), reference, rtol=1e-5, atol=1e-5)
  for row in range(1, len(lengths)):
    expected = attend(q[row], paged.keys[row], paged.values[row], HEAD_DIM**-0.5, window)
    np.testing.assert_allclose(reference[row], expected, rtol=1e-4, atol=1e-5)


OPTIONS = [{'soft_cap': 1.5}, {'sinks': True}, {'soft_cap': 2.0, 'sinks': True, 'sliding_window': 5}]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_a_soft_cap_and_sinks_are_in_the_result_and_in_its_sum(options):
  q, paged, lengths = inputs(*CASES[0])
  if options.get('sinks'):
    options = options | {'sinks': np.linspace(-2, 4, q.shape[1], dtype=np.float32)}
  out, lse = run('xla', q, paged, lengths, return_lse=True, **options)
  expected, expected_lse = run('reference', q, paged, lengths, return_lse=True, **options)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)
  assert not out[0].any() and np.isneginf(lse[0]).all()
  window, soft_cap, sinks = (options.get(name) for name in ('sliding_window', 'soft_cap', 'sinks'))
  for row in range(1, len(lengths)):
    dense = attend_with_sum(q[row], paged.keys[row], paged.values[row], HEAD_DIM**-0.5, window, soft_cap, sinks)
    np.testing.assert_allclose(expected[row], dense[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(expected_lse[row], dense[1], rtol=1e-4, atol=1e-5)


def test_a_window_that_hides_all_is_refused():
  q, paged, lengths = inputs(*CASES[1])
  with pytest.raises(ValueError, match='sliding_window is 0'):
    run(None, q, paged, lengths, sliding_window=0)


def test_the_fastest_here_is_xla():
  q, paged, lengths = inputs(*CASES[1])
  np.testing.assert_array_equal(run(None, q, paged, lengths), run('xla', q, paged, lengths))


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
def test_a_scale_of_ones_own_takes_the_place_of_the_usual_one(implementation):
  q, paged, lengths = inputs(*CASES[0])
  actual = run(implementation, q, paged, lengths, softmax_scale=1.5)
  expected = attend(q[4], paged.keys[4], paged.values[4], 1.5)
  np.testing.assert_allclose(actual[4], expected, rtol=1e-4, atol=1e-4)


def test_xla_matches_reference_in_bfloat16_and_keeps_the_type():
  q, paged, lengths = inputs(*CASES[3])
  narrow = [jnp.asarray(a, jnp.bfloat16) for a in (q, paged.pages)]
  actual, expected = (
    jax.jit(functools.partial(paged_attention, implementation=name))(*narrow, paged.tables, lengths)
    for name in ('xla', 'reference')
  )
  assert actual.dtype == expected.dtype == jnp.bfloat16
  np.testing.assert_allclose(actual.astype(jnp.float32), expected.astype(jnp.float32), rtol=2e-2, atol=2e-2)


def test_large_scores_do_not_overflow():
  q, paged, lengths = inputs(*CASES[1])
  actual = run('xla', q * 1e3, paged, lengths)
  assert np.isfinite(actual).all()
  np.testing.assert_allclose(actual, run('reference', q * 1e3, paged, lengths), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
  'change, message',
  [
    ({'q': (2, 6, 8, 1)}, r'\[B, H, D\]'),
    ({'q': (2, 6, 4)}, r'\[P, 2, K, G, D\]'),
    ({'pages': (5, 3, 2, 4, 8)}, r'\[P, 2, K, G, D\]'),
    ({'pages': (5, 2, 4, 4, 8)}, '4 key/value heads do not divide 6 query heads'),
    ({'tables': (3, 2)}, 'do not belong to 2 sequences'),
    ({'lengths': (3,)}, 'do not belong to 2 sequences'),
  ],
)
def test_shapes_that_do_not_fit_together_are_refused(change, message):
  shapes = {'q': (2, 6, 8), 'pages': (5, 2, 2, 4, 8), 'tables': (2, 2), 'lengths': (2,)} | change
  with pytest.raises(ValueError, match=message):
    paged_attention(*(np.zeros(shape, np.int32 if name in ('tables', 'lengths') else np.float32)
                      for name, shape in shapes.items()))  # fmt: skip


def test_an_unknown_implementation_is_refused_with_those_there_are():
  q, paged, lengths = inputs(*CASES[1])
  with pytest.raises(ValueError, match="'cuda' is unknown; there are xla, reference"):
    paged_attention(q, paged.pages, paged.tables, lengths, implementation='cuda')
