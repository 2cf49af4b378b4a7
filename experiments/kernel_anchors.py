"""JAX's own attention kernels, called for the same problems as ours."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from pallas_kernels.static_cost import Case

QUERY_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
_TOKEN_BYTES = 2 * KV_HEADS * HEAD_DIM * 2


def flash_prefill(context: int = 4096, block: int | None = None) -> Case:
  """JAX's flash attention, keys and values repeated for every query head, as it wants them."""
  sizes = None
  if block is not None:
    sizes = flash.BlockSizes(block_q=block, block_k_major=block, block_k=block, block_b=1)
  call = functools.partial(flash.flash_attention, causal=True, sm_scale=HEAD_DIM**-0.5, block_sizes=sizes)
  array = jax.ShapeDtypeStruct((1, QUERY_HEADS, context, HEAD_DIM), jnp.bfloat16)
  return _prefill(call, (array, array, array), context)


def splash_prefill(context: int = 4096, block: int | None = None) -> Case:
  """JAX's splash attention with a causal mask, a group of query heads to each key/value head."""
  group = QUERY_HEADS // KV_HEADS
  mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((context, context))] * group)
  sizes = None if block is None else splash.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block)
  call = jax.vmap(splash.make_splash_mqa_single_device(mask, block_sizes=sizes))
  q = jax.ShapeDtypeStruct((KV_HEADS, group, context, HEAD_DIM), jnp.bfloat16)
  kv = jax.ShapeDtypeStruct((KV_HEADS, context, HEAD_DIM), jnp.bfloat16)
  return _prefill(call, (q, kv, kv), context)


def paged_decode(batch: int = 64, context: int = 2048, page_size: int = 128) -> Case:
  """JAX's paged attention, 2,048 tokens a block."""
  call = functools.partial(paged_attention, pages_per_compute_block=2048 // page_size)
  q = jax.ShapeDtypeStruct((batch, QUERY_HEADS, HEAD_DIM), jnp.bfloat16)
  pages = jax.ShapeDtypeStruct((KV_HEADS, batch * context // page_size, page_size, HEAD_DIM), jnp.bfloat16)
  inputs = (q, pages, pages, _ints(batch), _ints(batch, context // page_size))
  return _decode(call, inputs, batch, context, {3: _lengths(batch, context), 4: _tables(batch, context // page_size)})


def ragged_decode(batch: int = 64, context: int = 2048, page_size: int = 128) -> Case:
  """JAX's ragged paged attention, as a decode step, 2,048 tokens a block."""
  call = functools.partial(
    ragged_paged_attention, sm_scale=HEAD_DIM**-0.5, num_kv_pages_per_block=2048 // page_size,
    num_queries_per_block=8, vmem_limit_bytes=64 << 20,
  )  # fmt: skip
  q = jax.ShapeDtypeStruct((batch, QUERY_HEADS, HEAD_DIM), jnp.bfloat16)
  pages = jax.ShapeDtypeStruct((batch * context // page_size, page_size, 2 * KV_HEADS, HEAD_DIM), jnp.bfloat16)
  inputs = (q, pages, _ints(batch), _ints(batch, context // page_size), _ints(batch + 1), _ints(1))
  integers = {
    2: _lengths(batch, context),
    3: _tables(batch, context // page_size),
    4: functools.partial(jnp.arange, batch + 1, dtype=jnp.int32),
    5: _lengths(1, batch),
  }
  return _decode(call, inputs, batch, context, integers)


def tokamax_prefill(context: int = 4096) -> Case:
  """Tokamax's attention, if it is installed."""
  import tokamax

  q = jax.ShapeDtypeStruct((1, context, QUERY_HEADS, HEAD_DIM), jnp.bfloat16)
  kv = jax.ShapeDtypeStruct((1, context, KV_HEADS, HEAD_DIM), jnp.bfloat16)
  call = functools.partial(tokamax.dot_product_attention, is_causal=True, implementation='mosaic')
  return _prefill(call, (q, kv, kv), context)


def _prefill(call: Any, inputs: tuple[jax.ShapeDtypeStruct, ...], context: int) -> Case:
  flops = 2 * context * (context + 1) * QUERY_HEADS * HEAD_DIM
  return Case(call, inputs, flops, context * (_TOKEN_BYTES + 4 * QUERY_HEADS * HEAD_DIM))


def _decode(
  call: Any, inputs: tuple[jax.ShapeDtypeStruct, ...], batch: int, context: int, integers: dict[int, Any]
) -> Case:
  flops, moved = 4 * batch * context * QUERY_HEADS * HEAD_DIM, batch * context * _TOKEN_BYTES
  return Case(call, inputs, flops, moved, integers=integers)


def _lengths(count: int, value: int) -> Any:
  return functools.partial(jnp.full, count, value, jnp.int32)


def _tables(batch: int, slots: int) -> Any:
  return lambda: jnp.arange(batch * slots, dtype=jnp.int32).reshape(batch, slots)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.int32)
