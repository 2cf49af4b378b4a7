"""The problems for which kernels are measured and tuned, as calls for a compiler: shapes, and what they have to do."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import arguments, devices, dispatch
from pallas_kernels.layouts import PageLayout
from pallas_kernels.paged_attention import api
from pallas_kernels.static_cost import Case

_POOL_BYTES = 4 << 30


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
) -> Case:
  """A decode step whose sequences all have the same context; in whole blocks, if its trip counts are to be known."""
  layout = _layout(kv_heads, page_size, head_dim)
  slots = -(-context // page_size)
  pages = _pool(batch * slots, layout, dtype)
  q_dtype = jnp.bfloat16 if pages.dtype.itemsize == 1 else pages.dtype
  q = jax.ShapeDtypeStruct((batch, *(() if query_tokens == 1 else (query_tokens,)), query_heads, head_dim), q_dtype)
  tables, lengths = jax.ShapeDtypeStruct((batch, slots), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
  scales = _scales(pages, kv_heads)
  facts = arguments.describe(layout, q, pages, tables) | {'query_tokens': query_tokens}

  def call(q, pages, tables, lengths, scales):
    run = _tpu_kernel('paged_attention', api.IMPLEMENTATIONS, facts, config)
    known = context if static else None
    return run(q, pages, tables, lengths, scales=scales, softmax_scale=head_dim**-0.5, static_length=known)

  tokens = batch * context
  moved = _bytes(q, q, tables, lengths) + tokens * 2 * kv_heads * (
    head_dim * pages.dtype.itemsize + (0 if scales is None else 4)
  )
  flops = 4 * tokens * query_tokens * query_heads * head_dim
  return Case(call, (q, pages, tables, lengths, scales), flops, moved, kernel='paged_attention', facts=facts)


def _tpu_kernel(kernel, implementations, facts, config):
  """What dispatch takes on a TPU for a problem, or the same with parameters of one's own."""
  tpu = implementations['pallas_tpu']
  if config is None:
    return dispatch.choose(kernel, implementations, 'pallas_tpu', facts)
  chosen, device = tpu.config(**config), devices.current()
  refusal = tpu.refusal(chosen, device, facts)
  if refusal is not None:
    raise ValueError(refusal)
  return functools.partial(tpu.run, config=chosen, device=device)


def _layout(kv_heads: int, page_size: int, head_dim: int) -> PageLayout:
  """The layout in which a TPU reads such heads."""
  name = 'plain' if head_dim % 128 == 0 else 'kv' if kv_heads % 2 else 'paired'
  return PageLayout(name, kv_heads, page_size, head_dim)


def _pool(num_pages: int, layout: PageLayout, dtype: str) -> jax.ShapeDtypeStruct:
  """So many pages, or as many as fit into the smallest memory: tables may name a page twice."""
  page_bytes = math.prod(layout.page_shape) * jnp.dtype(dtype).itemsize
  return jax.ShapeDtypeStruct((min(num_pages, _POOL_BYTES // page_bytes), *layout.page_shape), dtype)


def _scales(pages: jax.ShapeDtypeStruct, kv_heads: int) -> jax.ShapeDtypeStruct | None:
  if pages.dtype.itemsize > 1:
    return None
  return jax.ShapeDtypeStruct((pages.shape[0], 2, kv_heads, pages.shape[3]), jnp.float32)


def _bytes(*arrays: jax.ShapeDtypeStruct) -> int:
  return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
