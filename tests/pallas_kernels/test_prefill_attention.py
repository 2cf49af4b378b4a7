"""Attention of packed chunks over pages: the definition against dense attention, the fast way against that."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import prefill_attention
from pallas_kernels.prefill_attention import xla
from tests.pallas_kernels.dense import Paged, attend, attend_with_sum, draw_options, draw_shape

HEAD_DIM = 8
PADDING = 21  # rows past the last chunk
CASES = [(1, 6, 2), (4, 4, 4), (16, 8, 1), (64, 6, 2)]  # page size, query heads, key/value heads


def chunks_for(page_size: int) -> list[tuple[int, int]]:
  """(cached before, new) tokens of each chunk."""
  rows, tokens = xla.LARGE_BLOCKS
  return [
    (0, 0),  # empty, at the beginning
    (0, 1),  # one token
    (0, page_size),
    (0, rows + 5),  # its last block of rows reaches into the next chunk's
    (page_size, 3),  # goes on where a page ends
    (0, 0),  # empty, in the middle
    (tokens + 11, 7),  # goes on after more than a block of cached tokens
    (tokens - 60, rows + 30),  # crosses from one block of cached tokens into the next
    (2, page_size),
    (0, 0),  # empty, at the end
  ]


@functools.lru_cache
def inputs(page_size: int, query_heads: int, kv_heads: int) -> tuple[np.ndarray, Paged, np.ndarray, np.ndarray]:
  rng = np.random.default_rng([page_size, query_heads, kv_heads])
  chunks = chunks_for(page_size)
  lengths = np.array([cached + new for cached, new in chunks], np.int32)
  offsets = np.cumsum([0, *(new for _, new in chunks)]).astype(np.int32)
  paged = Paged.random(rng, lengths.tolist(), kv_heads, HEAD_DIM, page_size)
  q = rng.standard_normal((offsets[-1] + PADDING, query_heads, HEAD_DIM), np.float32)
  return q, paged, offsets, lengths


@functools.lru_cache
def compiled(implementation: str, window: int | None = None):
  return jax.jit(functools.partial(prefill_attention, implementation=implementation, sliding_window=window))


@functools.lru_cache
def run(implementation: str, *case: int, window: int | None = None) -> np.ndarray:
  q, paged, offsets, lengths = inputs(*case)
  with jax.default_matmul_precision('highest'):
    return np.asarray(compiled(implementation, window)(q, paged.pages, paged.tables, offsets, lengths))


@pytest.mark.parametrize('case', CASES)
def test_reference_is_causal_dense_attention(case):
  q, paged, offsets, _ = inputs(*case)
  actual = run('reference', *case)
  for chunk, (cached, new) in enumerate(chunks_for(case[0])):
    for index in {0, 1, new // 2, new - 2, new - 1} & set(range(new)):
      row, seen = offsets[chunk] + index, cached + index + 1
      expected = attend(q[row], paged.keys[chunk][:seen], paged.values[chunk][:seen], HEAD_DIM**-0.5)
      np.testing.assert_allclose(actual[row], expected, rtol=1e-4, atol=1e-5)
  assert actual[: offsets[-1]].any(axis=(1, 2)).all()
  assert not actual[offsets[-1] :].any()


@pytest.mark.parametrize('case', CASES)
def test_xla_matches_reference(case):
  actual = run('xla', *case)
  np.testing.assert_allclose(actual, run('reference', *case), rtol=1e-5, atol=1e-5)
  assert not actual[-PADDING:].any()


@pytest.mark.parametrize('blocks', [xla.BLOCKS, xla.LARGE_BLOCKS, (16, 512)])
def test_blocks_of_any_size_give_the_same(blocks):
  case = CASES[2]
  q, paged, offsets, lengths = inputs(*case)
  call = jax.jit(functools.partial(xla.prefill_attention, softmax_scale=HEAD_DIM**-0.5, blocks=blocks))
  with jax.default_matmul_precision('highest'):
    actual = call(q, paged.pages, paged.tables, offsets, lengths)
  np.testing.assert_allclose(actual, run('reference', *case), rtol=1e-5, atol=1e-5)


def test_a_long_chunk_by_itself_takes_large_blocks_and_matches_the_reference():
  q, paged, offsets, lengths = inputs(*CASES[2])
  own = q[offsets[7] : offsets[8]]
  offsets, lengths = np.array([0, 0, len(own), len(own)], np.int32), np.array([0, lengths[7], 0], np.int32)
  assert len(own) > xla.LARGE_BLOCKS[0]
  actual, expected = (
    jax.jit(functools.partial(prefill_attention, implementation=name))(
      own, paged.pages, paged.tables[6:9], offsets, lengths
    )
    for name in ('xla', 'reference')
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('window', [6, 150])
def test_a_sliding_window_hides_what_lies_before_it(window):
  case = CASES[1]
  q, paged, offsets, _ = inputs(*case)
  actual = run('reference', *case, window=window)
  for chunk, (cached, new) in enumerate(chunks_for(case[0])):
    for index in {0, new // 2, new - 1} & set(range(new)):
      row, seen = offsets[chunk] + index, cached + index + 1
      expected = attend(q[row], paged.keys[chunk][:seen], paged.values[chunk][:seen], HEAD_DIM**-0.5, window)
      np.testing.assert_allclose(actual[row], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(run('xla', *case, window=window), actual, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('seed', range(8))
def test_all_options_together_are_dense_attention_with_them(seed):
  rng = np.random.default_rng(seed)
  layout = ('paired', 'kv', 'plain')[seed % 3]
  dtype = ('float32', 'int8', 'float32', 'float8_e4m3fn')[seed % 4]
  page_size, query_heads, kv_heads, head_dim = draw_shape(rng, layout)
  options = draw_options(rng, query_heads)
  new = np.array([0, 1, rng.integers(2, 20), rng.integers(20, 100)])
  cached = rng.integers(0, 90, 4)

  @jax.jit
  def both(q, pages, tables, offsets, lengths, scales):
    return [
      prefill_attention(
        q, pages, tables, offsets, lengths, scales=scales, return_lse=True, implementation=name, **options
      )
      for name in ('reference', 'xla')
    ]

  for _ in range(5):
    order = rng.permutation(4)
    new, cached = new[order], cached[order]
    offsets, lengths = np.cumsum([0, *new]).astype(np.int32), (cached + new).astype(np.int32)
    paged = Paged.random(rng, lengths.tolist(), kv_heads, head_dim, page_size)
    paged = paged if dtype == 'float32' else paged.quantized(dtype)
    q = rng.standard_normal((offsets[-1] + 3, query_heads, head_dim), np.float32)
    with jax.default_matmul_precision('highest'):
      actual = both(q, paged.packed(layout).pages, paged.tables, offsets, lengths, paged.scales)
    for chunk in range(4):
      for index in {0, 1, new[chunk] // 2, new[chunk] - 1} & set(range(new[chunk])):
        row, seen = offsets[chunk] + index, cached[chunk] + index + 1
        expected = attend_with_sum(q[row], paged.keys[chunk][:seen], paged.values[chunk][:seen], **options)
        for out, lse in actual:
          np.testing.assert_allclose(out[row], expected[0], rtol=2e-5, atol=2e-5)
          np.testing.assert_allclose(lse[row], expected[1], rtol=2e-5, atol=2e-5)
    for out, lse in actual:
      assert not out[-3:].any() and np.isneginf(lse[-3:]).all()
      np.testing.assert_allclose(out, actual[0][0], rtol=2e-5, atol=2e-5)
      np.testing.assert_allclose(lse, actual[0][1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('layout', ['paired', 'kv'])
def test_packed_pages_give_the_same_as_plain_ones(layout):
  q, paged, offsets, lengths = inputs(*CASES[1])
  with jax.default_matmul_precision('highest'):
    call = jax.jit(functools.partial(xla.prefill_attention, softmax_scale=HEAD_DIM**-0.5, blocks=xla.BLOCKS))
    actual = call(q, paged.packed(layout).pages, paged.tables, offsets, lengths)
  np.testing.assert_allclose(actual, run('xla', *CASES[1]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
@pytest.mark.parametrize('part', [0, 1])
def test_a_nan_of_one_sequence_stays_with_it(implementation, part):
  q, paged, offsets, lengths = inputs(*CASES[1])
  pages = paged.pages.copy()
  pages[paged.tables[6, 2], part, :, 1, 3] = np.nan
  with jax.default_matmul_precision('highest'):
    actual = np.asarray(compiled(implementation)(q, pages, paged.tables, offsets, lengths))
  own = slice(offsets[6], offsets[7])
  assert np.isnan(actual[own]).any(axis=-1).all()
  clean = run(implementation, *CASES[1])
  np.testing.assert_array_equal(np.delete(actual, own, axis=0), np.delete(clean, own, axis=0))


def test_a_prompt_in_two_chunks_is_the_prompt_in_one():
  q, paged, _, lengths = inputs(*CASES[1])
  sequence, length, cut = 7, int(lengths[7]), 133
  rng = np.random.default_rng(0)
  q = rng.standard_normal((length, *q.shape[1:]), np.float32)
  table = paged.tables[[sequence]]
  call = compiled('xla')
  whole = call(q, paged.pages, table, np.array([0, length], np.int32), np.array([length], np.int32))
  first = call(q[:cut], paged.pages, table, np.array([0, cut], np.int32), np.array([cut], np.int32))
  second = call(q[cut:], paged.pages, table, np.array([0, length - cut], np.int32), np.array([length], np.int32))
  np.testing.assert_allclose(np.concatenate([first, second]), whole, rtol=1e-4, atol=1e-5)


def test_rows_without_any_chunk_come_out_as_zeros():
  q, paged, offsets, lengths = inputs(*CASES[1])
  nothing = np.zeros_like(offsets), np.zeros_like(lengths)
  assert not np.asarray(compiled('xla')(q, paged.pages, paged.tables, *nothing)).any()


def test_xla_matches_reference_in_bfloat16_and_keeps_the_type():
  q, paged, offsets, lengths = inputs(*CASES[3])
  narrow = [jnp.asarray(a, jnp.bfloat16) for a in (q, paged.pages)]
  actual, expected = (
    jax.jit(functools.partial(prefill_attention, implementation=name))(*narrow, paged.tables, offsets, lengths)
    for name in ('xla', 'reference')
  )
  assert actual.dtype == expected.dtype == jnp.bfloat16
  np.testing.assert_allclose(actual.astype(jnp.float32), expected.astype(jnp.float32), rtol=2e-2, atol=2e-2)


I32, F32, INT8 = np.dtype('int32'), np.dtype('float32'), np.dtype('int8')
GOOD = {
  'q': ((7, 6, 8), F32),
  'pages': ((5, 2, 2, 4, 8), F32),
  'tables': ((2, 2), I32),
  'offsets': ((3,), I32),
  'lengths': ((2,), I32),
}


@pytest.mark.parametrize(
  'change, message',
  [
    ({'q': ((7, 6), F32)}, r'q \(7, 6\) is not \[T, H, D\]'),
    ({'q': ((1, 7, 6, 8), F32)}, r'q \(1, 7, 6, 8\) is not \[T, H, D\]'),
    ({'q': ((7, 6, 6), F32)}, r'pages \(5, 2, 2, 4, 8\) are not \[P, 2, K, G, D\].*head size D = 6'),
    ({'pages': ((5, 1, 2, 4, 8), F32)}, r'pages \(5, 1, 2, 4, 8\) are not \[P, 2, K, G, D\].*head size D = 8'),
    ({'pages': ((5, 2, 4, 4, 8), F32)}, '4 key/value heads do not divide 6 query heads'),
    ({'pages': ((5, 2, 2, 4, 8), INT8)}, r'pages are int8 and scales are None; give .* \(5, 2, 2, 4\)'),
    ({'scales': ((5, 2, 2, 4), F32)}, r'pages are float32 and scales \(5, 2, 2, 4\) are given'),
    ({'sinks': ((2,), F32)}, r'sinks \(2,\) are not \[H\] = \(6,\)'),
    ({'tables': ((), I32)}, r'tables \(\) do not belong to 0 sequences'),
    ({'offsets': ((2,), I32)}, r'offsets \(2,\) do not belong to 2 sequences: expected \(3,\)'),
    ({'offsets': ((3,), F32)}, 'offsets are float32, expected int32'),
    ({'lengths': ((3,), I32)}, r'lengths \(3,\) do not belong to 2 sequences: expected \(2,\)'),
  ],
)
def test_arguments_that_do_not_fit_together_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    prefill_attention(**{name: np.zeros(*spec) for name, spec in (GOOD | change).items()})


@pytest.mark.parametrize(
  'options, message',
  [
    ({'sliding_window': 0}, 'sliding_window is 0, expected at least 1'),
    ({'soft_cap': 0.0}, r'soft_cap is 0\.0, expected'),
  ],
)
def test_options_without_a_meaning_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    prefill_attention(**{name: np.zeros(*spec) for name, spec in GOOD.items()}, **options)


@pytest.mark.parametrize(
  'offsets, lengths, message',
  [
    ((1, 2, 3), (4, 4), r'offsets\[0\] is 1, expected 0'),
    ((0, 3, 2), (4, 4), r'offsets\[2\] is 2, expected offsets\[1\] = 3 or more'),
    ((0, 3, 8), (4, 5), r'offsets\[2\] is 8, expected at most 7, the rows of q'),
    ((0, 3, 5), (4, 1), r'lengths\[1\] is 1, expected 2 or more: it counts the chunk in rows 3 to 5 of q too'),
    ((0, 3, 5), (4, -1), r'lengths\[1\] is -1, expected 0 to 8: a table has 2 pages of 4 tokens'),
    ((0, 3, 5), (9, 4), r'lengths\[0\] is 9, expected 0 to 8'),
    ((0, 3, 5), (4, 5), r'tables\[1, 1\] is 5, expected 0 to 4: there are 5 pages, and sequence 1 has 5 tokens'),
  ],
)
def test_checked_mode_refuses_values_out_of_bounds(offsets, lengths, message):
  q, pages, tables, *_ = (np.zeros(*spec) for spec in GOOD.values())
  tables[1, 1] = 5
  with pytest.raises(ValueError, match=message):
    prefill_attention(q, pages, tables, np.array(offsets, np.int32), np.array(lengths, np.int32), checked=True)


def test_checked_mode_asks_nothing_of_tables_that_no_query_sees():
  q, pages, tables, *_ = (np.zeros(*spec) for spec in GOOD.values())
  tables[:] = [[99, 99], [-1, 0]]  # no chunk, and a window that begins in the second page
  offsets, lengths = np.array([0, 0, 2], np.int32), np.array([8, 8], np.int32)
  jax.eval_shape(lambda: prefill_attention(q, pages, tables, offsets, lengths, sliding_window=2, checked=True))
  with pytest.raises(ValueError, match=r'tables\[1, 0\] is -1'):
    prefill_attention(q, pages, tables, offsets, lengths, sliding_window=4, checked=True)


def test_checked_mode_refuses_to_look_under_jit():
  arrays = {name: np.zeros(*spec) for name, spec in GOOD.items()}
  with pytest.raises(
    ValueError, match='values in offsets, which are not known while JAX traces: call it outside of jit'
  ):
    jax.jit(functools.partial(prefill_attention, checked=True))(**arrays)


def test_an_unknown_implementation_is_refused_with_those_there_are():
  q, paged, offsets, lengths = inputs(*CASES[1])
  with pytest.raises(ValueError, match="'pallas' is unknown; there are pallas_tpu, cudnn, xla, reference"):
    prefill_attention(q, paged.pages, paged.tables, offsets, lengths, implementation='pallas')
