"""The problems for which kernels are measured and tuned, as calls for a compiler: shapes, and what they have to do."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import arguments, devices, dispatch
from pallas_kernels.layouts import PageLayout
from pallas_kernels.page_copy import api as copy_api
from pallas_kernels.page_copy import gather_pages, scatter_pages
from pallas_kernels.paged_attention.api import IMPLEMENTATIONS as PAGED_ATTENTION
from pallas_kernels.prefill_attention.api import IMPLEMENTATIONS as PREFILL_ATTENTION
from pallas_kernels.quantized_matmul import api as matmul_api
from pallas_kernels.quantized_matmul import pallas_tpu as matmul_tpu
from pallas_kernels.quantized_matmul import quantize, quantized_matmul
from pallas_kernels.static_cost import Case
from pallas_kernels.tiles import sublanes
from pallas_kernels.token_append import api as append_api
from pallas_kernels.token_append import append_tokens

_POOL_BYTES = 4 << 30
_TPU = devices.by_name('v5e')  # pages are laid out alike on all of them


def decode(
  batch: int = 64,
  context: int = 2048,
  query_heads: int = 32,
  kv_heads: int = 8,
  head_dim: int = 128,
  page_size: int = 128,
  dtype: str = 'bfloat16',
  query_tokens: int = 1,
  config: dict[str, Any] | None = None,
  static: bool = True,
  flat: bool = False,
) -> Case:
  """A decode step whose sequences all have the same context; in whole blocks, if its trip counts are to be known.

  `flat` is with queries and results as projections give and take them, heads side by side.
  """
  layout = PageLayout.best(_TPU, kv_heads, page_size, head_dim)
  slots = -(-context // page_size)
  pages = _pool(batch * slots, layout, dtype)
  q_dtype = jnp.bfloat16 if pages.dtype.itemsize == 1 else pages.dtype
  q = jax.ShapeDtypeStruct((batch, *(() if query_tokens == 1 else (query_tokens,)), query_heads, head_dim), q_dtype)
  tables, lengths = jax.ShapeDtypeStruct((batch, slots), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
  scales = _scales(pages, kv_heads)
  facts = arguments.describe(layout, q, pages, tables) | {'query_tokens': query_tokens}

  given = jax.ShapeDtypeStruct((*q.shape[:-2], query_heads * head_dim), q.dtype) if flat else q

  def call(given, pages, tables, lengths, scales):
    run = _tpu_kernel('paged_attention', PAGED_ATTENTION, facts, config)
    known, heads = context if static else None, given.reshape(q.shape)
    out = run(heads, pages, tables, lengths, scales=scales, softmax_scale=head_dim**-0.5, static_length=known)
    return out.reshape(given.shape)

  tokens = batch * context
  moved = _bytes(q, q, tables, lengths) + tokens * 2 * kv_heads * (
    head_dim * pages.dtype.itemsize + (0 if scales is None else 4)
  )
  flops = 4 * tokens * query_tokens * query_heads * head_dim
  integers = {2: lambda: _tables(batch, slots, pages), 3: lambda: jnp.full(batch, context, jnp.int32)}
  inputs = (given, pages, tables, lengths, scales)
  return Case(call, inputs, flops, moved, integers=integers, kernel='paged_attention', facts=facts)


def prefill(
  batch: int = 1,
  context: int = 4096,
  query_heads: int = 32,
  kv_heads: int = 8,
  head_dim: int = 128,
  page_size: int = 128,
  dtype: str = 'bfloat16',
  tokens: int | None = None,
  config: dict[str, Any] | None = None,
  static: bool = True,
) -> Case:
  """A prefill step: whole prompts of `context` tokens if it is static, else `tokens` of up to `batch` sequences."""
  layout = PageLayout.best(_TPU, kv_heads, page_size, head_dim)
  slots = -(-context // page_size)
  tokens = batch * context if static else tokens or 512
  pages = _pool(batch * slots, layout, dtype)
  q_dtype = jnp.bfloat16 if pages.dtype.itemsize == 1 else pages.dtype
  q = jax.ShapeDtypeStruct((tokens, query_heads, head_dim), q_dtype)
  tables, lengths = jax.ShapeDtypeStruct((batch, slots), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
  offsets, scales = jax.ShapeDtypeStruct((batch + 1,), jnp.int32), _scales(pages, kv_heads)
  facts = arguments.describe(layout, q, pages, tables) | {'tokens': tokens}

  def call(q, pages, tables, offsets, lengths, scales):
    run = _tpu_kernel('prefill_attention', PREFILL_ATTENTION, facts, config)
    known = (context,) * batch if static else None
    scale = head_dim**-0.5
    return run(q, pages, tables, offsets, lengths, scales=scales, softmax_scale=scale, static_lengths=known)

  flops = 2 * batch * context * (context + 1) * query_heads * head_dim
  moved = _bytes(q, q) + batch * context * 2 * kv_heads * head_dim * pages.dtype.itemsize
  inputs = (q, pages, tables, offsets, lengths, scales)
  integers = {
    2: lambda: _tables(batch, slots, pages),
    3: lambda: jnp.arange(batch + 1, dtype=jnp.int32) * (tokens // batch),
    4: lambda: jnp.full(batch, context, jnp.int32),
  }
  return Case(call, inputs, flops, moved, integers=integers, kernel='prefill_attention', facts=facts)


def copy(
  batch: int = 64,
  context: int = 2048,
  query_heads: int = 0,
  kv_heads: int = 8,
  head_dim: int = 128,
  page_size: int = 16,
  dtype: str = 'bfloat16',
  static: bool = False,
) -> Case:
  """Tokens appended to pages, some pages gathered, and scattered into others."""
  del query_heads, static
  layout = PageLayout.best(_TPU, kv_heads, page_size, head_dim)
  pages = _pool(batch * -(-context // page_size), layout, dtype)
  tokens = jax.ShapeDtypeStruct((batch, kv_heads, head_dim), dtype)
  numbers = jax.ShapeDtypeStruct((batch,), jnp.int32)

  def call(pages, k, v, page, offset, ids):
    pages = append_tokens(pages, k, v, page, offset, implementation='pallas_tpu')
    values = gather_pages(pages, ids, head_dim=head_dim, implementation='pallas_tpu')
    return scatter_pages(pages, ids + 1, values, implementation='pallas_tpu')

  moved = 4 * batch * math.prod(layout.page_shape) * pages.dtype.itemsize
  inputs = (pages, tokens, tokens, numbers, numbers, numbers)
  each = functools.partial(jnp.arange, batch, dtype=jnp.int32)
  integers: dict[int, Any] = {3: each, 4: lambda: each() % page_size, 5: lambda: 2 * each()}
  return Case(call, inputs, 0, moved, donated=(0,), integers=integers, kernel='page_copy')


def append(
  batch: int = 64,
  kv_heads: int = 8,
  head_dim: int = 128,
  page_size: int = 16,
  dtype: str = 'bfloat16',
  config: dict[str, Any] | None = None,
) -> Case:
  """A token of each sequence appended, each to a page of its own; at least, its tile is read and written."""
  layout = PageLayout.best(_TPU, kv_heads, page_size, head_dim)
  pages = _pool(batch * 128, layout, dtype)
  tokens = jax.ShapeDtypeStruct((batch, kv_heads, head_dim), dtype)
  numbers = jax.ShapeDtypeStruct((batch,), jnp.int32)
  facts = append_api.problem(pages, layout, pages.dtype, count=batch)

  def call(pages, k, v, page, offset):
    run = _tpu_kernel('token_append', append_api.IMPLEMENTATIONS, facts, config)
    block = run.keywords['config'].block_tokens
    if batch % block:
      raise ValueError(f'{batch} tokens are not whole blocks of {block}, so the runs of a block are not known.')
    return run(pages, k, v, page, offset, None, layout=layout, static_runs=block)[0]

  tile_bytes = math.prod(layout.page_shape) * pages.dtype.itemsize * sublanes(pages.dtype) // page_size
  each = functools.partial(jnp.arange, batch, dtype=jnp.int32)
  inputs = (pages, tokens, tokens, numbers, numbers)
  integers: dict[int, Any] = {3: each, 4: lambda: each() % page_size}
  moved = _bytes(tokens, tokens) + 2 * batch * tile_bytes
  return Case(call, inputs, 0, moved, donated=(0,), integers=integers, kernel='token_append', facts=facts)


def gather(**sizes: Any) -> Case:
  """Pages of one layer copied into one array; see `_copy_of_pages`."""
  return _copy_of_pages('gather_pages', **sizes)


def scatter(**sizes: Any) -> Case:
  """Pages of one layer put back; see `_copy_of_pages`."""
  return _copy_of_pages('scatter_pages', **sizes)


def _copy_of_pages(
  function: str,
  count: int = 128,
  kv_heads: int = 8,
  head_dim: int = 128,
  page_size: int = 16,
  dtype: str = 'bfloat16',
  config: dict[str, Any] | None = None,
) -> Case:
  """`count` pages, of which all numbers are in the pool; each is read and written once."""
  layout = PageLayout.best(_TPU, kv_heads, page_size, head_dim)
  pages = _pool(64 * count, layout, dtype)
  ids = jax.ShapeDtypeStruct((count,), jnp.int32)
  facts = copy_api.problem(function, pages, layout, pages.dtype, count=count)
  values = jax.ShapeDtypeStruct((count, 1, *layout.page_shape), dtype)

  def call(pages, ids, values):
    run = _tpu_kernel('page_copy', copy_api.IMPLEMENTATIONS[function], facts, config)
    if function == 'gather_pages':
      return run((pages,), ids, None, dtype=pages.dtype, scaled=False, layout=layout)[0]
    return run((pages,), ids, values, None, None, layout=layout, all_valid=True)[0][0]

  inputs = (pages, ids, None if function == 'gather_pages' else values)
  donated = () if function == 'gather_pages' else (0,)
  integers = {1: functools.partial(jnp.arange, count, dtype=jnp.int32)}
  moved = 2 * _bytes(values)
  return Case(call, inputs, 0, moved, donated=donated, integers=integers, kernel='page_copy', facts=facts)


def matmul(
  m: int = 64,
  k: int = 4096,
  n: int = 14336,
  kind: str = 'int4',
  group_size: int | None = None,
  dtype: str = 'bfloat16',
  config: dict[str, Any] | None = None,
) -> Case:
  """A product with quantized weights: 'int4', 'int8', or 'w8a8' with activations quantized on the way."""
  bits = 4 if kind == 'int4' else 8
  weights = jax.eval_shape(lambda w: quantize(w, bits, group_size), jax.ShapeDtypeStruct((k, n), jnp.float32))
  x = jax.ShapeDtypeStruct((m, k), dtype)
  quantized = jax.ShapeDtypeStruct((m, k), jnp.int8) if kind == 'w8a8' else x
  facts = matmul_tpu.problem(quantized, weights.values, weights.scales)

  def call(x, values, scales):
    if config is None:
      integers = kind == 'w8a8'
      return quantized_matmul(x, values, scales, quantize_activations=integers, implementation='pallas_tpu')
    run = _tpu_kernel('quantized_matmul', matmul_api.IMPLEMENTATIONS, facts, config)
    if kind != 'w8a8':
      return run(x, values, scales, out_dtype=x.dtype)
    rows, x_scales = matmul_api.quantize_rows(x)
    return run(rows, values, scales, x_scales=x_scales, out_dtype=x.dtype)

  moved = _bytes(x, weights.values, weights.scales, jax.ShapeDtypeStruct((m, n), dtype))
  inputs = (x, weights.values, weights.scales)
  return Case(call, inputs, 2 * m * k * n, moved, kernel='quantized_matmul', facts=facts)


def matmul_of_heads(
  batch: int,
  query_heads: int,
  kv_heads: int,
  head_dim: int,
  page_size: int,
  dtype: str,
  context: int = 0,
  static: bool = False,
) -> Case:
  """The output projection of attention with such heads; groups of a scale of 128 or, for large pages, all of K."""
  del kv_heads, context, static
  size_k = query_heads * head_dim
  grouped = page_size < 64 and size_k % 128 == 0
  return matmul(batch, size_k, size_k, 'int4' if page_size % 64 else 'int8', 128 if grouped else None, dtype)


def _tpu_kernel(kernel, implementations, facts, config):
  """The kernel that dispatch takes on a TPU for a problem, or the one for TPUs with the parameters of `config`."""
  tpu = implementations['pallas_tpu']
  if config is None:
    return dispatch.choose(kernel, implementations, 'pallas_tpu', facts)
  chosen, device = tpu.config(**config), devices.current()
  refusal = tpu.refusal(chosen, device, facts)
  if refusal is not None:
    raise ValueError(refusal)
  return functools.partial(tpu.run, config=chosen, device=device)


def _pool(num_pages: int, layout: PageLayout, dtype: str) -> jax.ShapeDtypeStruct:
  """So many pages, or as many as fit into the smallest memory: tables may name a page twice."""
  page_bytes = math.prod(layout.page_shape) * jnp.dtype(dtype).itemsize
  return jax.ShapeDtypeStruct((min(num_pages, _POOL_BYTES // page_bytes), *layout.page_shape), dtype)


def _tables(batch: int, slots: int, pages: jax.ShapeDtypeStruct) -> jax.Array:
  """Page tables in which every slot has a page of its own, as far as there are pages."""
  return jnp.arange(batch * slots, dtype=jnp.int32).reshape(batch, slots) % pages.shape[0]


def _scales(pages: jax.ShapeDtypeStruct, kv_heads: int) -> jax.ShapeDtypeStruct | None:
  if pages.dtype.itemsize > 1:
    return None
  return jax.ShapeDtypeStruct((pages.shape[0], 2, kv_heads, pages.shape[3]), jnp.float32)


def _bytes(*arrays: jax.ShapeDtypeStruct) -> int:
  return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
