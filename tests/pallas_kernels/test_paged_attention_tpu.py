"""The TPU form of decode attention, interpreted, against attention as a textbook has it."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import devices
from pallas_kernels.paged_attention import pallas_tpu
from pallas_kernels.paged_attention.tpu_problem import Config, Problem
from tests.pallas_kernels.dense import Paged, attend_with_sum

# The function of that name hides the folder from an import.
tpu_kernel = importlib.import_module('pallas_kernels.paged_attention.tpu_kernel')
V6E, V5P = devices.by_name('v6e'), devices.by_name('v5p')


@pytest.fixture(autouse=True)
def short_programs(monkeypatch):
  """Fewer copies in a straight line: interpreted, each takes long to compile."""
  monkeypatch.setattr(tpu_kernel, '_UNROLLED_COPIES', 2)


def check(
  seed,
  lengths,
  *,
  heads=(4, 2),
  head_dim=8,
  page_size=8,
  layout='plain',
  dtype=None,
  query_tokens=1,
  config=None,
  device=V6E,
  interpret=True,
  with_sinks=False,
  **options,
):
  """The kernel gives what the textbook does, garbage and all."""
  rng = np.random.default_rng(seed)
  query_heads, kv_heads = heads
  paged = Paged.random(rng, lengths, kv_heads, head_dim, page_size)
  if dtype is not None:
    paged = paged.quantized(dtype)
  pages = paged.packed(layout).pages
  q = rng.standard_normal((len(lengths), query_tokens, query_heads, head_dim), np.float32)
  sinks = rng.normal(size=query_heads).astype(np.float32) * 2 if with_sinks else None
  scale = head_dim**-0.5
  call = functools.partial(
    pallas_tpu.paged_attention, softmax_scale=scale, return_lse=True, config=config or Config(16, copy_tokens=8),
    device=device, interpret=interpret, **options,
  )  # fmt: skip
  out, lse = jax.jit(call, compiler_options={'xla_backend_optimization_level': 0})(
    jnp.asarray(q if query_tokens > 1 else q[:, 0]), jnp.asarray(pages), jnp.asarray(paged.tables),
    jnp.asarray(lengths, jnp.int32), sinks=None if sinks is None else jnp.asarray(sinks),
    scales=None if paged.scales is None else jnp.asarray(paged.scales, jnp.float32),
  )  # fmt: skip
  out, lse = (np.asarray(x).reshape(len(lengths), query_tokens, query_heads, -1) for x in (out, lse))
  for row, length in enumerate(lengths):
    for token in range(query_tokens):
      seen = max(length - query_tokens + token + 1, 0) if length else 0
      expected = attend_with_sum(
        q[row, token], paged.keys[row][:seen], paged.values[row][:seen], scale, sinks=sinks, **options
      )
      np.testing.assert_allclose(out[row, token], expected[0], rtol=2e-5, atol=2e-5, err_msg=f'{row} {token}')
      np.testing.assert_allclose(lse[row, token, :, 0], expected[1], rtol=2e-5, atol=2e-5, err_msg=f'{row} {token}')


def case(**options):
  return options


@pytest.mark.parametrize(
  'options',
  [
    case(lengths=[37, 0, 1, 16]),
    case(lengths=[5, 29, 48], config=Config(16, blocks=2, share=2, copy_tokens=16), heads=(12, 4)),
    case(lengths=[33, 0, 9], config=Config(16, blocks=3, share=4, copy_tokens=8), layout='paired', heads=(8, 4)),
    case(lengths=[20, 17], layout='kv', heads=(9, 3), page_size=3, config=Config(12, copy_tokens=6)),
    case(lengths=[40, 2, 0, 21, 7], device=V5P, sliding_window=11),
    case(lengths=[3, 30], query_tokens=4, sliding_window=13, with_sinks=True, soft_cap=2.0),
    case(lengths=[26, 8], dtype='int8', layout='paired', heads=(4, 2), query_tokens=2),
    case(lengths=[19], dtype='float8_e4m3fn', with_sinks=True),
    case(lengths=[64], config=Config(16, copy_tokens=8), heads=(16, 1), page_size=1),
    case(lengths=[50, 0, 9, 16], config=Config(16, blocks=4, copy_tokens=8, joined=2), heads=(3, 1), with_sinks=True),
    case(
      lengths=[30, 5, 17],
      config=Config(8, blocks=4, share=2, copy_tokens=8, joined=2),
      heads=(8, 4),
      dtype='int8',
      layout='paired',
      sliding_window=11,
      query_tokens=2,
    ),
  ],
  ids=lambda options: ' '.join(
    f'{name}={value}' for name, value in options.items() if name not in ('config', 'device')
  ),
)
def test_it_gives_what_the_textbook_does(options):
  check(1, **options)


def test_page_numbers_too_many_for_scalar_memory_are_looked_up_block_by_block(monkeypatch):
  monkeypatch.setattr(pallas_tpu, 'PREFETCHED_PAGES', 0)
  check(2, [37, 0, 5], config=Config(16, blocks=2, copy_tokens=8))


@settings(max_examples=4, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_it_gives_what_the_textbook_does_for_odd_shapes(data):
  def draw(*values):
    return data.draw(st.sampled_from(values))

  device = dataclasses.replace(V6E, chip=dataclasses.replace(V6E.tpu, cores=draw(1, 2)))
  layout = draw('plain', 'paired', 'kv')
  kv_heads = draw(2, 4) if layout == 'paired' else draw(1, 3, 5)
  page_size = draw(1, 4, 16)
  config = Config(
    page_size * draw(2, 8), blocks=draw(1, 2, 3), share=draw(1, 2, 4), copy_tokens=2 * page_size, joined=draw(1, 2, 3)
  )
  check(
    data.draw(st.integers(0, 2**32 - 1)),
    [*data.draw(st.lists(st.integers(0, 50), max_size=4)), 23],
    heads=(kv_heads * draw(1, 2, 3), kv_heads), head_dim=draw(4, 16), page_size=page_size, layout=layout,
    query_tokens=draw(1, 2, 3), config=config, device=device,
    with_sinks=draw(False, True), sliding_window=draw(None, 1, 17),
  )  # fmt: skip


@pytest.mark.parametrize('blocks', [(10, 9), (10, 1, 1), (1, 1, 10), (0, 3, 0, 3), (7,), (1,) * 64])
def test_cores_have_about_the_same_to_do(blocks):
  page = (2, 1, 16, 128)
  problem = Problem(Config(16, copy_tokens=16), len(blocks), 1, 1, 128, page, table_pages=10, cores=2)
  work = pallas_tpu._list_work(problem, 16 * jnp.asarray(blocks, jnp.int32))
  owners = (np.asarray(work.items) >> tpu_kernel.BLOCK_BITS).reshape(2, -1)
  done = [(core[core < len(blocks)]).size for core in owners]
  assert sum(done) == sum(blocks) and int(work.steps) == max(done)
  assert max(done) <= max(max(blocks), sum(blocks) / 2 + max(blocks) / 2)


@pytest.mark.parametrize('prefetched', [1 << 16, 0])
def test_no_copy_races_another_or_the_computation(prefetched, monkeypatch):
  monkeypatch.setattr(pallas_tpu, 'PREFETCHED_PAGES', prefetched)
  interpret = pltpu.InterpretParams(detect_races=True)
  check(3, [20, 3, 0, 17], config=Config(8, blocks=2, copy_tokens=8), head_dim=128, interpret=interpret)
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  assert not interpret_pallas_call.races.races_found
