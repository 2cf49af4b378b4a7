"""Prefill attention in bfloat16 by shape: chunks over pages, beside the same over contiguous keys."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
from experiments.device_check.sizes import Chunks
from experiments.device_check.timing import Case, draw
from pallas_kernels import prefill_attention
from pallas_kernels.prefill_attention.api import IMPLEMENTATIONS


def run(context: Context) -> None:
  """Time the automatic choice at every shape, others at pages of one size, and what is beside them once."""
  sizes = context.sizes
  say_what_is_missing(context)
  most = max(sum(new + before for new, before in chunks) for chunks in sizes.prefills)
  pools = {page_size: Pool.draw(context, 2 * most, page_size) for page_size in sizes.page_sizes}
  cases = []
  for chunks in sizes.prefills:
    about = chunks
    if context.platform == 'gpu':
      cases.append(Case(f'prefill {title(chunks)}, {CUDNN}', _contiguous(context, chunks, 'cudnn'), about))
    for page_size, pool in pools.items():
      case = functools.partial(_name, chunks, page_size)
      cases.append(Case(case(AUTOMATIC), _paged(context, chunks, pool, AUTOMATIC), about))
    for name in implementations(IMPLEMENTATIONS, context.platform):
      cases.append(
        Case(_name(chunks, sizes.page_sizes[0], name), _paged(context, chunks, pools[sizes.page_sizes[0]], name), about)
      )
    query_heads, _, _ = sizes.heads
    scores = 4 * query_heads * max(new * max(before, new) for new, before in chunks)
    if scores <= sizes.scores_bytes:
      cases.append(Case(f'prefill {title(chunks)}, {DENSE}', _contiguous(context, chunks, 'xla'), about))
    else:
      context.figures.note(f'prefill {title(chunks)}, {DENSE}: not measured, its scores are {scores / 2**30:.0f} GiB')

  def add(case: Case, seconds: float, found: Mapping[str, float]) -> None:
    flops = work(case.about, sizes.heads)
    peer_s = found.get(f'prefill {title(case.about)}, {CUDNN}')
    has_peer = peer_s is not None and CUDNN not in case.name
    context.figures.add(
      case.name, flops / seconds / 1e12, 'TFLOP/s',
      peer=CUDNN if has_peer else None, peer_value=flops / peer_s / 1e12 if has_peer and peer_s else None,
      floor_share=flops / context.ceilings.flops_per_s / seconds, microseconds=round(1e6 * seconds, 2),
    )  # fmt: skip

  _ = context.ceilings  # measured now, if they were not before: while nothing else runs
  time_all(context, cases, add)


def title(chunks: Chunks) -> str:
  """Packed chunks in words."""
  if len(chunks) == 1:
    ((new, before),) = chunks
    return f'{new:,} behind {before:,}' if before else f'{new:,}'
  return f'{len(chunks)} of {chunks[0][0]:,} behind {"/".join(f"{before:,}" for _, before in chunks)}'


def work(chunks: Chunks, heads: tuple[int, int, int]) -> int:
  """FLOPs of causal attention: two products of every query with every token that it sees."""
  query_heads, _, head_dim = heads
  return 4 * query_heads * head_dim * sum(new * before + new * (new + 1) // 2 for new, before in chunks)


def _name(chunks: Chunks, page_size: int, implementation: str) -> str:
  return f'prefill {title(chunks)}, page {page_size}, {implementation}'


def _paged(context: Context, chunks: Chunks, pool: Pool, name: str) -> Callable[[], Callable[[int], Any]]:
  query_heads, _, head_dim = context.sizes.heads
  new = [one for one, _ in chunks]
  lengths = [sum(chunk) for chunk in chunks]

  def make() -> Callable[[int], Any]:
    call = jax.jit(functools.partial(prefill_attention, implementation=wanted(name)))
    tables = pool.tables(context, lengths)
    offsets, stops = jnp.asarray(np.cumsum([0, *new]), jnp.int32), jnp.asarray(lengths, jnp.int32)
    queries = [draw((sum(new), query_heads, head_dim), 'bfloat16', seed) for seed in range(4)]
    inputs = [
      (queries[i % 4], pool.pages, table, offsets, stops) for i, table in enumerate((tables * 4)[: max(4, len(tables))])
    ]
    return rotating(call, inputs)

  return make


def _contiguous(context: Context, chunks: Chunks, implementation: str) -> Callable[[], Callable[[int], Any]]:
  """The calls that it takes over contiguous keys: what lies before each chunk whole, and the chunk by itself causal.

  Their results would still have to be joined, which is not counted.
  """
  query_heads, kv_heads, head_dim = context.sizes.heads
  attend = dense(implementation)

  def call(queries, keys, values, cached_keys, cached_values):
    results = []
    for i, (_, before) in enumerate(chunks):
      results.append(attend(queries[i], keys[i], values[i], is_causal=True))
      if before:
        results.append(attend(queries[i], cached_keys[i], cached_values[i]))
    return results

  def drawn(seed: int) -> tuple[list[jax.Array], ...]:
    q, k, v, cached_k, cached_v = [], [], [], [], []
    for place, (new, before) in enumerate(chunks):
      one = 100 * seed + 10 * place
      q.append(draw((1, new, query_heads, head_dim), 'bfloat16', one))
      k.append(draw((1, new, kv_heads, head_dim), 'bfloat16', one + 1))
      v.append(draw((1, new, kv_heads, head_dim), 'bfloat16', one + 2))
      cached_k.append(draw((1, max(before, 1), kv_heads, head_dim), 'bfloat16', one + 3))
      cached_v.append(draw((1, max(before, 1), kv_heads, head_dim), 'bfloat16', one + 4))
    return q, k, v, cached_k, cached_v

  def make() -> Callable[[int], Any]:
    new_bytes = sum(2 * head_dim * (new * query_heads + 2 * (new + before) * kv_heads) for new, before in chunks)
    inputs = [drawn(seed) for seed in range(min(16, sets(context, new_bytes)))]
    return rotating(jax.jit(call), inputs)

  return make
