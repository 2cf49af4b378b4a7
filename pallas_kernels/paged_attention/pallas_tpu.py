"""Paged decode attention on TPU: the blocks of all sequences are one list, and a grid step attends to a few of them.

A grid step starts the copies of the next step's pages, waits for its own, and then runs straight on: the product of
the next queries and keys is issued before the softmax of these, so that the matrix units need not wait for the vector
units. Queries of several heads share one product as a block-diagonal matrix. That costs nothing: the matrix units are
bound by every key and value having to be pushed into them once, and not by the few rows that stream past.

The softmax is online (Milakov and Gimelshein 2018), in powers of two, its state in scratch from block to block.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.devices import Device
from pallas_kernels.online_softmax import LOG2_E
from pallas_kernels.paged_attention.tpu_kernel import BLOCK_BITS, Step
from pallas_kernels.paged_attention.tpu_problem import PREFETCHED_PAGES, Config, Problem, round_up_power
from pallas_kernels.tiles import LANES, compute_dtype, page_of, page_refusal
from pallas_kernels.tuning import Facts


def paged_attention(
  q: jax.Array,
  pages: jax.Array,
  tables: jax.Array,
  lengths: jax.Array,
  *,
  softmax_scale: float,
  sliding_window: int | None = None,
  soft_cap: float | None = None,
  sinks: jax.Array | None = None,
  scales: jax.Array | None = None,
  return_lse: bool = False,
  config: Config,
  device: Device,
  interpret: Any = False,
  static_length: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `pallas_kernels.paged_attention.paged_attention`.

  Args:
    q: `[B, H, D]` or `[B, Q, H, D]`.
    pages: `[P, A, C, G, W]`.
    tables: `[B, N]`.
    lengths: `[B]`.
    softmax_scale: Multiplies the scores.
    sliding_window: Tokens that a query sees, or None.
    soft_cap: Bounds the scores, or None.
    sinks: `[H]` or None.
    scales: `[P, 2, K, G]` of quantized pages, or None.
    return_lse: Whether to return the logarithm of each softmax's sum too.
    config: Sizes by which the work is cut.
    device: To run on.
    interpret: As for `pallas_call`.
    static_length: Promises that each sequence is so long, which must be whole blocks. Trip counts are known at trace
      time then, as a static cost needs them; what they are for other lengths is left out.
  """
  queries = q if q.ndim == 4 else q[:, None]
  problem = Problem(
    config=config,
    batch=queries.shape[0],
    query_tokens=queries.shape[1],
    query_heads=queries.shape[2],
    head_dim=queries.shape[3],
    page=pages.shape[1:],
    table_pages=tables.shape[1],
    cores=device.tpu.cores,
    softmax_scale=softmax_scale,
    sliding_window=sliding_window,
    soft_cap=soft_cap,
    static_length=static_length,
  )
  work = _list_work(problem, lengths)
  results = _attend(
    problem, lengths, work, _rows(problem, queries, pages.dtype), pages, tables, scales, sinks, return_lse, interpret
  )
  position = lengths[:, None] - problem.query_tokens + jnp.arange(problem.query_tokens)  # [B, Q]
  seen = (position >= 0) & (lengths[:, None] > 0)
  out = _unrows(problem, results['out'])
  out = jnp.where(seen[..., None, None], out, 0).astype(q.dtype).reshape(q.shape)
  if not return_lse:
    return out
  lse = _unrows(problem, results['lse'])[..., 0]
  return out, jnp.where(seen[..., None], lse, -jnp.inf).reshape(q.shape[:-1])


class _Work(NamedTuple):
  """The blocks of all sequences as one list a core, of which every grid step takes `blocks`."""

  items: jax.Array  # [cores · items] whose block (B where a list has ended), and which of its sequence in the low bits
  steps: int | jax.Array  # of the core that has most


def _list_work(problem: Problem, lengths: jax.Array) -> _Work:
  """A sequence's blocks stand together, in order, in the list of one core: each is joined to those before it."""
  batch, blocks, tokens = problem.batch, problem.config.blocks, problem.block_tokens
  first = jnp.zeros_like(lengths)
  if problem.sliding_window is not None:
    first = jnp.maximum(lengths - problem.query_tokens + 1 - problem.sliding_window, 0) // tokens
  count = jnp.where(lengths > 0, -(-lengths // tokens) - first, 0)
  # Comparing with all sequences is cheaper here than cumulative sums, searches and gathers, each a kernel of its own.
  order = jnp.arange(batch, dtype=jnp.int32)
  starts = jnp.sum(jnp.where(order < order[:, None], count, 0), axis=1)  # places in the list of all
  place = jnp.arange((problem.max_steps + 1) * blocks, dtype=jnp.int32)[None]  # [cores, items]
  longest = total = jnp.sum(count)
  if problem.cores > 1:  # cores take equal shares of the list, moved to the nearest end of a sequence
    share = jnp.arange(problem.cores + 1, dtype=jnp.int32) * total // problem.cores
    middle = starts + (count + 1) // 2
    stops = jnp.max(jnp.where(middle <= share[:, None], starts + count, 0), axis=1)  # [cores + 1]
    longest = jnp.max(stops[1:] - stops[:-1])
    place = place + stops[:-1, None]
    place = jnp.where(place < stops[1:, None], place, total)
  place = place[..., None]
  own = (starts <= place) & (place < starts + count)
  item = jnp.min(jnp.where(own, (order << BLOCK_BITS) | (place - starts + first), batch << BLOCK_BITS), axis=-1)
  steps: Any = -(-longest // blocks)
  if problem.static_blocks is not None:
    steps = problem.static_steps
  return _Work(item.reshape(-1), steps)


def _rows(problem: Problem, q: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Queries `[B, Q, H, D]` as rows `[B, C·R, D]`, those of a head next to each other."""
  batch, _, _, head_dim = q.shape
  q = q.astype(compute_dtype(q.dtype, dtype)).swapaxes(1, 2).reshape(batch, problem.columns, -1, head_dim)
  q = jnp.pad(q, ((0, 0), (0, 0), (0, problem.column_rows - q.shape[2]), (0, 0)))
  return q.reshape(batch, problem.rows, head_dim)


def _unrows(problem: Problem, rows: jax.Array) -> jax.Array:
  """Results `[B, C·R, X]` of the rows as `[B, Q, H, X]`."""
  batch, _, size = rows.shape
  real = problem.heads * problem.group * problem.query_tokens
  rows = rows.reshape(batch, problem.columns, problem.column_rows, size)[:, :, :real]
  return rows.reshape(batch, problem.query_heads, problem.query_tokens, size).swapaxes(1, 2)


def _of_heads(problem: Problem, values: jax.Array) -> jax.Array:
  """One value a query head `[H]` as `[C·R, 128]`, for every row and lane."""
  values = jnp.repeat(values.reshape(problem.columns, -1), problem.query_tokens, axis=1)
  values = jnp.pad(values, ((0, 0), (0, problem.column_rows - values.shape[1])))
  return jnp.broadcast_to(values.reshape(-1, 1), (problem.rows, LANES))


def _attend(problem, lengths, work, q, pages, tables, scales, sinks, return_lse, interpret):
  """Results of the rows by name: 'out' `[B, C·R, D]` and maybe 'lse' `[B, C·R, 128]`; unwritten for empty sequences."""
  blocks, rows, head_dim = problem.config.blocks, problem.rows, problem.head_dim
  hbm = pl.BlockSpec(memory_space=pltpu.HBM)
  operands = {'q': q, 'pages': pages}
  in_specs = {'q': hbm, 'pages': hbm}
  scratch = {
    'page': pltpu.VMEM((2, blocks, problem.block_pages, *problem.page), pages.dtype),
    'query': pltpu.VMEM((2, blocks, rows, head_dim), q.dtype),
    'own': pltpu.VMEM(
      (problem.joined * problem.share_rows, problem.joined * problem.share * problem.width), jnp.float32
    ),
    'top': pltpu.VMEM((rows, LANES), jnp.float32),
    'total': pltpu.VMEM((rows, LANES), jnp.float32),
    'sum': pltpu.VMEM((rows, head_dim), jnp.float32),
    'arrived': pltpu.SemaphoreType.DMA((4, 2, blocks)),  # page numbers, queries, pages and scales, of each block
  }
  prefetched = {'lengths': lengths, 'items': work.items}
  padding = problem.table_blocks * problem.block_pages - tables.shape[1]
  if problem.copy_pages > 1:  # a group of pages may end behind those that the sequence holds: any will do there
    tables = jnp.clip(tables, 0, pages.shape[0] - 1)
  tables = jnp.pad(tables, ((0, 0), (0, padding)))
  if tables.size <= PREFETCHED_PAGES:
    prefetched['tables'] = tables.reshape(-1)
  else:
    operands['tables'], in_specs['tables'] = tables.reshape(-1, 1, problem.block_pages), hbm
    scratch['tables'] = pltpu.SMEM((2, blocks, 1, problem.block_pages), jnp.int32)
  if scales is not None:
    operands['scales'], in_specs['scales'] = scales, hbm
    scratch['scale'] = pltpu.VMEM((2, blocks, problem.block_pages, *scales.shape[1:]), scales.dtype)
  if sinks is not None:
    operands['sinks'] = _of_heads(problem, sinks.astype(jnp.float32) * LOG2_E)
    in_specs['sinks'] = pl.BlockSpec((rows, LANES), lambda *_: (0, 0))
  shapes = {'out': jax.ShapeDtypeStruct((problem.batch, rows, head_dim), q.dtype)}
  if return_lse:
    shapes['lse'] = jax.ShapeDtypeStruct((problem.batch, rows, LANES), jnp.float32)
  for name, shape in shapes.items():
    scratch[name] = pltpu.VMEM((2, blocks, *shape.shape[1:]), shape.dtype)
  scratch['written'] = pltpu.SemaphoreType.DMA((len(shapes), 2, blocks))

  if not interpret:  # the static cost of v5e knows no copies out of vector memory, where XLA may put small arrays
    prefetched = {name: pltpu.with_memory_space_constraint(x, pltpu.HBM) for name, x in prefetched.items()}
    operands = {name: pltpu.with_memory_space_constraint(x, pltpu.HBM) for name, x in operands.items()}

  def kernel(*refs):
    *ahead, operands, results, scratch = refs
    Step(problem, dict(zip(prefetched, ahead, strict=True)), operands, results, scratch, pl.program_id(0)).run()

  return pl.pallas_call(
    kernel,
    out_shape=shapes,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(prefetched),
      grid=(problem.cores, work.steps + 1),
      in_specs=[in_specs],
      out_specs=dict.fromkeys(shapes, hbm),
      scratch_shapes=[scratch],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'),
      vmem_limit_bytes=problem.vmem_bytes(pages.dtype, q.dtype),
      disable_bounds_checks=True,
    ),
    interpret=interpret,
    name='paged_attention',
  )(*prefetched.values(), operands)


def rule(device: Device, facts: Facts) -> Config:
  """The parameters where nothing near was measured: two to four blocks a step of some MiB, as far as VMEM goes."""
  page, group = page_of(facts), int(facts['query_heads']) // int(facts['kv_heads'])
  rows = int(facts['kv_heads']) // page[1] * group * int(facts['query_tokens'])
  share = next((n for n in (1, 2, 4, 8) if n * rows >= 16), 16)
  token_bytes = page[0] * page[1] * page[3] * jnp.dtype(str(facts['dtype'])).itemsize
  longest = max(round_up_power(int(facts['context'])), int(facts['page_size']))
  tokens = min(2048, round_up_power((4 << 20) // token_bytes + 1) // 2, longest)
  blocks = max(min((8 << 20) // (tokens * token_bytes), 4), 1)
  config = Config(tokens, blocks, share, joined=2 if page[1] == 1 else 1)
  while refusal(config, device, facts) is not None and config.block_tokens > max(int(facts['page_size']), 128):
    config = dataclasses.replace(config, block_tokens=config.block_tokens // 2)
  return config


def shorten(config: Config) -> Config:
  """The same in short pieces of code: one block a step."""
  return dataclasses.replace(config, blocks=1)


def refusal(config: Config, device: Device, facts: Facts) -> str | None:
  """A reason against this kernel for a problem, or None."""
  refused = page_refusal(facts)
  if refused is not None:
    return refused
  dtype, page = jnp.dtype(str(facts['dtype'])), page_of(facts)
  problem = Problem(
    config=config,
    batch=int(facts['batch']),
    query_tokens=int(facts['query_tokens']),
    query_heads=int(facts['query_heads']),
    head_dim=int(facts['head_dim']),
    page=page,
    table_pages=-(-int(facts['context']) // page[2]),
    cores=device.tpu.cores,
  )
  if problem.table_blocks >= 1 << BLOCK_BITS or problem.batch >= 1 << 30 - BLOCK_BITS:
    return f'{problem.batch} sequences of {problem.table_blocks} blocks cannot be listed; take larger blocks.'
  if problem.smem_bytes > device.tpu.smem_bytes * 3 // 4:  # the compiler wants some for itself
    return (
      f'{problem.batch} sequences of {problem.table_blocks} blocks need {problem.smem_bytes >> 10} KiB of scalar '
      f'memory, and a {device.name} has {device.tpu.smem_bytes >> 10}; take fewer at once.'
    )
  needed = problem.vmem_bytes(dtype, compute_dtype(jnp.dtype(str(facts['q_dtype'])), dtype))
  if needed > device.tpu.vmem_bytes:
    return f'{config} needs {needed >> 20} MiB of vector memory, and a {device.name} has {device.tpu.vmem_bytes >> 20}.'
  return None
