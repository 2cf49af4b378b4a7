"""Decode attention in bfloat16 by shape: a token of each sequence over its pages, beside contiguous keys."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from experiments.device_check.context import Context
from experiments.device_check.kernels import (
  AUTOMATIC,
  CUDNN,
  DENSE,
  POOL_ELEMENTS,
  Pool,
  add_rate,
  calls_of,
  chained,
  dense,
  implementations,
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
  shapes = []
  for shape in [(batch, length) for length in sizes.contexts for batch in sizes.batches]:
    if all(pool.holds([shape[1]] * shape[0]) for pool in pools.values()):
      shapes.append(shape)
    else:
      context.figures.note(f'{title(shape)}: not measured, a pool would need more than {POOL_ELEMENTS:,} elements')
  cases = []
  for shape in shapes:
    if context.platform == 'gpu':
      cases.append(_contiguous(context, shape, CUDNN, 'cudnn'))
    cases += [_paged(context, shape, pool, AUTOMATIC) for pool in pools.values()]
    if shape[1] != sizes.contexts[0]:
      continue
    first = pools[sizes.page_sizes[0]]
    cases += [_paged(context, shape, first, name) for name in implementations(IMPLEMENTATIONS, context.platform)]
    cases.append(_contiguous(context, shape, DENSE, 'xla'))
  cases.append(_paged(context, shapes[0], pools[sizes.page_sizes[0]], AUTOMATIC, 4 * shapes[0][1]))

  time_all(context, cases, functools.partial(add, context))


def add(context: Context, case: Case, seconds: float, found: Mapping[str, float]) -> None:
  """Hand over the rate at which a decode step reads its keys and values."""
  add_rate(
    context, case, seconds, found, title(case.about), read_bytes(case.about, context.sizes.heads), 'GB/s',
    floor_share=context.ceilings.copy_bytes_per_s, bound_share=context.ceilings.bytes_per_s,
  )  # fmt: skip


def title(shape: _Shape) -> str:
  """A decode step in words."""
  return f'decode {shape[0]} at {shape[1]:,}'


def read_bytes(shape: _Shape, heads: tuple[int, int, int]) -> int:
  """Bytes of all keys and values in bfloat16, each read once."""
  batch, length = shape
  _, kv_heads, head_dim = heads
  return 2 * 2 * batch * length * kv_heads * head_dim


def calls(context: Context, shape: _Shape) -> int:
  """The number of decode steps of a shape in one program."""
  return calls_of(context, read_bytes(shape, context.sizes.heads) / context.ceilings.bytes_per_s)


def _paged(context: Context, shape: _Shape, pool: Pool, name: str, width: int | None = None) -> Case:
  batch, length = shape
  query_heads, _, head_dim = context.sizes.heads
  count = calls(context, shape)

  def attend(q, table, pages, lengths):
    return paged_attention(q, pages, table, lengths, implementation=wanted(name))

  def make() -> Callable[[int], Any]:
    queries = [draw((batch, query_heads, head_dim), 'bfloat16', seed) for seed in range(2)]
    lengths = jnp.full(batch, length, jnp.int32)
    return chained(attend, queries, pool.tables(context, [length] * batch, width), (pool.pages, lengths), count)

  wide = '' if width is None else f', in tables for {width:,}'
  called = f'{title(shape)}, page {pool.page_size}, {name}{wide}'
  return Case(called, make, shape, count, needed=name == AUTOMATIC)


def _contiguous(context: Context, shape: _Shape, name: str, implementation: str) -> Case:
  batch, length = shape
  query_heads, kv_heads, head_dim = context.sizes.heads
  count = calls(context, shape)

  def attend(q, keys, lengths):
    return dense(implementation)(q, *keys, key_value_seq_lengths=lengths)

  def make() -> Callable[[int], Any]:
    lengths = jnp.full(batch, length, jnp.int32)
    queries, keys = [], []
    for seed in range(sets(context, read_bytes(shape, context.sizes.heads))):
      queries.append(draw((batch, 1, query_heads, head_dim), 'bfloat16', 3 * seed))
      keys.append(tuple(draw((batch, length, kv_heads, head_dim), 'bfloat16', 3 * seed + part) for part in (1, 2)))
    return chained(attend, queries, keys, (lengths,), count)

  return Case(f'{title(shape)}, {name}', make, shape, count)
