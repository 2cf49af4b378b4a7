"""Attention of packed chunks over pages: the definition against dense attention, the fast way against that."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import prefill_attention
from pallas_kernels.prefill_attention import xla
from tests.pallas_kernels.dense import Paged, attend, attend_with_sum

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
def run(implementation: str, *case: int, window: int | None = None) -> np.ndarray:
  q, paged, offsets, lengths = inputs(*case)
  call = jax.jit(functools.partial(prefill_attention, implementation=implementation, sliding_window=window))
  with jax.default_matmul_precision('highest'):
    return np.asarray(call(q, paged.pages, paged.tables, offsets, lengths))


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


@pytest.mark.parametrize('window', [1, 6, 150])
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


OPTIONS = [{'soft_cap': 1.5}, {'sinks': True}, {'soft_cap': 2.0, 'sinks': True, 'sliding_window': 5}]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_a_soft_cap_and_sinks_are_in_the_result_and_in_its_sum(options):
  case = CASES[1]
  q, paged, offsets, lengths = inputs(*case)
  if options.get('sinks'):
    options = options | {'sinks': np.linspace(-2, 4, q.shape[1], dtype=np.float32)}

  def call(implementation):
    run = jax.jit(functools.partial(prefill_attention, implementation=implementation, return_lse=True, **options))
    with jax.default_matmul_precision('highest'):
      return map(np.asarray, run(q, paged.pages, paged.tables, offsets, lengths))

  (out, lse), (expected, expected_lse) = call('xla'), call('reference')
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)
  assert not out[-PADDING:].any() and np.isneginf(lse[-PADDING:]).all()
  window, soft_cap, sinks = (options.get(name) for name in ('sliding_window', 'soft_cap', 'sinks'))
  for chunk, (cached, new) in enumerate(chunks_for(case[0])):
    for index in {0, new // 2, new - 1} & set(range(new)):
      row, seen = offsets[chunk] + index, cached + index + 1
      keys, values = paged.keys[chunk][:seen], paged.values[chunk][:seen]
      dense = attend_with_sum(q[row], keys, values, HEAD_DIM**-0.5, window, soft_cap, sinks)
      np.testing.assert_allclose(expected[row], dense[0], rtol=1e-4, atol=1e-5)
      np.testing.assert_allclose(expected_lse[row], dense[1], rtol=1e-4, atol=1e-5)


def test_a_prompt_in_two_chunks_is_the_prompt_in_one():
  q, paged, _, lengths = inputs(*CASES[1])
  sequence, length, cut = 7, int(lengths[7]), 133
  rng = np.random.default_rng(0)
  q = rng.standard_normal((length, *q.shape[1:]), np.float32)
  table = paged.tables[[sequence]]
  call = jax.jit(prefill_attention)
  whole = call(q, paged.pages, table, np.array([0, length], np.int32), np.array([length], np.int32))
  first = call(q[:cut], paged.pages, table, np.array([0, cut], np.int32), np.array([cut], np.int32))
  second = call(q[cut:], paged.pages, table, np.array([0, length - cut], np.int32), np.array([length], np.int32))
  np.testing.assert_allclose(np.concatenate([first, second]), whole, rtol=1e-4, atol=1e-5)


def test_rows_without_any_chunk_come_out_as_zeros():
  q, paged, offsets, lengths = inputs(*CASES[1])
  nothing = np.zeros_like(offsets), np.zeros_like(lengths)
  assert not np.asarray(jax.jit(prefill_attention)(q, paged.pages, paged.tables, *nothing)).any()


def test_xla_matches_reference_in_bfloat16_and_keeps_the_type():
  q, paged, offsets, lengths = inputs(*CASES[3])
  narrow = [jnp.asarray(a, jnp.bfloat16) for a in (q, paged.pages)]
  actual, expected = (
    jax.jit(functools.partial(prefill_attention, implementation=name))(*narrow, paged.tables, offsets, lengths)
    for name in ('xla', 'reference')
  )
  assert actual.dtype == expected.dtype == jnp.bfloat16
  np.testing.assert_allclose(actual.astype(jnp.float32), expected.astype(jnp.float32), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
def test_a_scale_of_ones_own_takes_the_place_of_the_usual_one(implementation):
  q, paged, offsets, lengths = inputs(*CASES[1])
  call = jax.jit(functools.partial(prefill_attention, implementation=implementation, softmax_scale=1.5))
  row = offsets[7] - 1
  actual = np.asarray(call(q, paged.pages, paged.tables, offsets, lengths))[row]
  np.testing.assert_allclose(actual, attend(q[row], paged.keys[6], paged.values[6], 1.5), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
  'change, message',
  [
    ({'q': (7, 6)}, r'\[T, H, D\]'),
    ({'q': (7, 6, 4)}, r'\[P, 2, K, G, D\]'),
    ({'pages': (5, 1, 2, 4, 8)}, r'\[P, 2, K, G, D\]'),
    ({'pages': (5, 2, 4, 4, 8)}, '4 key/value heads do not divide 6 query heads'),
    ({'offsets': (2,)}, 'do not belong to 2 sequences'),
    ({'lengths': (3,)}, 'do not belong to 2 sequences'),
  ],
)
def test_shapes_that_do_not_fit_together_are_refused(change, message):
  shapes = {'q': (7, 6, 8), 'pages': (5, 2, 2, 4, 8), 'tables': (2, 2), 'offsets': (3,), 'lengths': (2,)} | change
  with pytest.raises(ValueError, match=message):
    prefill_attention(*(np.zeros(shape, np.float32 if name in ('q', 'pages') else np.int32)
                        for name, shape in shapes.items()))  # fmt: skip


def test_an_unknown_implementation_is_refused_with_those_there_are():
  q, paged, offsets, lengths = inputs(*CASES[1])
  with pytest.raises(ValueError, match="'pallas' is unknown; there are xla, reference"):
    prefill_attention(q, paged.pages, paged.tables, offsets, lengths, implementation='pallas')
