"""Decode attention over pages: the definition against dense attention, the fast way against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged_attention
from pallas_kernels.paged_attention import xla
from tests.pallas_kernels.dense import Paged, attend, attend_with_sum, draw_options, draw_shape

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


@functools.lru_cache
def compiled(implementation: str | None, **options):
  return jax.jit(functools.partial(paged_attention, implementation=implementation, **options))


def run(implementation: str | None, q, paged: Paged, lengths, **options):
  with jax.default_matmul_precision('highest'):
    return np.asarray(compiled(implementation, **options)(q, paged.pages, paged.tables, lengths))


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


@pytest.mark.parametrize('window', [1, 128, 1000])
def test_a_sliding_window_hides_what_lies_before_it(window):
  q, paged, lengths = inputs(*CASES[1])
  reference = run('reference', q, paged, lengths, sliding_window=window)
  np.testing.assert_allclose(run('xla', q, paged, lengths, sliding_window=window), reference, rtol=1e-5, atol=1e-5)
  for row in range(1, len(lengths)):
    expected = attend(q[row], paged.keys[row], paged.values[row], HEAD_DIM**-0.5, window)
    np.testing.assert_allclose(reference[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('seed', range(8))
def test_all_options_together_are_dense_attention_with_them(seed):
  rng = np.random.default_rng(seed)
  layout = ('plain', 'paired', 'kv')[seed % 3]
  dtype = ('float32', 'int8', 'float32', 'float8_e4m3fn')[seed % 4]
  page_size, query_heads, kv_heads, head_dim = draw_shape(rng, layout)
  queries = int(rng.integers(1, 5))
  options = draw_options(rng, query_heads)
  lengths = np.array([0, rng.integers(1, 5), rng.integers(1, 80), rng.integers(80, 200)], np.int32)

  @jax.jit
  def both(q, pages, tables, lengths, scales):
    return [
      paged_attention(q, pages, tables, lengths, scales=scales, return_lse=True, implementation=name, **options)
      for name in ('reference', 'xla')
    ]

  for _ in range(5):
    lengths = rng.permutation(lengths)
    paged = Paged.random(rng, lengths.tolist(), kv_heads, head_dim, page_size)
    paged = paged if dtype == 'float32' else paged.quantized(dtype)
    q = rng.standard_normal((len(lengths), queries, query_heads, head_dim), np.float32)
    with jax.default_matmul_precision('highest'):
      actual = both(q, paged.packed(layout).pages, paged.tables, lengths, paged.scales)
    for row, query in np.ndindex(q.shape[:2]):
      seen = max(lengths[row] - queries + query + 1, 0)
      expected = attend_with_sum(q[row, query], paged.keys[row][:seen], paged.values[row][:seen], **options)
      for out, lse in actual:
        np.testing.assert_allclose(out[row, query], expected[0], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(lse[row, query], expected[1], rtol=2e-5, atol=2e-5)


def test_several_queries_of_a_sequence_are_each_of_them_at_its_length():
  q, paged, lengths = inputs(*CASES[1])
  several = np.stack([q, q + 1, q - 1], axis=1)
  actual = run('xla', several, paged, lengths, sliding_window=70)
  for back in range(3):
    one = run('xla', several[:, 2 - back], paged, np.maximum(lengths - back, 0), sliding_window=70)
    np.testing.assert_allclose(actual[:, 2 - back], one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('layout', ['paired', 'kv'])
def test_packed_pages_give_the_same_as_plain_ones(layout):
  q, paged, lengths = inputs(*CASES[1])
  actual = run('xla', q, paged.packed(layout), lengths)
  np.testing.assert_allclose(actual, run('xla', q, paged, lengths), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
@pytest.mark.parametrize('part', [0, 1])
def test_a_nan_of_one_sequence_stays_with_it(implementation, part):
  q, paged, lengths = inputs(*CASES[1])
  pages = paged.pages.copy()
  pages[paged.tables[4, 2], part, :, 1, 3] = np.nan
  call = compiled(implementation)
  clean, actual = (np.asarray(call(q, x, paged.tables, lengths)) for x in (paged.pages, pages))
  assert np.isnan(actual[4]).any(axis=-1).all()
  np.testing.assert_array_equal(np.delete(actual, 4, axis=0), np.delete(clean, 4, axis=0))


def test_a_window_that_hides_all_is_refused():
  q, paged, lengths = inputs(*CASES[1])
  with pytest.raises(ValueError, match='sliding_window is 0'):
    run(None, q, paged, lengths, sliding_window=0)


def test_the_fastest_here_is_xla():
  q, paged, lengths = inputs(*CASES[1])
  np.testing.assert_array_equal(run(None, q, paged, lengths), run('xla', q, paged, lengths))


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


I32, F32, INT8 = np.dtype('int32'), np.dtype('float32'), np.dtype('int8')
GOOD = {'q': ((2, 6, 8), F32), 'pages': ((5, 2, 2, 4, 8), F32), 'tables': ((2, 2), I32), 'lengths': ((2,), I32)}
SCALES = {'pages': ((5, 2, 2, 4, 8), INT8), 'scales': ((5, 2, 2, 4), F32)}


@pytest.mark.parametrize(
  'change, message',
  [
    ({'q': ((6, 8), F32)}, r'q \(6, 8\) is not \[B, H, D\] or \[B, Q, H, D\]'),
    ({'q': ((0, 6, 8), F32)}, r'q \(0, 6, 8\) or pages .* hold nothing'),
    ({'q': ((2, 6, 8), I32)}, 'q is int32, expected float32'),
    ({'q': ((2, 6, 6), F32)}, r'pages \(5, 2, 2, 4, 8\) are not \[P, 2, K, G, D\].*head size D = 6'),
    ({'pages': ((5, 3, 2, 4, 8), F32)}, r'pages \(5, 3, 2, 4, 8\) are not \[P, 2, K, G, D\].*head size D = 8'),
    ({'pages': ((5, 2, 4, 4, 8), F32)}, '4 key/value heads do not divide 6 query heads'),
    ({'pages': ((5, 2, 2, 4, 16), F32)}, r'4 key/value heads do not divide 6 query heads.*\(paired\)'),
    ({'pages': ((5, 2, 2, 4, 8), I32)}, 'pages are int32, expected float32'),
    ({'pages': ((5, 2, 2, 4, 8), INT8)}, r'pages are int8 and scales are None; give .* \(5, 2, 2, 4\)'),
    ({'scales': ((5, 2, 2, 4), F32)}, r'pages are float32 and scales \(5, 2, 2, 4\) are given'),
    (SCALES | {'scales': ((5, 2, 4), F32)}, r'scales are float32 \(5, 2, 4\), expected .* \(5, 2, 2, 4\)'),
    (SCALES | {'scales': ((5, 2, 2, 4), I32)}, r'scales are int32 \(5, 2, 2, 4\), expected float32'),
    ({'sinks': ((2,), F32)}, r'sinks \(2,\) are not \[H\] = \(6,\)'),
    ({'sinks': ((6,), I32)}, 'sinks are int32, expected float32'),
    ({'tables': ((3, 2), I32)}, r'tables \(3, 2\) do not belong to 2 sequences: expected \(2, 2\)'),
    ({'tables': ((2,), I32)}, r'tables \(2,\) do not belong to 2 sequences: expected \(2, N\)'),
    ({'tables': ((2, 0), I32)}, r'tables \(2, 0\) hold nothing'),
    ({'tables': ((2, 2), F32)}, 'tables are float32, expected int32'),
    ({'lengths': ((3,), I32)}, r'lengths \(3,\) do not belong to 2 sequences: expected \(2,\)'),
    ({'lengths': ((2,), F32)}, 'lengths are float32, expected int32'),
  ],
)
def test_arguments_that_do_not_fit_together_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    paged_attention(**{name: np.zeros(*spec) for name, spec in (GOOD | change).items()})


@pytest.mark.parametrize('soft_cap', [0, -1.0, float('nan'), float('inf')])
def test_a_soft_cap_that_is_no_bound_is_refused(soft_cap):
  q, paged, lengths = inputs(*CASES[1])
  with pytest.raises(ValueError, match=f'soft_cap is {soft_cap}, expected a bound above 0'):
    run(None, q, paged, lengths, soft_cap=soft_cap)


@pytest.mark.parametrize(
  'lengths, entry, message',
  [
    ((1, -1), 0, r'lengths\[1\] is -1, expected 0 to 8: a table has 2 pages of 4 tokens'),
    ((9, 1), 0, r'lengths\[0\] is 9, expected 0 to 8'),
    ((1, 5), 5, r'tables\[1, 1\] is 5, expected 0 to 4: there are 5 pages, and sequence 1 has 5 tokens, 4 to a page'),
    ((1, 8), -1, r'tables\[1, 1\] is -1, expected 0 to 4'),
  ],
)
def test_checked_mode_refuses_values_out_of_bounds(lengths, entry, message):
  q, pages, tables, _ = (np.zeros(*spec) for spec in GOOD.values())
  tables[1, 1] = entry
  with pytest.raises(ValueError, match=message):
    paged_attention(q, pages, tables, np.array(lengths, np.int32), checked=True)


def test_checked_mode_asks_nothing_of_slots_that_no_query_sees():
  q, pages, tables, lengths = (np.zeros(*spec) for spec in GOOD.values())
  tables[:] = [[-1, 0], [0, 99]]  # the window begins in the second page; the sequence ends in the first
  lengths[:] = 8, 4
  jax.eval_shape(lambda: paged_attention(q, pages, tables, lengths, sliding_window=3, checked=True))
  with pytest.raises(ValueError, match=r'tables\[0, 0\] is -1'):
    paged_attention(q, pages, tables, lengths, sliding_window=5, checked=True)


def test_checked_mode_refuses_to_look_under_jit():
  q, pages, tables, lengths = (np.zeros(*spec) for spec in GOOD.values())
  with pytest.raises(
    ValueError, match='values in lengths, which are not known while JAX traces: call it outside of jit'
  ):
    jax.jit(lambda lengths: paged_attention(q, pages, tables, lengths, checked=True))(lengths)


def test_an_unknown_implementation_is_refused_with_those_there_are():
  q, paged, lengths = inputs(*CASES[1])
  with pytest.raises(ValueError, match="'cuda' is unknown; there are pallas_tpu, cudnn, xla, reference"):
    paged_attention(q, paged.pages, paged.tables, lengths, implementation='cuda')
