"""Pages gathered and scattered on TPU: plain copies never leave the DMA engines, conversions pass through VMEM.

The grid walks slices of the page numbers, so that SMEM holds one slice however many pages move. In a slice the unit
is one page of every layer. A plain copy starts the unit's DMAs, HBM to HBM, on one semaphore of a ring and waits for
the unit that used it before: so many units are in flight, and no buffer is needed. A copy that converts reads a unit
(or, when its layers do not fit in VMEM at once, a group of them) into one of two buffers while it converts the other,
and writes from two more. A slice ends when its last writes have landed, so slices are independent and may run on two
cores.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conversion import QUANTIZED
from pallas_kernels.devices import Device
from pallas_kernels.layouts import PageLayout
from pallas_kernels.page_copy.tpu_kernel import copy_directly, copy_through_vmem
from pallas_kernels.page_copy.tpu_problem import Config, group_layers, vmem_bytes
from pallas_kernels.tiles import padded_bytes, page_of, sublanes
from pallas_kernels.tuning import Facts

__all__ = ['Config', 'gather_pages', 'refusal', 'rule', 'scatter_pages']

Layers = Sequence[jax.Array]
_COPIES = 64  # at once: enough to hide their latency


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
    body = functools.partial(copy_directly, gather=gather, depth=config.units_in_flight, valid=valid)
    vmem = 0
  else:
    sides = [[(pool[0].shape[1:], pool[0].dtype) for pool in pools], [(row.shape[2:], row.dtype) for row in rows]]
    page_bytes = sum(padded_bytes(*stream) for side in sides for stream in side)
    group = group_layers(config, num_layers, page_bytes)
    scratches = [[pltpu.VMEM((2, group, *shape), dtype) for shape, dtype in side] for side in sides]
    scratches += [pltpu.SemaphoreType.DMA((2,)), pltpu.SemaphoreType.DMA((2,))]
    body = functools.partial(copy_through_vmem, gather=gather, group=group, layout=layout, valid=valid)
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
