"""Pages gathered and scattered on TPU: plain copies never leave the DMA engines, conversions pass through VMEM.

The grid walks slices of the page numbers, so that SMEM holds one slice however many pages move. In a slice the unit
is one page of every layer. A plain copy starts the unit's DMAs, HBM to HBM, on one semaphore of a ring and waits for
the unit that used it before: so many units are in flight, and no buffer is needed. A copy that converts reads a unit
(or, when its layers do not fit in VMEM at once, a group of them) into one of two buffers while it converts the other,
and writes from two more. A slice ends when its last writes have landed, so slices are independent and may run on two
cores.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.devices import Device
from pallas_kernels.layouts import PageLayout
from pallas_kernels.page_copy.conversion import QUANTIZED, SMALLEST_ABSMAX, cast
from pallas_kernels.tiles import padded_bytes, page_of, sublanes
from pallas_kernels.tuning import Facts

Layers = Sequence[jax.Array]
_COPIES = 64  # at once: enough to hide their latency
_TILE_ELEMENTS = 64 * 1024  # converted in one go: 64 registers of float32


@dataclasses.dataclass(frozen=True)
class Config:
  """Tuning of the copies.

  Attributes:
    units_in_flight: Pages (of every layer) whose plain copies are under way at once.
    slice_pages: Page numbers in SMEM at once.
    cores: Cores that share the slices; 2 where one device is two cores (v4, v5p).
    direct: Whether plain copies go from HBM to HBM; otherwise they pass through VMEM, as conversions do.
    buffer_bytes: VMEM for the four buffers of a copy that converts, unless one page of one layer needs more.
  """

  units_in_flight: int = 32
  slice_pages: int = 1024
  cores: int = 1
  direct: bool = True
  buffer_bytes: int = 8 * 2**20


def rule(device: Device, facts: Facts) -> Config:
  """The parameters where nothing near was measured: about 64 copies in flight, and all cores."""
  return Config(units_in_flight=max(2, min(32, _COPIES // int(facts['layers']))), cores=device.tpu.cores)


def refusal(config: Config, device: Device, facts: Facts) -> str | None:
  """A reason against copying pages so on a device, or None."""
  dtypes = {jnp.dtype(str(facts['dtype'])), jnp.dtype(str(facts['values']))}
  page_size = int(facts['page_size'])
  if unknown := [str(dtype) for dtype in dtypes if dtype.name not in ('float32', 'bfloat16', *map(str, QUANTIZED))]:
    return f'Mosaic has no {" or ".join(unknown)}; it has float32, bfloat16, int8 and fp8.'
  layers = int(facts['layers'])
  if (copies := config.units_in_flight * layers) > max(_COPIES, 2 * layers):
    return f'{config.units_in_flight} pages of {layers} layers are {copies} copies at once, of which {_COPIES} will do.'
  if len(dtypes) == 1 and facts['scaled'] in ('both', 'neither'):
    return None
  for dtype in dtypes:
    if page_size % sublanes(dtype):
      return f'{page_size} tokens a page are not whole tiles of {sublanes(dtype)} rows of {dtype}.'
  page_bytes = sum(padded_bytes(page_of(facts), dtype) for dtype in dtypes)
  if (needed := vmem_bytes(config, layers, page_bytes)) > device.tpu.vmem_bytes:
    return f'two pages need {needed >> 20} MiB of vector memory, and a {device.name} has {device.tpu.vmem_bytes >> 20}.'
  return None


def group_layers(config: Config, num_layers: int, page_bytes: int) -> int:
  """Layers of one converted unit, when one page of one layer takes `page_bytes` on both sides together."""
  return max(1, min(num_layers, config.buffer_bytes // (2 * page_bytes)))


def vmem_bytes(config: Config, num_layers: int, page_bytes: int) -> int:
  """VMEM that a converting copy uses."""
  return 2 * page_bytes * group_layers(config, num_layers, page_bytes)


# ---------------------------------------------------------------------------- the two functions


def gather_pages(
  layers: Layers,
  ids: jax.Array,
  scales: Layers | None,
  *,
  dtype: jnp.dtype,
  scaled: bool,
  layout: PageLayout,
  config: Config,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array | None]:
  """See `reference.gather_pages`."""
  num_pages, *page = layers[0].shape
  lead = (ids.shape[0], len(layers))
  rows = [jax.ShapeDtypeStruct((*lead, *page), dtype)]
  if scaled:
    rows.append(jax.ShapeDtypeStruct((*lead, *_scales_shape(layout)), jnp.float32))
  pools = [tuple(layers), *([] if scales is None else [tuple(scales)])]
  ids = jnp.clip(ids, 0, num_pages - 1)
  plain = dtype == layers[0].dtype and scaled == (scales is not None)
  out = _copy(ids, pools, rows, gather=True, plain=plain, layout=layout, config=config, interpret=interpret, valid=None)
  return out[0], out[1] if scaled else None


def scatter_pages(
  layers: Layers,
  ids: jax.Array,
  values: jax.Array,
  scales: Layers | None,
  value_scales: jax.Array | None,
  *,
  layout: PageLayout,
  config: Config,
  interpret: Any = False,
  all_valid: bool = False,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...] | None]:
  """See `reference.scatter_pages`; `all_valid` says that no page number is out of the pool (for static cost)."""
  pools = [tuple(layers), *([] if scales is None else [tuple(scales)])]
  rows = [values, *([] if value_scales is None else [value_scales])]
  num_pages = layers[0].shape[0]
  plain = values.dtype == layers[0].dtype and (value_scales is None) == (scales is None)

  def in_pool(page):
    return (page >= 0) & (page < num_pages)

  out = _copy(
    ids,
    pools,
    rows,
    gather=False,
    plain=plain,
    layout=layout,
    config=config,
    interpret=interpret,
    valid=None if all_valid else in_pool,
  )
  count = len(layers)
  return tuple(out[:count]), None if scales is None else tuple(out[count:])


def _scales_shape(layout: PageLayout) -> tuple[int, ...]:
  return 2, layout.kv_heads, layout.page_shape[2]


def _copy(ids, pools, rows, *, gather, plain, layout, config, interpret, valid):
  """Between `pools`, tuples of L `[P, ...]` reached by page number, and `rows`, each `[n, L, ...]`."""
  count, num_layers = rows[0].shape[:2]
  slices = min(count, max(-(-count // config.slice_pages), config.cores))
  per_slice = -(-count // slices)
  slices = -(-count // per_slice)
  ids = jnp.pad(ids.astype(jnp.int32), (0, slices * per_slice - count)).reshape(slices, 1, per_slice)
  flat_pools = [layer for pool in pools for layer in pool]
  inputs = flat_pools if gather else [*rows, *flat_pools]
  outputs = rows if gather else [jax.ShapeDtypeStruct(layer.shape, layer.dtype) for layer in flat_pools]

  def kernel(ids_ref, *refs):
    ins, outs, scratch = refs[: len(inputs)], refs[len(inputs) : len(inputs) + len(outputs)], refs[-len(scratches) :]
    pool_refs, row_refs = (ins, outs) if gather else (outs, ins[: len(rows)])
    by_pool = [pool_refs[i * num_layers : (i + 1) * num_layers] for i in range(len(pools))]
    base = pl.program_id(0) * per_slice
    here = per_slice if count % per_slice == 0 else jnp.minimum(per_slice, count - base)
    body(lambda i: ids_ref[0, 0, i], here, base, by_pool, row_refs, *scratch)

  if plain and config.direct:
    scratches = [pltpu.SemaphoreType.DMA((config.units_in_flight,))]
    body = functools.partial(_direct, gather=gather, depth=config.units_in_flight, valid=valid)
    vmem = 0
  else:
    sides = [[(pool[0].shape[1:], pool[0].dtype) for pool in pools], [(row.shape[2:], row.dtype) for row in rows]]
    page_bytes = sum(padded_bytes(*stream) for side in sides for stream in side)
    group = group_layers(config, num_layers, page_bytes)
    scratches = [[pltpu.VMEM((2, group, *shape), dtype) for shape, dtype in side] for side in sides]
    scratches += [pltpu.SemaphoreType.DMA((2,)), pltpu.SemaphoreType.DMA((2,))]
    body = functools.partial(_through_vmem, gather=gather, group=group, layout=layout, valid=valid)
    vmem = vmem_bytes(config, num_layers, page_bytes)
  call = pl.pallas_call(
    kernel,
    grid=(slices,),
    in_specs=[
      pl.BlockSpec((1, 1, per_slice), lambda i: (i, 0, 0), memory_space=pltpu.SMEM),
      *[pl.BlockSpec(memory_space=pl.ANY)] * len(inputs),
    ],
    out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(outputs),
    out_shape=[jax.ShapeDtypeStruct(out.shape, out.dtype) for out in outputs],
    scratch_shapes=scratches,
    input_output_aliases={} if gather else {1 + len(rows) + i: i for i in range(len(outputs))},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel' if config.cores > 1 else 'arbitrary',),
      disable_bounds_checks=True,
      disable_semaphore_checks=True,
      vmem_limit_bytes=vmem + 2**21 if vmem else None,
    ),
    interpret=interpret,
    name='gather_pages' if gather else 'scatter_pages',
  )
  return call(ids, *inputs)


def _loop(start, stop, step: Callable[[Any], None]) -> None:

  def body(i, carry):
    step(i)
    return carry

  jax.lax.fori_loop(start, stop, body, 0)


def _when(condition: Any, do: Callable[[], None]) -> None:
  """`pl.when`, and nothing where the answer is known now."""
  if condition is True:
    do()
  elif condition is not False:
    pl.when(condition)(do)


# ---------------------------------------------------------------------------- plain copies


def _direct(page_of, here, base, pools, rows, sems, *, gather, depth, valid):
  def each(i, do):
    _when(True if valid is None else valid(page_of(i)), do)

  def start(i):
    def do():
      for pool, row in zip(pools, rows, strict=True):
        for index, layer in enumerate(pool):
          ends = layer.at[page_of(i)], row.at[base + i, index]
          pltpu.make_async_copy(*(ends if gather else ends[::-1]), sems.at[i % depth]).start()

    each(i, do)

  def wait(i):
    def do():
      for row in rows:
        pltpu.make_async_copy(row.at[base], row.at[base], sems.at[i % depth]).wait()

    each(i, do)

  def step(i):
    wait(i - depth)
    start(i)

  ring = min(depth, here) if isinstance(here, int) else jnp.minimum(depth, here)
  _loop(0, ring, start)
  _loop(ring, here, step)
  _loop(here - ring, here, wait)


# ---------------------------------------------------------------------------- copies that convert


def _through_vmem(page_of, here, base, pools, rows, pool_buffers, row_buffers, read_sems, write_sems, **options):
  gather, group, layout, valid = (options[name] for name in ('gather', 'group', 'layout', 'valid'))
  num_layers = len(pools[0])
  groups = [(first, min(group, num_layers - first)) for first in range(0, num_layers, group)]
  read_buffers, write_buffers = (pool_buffers, row_buffers) if gather else (row_buffers, pool_buffers)

  def pool_copies(i, g, slot, sems):
    first, size = groups[g]
    for pool, buffer in zip(pools, pool_buffers, strict=True):
      for index in range(size):
        ends = pool[first + index].at[page_of(i)], buffer.at[slot, index]
        pltpu.make_async_copy(*(ends if gather else ends[::-1]), sems.at[slot]).start()

  def row_copies(i, g, slot, sems):
    first, size = groups[g]
    for row, buffer in zip(rows, row_buffers, strict=True):
      ends = buffer.at[slot, pl.ds(0, size)], row.at[base + i, pl.ds(first, size)]
      pltpu.make_async_copy(*(ends if gather else ends[::-1]), sems.at[slot]).start()

  def wait(buffers, g, slot, sems):
    for buffer in buffers:
      part = buffer.at[slot, pl.ds(0, groups[g][1])]
      pltpu.make_async_copy(part, part, sems.at[slot]).wait()

  read, write = (pool_copies, row_copies) if gather else (row_copies, pool_copies)

  def is_valid(i):
    return True if valid is None or gather else valid(page_of(i))

  def unit(i, g, earlier):
    """Convert one unit; `earlier` are the units before it, if Python knows, at most two."""
    slot = (i * len(groups) + g) % 2
    next_i, next_g = (i + 1, 0) if g + 1 == len(groups) else (i, g + 1)
    # past the end the last unit is read again, and waited for below: no branch in the loop
    read(next_i if next_g else _least(next_i, here - 1), next_g, 1 - slot, read_sems)
    wait(read_buffers, g, slot, read_sems)
    if earlier >= 2:
      before_i, before_g = divmod(g - 2, len(groups))
      _when(is_valid(i + before_i), lambda: wait(write_buffers, before_g, slot, write_sems))
    _convert(groups[g][1], slot, read_buffers, write_buffers, layout)
    _when(is_valid(i), lambda: write(i, g, slot, write_sems))

  read(0, 0, 0, read_sems)
  peeled = 2 if len(groups) == 1 else 1
  for i in range(peeled):

    def first(i=i):
      for g in range(len(groups)):
        unit(i, g, i * len(groups) + g)

    _when(i < here if isinstance(here, int) else (True if i == 0 else i < here), first)

  def later(i):
    for g in range(len(groups)):
      unit(i, g, 2)

  _loop(peeled, here, later)

  last = here * len(groups)
  wait(read_buffers, 0, last % 2, read_sems)
  for back in (2, 1):
    before_i, before_g = divmod(-back, len(groups))
    i = here + before_i
    exists = i >= 0
    if isinstance(here, int) and not exists:
      continue

    def end(i=i, g=before_g, slot=(last - back) % 2):
      _when(is_valid(i), lambda: wait(write_buffers, g, slot, write_sems))

    _when(True if isinstance(here, int) else exists, end)


def _least(a, b):
  return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def _convert(size, slot, sources, targets, layout):
  """Convert `size` layers' pages in the buffers' slot; a side with scales has two buffers."""
  _, _, both, blocks, tokens, width = sources[0].shape
  chunk = max(c for c in range(1, blocks + 1) if blocks % c == 0 and (c == 1 or c * tokens * width <= _TILE_ELEMENTS))

  def tile(layer, half, first):
    where = (slot, layer, half, pl.ds(first, chunk))
    x = sources[0][where]
    if len(sources) == len(targets):
      targets[0][where] = _cast(x, targets[0].dtype)
    elif len(targets) == 2:
      stored, scales = _quantize(x.astype(jnp.float32), targets[0].dtype, layout)
      targets[0][where] = stored
      for c in range(chunk):
        for part in range(layout.halves):
          both_index, head = _place(half, first + c, part, layout)
          targets[1][slot, layer, both_index, pl.ds(head, 1), :] = scales[part][c]
    else:
      rows = [
        [sources[1][(slot, layer, *_row(half, first + c, part, layout))] for part in range(layout.halves)]
        for c in range(chunk)
      ]
      targets[0][where] = _cast(_scale(x, rows, layout), targets[0].dtype)

  def block_step(layer, half, index):
    tile(layer, half, index * chunk)

  def layer_step(layer):
    if len(sources) == len(targets) == 2:
      targets[1][slot, layer] = sources[1][slot, layer]
    for half in range(both):
      if chunk == blocks:
        tile(layer, half, 0)
      else:
        _loop(0, blocks // chunk, functools.partial(block_step, layer, half))

  _loop(0, size, layer_step)


def _place(half, block, part, layout):
  """The indices of the scales of part `part` of the lanes of `[half, block]`: key or value, and head."""
  if layout.page_shape[0] == 1:
    return part, block
  return half, block * layout.halves + part


def _row(half, block, part, layout):
  both_index, head = _place(half, block, part, layout)
  return both_index, pl.ds(head, 1), slice(None)


def _cast(x, dtype):
  if x.dtype == dtype:
    return x
  if x.dtype not in (jnp.float32, jnp.bfloat16) or (dtype not in (jnp.float32, jnp.bfloat16)):
    x = x.astype(jnp.float32)
  if dtype == jnp.int8:  # by way of int32, whole numbers already
    return x.astype(jnp.int32).astype(jnp.int8)
  return cast(x, dtype)


def _diagonal(size):
  return jax.lax.broadcasted_iota(jnp.int32, (size, size), 0) == jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)


def _quantize(x, dtype, layout):
  """`[c, G, W]` float32 as stored elements, and for each part of the lanes c rows `[1, G]` of scales."""
  largest = QUANTIZED[jnp.dtype(dtype)]
  tokens, width = x.shape[1:]
  part_of = jax.lax.broadcasted_iota(jnp.int32, (1, 1, width), 2) // layout.head_dim
  inverse, scales = None, []
  for part in range(layout.halves):
    mine = jnp.abs(x) if layout.halves == 1 else jnp.where(part_of == part, jnp.abs(x), 0)
    absmax = jnp.max(mine, axis=-1, keepdims=True)  # [c, G, 1]
    this = largest / jnp.maximum(absmax, SMALLEST_ABSMAX)
    inverse = this if inverse is None else jnp.where(part_of == part, this, inverse)
    turned = jnp.where(_diagonal(tokens)[None], absmax, 0)  # tokens from rows to lanes
    scales.append(jnp.sum(turned, axis=1, keepdims=True) * (1 / largest))  # [c, 1, G]
  stored = x * inverse
  if dtype == jnp.int8:
    stored = jnp.round(stored)  # 127 at most: the inverse is a rounding error too large at worst
  return _cast(stored, dtype), scales


def _scale(x, rows, layout):
  """`[c, G, W]` stored elements times their scales, which are `[1, G]` by block and part of the lanes."""
  tokens, width = x.shape[1:]
  part_of = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1) // layout.head_dim
  out = []
  for block, parts in zip(x.astype(jnp.float32), rows, strict=True):
    factor = None
    for part, row in enumerate(parts):
      turned = jnp.where(_diagonal(tokens), row, 0)  # tokens from lanes to rows
      column = jnp.sum(turned, axis=1, keepdims=True)  # [G, 1]
      factor = column if factor is None else jnp.where(part_of == part, column, factor)
    out.append(block * factor)
  return jnp.stack(out)
