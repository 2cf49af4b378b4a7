"""Packed prefill attention on TPU: a block of rows at a time, over blocks of pages copied while the last ones are used.

The grid walks blocks of packed rows, whosever they are. For each sequence with rows in the block, its cached blocks
come in one after another: first the *edges*, in which some row does not see some token, with masks and a running
maximum; then the *interior*, which all the sequence's rows see whole. An interior block refers its exponentials to
the maximum of the edges, which hold each row's own key, so it needs neither masks nor maxima. Should a key in the
interior stand out so far that a row's sum overflows, the rows are done again with a running maximum everywhere.

Scores lie transposed, tokens down the sublanes and rows along the lanes: the product with the values then runs at
full width on 256 x 256 matrix units although a head is 128 wide, and sums need no shuffle of lanes. The products of
the next tiles stand before the softmax of this one, in straight-line code, so that the compiler can overlap them.

Scores are in units of log2(e), folded into the queries, so that a power of two takes the place of the exponential.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.devices import Device
from pallas_kernels.prefill_attention.tpu_kernel import Kernel
from pallas_kernels.prefill_attention.tpu_problem import Config, Problem
from pallas_kernels.tiles import LANES, compute_dtype, page_of, page_refusal
from pallas_kernels.tuning import Facts

_PREFETCHED_PAGES = 65_536  # page numbers that may lie in scalar memory all the time; else a sequence's are copied

__all__ = ['Config', 'prefill_attention', 'refusal', 'rule', 'shorten']


def prefill_attention(
  q: jax.Array,
  pages: jax.Array,
  tables: jax.Array,
  offsets: jax.Array,
  lengths: jax.Array,
  *,
  softmax_scale: float,
  sliding_window: int | None = None,
  soft_cap: float | None = None,
  sinks: jax.Array | None = None,
  scales: jax.Array | None = None,
  return_lse: bool = False,
  config: Config,
  device: Device | None = None,
  interpret: Any = False,
  static_lengths: tuple[int, ...] | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `pallas_kernels.prefill_attention.prefill_attention`.

  Args:
    q: `[T, H, D]`.
    pages: `[P, A, C, G, W]`.
    tables: `[B, N]`.
    offsets: `[B + 1]`.
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
    static_lengths: Promises that the chunks are whole prompts of these lengths. Trip counts are known at trace time
      then, as a static cost needs them; what they are for other lengths is left out.
  """
  problem = Problem(
    config=config,
    tokens=q.shape[0],
    query_heads=q.shape[1],
    head_dim=q.shape[2],
    page=pages.shape[1:],
    dtype=compute_dtype(q.dtype, pages.dtype),
    page_dtype=jnp.dtype(pages.dtype),
    softmax_scale=softmax_scale,
    sliding_window=sliding_window,
    soft_cap=soft_cap,
  )
  rows = _rows(problem, q.astype(problem.dtype))
  results = _attend(
    problem, device, rows, pages, tables, offsets, lengths, sinks, scales, return_lse, interpret, static_lengths
  )
  out = _unrows(problem, results['out']).astype(q.dtype)
  return (out, jnp.swapaxes(results['lse'], 0, 1)[: problem.tokens]) if return_lse else out


def _rows(problem: Problem, q: jax.Array) -> jax.Array:
  """Queries in whole blocks, as they are or `[H, T, W]`, each head in the lanes of its keys."""
  q = jnp.pad(q, ((0, problem.rows - problem.tokens), (0, 0), (0, 0)))
  if problem.rows_in_place:
    return q
  spare = problem.width - problem.head_dim
  lanes = [problem.key_lane(head) for head in range(problem.query_heads)]
  return jnp.stack([jnp.pad(q[:, h], ((0, 0), (lane, spare - lane))) for h, lane in enumerate(lanes)])


def _unrows(problem: Problem, out: jax.Array) -> jax.Array:
  """Results `[T, H, D]` of what the kernel wrote."""
  if not problem.rows_in_place:
    lanes = [problem.value_lane(head) for head in range(problem.query_heads)]
    out = jnp.stack([out[h, :, lane : lane + problem.head_dim] for h, lane in enumerate(lanes)], axis=1)
  return out[: problem.tokens]


def _attend(
  problem, device, q, pages, tables, offsets, lengths, sinks, scales, return_lse, interpret, static_lengths
) -> dict[str, jax.Array]:
  """Results by name: 'out' as the rows of `q`, and maybe 'lse' `[H, T]`."""
  block_rows = problem.config.block_rows
  blocks = problem.rows // block_rows
  cores = device.tpu.cores if device is not None and blocks % device.tpu.cores == 0 else 1

  def block_of(core, step):
    """Cores take turns at going first, so that none gets the later and longer rows only."""
    return step * cores + jnp.where(step % 2 == 0, core, cores - 1 - core) if cores > 1 else step

  if problem.rows_in_place:
    rows = pl.BlockSpec(problem.rows_block, lambda core, step, *_: (block_of(core, step), 0, 0))
  else:
    rows = pl.BlockSpec(problem.rows_block, lambda core, step, *_: (0, block_of(core, step), 0))
  scalars = {'offsets': offsets.astype(jnp.int32), 'lengths': lengths.astype(jnp.int32)}
  hbm = pl.BlockSpec(memory_space=pltpu.HBM)
  operands, in_specs = {'q': q, 'pages': pages}, {'q': rows, 'pages': hbm}
  out_shape, out_specs = {'out': jax.ShapeDtypeStruct(q.shape, q.dtype)}, {'out': rows}
  ids = (1, LANES)  # a sequence's page numbers at a time
  if tables.size <= _PREFETCHED_PAGES:
    scalars['tables'] = tables.reshape(-1)
  else:
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % LANES)))[:, None]  # a row is one copy
    operands['tables'], in_specs['tables'], ids = tables, hbm, tables.shape[1:]
  if sinks is not None:
    scalars['sinks'] = sinks.astype(jnp.float32)
  if scales is not None:
    operands['scales'], in_specs['scales'] = scales, hbm
  if return_lse:
    out_shape['lse'] = jax.ShapeDtypeStruct((problem.query_heads, problem.rows), jnp.float32)
    out_specs['lse'] = pl.BlockSpec((problem.query_heads, block_rows), lambda core, step, *_: (0, block_of(core, step)))
  chunks = None
  if static_lengths is not None:
    ends = [sum(static_lengths[: i + 1]) for i in range(len(static_lengths))]
    chunks = tuple((end - length, end, length) for end, length in zip(ends, static_lengths, strict=True))

  def kernel(*refs):
    named, scratch = refs[: len(scalars)], refs[len(scalars) + 2 :]
    inputs, outputs = refs[len(scalars) : len(scalars) + 2]
    block = block_of(pl.program_id(0), pl.program_id(1))
    Kernel(problem, chunks, block, dict(zip(scalars, named, strict=True)) | inputs | outputs, scratch).run()

  if not interpret:  # else the compiler may keep them in vector memory, and then it takes more of it than is left
    # A single number it keeps in scalar memory.
    scalars = {
      name: x if x.size == 1 else pltpu.with_memory_space_constraint(x, pltpu.HBM) for name, x in scalars.items()
    }
    operands = {name: pltpu.with_memory_space_constraint(x, pltpu.HBM) for name, x in operands.items()}
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(cores, blocks // cores),
      in_specs=[in_specs],
      out_specs=out_specs,
      scratch_shapes=[
        *(pltpu.VMEM(shape, dtype) for shape, dtype in problem.state()),
        pltpu.SMEM(ids, jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA,
        *(pltpu.VMEM(shape, dtype) for shape, dtype in problem.copies()),
      ],
    ),
    out_shape=out_shape,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'),
      vmem_limit_bytes=problem.vmem_bytes(),
      disable_bounds_checks=True,
    ),
    interpret=interpret,
    name='prefill_attention',
  )(*scalars.values(), operands)


def rule(device: Device, facts: Facts) -> Config:
  """The parameters where nothing near was measured: the largest blocks that fit, in long pieces of code."""
  heads, tokens = page_of(facts)[1], int(facts['tokens'])
  group = int(facts['query_heads']) // heads
  tile_rows = 128 if tokens <= 128 else 256
  piece = 64 if device.tpu.matrix_width == 256 else 16  # tiles; the wider the units, the more there is to hide
  if facts['dtype'] == 'float32':  # of which a product is six
    piece //= 8
  for block_rows, block_tokens in ((512, 512), (256, 512), (256, 256), (128, 256), (128, 128)):
    if block_rows >= tokens + tile_rows:
      continue
    tile = min(tile_rows, block_rows)
    at_once = math.gcd(heads, max(1, piece // (group * block_rows // tile)))
    edges = math.gcd(heads, max(1, min(32, 2 * piece) // group))
    config = Config(block_rows, tile, block_tokens, min(256, block_tokens), 4, at_once, edges)
    if refusal(config, device, facts) is None:
      return config
  return Config(128, 128, 128, 128, 2, 1, 1)


def shorten(config: Config) -> Config:
  """The same in short pieces of code: one head, and one tile of its cached tokens, at a time."""
  block_tokens = min(config.block_tokens, config.tile_tokens)
  return dataclasses.replace(
    config, block_tokens=block_tokens, heads_at_once=1, edge_heads_at_once=1, outer_heads_at_once=1
  )


def refusal(config: Config, device: Device, facts: Facts) -> str | None:
  """A reason against this kernel for a problem, or None."""
  dtype, page = jnp.dtype(str(facts['dtype'])), page_of(facts)
  refused = page_refusal(facts)
  if refused is not None:
    return refused
  if config.tile_rows % LANES or config.block_rows % config.tile_rows:
    return f'{config}: tile_rows must be whole lanes of {LANES}, and divide block_rows.'
  if LANES < config.block_rows >= int(facts['tokens']) + config.tile_rows:
    return f'{config}: blocks of {config.block_rows} rows are too large for {facts["tokens"]} tokens.'
  compute = compute_dtype(jnp.dtype(str(facts['q_dtype'])), dtype)
  heads, head_dim = int(facts['query_heads']), int(facts['head_dim'])
  problem = Problem(config, int(facts['tokens']), heads, head_dim, page, compute, dtype)
  if problem.tile_tokens % LANES:
    return f'{config}: tiles of {problem.tile_tokens} cached tokens do not fill lanes of {LANES}.'
  needed = problem.vmem_bytes()
  if needed > device.tpu.vmem_bytes:
    return f'{config} needs {needed >> 20} MiB of vector memory, and a {device.name} has {device.tpu.vmem_bytes >> 20}.'
  return None
