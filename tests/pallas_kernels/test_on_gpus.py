"""The choices of GPUs, tested without one: the device is forced, and its choice runs here."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels import devices, dispatch, paged_attention, prefill_attention
from tests.pallas_kernels.dense import Paged

HEAD_DIM = 8


@pytest.fixture
def gpu(monkeypatch) -> devices.Device:
  device = devices.by_name('h100')
  monkeypatch.setattr(dispatch, 'current', lambda: device)
  return device


@pytest.fixture
def turns(monkeypatch) -> list[int]:
  """The turns of each loop over blocks of a context, of programs that run without being compiled."""
  counts = []

  def count(lower, upper, body, carried):
    counts.append(int(upper) - int(lower))
    for index in range(int(lower), int(upper)):
      carried = body(index, carried)
    return carried

  monkeypatch.setattr(jax.lax, 'fori_loop', count)
  return counts


def chunks(cached_and_new: list[tuple[int, int]], page_size: int, padding: int = 3):
  rng = np.random.default_rng([page_size, *map(sum, cached_and_new)])
  lengths = np.array([cached + new for cached, new in cached_and_new], np.int32)
  offsets = np.cumsum([0, *(new for _, new in cached_and_new)]).astype(np.int32)
  paged = Paged.random(rng, lengths.tolist(), 2, HEAD_DIM, page_size)
  q = rng.standard_normal((offsets[-1] + padding, 4, HEAD_DIM), np.float32)
  return q, paged.pages, paged.tables, offsets, lengths


@pytest.mark.parametrize(
  'cached_and_new',
  [[(0, 1)], [(0, 300)], [(1030, 5), (0, 40), (0, 0), (7, 250)], [(1023, 2), (2100, 1)], [(500, 256), (0, 255)]],
)
@pytest.mark.parametrize('window', [None, 100])
def test_prefill_on_a_gpu_is_the_reference_at_odd_shapes(gpu, cached_and_new, window):
  inputs = chunks(cached_and_new, page_size=16)
  with jax.default_matmul_precision('highest'):
    actual, expected = (
      prefill_attention(*inputs, implementation=way, sliding_window=window) for way in (None, 'reference')
    )
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('lengths', [[1], [1024, 1025, 0, 7], [2100, 3], [64] * 9])
def test_decode_on_a_gpu_is_the_reference_at_odd_shapes(gpu, lengths):
  rng = np.random.default_rng(lengths)
  paged = Paged.random(rng, lengths, 2, HEAD_DIM, 16)
  q = rng.standard_normal((len(lengths), 4, HEAD_DIM), np.float32)
  with jax.default_matmul_precision('highest'):
    actual, expected = (
      paged_attention(q, paged.pages, paged.tables, np.array(lengths, np.int32), implementation=way)
      for way in (None, 'reference')
    )
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('seed', range(6))
def test_options_on_a_gpu_are_those_of_the_reference(gpu, seed):
  rng = np.random.default_rng(seed)
  inputs = chunks([(int(rng.integers(1, 60)), int(rng.integers(1, 40))) for _ in range(3)], page_size=4)
  options = {'soft_cap': 5.0, 'sinks': rng.standard_normal(4, np.float32), 'return_lse': True}
  for name in list(options)[: seed % 3]:
    del options[name]
  with jax.default_matmul_precision('highest'):
    actual, expected = (prefill_attention(*inputs, implementation=way, **options) for way in (None, 'reference'))
  for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def wide(inputs, tokens: int):
  """The same with tables that have room for so many tokens."""
  q, pages, tables, *rest = inputs
  room = np.zeros((len(tables), tokens // pages.shape[3]), np.int32)
  room[:, : tables.shape[1]] = tables
  return q, pages, room, *rest


@pytest.mark.parametrize(('cached', 'new'), [(0, 1), (0, 256), (1000, 24), (1000, 25), (3000, 100), (3000, 256)])
def test_a_chunk_goes_round_once_for_each_1024_tokens_of_its_context(gpu, turns, cached, new):
  inputs = chunks([(cached, new)], page_size=16, padding=0)
  with jax.disable_jit():
    prefill_attention(*wide(inputs, 8192))
    assert sum(turns) == -(-(cached + new) // 1024)
    turns.clear()
    prefill_attention(*inputs)
  assert sum(turns) == (0 if cached + new <= 2048 else -(-(cached + new) // 1024))  # a short table is taken whole


def test_pages_that_1024_is_no_multiple_of_cost_no_turn_more(gpu, turns):
  with jax.disable_jit():
    prefill_attention(*wide(chunks([(824, 200)], page_size=48, padding=0), 4800))
  assert turns == [1]


def test_longer_chunks_go_round_as_often_for_each_256_rows(gpu, turns):
  with jax.disable_jit():
    prefill_attention(*wide(chunks([(1000, 600)], page_size=16, padding=0), 8192))
  assert turns == [2, 2, 2]  # 600 rows are three times 256, and see 1,256, 1,512 and 1,600 tokens


def test_a_prompt_of_1024_tokens_takes_four_turns_a_layer_where_a_cpu_takes_136(gpu, turns, monkeypatch):
  prompt = [chunks([(cached, 256)], page_size=16, padding=0) for cached in range(0, 1024, 256)]
  with jax.disable_jit():
    for inputs in prompt:
      prefill_attention(*wide(inputs, 8192))
    assert sum(turns) == 4
    turns.clear()
    for inputs in prompt:
      prefill_attention(*inputs)
    assert not turns
    monkeypatch.setattr(dispatch, 'current', lambda: devices.Device('cpu', 'cpu'))
    for inputs in prompt:
      prefill_attention(*inputs)
    assert sum(turns) == 136


@pytest.mark.parametrize('room', [2048, 4096])
def test_decode_goes_round_once_for_each_1024_tokens_of_the_longest_contexts(gpu, turns, room):
  lengths = np.array([2048, 1024, 1024, 5], np.int32)
  paged = Paged.random(np.random.default_rng(0), lengths.tolist(), 2, HEAD_DIM, 16)
  q = np.ones((4, 4, HEAD_DIM), np.float32)
  with jax.disable_jit():
    paged_attention(*wide((q, paged.pages, paged.tables, lengths), room))
  assert sum(turns) == (0 if room == 2048 else 2)  # five blocks, four at a time


@pytest.mark.parametrize(('dtype', 'room'), [('float32', 2048), ('float16', 1040)])
def test_short_tables_of_one_sequence_are_programs_without_a_loop(gpu, dtype, room):
  """Of float32, and of what cuDNN does not take, such as a soft cap."""
  shape = jax.ShapeDtypeStruct
  pages, tables = shape((256, 2, 8, 16, 128), dtype), shape((1, room // 16), np.int32)
  offsets, lengths = shape((2,), np.int32), shape((1,), np.int32)
  prefill = functools.partial(prefill_attention, soft_cap=30.0)
  text = jax.jit(prefill).lower(shape((256, 32, 128), dtype), pages, tables, offsets, lengths).as_text()
  assert 'stablehlo.while' not in text
  tables, lengths = shape((64, room // 16), np.int32), shape((64,), np.int32)
  decode = functools.partial(paged_attention, soft_cap=30.0)
  assert 'while' not in jax.jit(decode).lower(shape((64, 32, 128), dtype), pages, tables, lengths).as_text()
