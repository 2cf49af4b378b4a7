"""New tokens written into pages on TPU: runs of tokens merged into tiles that pass through VMEM.

HBM is written in tiles of rows, so a token cannot be put into its row alone: its tile is read, the row replaced and the
tile written back. Tokens of a prompt chunk lie side by side in their pages, so XLA first cuts the tokens into *runs*,
each as many rows of one tile as follow one another; a run that fills its tile needs no read. The grid walks blocks of
tokens, which lie in VMEM head-major and in float32, where a window may start at any row; a block walks its runs with a
ring of tiles: reads some runs ahead, merges, and leaves writes under way. A run whose tile an earlier run of the block
writes waits for all writes before it reads, and a block ends when its writes have landed: so no order of tokens races.
Where a device has two cores they share the heads, never a tile.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conversion import QUANTIZED, cast, quantize
from pallas_kernels.devices import Device
from pallas_kernels.layouts import PageLayout
from pallas_kernels.tiles import page_of, sublanes
from pallas_kernels.token_append.tpu_kernel import walk_known_runs, walk_runs
from pallas_kernels.token_append.tpu_problem import Config, vmem_bytes
from pallas_kernels.token_append.tpu_runs import COUNT, END, FIRST, KIND, PAGE, ROW, SOURCE, cut_into_blocks, plan_runs
from pallas_kernels.tuning import Facts

__all__ = ['Config', 'append_tokens', 'refusal', 'rule']

_MOST_VMEM = 16 * 2**20  # the smallest that a device gives a kernel unasked


def append_tokens(
  pages: jax.Array,
  k: jax.Array,
  v: jax.Array,
  page: jax.Array,
  offset: jax.Array,
  scales: jax.Array | None,
  *,
  layout: PageLayout,
  config: Config,
  interpret: Any = False,
  static_runs: int | None = None,
) -> tuple[jax.Array, jax.Array | None]:
  """See `reference.append_tokens`; `static_runs` fixes the runs of a block, none of them late (for static cost)."""
  num_pages, both, heads, page_size, width = pages.shape
  live = (page >= 0) & (page < num_pages) & (offset >= 0) & (offset < page_size)
  parts = jnp.moveaxis(jnp.stack([k, v]), 1, 2)  # [2, K, T, D]
  spare = -page.shape[0] % config.block_tokens
  blocked = (-1, config.block_tokens)
  live, page, offset = (jnp.pad(one, (0, spare)).reshape(blocked) for one in (live, page, offset))
  if scales is not None:
    parts, new_scales = quantize(parts, pages.dtype)  # and [2, K, T]
    plan = plan_runs(live, page, offset, page_size, page_size)
    blocks = cut_into_blocks(new_scales, 2, config.block_tokens, page_size)  # [blocks, 2, K, columns]
    blocks = jnp.pad(blocks, ((0, 0), (0, 0), (0, -blocks.shape[2] % 8), (0, -blocks.shape[3] % 128)))
    scales = _write_scales(scales, blocks, plan, config, interpret, static_runs)

  rows = layout.pack(cast(parts, pages.dtype).astype(jnp.float32))  # [A, C, T, W]
  lanes = min(width, 128)  # a window may start at any row only where rows are one register wide
  rows = rows.reshape(both, heads, -1, width // lanes, lanes)
  rows = jnp.moveaxis(rows, 3, 2).reshape(both, heads * (width // lanes), -1, lanes)
  blocks = cut_into_blocks(rows, 2, config.block_tokens, config.tile_rows)
  plan = plan_runs(live, page, offset, config.tile_rows, page_size)
  return _write_rows(pages, blocks, plan, config, interpret, static_runs), scales


def _write_rows(pages, rows, plan, config, interpret, static_runs):
  """Runs of `rows` `[blocks, A, C * parts, rows, lanes]`, a head's lanes in `parts`, into the pages."""
  _, both, heads, _, width = pages.shape
  _, _, _, padded, lanes = rows.shape
  tile, parts = config.tile_rows, width // lanes
  cores = config.cores if both % config.cores == 0 or heads % config.cores == 0 else 1
  share = (both // cores, heads) if both % cores == 0 else (both, heads // cores)  # of a core

  def tile_of(pool, plan_ref, run, core):
    corner = (core * share[0], 0) if share[0] < both else (0, core * share[1])
    row = pl.multiple_of(plan_ref[0, ROW, run], tile)
    return pool.at[(plan_ref[0, PAGE, run], *map(pl.ds, corner, share), pl.ds(row, tile))]

  def merge(plan_ref, rows_ref, old, run):
    start, first, end = (plan_ref[0, name, run] for name in (SOURCE, FIRST, END))
    row = jax.lax.broadcasted_iota(jnp.int32, (tile, lanes), 0)
    new_row = (row >= first) & (row < end)
    for a, c, part in itertools.product(range(share[0]), range(share[1]), range(parts)):
      where = a, c, slice(None), slice(part * lanes, (part + 1) * lanes)
      window = rows_ref[0, a, c * parts + part, pl.ds(start, tile), :]
      merged = jnp.where(new_row, window, old[where].astype(jnp.float32))
      if old.dtype == jnp.int8:
        merged = merged.astype(jnp.int32)
      old[where] = merged.astype(old.dtype)

  rows_spec = pl.BlockSpec(
    (1, share[0], share[1] * parts, padded, lanes),
    lambda core, block: (block, *((core, 0) if share[0] < both else (0, core)), 0, 0),
  )
  vmem = vmem_bytes(config, pages.shape[1:], pages.dtype)
  ring = (*share, tile, width)
  return _write(pages, rows, rows_spec, plan, ring, tile_of, merge, cores, vmem, config, interpret, static_runs)


def _write_scales(scales, columns, plan, config, interpret, static_runs):
  """Runs of `columns` `[blocks, 2, K and more, columns]` into the scales `[P, 2, K, G]`, a page's at a time."""
  _, _, heads, page_size = scales.shape
  block = columns.shape[1:]

  def merge(plan_ref, columns_ref, old, run):
    start, first, end = (plan_ref[0, name, run] for name in (SOURCE, FIRST, END))
    column = jax.lax.broadcasted_iota(jnp.int32, (heads, page_size), 1)
    new_column = (column >= first) & (column < end)
    for half in range(2):
      window = pltpu.roll(columns_ref[0, half], block[2] - start, 1)[:heads, :page_size]
      old[half] = jnp.where(new_column, window, old[half])

  columns_spec = pl.BlockSpec((1, *block), lambda core, block: (block, 0, 0, 0))
  padded = -(-heads // 8) * 8 * -(-page_size // 128) * 128
  vmem = 4 * (2 * math.prod(block) + 2 * config.slots * padded)

  def tile_of(pool, plan_ref, run, core):
    return pool.at[plan_ref[0, PAGE, run]]

  ring = (2, heads, page_size)
  return _write(scales, columns, columns_spec, plan, ring, tile_of, merge, 1, vmem, config, interpret, static_runs)


def _write(pool, source, source_spec, plan, ring_shape, tile_of, merge, cores, vmem, config, interpret, static_runs):
  """Walk every block's runs, merging what `source` has into the pool's tiles."""
  slots = config.slots

  def kernel(plan_ref, source_ref, _, pool_ref, ring, read_sems, write_sems):
    core = pl.program_id(0)

    def there(run):
      return tile_of(pool_ref, plan_ref, run, core)

    def read(run):
      pltpu.make_async_copy(there(run), ring.at[run % slots], read_sems.at[run % slots]).start()

    def write(run):
      pltpu.make_async_copy(ring.at[run % slots], there(run), write_sems.at[run % slots]).start()

    def wait(run, sems):
      buffer = ring.at[run % slots]
      pltpu.make_async_copy(buffer, buffer, sems.at[run % slots]).wait()

    walk = walk_runs if static_runs is None else walk_known_runs
    walk(
      plan_ref[0, COUNT, 0] if static_runs is None else static_runs,
      slots,
      config.ahead,
      lambda run: plan_ref[0, KIND, run],
      read,
      lambda run: wait(run, read_sems),
      lambda run: merge(plan_ref, source_ref, ring.at[run % slots], run),
      write,
      lambda run: wait(run, write_sems),
    )

  return pl.pallas_call(
    kernel,
    grid=(cores, plan.shape[0]),
    in_specs=[
      pl.BlockSpec((1, *plan.shape[1:]), lambda core, block: (block, 0, 0), memory_space=pltpu.SMEM),
      source_spec,
      pl.BlockSpec(memory_space=pl.ANY),
    ],
    out_specs=pl.BlockSpec(memory_space=pl.ANY),
    out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
    scratch_shapes=[
      pltpu.VMEM((slots, *ring_shape), pool.dtype),
      pltpu.SemaphoreType.DMA((slots,)),
      pltpu.SemaphoreType.DMA((slots,)),
    ],
    input_output_aliases={2: 0},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel' if cores > 1 else 'arbitrary', 'arbitrary'),
      disable_bounds_checks=True,
      disable_semaphore_checks=True,
      vmem_limit_bytes=vmem + 2**22,
    ),
    interpret=interpret,
    name='append_tokens',
  )(plan, source, pool)


def rule(device: Device, facts: Facts) -> Config:
  """The parameters where nothing near was measured: the smallest tiles, 4 MB of them and of the tokens of a block."""
  dtype, num_tokens = jnp.dtype(str(facts['dtype'])), int(facts['tokens'])
  rows = sublanes(dtype)
  both, blocks, _, width = page_of(facts)
  elements = both * blocks * -(-width // 128) * 128
  most = max(rows, 4 * 2**20 // (4 * elements) // rows * rows)
  block = min(most, 256, -(-num_tokens // rows) * rows)
  slots = max(4, min(32, 4 * 2**20 // (elements * rows * jnp.dtype(dtype).itemsize)))
  return Config(tile_rows=rows, block_tokens=block, slots=slots, ahead=slots // 2, cores=device.tpu.cores)


def refusal(config: Config, device: Device, facts: Facts) -> str | None:
  """A reason against writing tokens so into pages on a device, or None."""
  names = ('float32', 'bfloat16', *map(str, QUANTIZED))
  dtype, page_size = jnp.dtype(str(facts['dtype'])), int(facts['page_size'])
  if dtype.name not in names:
    return f'Mosaic does not convert to {dtype}; it does {", ".join(names)}.'
  if page_size % sublanes(dtype):
    return f'{page_size} tokens a page are not whole tiles of {sublanes(dtype)} rows of {dtype}.'
  if not 0 < config.ahead < config.slots:
    return f'{config.ahead} tiles ahead leave none of {config.slots} to write.'
  if page_size % config.tile_rows or config.tile_rows % sublanes(dtype):
    return f'tiles of {config.tile_rows} rows do not cut pages of {page_size} tokens of {dtype} into whole tiles.'
  if (needed := vmem_bytes(config, page_of(facts), dtype)) > _MOST_VMEM:
    return f'blocks and tiles need {needed >> 20} MiB of vector memory, of which {_MOST_VMEM >> 20} are for a copy.'
  return None
