"""Decode attention in bfloat16 by shape: a token of each sequence over its pages, beside contiguous keys."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.device_check.context import Context
from experiments.device_check.kernels import (
  AUTOMATIC,
  CUDNN,
  DENSE,
  Pool,
  dense,
  implementations,
  rotating,
  say_what_is_missing,
  sets,
  time_all,
  wanted,
)
from experiments.device_check.timing import Case, draw
from pallas_kernels import paged_attention
from pallas_kernels.paged_attention.api import IMPLEMENTATIONS

_Shape = tuple[int, int]  # sequences, and cached tokens of each


def run(context: Context) -> None:
  """Time the automatic choice at every shape, others at the first context, and what is beside them once."""
  sizes = context.sizes
  say_what_is_missing(context)
  most = max(sizes.batches) * max(sizes.contexts)
  pools = {page_size: Pool.draw(context, most, page_size) for page_size in sizes.page_sizes}
  shapes = [(batch, length) for length in sizes.contexts for batch in sizes.batches]
  cases = []
  for shape in shapes:
    if context.platform == 'gpu':
      cases.append(Case(f'{title(shape)}, {CUDNN}', _contiguous(context, shape, 'cudnn'), shape))
    for page_size, pool in pools.items():
      cases.append(
        Case(f'{title(shape)}, page {page_size}, {AUTOMATIC}', _paged(context, shape, pool, AUTOMATIC), shape)
      )
    if shape[1] != sizes.contexts[0]:
      continue
    first = sizes.page_sizes[0]
    for name in implementations(IMPLEMENTATIONS, context.platform):
      cases.append(Case(f'{title(shape)}, page {first}, {name}', _paged(context, shape, pools[first], name), shape))
    cases.append(Case(f'{title(shape)}, {DENSE}', _contiguous(context, shape, 'xla'), shape))
  shape, first, width = shapes[0], sizes.page_sizes[0], 4 * shapes[0][1]
  name = f'{title(shape)}, page {first}, {AUTOMATIC}, in tables for {width:,}'
  cases.append(Case(name, _paged(context, shape, pools[first], AUTOMATIC, width), shape))

  def add(case: Case, seconds: float, found: Mapping[str, float]) -> None:
    read = read_bytes(case.about, sizes.heads)
    peer_s = found.get(f'{title(case.about)}, {CUDNN}')
    has_peer = peer_s is not None and CUDNN not in case.name
    context.figures.add(
      case.name, read / seconds / 1e9, 'GB/s',
      peer=CUDNN if has_peer else None, peer_value=read / peer_s / 1e9 if has_peer and peer_s else None,
      floor_share=read / context.ceilings.copy_bytes_per_s / seconds, microseconds=round(1e6 * seconds, 2),
    )  # fmt: skip

  _ = context.ceilings
  time_all(context, cases, add)


def title(shape: _Shape) -> str:
  """A decode step in words."""
  return f'decode {shape[0]} at {shape[1]:,}'


def read_bytes(shape: _Shape, heads: tuple[int, int, int]) -> int:
  """Bytes of all keys and values in bfloat16, each read once."""
  batch, length = shape
  _, kv_heads, head_dim = heads
  return 2 * 2 * batch * length * kv_heads * head_dim


def _paged(
  context: Context, shape: _Shape, pool: Pool, name: str, width: int | None = None
) -> Callable[[], Callable[[int], Any]]:
  batch, length = shape
  query_heads, _, head_dim = context.sizes.heads

  def make() -> Callable[[int], Any]:
    call = jax.jit(functools.partial(paged_attention, implementation=wanted(name)))
    queries = [draw((batch, query_heads, head_dim), 'bfloat16', seed) for seed in range(2)]
    lengths = jnp.full(batch, length, jnp.int32)
    tables = pool.tables(context, [length] * batch, width)
    return rotating(call, [(queries[i % 2], pool.pages, table, lengths) for i, table in enumerate(tables)])

  return make


def _contiguous(context: Context, shape: _Shape, implementation: str) -> Callable[[], Callable[[int], Any]]:
  batch, length = shape
  query_heads, kv_heads, head_dim = context.sizes.heads
  attend = dense(implementation)

  def call(q, k, v, lengths):
    return attend(q, k, v, key_value_seq_lengths=lengths)

  def make() -> Callable[[int], Any]:
    lengths = jnp.full(batch, length, jnp.int32)
    inputs = []
    for seed in range(sets(context, read_bytes(shape, context.sizes.heads))):
      q = draw((batch, 1, query_heads, head_dim), 'bfloat16', 3 * seed)
      k, v = (draw((batch, length, kv_heads, head_dim), 'bfloat16', 3 * seed + part) for part in (1, 2))
      inputs.append((q, k, v, lengths))
    return rotating(jax.jit(call), inputs)

  return make
