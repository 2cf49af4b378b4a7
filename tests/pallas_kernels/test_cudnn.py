"""Attention by cuDNN without cuDNN: what is sent to XLA, and, with a stand-in for the call, all that is around it."""

import dataclasses
import functools
import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from pallas_kernels import cudnn, cudnn_trial, devices, dispatch, paged_attention, prefill_attention, tuning
from pallas_kernels.paged_attention import cudnn as decode
from pallas_kernels.prefill_attention import cudnn as prefill
from tests.pallas_kernels.dense import Paged

H100, A100, T4 = (devices.by_name(name) for name in ('h100', 'a100', 't4'))
INT32, BF16 = jnp.int32, jnp.bfloat16


def shape(*sizes: int, dtype=BF16) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(sizes, dtype)


def lowered(function, *shapes) -> str:
  return jax.jit(function).trace(*shapes).lower(lowering_platforms=('cuda',)).as_text()


# ---------------------------------------------------------------------------- the call


def call_of(text: str) -> tuple[dict, str, str]:
  """Of the only call of cuDNN in a program: what XLA is told, the attributes beside that, and the types."""
  (line,) = (line for line in text.splitlines() if cudnn.TARGET in line)
  told = re.search(r'backend_config = "((?:[^"\\]|\\.)*)"(, )?', line)
  attributes = line.replace(told[0], '').split(' {')[1].split('} : ')[0]
  return json.loads(told[1].replace('\\22', '"')), attributes, line.split(' : (')[-1]


@pytest.fixture
def jax_cudnn(monkeypatch):
  """JAX's own attention by cuDNN, told of a version that it cannot ask for here."""
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)
  return fused_attention_stablehlo


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('return_lse', [False, True])
def test_a_call_is_the_one_that_jax_makes(jax_cudnn, causal, return_lse):
  mask = jax_cudnn.MaskType.PADDING_CAUSAL if causal else jax_cudnn.MaskType.PADDING
  whole = (shape(2, 64, 4, 32), shape(2, 64, 2, 32), shape(2, 64, 2, 32), shape(2, dtype=INT32), shape(2, dtype=INT32))

  def theirs(q, k, v, rows, cached):
    return jax_cudnn.dot_product_attention(
      q, k, v, q_seqlen=rows, kv_seqlen=cached, scale=0.5, mask_type=mask, return_residual=return_lse
    )

  def ours(q, k, v, rows, cached):
    return cudnn.attend(q, k, v, rows, cached, softmax_scale=0.5, causal=causal, return_lse=return_lse)

  assert call_of(lowered(ours, *whole)) == call_of(lowered(theirs, *whole))


def test_a_call_over_pages_is_the_one_that_jax_makes(jax_cudnn):
  sequences, slots = 2, 4
  pool, lengths = shape(sequences * slots, 2, 16, 32), shape(sequences, dtype=INT32)
  arguments = shape(sequences, 2, 3, 32), pool, pool, lengths, lengths, *[shape(sequences, slots, dtype=INT32)] * 2

  def theirs(q, k, v, rows, cached, *tables):
    tables = (table[:, None, :, None] for table in tables)
    return jax_cudnn.paged_attention(
      q, k, v, rows, cached, *tables, scale=0.5, mask_type=jax_cudnn.MaskType.PADDING, qkv_layout='BNTH',
      return_residual=True,
    )  # fmt: skip

  def ours(q, k, v, rows, cached, *tables):
    return cudnn.attend(q, k, v, rows, cached, softmax_scale=0.5, tables=tables, heads_first=True, return_lse=True)

  assert call_of(lowered(ours, *arguments)) == call_of(lowered(theirs, *arguments))


def test_rows_lie_as_the_model_has_them_and_pages_as_the_pool_has_them():
  arguments = shape(1, 64, 4, 32), shape(9, 2, 2, 16, 32), *[shape(1, 3, dtype=INT32)], *[shape(1, dtype=INT32)] * 2
  text = lowered(
    lambda q, pages, *rest: cudnn.attend_pages(q, pages, *rest, softmax_scale=0.5, apart=False), *arguments
  )
  told, attributes, types = call_of(text)
  told = told['cudnn_fmha_backend_config']
  assert told['is_paged_attention']
  assert told['bmm1_dot_dimension_numbers']['lhs_batch_dimensions'] == ['0', '2']  # [X, R, H, D]
  assert told['bmm1_dot_dimension_numbers']['rhs_batch_dimensions'] == ['0', '1']  # [2P, K, G, D]
  assert told['bmm2_dot_dimension_numbers']['rhs_contracting_dimensions'] == ['2']
  assert types.startswith('tensor<1x64x4x32xbf16>, tensor<18x2x16x32xbf16>, tensor<18x2x16x32xbf16>')
  assert 'result_layouts = [dense<[3, 1, 2, 0]>' in attributes  # rows before heads: nothing is turned round
  assert not re.search(r'stablehlo.(gather|dynamic_slice|pad).*x2x16x32xbf16', text)  # and no page is copied


# ---------------------------------------------------------------------------- a stand-in for it


def stand_in(
  q, keys, values, query_lengths, lengths, *, softmax_scale, causal=False, tables=None, heads_first=False,
  return_lse=False, leaks=True, off=0.0,
):  # fmt: skip
  """The answer expected of cuDNN, of whole blocks of keys: where it `leaks`, weights of 0 meet what may be NaN."""
  if tables is not None:
    keys, values = (
      jnp.moveaxis(blocks[table], 2, 3).reshape(table.shape[0], -1, blocks.shape[1], blocks.shape[3])
      for blocks, table in zip((keys, values), tables, strict=True)
    )
  q = jnp.moveaxis(q, 1, 2) if heads_first else q
  group = q.shape[2] // keys.shape[2]
  keys, values = (jnp.repeat(tokens, group, axis=2).astype(jnp.float32) for tokens in (keys, values))
  held = jnp.arange(keys.shape[1]) < lengths[:, None]
  scores = jnp.einsum('xrhd,xshd->xhrs', q.astype(jnp.float32), keys, precision='highest') * softmax_scale
  visible = held[:, None, None]
  if causal:
    visible &= jnp.tril(jnp.ones(scores.shape[-2:], bool))
  scores = jnp.where(visible, scores, -jnp.inf)
  lse = jax.nn.logsumexp(scores, axis=-1)
  if not leaks:
    values = jnp.where(held[..., None, None], values, 0)
  out = jnp.einsum('xhrs,xshd->xrhd', jnp.exp(scores - lse[..., None]), values, precision='highest') + off
  past = jnp.arange(out.shape[1]) >= query_lengths[:, None]
  out = jnp.where(past[..., None, None], jnp.nan, out).astype(q.dtype)  # undefined
  return jnp.moveaxis(out, 1, 2) if heads_first else out, lse if return_lse else None


@pytest.fixture
def call(monkeypatch):
  def take(**options):
    cudnn_trial._ask_rows.clear_cache()
    cudnn_trial._ask_heads.clear_cache()
    monkeypatch.setattr(cudnn, 'attend', functools.partial(stand_in, **options))

  take()
  return take


def decoded(*arguments, apart=True, return_lse=False):
  """The answer of decode, as one program: operation by operation takes seconds."""
  config = decode.Config(apart)
  run = functools.partial(decode.paged_attention, softmax_scale=0.3, config=config, device=H100, return_lse=return_lse)
  return jax.jit(run)(*arguments)


def pages_of(lengths: list[int], page_size: int, kv_heads: int = 2, head_dim: int = 8):
  rng = np.random.default_rng([page_size, *lengths])
  paged = Paged.random(rng, [max(length, 1) for length in lengths], kv_heads, head_dim, page_size)
  return rng, jnp.asarray(paged.pages), jnp.asarray(paged.tables), jnp.asarray(lengths, INT32)


def assert_same(actual, expected):
  for one, other in zip(actual, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


CHUNKS = [
  [(0, 1)],
  [(0, 37)],
  [(33, 5)],
  [(16, 16)],
  [(0, 40), (7, 0), (50, 3), (16, 64), (3, 1)],
  [(100, 9), (0, 0), (0, 0)],
  [(15, 1), (16, 33)],
]


@pytest.mark.parametrize(
  ('cached_and_new', 'page_size', 'tile_rows', 'apart'),
  [
    (chunks, *((16, 256), (16, 8), (3, 7), (1, 16))[(number + apart) % 4], apart)
    for number, chunks in enumerate(CHUNKS)
    for apart in (True, False)
  ],
)
def test_merged_calls_of_prefill_are_the_reference(call, cached_and_new, page_size, tile_rows, apart):
  call(leaks=apart)
  rng, pages, tables, lengths = pages_of([sum(pair) for pair in cached_and_new], page_size)
  offsets = np.cumsum([0, *(new for _, new in cached_and_new)]).astype(np.int32)
  q = jnp.asarray(rng.standard_normal((offsets[-1] + 3, 6, 8), np.float32))
  config, rest = prefill.Config(apart, tile_rows), (q, pages, tables, jnp.asarray(offsets), lengths)
  with jax.default_matmul_precision('highest'):
    run = functools.partial(prefill.prefill_attention, softmax_scale=0.3, return_lse=True, config=config, device=H100)
    actual = jax.jit(run)(*rest)
    expected = prefill_attention(*rest, softmax_scale=0.3, return_lse=True, implementation='reference')
  assert_same(actual, expected)
  (out, _), live = actual, offsets[-1]
  assert not out[live:].any()


@pytest.mark.parametrize(
  ('lengths', 'page_size', 'heads', 'apart'),
  [
    ([1], 16, (2, 2), True),
    ([1], 1, (8, 1), False),
    ([33, 0, 16, 7], 16, (6, 2), True),
    ([33, 0, 16, 7], 3, (8, 1), True),
    ([33, 0, 16, 7], 16, (2, 2), False),
    ([64] * 5, 1, (6, 2), True),
    ([64] * 5, 3, (6, 2), False),
    ([0, 0], 16, (8, 1), True),
    ([0, 0], 3, (2, 2), False),
  ],
)
def test_decode_is_the_reference(call, lengths, page_size, heads, apart):
  call(leaks=apart)
  rng, pages, tables, held = pages_of(lengths, page_size, kv_heads=heads[1])
  q = jnp.asarray(rng.standard_normal((len(lengths), heads[0], 8), np.float32))
  with jax.default_matmul_precision('highest'):
    actual = decoded(q, pages, tables, held, apart=apart, return_lse=True)
    expected = paged_attention(q, pages, tables, held, softmax_scale=0.3, return_lse=True, implementation='reference')
  assert_same(actual, expected)


def test_a_query_with_an_axis_of_its_own_is_one(call):
  rng, pages, tables, held = pages_of([5, 20], 4)
  q = jnp.asarray(rng.standard_normal((2, 1, 4, 8), np.float32))
  out, lse = decoded(q, pages, tables, held, return_lse=True)
  flat, flat_lse = decoded(q[:, 0], pages, tables, held, return_lse=True)
  np.testing.assert_array_equal(out[:, 0], flat)
  np.testing.assert_array_equal(lse[:, 0], flat_lse)


def test_what_nobody_holds_shows_where_cudnn_sees_it(call):
  """So pages that are not full are kept from it, unless a trial has shown that NaN does not show."""
  rng, pages, tables, held = pages_of([5, 20], 16)
  q = jnp.asarray(rng.standard_normal((2, 4, 8), np.float32))
  assert np.isnan(decoded(q, pages, tables, held, apart=False)).any()
  assert not np.isnan(decoded(q, pages, tables, held, apart=True)).any()


def test_tables_may_name_pages_that_there_are_not_where_no_token_is(call):
  rng, pages, tables, held = pages_of([5, 20, 0], 4)
  slots = np.arange(tables.shape[1]) < -(-np.asarray(held) // 4)[:, None]
  wild = jnp.where(slots, tables, jnp.asarray([[-7], [10**6], [-1]]))
  q = jnp.asarray(rng.standard_normal((3, 4, 8), np.float32))
  actual, expected = (decoded(q, pages, table, held) for table in (wild, tables))
  np.testing.assert_array_equal(actual, expected)


# ---------------------------------------------------------------------------- the trial

ROWS, HEADS = (cudnn_trial.Kind(rows, 'bfloat16', 6, 2, 16, 8) for rows in (True, False))
both = pytest.mark.parametrize('kind', [ROWS, HEADS], ids=['rows', 'heads'])
RELIABLE, KEPT_APART = cudnn_trial.Finding(None, False), cudnn_trial.Finding(None, True)


@both
def test_a_trial_finds_what_can_be_relied_on(call, kind):
  call(leaks=False)
  assert cudnn_trial.trial(kind) == RELIABLE
  call(leaks=True)
  assert cudnn_trial.trial(kind) == KEPT_APART
  assert cudnn_trial.trial(dataclasses.replace(kind, dtype='float16')) == KEPT_APART


def test_a_trial_looks_for_nan_also_where_jax_would_raise(call):
  call(leaks=True)
  with jax.debug_nans(True):
    assert cudnn_trial.trial(HEADS) == KEPT_APART


@both
def test_a_trial_says_why_not(call, monkeypatch, kind):
  call(off=0.1)
  assert re.search(r'its result differs from plain products by \d\.\de[+-]0\d of them', cudnn_trial.trial(kind).reason)
  call(off=np.nan)
  assert 'by nan of them' in cudnn_trial.trial(kind).reason

  def refuse(*args, **kwargs):
    raise NotImplementedError('no plan was found')

  call()
  monkeypatch.setattr(cudnn, 'attend', refuse)
  said = 'cuDNN was tried, and NotImplementedError was raised: no plan was found'
  assert cudnn_trial.trial(kind) == cudnn_trial.Finding(said, True)


@both
def test_a_trial_sees_keys_and_values_that_were_mixed_up(call, monkeypatch, kind):
  call()
  right = cudnn.attend

  def mixed_up(*arguments, **named):
    tables = named.pop('tables', None)
    return right(*arguments, tables=None if tables is None else tables[::-1], **named)

  monkeypatch.setattr(cudnn, 'attend', mixed_up)
  assert 'differs from plain products' in cudnn_trial.trial(kind).reason


@pytest.fixture
def tried(monkeypatch):
  """Trials that were run, on an H100 that is said to be here; `findings` are what comes of them."""
  trials: list[cudnn_trial.Kind] = []
  findings: dict[bool, cudnn_trial.Finding] = {True: RELIABLE, False: RELIABLE}
  monkeypatch.setattr(cudnn_trial, '_findings', {})
  monkeypatch.setattr(cudnn_trial, '_local', lambda device: 'a device')
  monkeypatch.setattr(cudnn_trial, 'trial', lambda kind, device: trials.append(kind) or findings[kind.rows])
  monkeypatch.setattr(dispatch, 'current', lambda: H100)
  return trials, findings


POOL = jnp.ones((2, 6, 16), BF16), jnp.ones((4, 2, 2, 8, 16), BF16), jnp.zeros((2, 2), INT32), jnp.ones(2, INT32)


def test_a_trial_runs_once_and_while_jax_traces(call, tried):
  trials, _ = tried
  for _ in range(2):
    assert jax.jit(paged_attention)(*POOL).shape == (2, 6, 16)
  assert trials == [HEADS]


def test_decode_does_not_depend_on_what_came_of_prefill(call, tried):
  trials, findings = tried
  findings[True] = cudnn_trial.Finding('cuDNN was tried, and it rained.', True)
  q, pages, tables, lengths = POOL
  offsets = jnp.array([0, 1, 2], INT32)
  with pytest.raises(ValueError, match='cudnn: cuDNN was tried, and it rained'):
    prefill_attention(q, pages, tables, offsets, lengths, implementation='cudnn')
  assert prefill_attention(q, pages, tables, offsets, lengths).shape == q.shape  # by XLA
  assert paged_attention(*POOL, implementation='cudnn').shape == q.shape
  assert set(trials) == {ROWS, HEADS}


def test_a_trial_without_memory_is_run_again(call, tried):
  trials, findings = tried
  findings[False] = cudnn_trial.Finding('cuDNN was tried, and X was raised: RESOURCE_EXHAUSTED: no room', True)
  for _ in range(2):
    with pytest.raises(ValueError, match='no room'):
      paged_attention(*POOL, implementation='cudnn')
  assert len(trials) >= 2
  findings[False] = RELIABLE
  paged_attention(*POOL, implementation='cudnn')


def test_a_row_that_lets_cudnn_see_what_shows_nan_is_passed_over(call, tried, monkeypatch, caplog):
  _, findings = tried
  findings[False] = KEPT_APART
  row = tuning.Row('h100', {}, {'apart': False}, implementation='cudnn')
  monkeypatch.setattr(tuning, 'load', lambda kernel: (row,))
  dispatch._log.cache_clear()
  with caplog.at_level(logging.INFO, 'pallas_kernels'):
    paged_attention(*POOL)
  assert 'takes cudnn, Config(apart=True) by rule, not of its row: NaN where no token is shows' in caplog.text


def test_threads_that_ask_at_once_share_a_trial(call, tried):
  trials, _ = tried
  facts = dataclasses.asdict(HEADS) | {'q_dtype': 'bfloat16', 'layout': 'plain'}
  with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda _: cudnn_trial.apart(H100, facts, rows=False), range(32)))
  assert trials == [HEADS]


def test_the_environment_leaves_it_out_and_the_log_says_so(call, tried, monkeypatch, caplog):
  monkeypatch.setenv(tuning.WITHOUT, 'cudnn, pallas_tpu')
  dispatch._log.cache_clear()
  with caplog.at_level(logging.INFO, 'pallas_kernels'):
    paged_attention(*POOL)
  assert not tried[0]
  assert 'takes xla' in caplog.text and 'not cudnn: PALLAS_KERNELS_WITHOUT leaves it out' in caplog.text
  paged_attention(*POOL, implementation='cudnn')  # by its name it is taken all the same
  assert tried[0] == [HEADS]


@pytest.mark.parametrize('wrong', ['cuddn', 'xla', 'cuDNN', 'cudnn;pallas_tpu'])
def test_what_cannot_be_left_out_is_named(monkeypatch, wrong):
  monkeypatch.setenv(tuning.WITHOUT, wrong)
  with pytest.raises(
    ValueError, match=f"PALLAS_KERNELS_WITHOUT names '{wrong}'.*cudnn, pallas_tpu, separated by commas"
  ):
    paged_attention(*POOL)


# ---------------------------------------------------------------------------- what callers may hand it


def test_lengths_of_64_bits_reach_it_as_32():
  with jax.enable_x64(True):
    text = lowered(
      functools.partial(prefill.prefill_attention, softmax_scale=1.0, config=prefill.Config(), device=H100),
      shape(64, 4, 32), shape(9, 2, 2, 16, 32), shape(3, 4, dtype=INT32), shape(4, dtype=INT32), shape(3, dtype=INT32),
    )  # fmt: skip
  for line in text.splitlines():
    if cudnn.TARGET in line:
      assert 'xi64' not in line.split('} : ')[-1]


def test_a_scale_may_be_any_number_and_one_that_is_traced_is_left_to_xla(monkeypatch, caplog):
  monkeypatch.setattr(dispatch, 'current', lambda: H100)
  scaled = functools.partial(paged_attention, softmax_scale=np.float32(0.5))
  assert cudnn.TARGET in lowered(scaled, *inputs())
  traced = lowered(
    lambda scale, *rest: paged_attention(*rest, softmax_scale=scale), shape(dtype=jnp.float32), *inputs()
  )
  assert cudnn.TARGET not in traced


def test_it_can_be_mapped(monkeypatch):
  monkeypatch.setattr(dispatch, 'current', lambda: H100)
  q, pages, tables, lengths = inputs()
  text = lowered(
    jax.vmap(paged_attention, (0, None, 0, None)),
    shape(3, *q.shape),
    pages,
    shape(3, *tables.shape, dtype=INT32),
    lengths,
  )
  assert cudnn.TARGET in text


# ---------------------------------------------------------------------------- who takes it


def inputs(dtype=BF16, head_dim=128, rows=(), layout=(2, 8), page_size=16):
  q = shape(*(rows or (4,)), 32, head_dim, dtype=dtype)
  return q, shape(9, *layout, page_size, head_dim, dtype=dtype), shape(4, 2, dtype=INT32), shape(4, dtype=INT32)


def taken(monkeypatch, caplog, device, *arguments, **options) -> str:
  monkeypatch.setattr(dispatch, 'current', lambda: device)
  dispatch._log.cache_clear()
  caplog.clear()
  with caplog.at_level(logging.INFO, 'pallas_kernels'):
    jax.eval_shape(functools.partial(paged_attention, **options), *arguments)
  return caplog.records[-1].message


def test_gpus_take_cudnn_where_it_can(monkeypatch, caplog):
  for device in (H100, A100, devices.by_name('b200'), devices.by_name('l4')):
    for dtype in (BF16, jnp.float16):
      assert f'on {device.name} takes cudnn, Config(apart=True)' in taken(monkeypatch, caplog, device, *inputs(dtype))


@pytest.mark.parametrize(
  ('device', 'arguments', 'options', 'reason'),
  [
    (T4, inputs(jnp.float16), {}, 'compute capability 8.0 and up, and t4 has 7.5'),
    (H100, inputs(jnp.float32), {}, 'bfloat16 or float16, and pages are float32'),
    (H100, inputs(), {'soft_cap': 5.0, 'sliding_window': 8}, 'no sliding_window and no soft_cap'),
    (H100, inputs(), {'sinks': np.zeros(32, np.float32)}, 'no sinks'),
    (A100, inputs(head_dim=256), {}, 'heads of 256 are no multiple of 8 up to 128'),
    (H100, inputs(head_dim=12), {}, 'heads of 12 are no multiple of 8 up to 256'),
    (H100, inputs(rows=(4, 3)), {}, 'one query a sequence, and there are 3'),
    (H100, (shape(4, 32, 128, dtype=jnp.float16), *inputs()[1:]), {}, 'q is float16, and pages are bfloat16'),
    (devices.Device('gfx942', 'gpu'), inputs(), {}, 'GPUs of NVIDIA whose compute capability is known'),
  ],
)
def test_everything_else_is_left_to_xla_with_the_reason(monkeypatch, caplog, device, arguments, options, reason):
  message = taken(monkeypatch, caplog, device, *arguments, **options)
  assert f'on {device.name} takes xla, block_tokens=1024' in message and reason in message


def test_wide_heads_are_for_later_gpus(monkeypatch, caplog):
  assert 'takes cudnn' in taken(monkeypatch, caplog, H100, *inputs(head_dim=256))


@pytest.mark.parametrize(('device', 'way'), [(H100, 'cudnn, Config(apart=True'), (A100, 'cudnn'), (T4, 'xla, blocks=')])
def test_prefill_is_taken_by_the_same(monkeypatch, caplog, device, way):
  monkeypatch.setattr(dispatch, 'current', lambda: device)
  dispatch._log.cache_clear()
  numbers = shape(2, 9, dtype=INT32), shape(3, dtype=INT32), shape(2, dtype=INT32)
  half = jnp.float16 if device is T4 else BF16
  with caplog.at_level(logging.INFO, 'pallas_kernels'):
    attend = functools.partial(prefill_attention)  # another one each time, or JAX would remember what came of the last
    jax.eval_shape(attend, shape(64, 32, 128, dtype=half), shape(9, 2, 8, 16, 128, dtype=half), *numbers)
  assert f'on {device.name} takes {way}' in caplog.text


def test_int8_pages_are_left_to_xla(monkeypatch, caplog):
  q, pages, *rest = inputs()
  pages, scales = shape(*pages.shape, dtype=jnp.int8), np.ones(pages.shape[:-1], np.float32)
  assert 'pages are int8' in taken(monkeypatch, caplog, H100, q, pages, *rest, scales=scales)


def test_other_devices_are_told_whom_it_is_for(monkeypatch):
  monkeypatch.setattr(dispatch, 'current', lambda: devices.by_name('v6e'))
  with pytest.raises(ValueError, match='cudnn: it is for GPUs, and this is v6e'):
    jax.eval_shape(functools.partial(paged_attention, implementation='cudnn'), *inputs())


def test_known_gpus_are_told_by_kind_and_unknown_ones_by_their_capability():
  class Fake:
    platform = 'gpu'

    def __init__(self, kind, capability):
      self.device_kind, self.compute_capability = kind, capability

  assert devices.of(Fake('NVIDIA H200', '9.0')) is devices.by_name('h200')
  unknown = devices.of(Fake('NVIDIA RTX 9090', '12.0'))
  assert (unknown.name, unknown.platform, unknown.gpu) == ('NVIDIA RTX 9090', 'gpu', devices.Gpu((12, 0)))
  assert devices.of(Fake('gfx90a', 'gfx90a')).gpu is None


def test_a_gpu_that_is_in_no_table_is_known_inside_a_mesh_too(monkeypatch):
  """The device of a mesh in context says its kind alone."""

  class Abstract:
    device_kind, num_cores = 'NVIDIA L40S', None

  class Real(Abstract):
    platform, compute_capability = 'gpu', '8.9'

  monkeypatch.setattr(jax, 'devices', lambda *args: [Real()])
  found = devices.of(Abstract())
  assert (found.name, found.platform, found.gpu) == ('NVIDIA L40S', 'gpu', devices.Gpu((8, 9)))


# ---------------------------------------------------------------------------- programs


@pytest.mark.parametrize('chunks', [1, 8])
def test_prefill_of_bfloat16_lowers_to_two_calls_without_a_loop(monkeypatch, chunks):
  monkeypatch.setattr(dispatch, 'current', lambda: H100)
  text = lowered(
    prefill_attention, shape(2048, 32, 128), shape(4096, 2, 8, 16, 128), shape(chunks, 8192, dtype=INT32),
    shape(chunks + 1, dtype=INT32), shape(chunks, dtype=INT32),
  )  # fmt: skip
  assert text.count(cudnn.TARGET) == 2 and 'stablehlo.while' not in text


def test_decode_of_bfloat16_lowers_to_one_call_without_a_loop(monkeypatch):
  monkeypatch.setattr(dispatch, 'current', lambda: H100)
  q, lengths = shape(64, 32, 128), shape(64, dtype=INT32)
  text = lowered(paged_attention, q, shape(4096, 2, 8, 16, 128), shape(64, 8192, dtype=INT32), lengths)
  assert text.count(cudnn.TARGET) == 1 and 'stablehlo.while' not in text
