"""Prefill attention's TPU kernel, interpreted at tiny shapes: every option against attention in double precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import devices
from pallas_kernels.prefill_attention import pallas_tpu
from pallas_kernels.prefill_attention.pallas_tpu import Config
from pallas_kernels.prefill_attention.tpu_kernel import Kernel

CONFIG = Config(block_rows=16, tile_rows=8, block_tokens=16, tile_tokens=8, outer_heads_at_once=1)
SCALE = 0.3
QUICKLY = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}  # compiled, not run
CHUNKS = ((0, 0), (3, 5), (40, 9), (0, 0), (0, 1), (2, 30), (0, 0))  # (cached before, new) tokens
LONG = ((50, 18), (0, 3))  # with blocks that all rows see whole


@dataclasses.dataclass(frozen=True)
class Case:
  """A call's arguments, garbage wherever nothing may be read, and what it should give."""

  arguments: tuple[np.ndarray, ...]
  options: dict
  out: np.ndarray  # [T, H, D]
  log_sums: np.ndarray  # [T, H]


def dense(q, keys, values, chunks, window, cap, sinks):
  """Results and logs of sums in double precision; keys and values are lists of `[S, K, D]`."""
  out, log_sums, row = np.zeros(q.shape), np.full(q.shape[:2], -np.inf), 0
  group = q.shape[1] // keys[0].shape[1]
  for chunk, (cached, new) in enumerate(chunks):
    for position in range(cached, cached + new):
      first = 0 if window is None else max(0, position - window + 1)
      for head in range(q.shape[1]):
        scores = keys[chunk][first : position + 1, head // group] @ q[row, head].astype(np.float64) * SCALE
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        everything = scores if sinks is None else np.append(scores, sinks[head])
        log_sums[row, head] = np.logaddexp.reduce(everything)
        out[row, head] = np.exp(scores - log_sums[row, head]) @ values[chunk][first : position + 1, head // group]
      row += 1
  return out, log_sums


def make(
  seed, *, chunks=CHUNKS, heads=4, kv_heads=2, head_dim=4, page_size=8, layout='plain', quantized=False,
  window=None, cap=None, with_sinks=False, spike=None, padding=3,
):  # fmt: skip
  rng = np.random.default_rng(seed)
  lengths = np.array([cached + new for cached, new in chunks], np.int32)
  offsets = np.cumsum([0, *(new for _, new in chunks)]).astype(np.int32)
  slots = max(-(-int(lengths.max()) // page_size), 1) + 1
  pool = rng.permutation(len(chunks) * slots)
  tables = pool.reshape(len(chunks), slots).astype(np.int32)
  pages = rng.standard_normal((len(pool), 2, kv_heads, page_size, head_dim), np.float32)
  if spike is not None:
    pages[tables[:, 0], 0, :, 2] *= spike
  scales = None
  exact = pages.astype(np.float64)
  if quantized:
    scales = np.abs(pages).max(-1) / 127
    pages = np.round(pages / scales[..., None]).astype(np.int8)
    exact = pages * scales[..., None].astype(np.float64)
  keys, values = (
    [np.concatenate(list(exact[table, kind]), axis=1).swapaxes(0, 1) for table in tables] for kind in range(2)
  )
  for sequence, length in enumerate(lengths):
    for slot in range(slots):
      unwritten = max(length - slot * page_size, 0)
      (pages if scales is None else scales)[tables[sequence, slot], :, :, unwritten:] = np.nan
    tables[sequence, -(-length // page_size) :] = 1 << 30
  if layout == 'paired':
    pages = pages.reshape(-1, 2, kv_heads // 2, 2, page_size, head_dim).swapaxes(3, 4)
    pages = pages.reshape(-1, 2, kv_heads // 2, page_size, 2 * head_dim)
  elif layout == 'kv':
    pages = np.concatenate([pages[:, 0], pages[:, 1]], axis=-1)[:, None]
  q = rng.standard_normal((int(offsets[-1]) + padding, heads, head_dim), np.float32)
  sinks = rng.standard_normal(heads).astype(np.float32) * 3 if with_sinks else None
  options = {'sliding_window': window, 'soft_cap': cap, 'sinks': sinks, 'scales': scales}
  return Case((q, pages, tables, offsets, lengths), options, *dense(q, keys, values, chunks, window, cap, sinks))


def run(case, config=CONFIG, interpret=True, dtype=jnp.float32):
  q, pages, *rest = case.arguments
  pages = jnp.asarray(pages) if pages.dtype == np.int8 else jnp.asarray(pages, dtype)
  options = case.options | {'softmax_scale': SCALE, 'return_lse': True, 'config': config, 'interpret': interpret}
  call = jax.jit(functools.partial(pallas_tpu.prefill_attention, **options), compiler_options=QUICKLY)
  results = call(jnp.asarray(q, dtype), pages, *rest)
  return [np.asarray(result, np.float32) for result in results]


def check(case, config=CONFIG, interpret=True):
  out, log_sums = run(case, config, interpret)
  np.testing.assert_allclose(out, case.out, rtol=1e-4, atol=2e-5)
  np.testing.assert_allclose(log_sums, case.log_sums, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
  'problem',
  [
    {'cap': 2.0, 'window': 9, 'page_size': 4},
    {'with_sinks': True, 'layout': 'paired', 'chunks': LONG},
    {'window': 23, 'chunks': LONG, 'heads': 3, 'kv_heads': 1, 'layout': 'kv'},
    {'quantized': True, 'layout': 'paired', 'kv_heads': 4},
    {'quantized': True, 'layout': 'kv', 'with_sinks': True, 'cap': 5.0},
  ],
)
def test_options_and_layouts_are_those_of_dense_attention(problem):
  check(make(1, **problem))


@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_odd_shapes_cut_in_odd_ways(data):
  def draw(*values):
    return data.draw(st.sampled_from(values))

  chunks = data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 24)), min_size=1, max_size=3))
  kv_heads, tile = draw(1, 2, 3), draw(8, 24)
  case = make(
    data.draw(st.integers(0, 2**32 - 1)), chunks=(*chunks, (0, 1)), heads=kv_heads * draw(1, 2, 3), kv_heads=kv_heads,
    head_dim=8, page_size=draw(2, 4, 6), window=draw(None, 5, 33), padding=data.draw(st.integers(0, 8)),
  )  # fmt: skip
  config = Config(
    tile * draw(1, 2), tile, 48, 24, ahead=draw(0, 1, 2, 3), heads_at_once=draw(1, 2, 4), edge_heads_at_once=draw(1, 8),
    fixed_reference=draw(False, True), outer_heads_at_once=draw(None, 1), join_results=draw(False, True),
  )  # fmt: skip
  check(case, config)


def test_a_key_that_stands_out_in_the_interior_is_done_again_exactly(monkeypatch):
  case = make(2, chunks=LONG, spike=400)
  check(case)
  check(case, dataclasses.replace(CONFIG, fixed_reference=False))
  monkeypatch.setattr(Kernel, 'overflowed', lambda self, end: jnp.bool_(False))
  assert not np.isfinite(run(case)[0]).all()


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason='no interpreter of this JAX writes through a bitcast')
def test_rows_of_two_heads_a_word_are_read_and_written_in_place():
  case = make(3, chunks=((0, 20), (3, 5)), heads=16, kv_heads=4, head_dim=128)
  for config in (Config(16, 16, 16, 8, 2, 2, 4), Config(16, 8, 16, 8, 2, 1, 1, 1)):
    out, log_sums = run(case, config, dtype=jnp.bfloat16)
    np.testing.assert_allclose(out, case.out, rtol=5e-2, atol=5e-2)
    np.testing.assert_allclose(log_sums, case.log_sums, rtol=3e-2, atol=5e-2)


def test_copies_and_products_do_not_race(monkeypatch):
  monkeypatch.setattr(pallas_tpu, '_PREFETCHED_PAGES', 0)
  case = make(4, chunks=((20, 6), (0, 4)), heads=2, kv_heads=1, quantized=True)
  check(case, interpret=pltpu.InterpretParams(detect_races=True, dma_execution_mode='on_wait'))
  assert not interpret_pallas_call.races.races_found


def test_promised_lengths_give_the_same():
  case = make(5, chunks=((0, 40),), padding=0)
  actual = pallas_tpu.prefill_attention(
    *map(jnp.asarray, case.arguments), softmax_scale=SCALE, config=CONFIG, interpret=True, static_lengths=(40,)
  )
  np.testing.assert_allclose(actual, case.out, rtol=1e-4, atol=2e-5)


FACTS = {
  'dtype': 'bfloat16', 'q_dtype': 'bfloat16', 'layout': 'plain', 'query_heads': 32, 'kv_heads': 8, 'head_dim': 128,
  'page_size': 16, 'tokens': 4096, 'batch': 7, 'context': 131072,
}  # fmt: skip


@pytest.mark.parametrize('device', ['v5e', 'v5p', 'v6e', 'tpu7x'])
@pytest.mark.parametrize(
  'problem',
  [
    {},
    {'tokens': 16},
    {'query_heads': 64},
    {'query_heads': 16, 'kv_heads': 16, 'head_dim': 256},
    {'query_heads': 9, 'kv_heads': 3, 'head_dim': 64, 'layout': 'kv'},
    {'dtype': 'int8', 'page_size': 128},
    {'dtype': 'float32', 'query_heads': 64, 'head_dim': 256},
  ],
)
def test_a_rule_finds_blocks_that_fit(device, problem):
  device = devices.by_name(device)
  facts = FACTS | problem
  assert pallas_tpu.refusal(pallas_tpu.rule(device, facts), device, facts) is None


@pytest.mark.parametrize(
  'problem, config, message',
  [
    ({'head_dim': 64}, {}, 'end in an axis of 64'),
    ({'page_size': 8}, {}, 'pages of 8 tokens'),
    ({'dtype': 'int8', 'page_size': 64}, {}, 'scales of pages of 64 tokens'),
    ({'dtype': 'float16'}, {}, 'pages are float16'),
    ({}, {'tile_rows': 64}, 'whole lanes'),
    ({}, {'block_rows': 4096}, 'MiB of vector memory'),
  ],
)
def test_what_it_cannot_do_is_said(problem, config, message):
  device = devices.by_name('v6e')
  assert message in pallas_tpu.refusal(Config(**config), device, FACTS | problem)
