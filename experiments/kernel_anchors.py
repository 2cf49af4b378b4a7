"""Published kernels, called for the same problems as ours: JAX's own attention kernels, tokamax's, and XLA's products.

Some of JAX's kernels read lengths, tables and masks as they run, and an estimate counts as skipped what depends on
them. With `static=True` such a call is traced knowing what it would read: its body and its copies stay as they are, and
only the trip counts and conditions that hang on lengths come from the grid instead. Every sequence has one length then,
and a decode step one query each.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from pallas_kernels.static_cost import Case

# Their packages have functions of the same names.
_OPS = 'jax.experimental.pallas.ops.tpu'
paged = importlib.import_module(f'{_OPS}.paged_attention.paged_attention_kernel')
ragged = importlib.import_module(f'{_OPS}.ragged_paged_attention.kernel')

GROUP, KV_HEADS, HEAD_DIM = 4, 8, 128


# ---------------------------------------------------------------------------- prefill


def flash_prefill(context: int = 4096, block: int | None = None) -> Case:
  """JAX's flash attention, keys and values repeated for every query head, as it wants them."""
  sizes = None
  if block is not None:
    sizes = flash.BlockSizes(block_q=block, block_k_major=block, block_k=block, block_b=1)
  call = functools.partial(flash.flash_attention, causal=True, sm_scale=HEAD_DIM**-0.5, block_sizes=sizes)
  array = jax.ShapeDtypeStruct((1, GROUP * KV_HEADS, context, HEAD_DIM), jnp.bfloat16)
  return _prefill(call, (array, array, array), context, KV_HEADS)


def splash_prefill(
  context: int = 4096,
  block_q: int = 128,
  block_kv: int = 128,
  compute: int | None = None,
  kv_heads: int = KV_HEADS,
  static: bool = False,
) -> Case:
  """JAX's splash attention with a causal mask, a group of query heads to each key/value head.

  Args:
    context: Tokens.
    block_q: Queries of a block.
    block_kv: Keys of a block.
    compute: Keys of a product; all of a block's if None.
    kv_heads: Of 8; the work is that of so many.
    static: Whether blocks above the diagonal are known while it is traced.
  """
  mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((context, context))] * GROUP)
  sizes = splash.BlockSizes(block_q=block_q, block_kv=block_kv, block_kv_compute=compute or block_kv)

  def next_block(h, i, j, data_next, block_mask, mask_next, next_i=False):
    del h, data_next, block_mask, next_i
    assert mask_next is None, 'a causal mask is computed, and none is read'
    needed = j * block_kv < (i + 1) * block_q
    return jax.lax.select(needed, j, 0), None, needed, True

  def call(q, k, v):
    with mock.patch.object(splash, '_next_nonzero', next_block) if static else contextlib.nullcontext():
      return jax.vmap(splash.make_splash_mqa_single_device(mask, block_sizes=sizes))(q, k, v)

  q = jax.ShapeDtypeStruct((kv_heads, GROUP, context, HEAD_DIM), jnp.bfloat16)
  kv = jax.ShapeDtypeStruct((kv_heads, context, HEAD_DIM), jnp.bfloat16)
  return _prefill(call, (q, kv, kv), context, kv_heads)


def tokamax_prefill(context: int = 4096) -> Case:
  """Tokamax's attention, if it is installed."""
  import tokamax

  q = jax.ShapeDtypeStruct((1, context, GROUP * KV_HEADS, HEAD_DIM), jnp.bfloat16)
  kv = jax.ShapeDtypeStruct((1, context, KV_HEADS, HEAD_DIM), jnp.bfloat16)
  call = functools.partial(tokamax.dot_product_attention, is_causal=True, implementation='mosaic')
  return _prefill(call, (q, kv, kv), context, KV_HEADS)


def _prefill(call: Any, inputs: tuple[jax.ShapeDtypeStruct, ...], context: int, kv_heads: int) -> Case:
  flops = 2 * context * (context + 1) * GROUP * kv_heads * HEAD_DIM
  return Case(call, inputs, flops, 2 * context * kv_heads * HEAD_DIM * (2 + 2 * GROUP))


# ---------------------------------------------------------------------------- decode


def paged_decode(
  batch: int = 64,
  context: int = 2048,
  page_size: int = 128,
  block_tokens: int = 2048,
  kv_heads: int = KV_HEADS,
  static: bool = False,
) -> Case:
  """JAX's paged attention; its work is that of `kv_heads` of 8."""

  def sequence(lengths, tables, buffer, first, *others, **options):
    del lengths, first
    known = _Reads(lambda _: jnp.int32(context)), tables, buffer, _Reads(lambda _: jnp.int32(0))
    whole(*known, *others, **options)

  def block(*references, program_ids, **options):
    _, b, h, i = program_ids
    step = (b * kv_heads + h) * blocks + i
    last = batch * kv_heads * blocks - 1
    with _when(paged, {'prefetch_first_block': lambda: step == 0, 'prefetch_next_block': lambda: step < last}):
      part(*references, program_ids=program_ids, **options)

  blocks = -(-context // block_tokens)
  whole, part = paged.paged_flash_attention_kernel_inline_seq_dim, paged.paged_flash_attention_kernel

  def call(*arguments):
    with (
      _instead(paged, 'paged_flash_attention_kernel_inline_seq_dim', sequence if static else whole),
      _instead(paged, 'paged_flash_attention_kernel', block if static else part),
    ):
      # Past its jit, which would remember what was traced here.
      return paged.paged_attention.__wrapped__(*arguments, pages_per_compute_block=block_tokens // page_size)

  q = jax.ShapeDtypeStruct((batch, GROUP * kv_heads, HEAD_DIM), jnp.bfloat16)
  pages = jax.ShapeDtypeStruct((kv_heads, batch * context // page_size, page_size, HEAD_DIM), jnp.bfloat16)
  inputs = (q, pages, pages, _ints(batch), _ints(batch, context // page_size))
  integers = {3: _lengths(batch, context), 4: _tables(batch, context // page_size)}
  return _decode(call, inputs, batch, context, kv_heads, integers)


def ragged_decode(
  batch: int = 64,
  context: int = 2048,
  page_size: int = 128,
  block_tokens: int = 2048,
  queries: int = 8,
  static: bool = False,
) -> Case:
  """JAX's ragged paged attention, as a decode step; a block has so many `queries`, each of a sequence."""

  def kernel(lengths, tables, starts, buffer, count, *others, **options):
    del lengths, starts, count
    head, some = pl.program_id(0), pl.program_id(1)
    inside: dict[str, Any] = {}  # the loops being traced

    def over_queries(body, init):
      def one(i, slot):
        inside['query'] = some * queries + i
        return body((0, inside['query'], slot))[2]

      return 1, (some + 1) * queries, jax.lax.fori_loop(0, queries, one, init[2])

    def over_blocks(body, init):
      def one(i, state):
        inside['step'] = (head * batch + inside['query']) * blocks + i
        return i + 1, body((i, state[1]))[1]

      return jax.lax.fori_loop(0, blocks, one, init)

    loops = iter((over_queries, over_blocks))  # the outer one is traced first, and the inner one in its body

    def while_loop(condition, body, init):
      del condition
      return next(loops)(body, init)

    known = (
      _Reads(lambda _: jnp.int32(context)), tables, _Reads(jnp.int32), buffer, _Reads(lambda _: jnp.int32(batch)),
    )  # fmt: skip
    with (
      _when(ragged, {'prefetch_next_kv_blk': lambda: inside['step'] < pl.num_programs(0) * batch * blocks - 1}),
      mock.patch.object(ragged, 'lax', _Module(jax.lax, while_loop=while_loop)),
    ):
      unpatched(*known, *others, **options)

  blocks = -(-context // block_tokens)
  unpatched = ragged.ragged_paged_attention_kernel

  def call(*arguments):
    with _instead(ragged, 'ragged_paged_attention_kernel', kernel if static else unpatched):
      return ragged.ragged_paged_attention.__wrapped__(
        *arguments, sm_scale=HEAD_DIM**-0.5, num_kv_pages_per_block=block_tokens // page_size,
        num_queries_per_block=queries, vmem_limit_bytes=64 << 20,
      )  # fmt: skip

  q = jax.ShapeDtypeStruct((batch, GROUP * KV_HEADS, HEAD_DIM), jnp.bfloat16)
  pages = jax.ShapeDtypeStruct((batch * context // page_size, page_size, 2 * KV_HEADS, HEAD_DIM), jnp.bfloat16)
  inputs = (q, pages, _ints(batch), _ints(batch, context // page_size), _ints(batch + 1), _ints(1))
  integers = {
    2: _lengths(batch, context),
    3: _tables(batch, context // page_size),
    4: functools.partial(jnp.arange, batch + 1, dtype=jnp.int32),
    5: _lengths(1, batch),
  }
  return _decode(call, inputs, batch, context, KV_HEADS, integers)


def _decode(
  call: Any,
  inputs: tuple[jax.ShapeDtypeStruct, ...],
  batch: int,
  context: int,
  kv_heads: int,
  integers: dict[int, Any],
) -> Case:
  tokens = batch * context * kv_heads
  return Case(call, inputs, 4 * tokens * GROUP * HEAD_DIM, 4 * tokens * HEAD_DIM, integers=integers)


# ---------------------------------------------------------------------------- products


def xla_matmul(m: int = 64, k: int = 4096, n: int = 14336, kind: str = 'int4') -> Case:
  """The product as XLA fuses it, one scale a column; its int4 weights are an array of that dtype."""

  def call(x, weights, scales):
    return (jnp.dot(x, weights.astype(x.dtype), preferred_element_type=jnp.float32) * scales).astype(x.dtype)

  dtype = jnp.dtype(kind)
  inputs = (
    jax.ShapeDtypeStruct((m, k), jnp.bfloat16),
    jax.ShapeDtypeStruct((k, n), dtype),
    jax.ShapeDtypeStruct((n,), jnp.float32),
  )
  return Case(call, inputs, 2 * m * k * n, 2 * m * (k + n) + k * n * (4 if kind == 'int4' else 8) // 8 + 4 * n)


# ---------------------------------------------------------------------------- what is read, known while tracing


class _Reads:
  """In the place of a reference: reading answers what is known, and writing changes nothing."""

  def __init__(self, answer: Callable[..., Any]):
    self.answer = answer

  def __getitem__(self, index: Any) -> Any:
    return self.answer(index)

  def __setitem__(self, index: Any, value: Any) -> None:
    pass


class _Module:
  """A module with other functions under some of its names."""

  def __init__(self, module: Any, **functions: Any):
    self._module = module
    self.__dict__.update(functions)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._module, name)


def _instead(module: Any, name: str, function: Any) -> Any:
  return mock.patch.object(module, name, function)


@contextlib.contextmanager
def _when(module: Any, conditions: dict[str, Callable[[], Any]]) -> Iterator[None]:
  """Let `pl.when` in a module take other conditions for the functions of these names."""

  def when(condition):
    def run(function):
      other = conditions.get(function.__name__)
      return pl.when(condition if other is None else other())(function)

    return run

  with mock.patch.object(module, 'pl', _Module(pl, when=when)):
    yield


def _lengths(count: int, value: int) -> Any:
  return functools.partial(jnp.full, count, value, jnp.int32)


def _tables(batch: int, slots: int) -> Any:
  return lambda: jnp.arange(batch * slots, dtype=jnp.int32).reshape(batch, slots)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.int32)
