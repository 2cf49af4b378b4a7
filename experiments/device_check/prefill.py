"""Prefill attention in bfloat16 by shape: chunks over pages, beside the same over contiguous keys."""

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
  first = pools[sizes.page_sizes[0]]
  cases = []
  for chunks in sizes.prefills:
    if context.platform == 'gpu':
      cases.append(_contiguous(context, chunks, CUDNN, 'cudnn'))
    cases += [_paged(context, chunks, pool, AUTOMATIC) for pool in pools.values()]
    cases += [_paged(context, chunks, first, name) for name in implementations(IMPLEMENTATIONS, context.platform)]
    query_heads, _, _ = sizes.heads
    scores = 4 * query_heads * max(new * max(before, new) for new, before in chunks)
    if scores <= sizes.scores_bytes:
      cases.append(_contiguous(context, chunks, DENSE, 'xla'))
    else:
      context.figures.note(f'prefill {title(chunks)}, {DENSE}: not measured, its scores are {scores / 2**30:.0f} GiB')

  def add(case: Case, seconds: float, found: Mapping[str, float]) -> None:
    shape, flops = f'prefill {title(case.about)}', work(case.about, sizes.heads)
    add_rate(context, case, seconds, found, shape, flops, 'TFLOP/s', floor_share=context.ceilings.flops_per_s)

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


def calls(context: Context, chunks: Chunks) -> int:
  """The number of prefills of a shape in one program."""
  return calls_of(context, work(chunks, context.sizes.heads) / context.ceilings.flops_per_s)


def _paged(context: Context, chunks: Chunks, pool: Pool, name: str) -> Case:
  query_heads, _, head_dim = context.sizes.heads
  new, lengths = [one for one, _ in chunks], [sum(chunk) for chunk in chunks]
  count = calls(context, chunks)

  def attend(q, table, pages, offsets, stops):
    return prefill_attention(q, pages, table, offsets, stops, implementation=wanted(name))

  def make() -> Callable[[int], Any]:
    queries = [draw((sum(new), query_heads, head_dim), 'bfloat16', seed) for seed in range(4)]
    offsets, stops = jnp.asarray(np.cumsum([0, *new]), jnp.int32), jnp.asarray(lengths, jnp.int32)
    return chained(attend, queries, pool.tables(context, lengths), (pool.pages, offsets, stops), count)

  called = f'prefill {title(chunks)}, page {pool.page_size}, {name}'
  return Case(called, make, chunks, count, needed=name == AUTOMATIC)


def _contiguous(context: Context, chunks: Chunks, name: str, implementation: str) -> Case:
  """The calls that it takes over contiguous keys: the chunk by itself causal, and what lies before each chunk whole.

  Their results would still have to be joined, which is not counted.
  """
  query_heads, kv_heads, head_dim = context.sizes.heads
  attend = dense(implementation)
  count = calls(context, chunks)

  def attend_all(queries, keys):
    results = []
    for q, (own, cached), (_, before) in zip(queries, keys, chunks, strict=True):
      out = attend(q, *own, is_causal=True)
      results.append(attend(out, *cached) if before else out)  # of the first's answer, so that neither is left out
    return results

  def drawn(seed: int, tokens: int, heads: int) -> jax.Array:
    return draw((1, tokens, heads, head_dim), 'bfloat16', seed)

  def drawn_keys(seed: int) -> Any:
    keys = []
    for place, (new, before) in enumerate(chunks):
      one = 100 * seed + 10 * place
      keys.append(
        tuple(
          tuple(drawn(one + 2 * part + i, max(tokens, 1), kv_heads) for i in (0, 1))
          for part, tokens in enumerate((new, before))
        )
      )
    return keys

  def make() -> Callable[[int], Any]:
    new_bytes = sum(2 * head_dim * (new * query_heads + 2 * (new + before) * kv_heads) for new, before in chunks)
    seeds = range(min(16, sets(context, new_bytes)))
    queries = [
      [drawn(100 * seed + 10 * i + 4, new, query_heads) for i, (new, _) in enumerate(chunks)] for seed in seeds
    ]
    return chained(attend_all, queries, [drawn_keys(seed) for seed in seeds], (), count)

  return Case(f'prefill {title(chunks)}, {name}', make, chunks, count)
