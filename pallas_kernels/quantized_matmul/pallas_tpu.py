"""Quantized matrix product on TPU: activations stay in VMEM, quantized weights stream past them once.

One grid step a block of rows (and a part of the columns a core): it copies its activations to VMEM, then walks over the
columns, `block_n` at a time and, for large K, `block_k` rows at a time, with `depth` blocks of weights in flight. The
columns that `block_n` leaves over come first, in pieces: while they are computed the first whole block arrives. It ends
when its last results have left VMEM.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.devices import Device
from pallas_kernels.quantized_matmul.bfloat16_parts import split
from pallas_kernels.quantized_matmul.storage import UNIT
from pallas_kernels.quantized_matmul.tpu_kernel import kernel
from pallas_kernels.quantized_matmul.tpu_problem import Config, Plan, row_blocks
from pallas_kernels.tiles import LANES
from pallas_kernels.tuning import Facts

__all__ = ['Config', 'problem', 'quantized_matmul', 'refusal', 'rule', 'shorten']

_SHORT_BLOCK_N = 640  # columns of a body of under 6,000 bundles, at 64 rows
_LONGEST_BODY = 64 * 2048 * 4096  # rows times weights of a grid step


def quantized_matmul(
  x: jax.Array,
  weights: jax.Array,
  scales: jax.Array,
  *,
  x_scales: jax.Array | None = None,
  out_dtype: jax.typing.DTypeLike,
  config: Config,
  device: Device | None = None,
  interpret: Any = False,
) -> jax.Array:
  """See `pallas_kernels.quantized_matmul.quantized_matmul`; what does not fill whole tiles of 128 columns is copied."""
  facts = problem(x, weights, scales)
  plan = Plan.of(facts, config, out_dtype)
  (size_m, size_k), size_n = x.shape, weights.shape[1]
  blocks = row_blocks(size_m, config)
  x = jnp.pad(x, ((0, blocks * plan.rows - size_m), (0, plan.size_k - size_k)))
  x = jnp.stack(split(x, plan.pieces)).reshape(plan.pieces, blocks, plan.rows, plan.size_k)
  x = jnp.moveaxis(x, 0, 1).reshape(blocks, plan.pieces * plan.rows, plan.size_k)
  wide = plan.size_n * config.cores
  weights = jnp.pad(weights, ((0, plan.size_k // plan.packing - weights.shape[0]), (0, wide - size_n)))
  runs = plan.block_k // plan.run
  scales = jnp.pad(scales.astype(jnp.float32), ((0, 0), (0, wide - size_n))).reshape(-1, runs, wide)
  if x_scales is None:
    row_scales = scales  # not read
  else:
    row_scales = jnp.pad(x_scales.astype(jnp.float32), (0, blocks * plan.rows - size_m)).reshape(blocks, plan.rows, 1)
    row_scales = jnp.broadcast_to(row_scales, (blocks, plan.rows, LANES))
  out = _call(x, weights, scales, row_scales, plan, interpret)
  return out.reshape(blocks * plan.rows, wide)[:size_m, :size_n]


def problem(x: Any, weights: Any, scales: Any) -> dict[str, int | str]:
  """Facts by which parameters are chosen."""
  kind = 'int4' if weights.dtype == jnp.int32 else 'w8a8' if x.dtype == jnp.int8 else 'int8'
  (size_m, size_k), size_n = x.shape, weights.shape[1]
  return {
    'kind': kind,
    'dtype': x.dtype.name,
    'm': size_m,
    'k': size_k,
    'n': size_n,
    'group_size': size_k // scales.shape[0],
  }


def _call(x, weights, scales, row_scales, plan: Plan, interpret):
  """The kernel on padded operands: x `[blocks, pieces · rows, K]`, weights as stored, scales `[.., runs, N]`."""
  config = plan.config
  blocks = x.shape[0]
  dma = pltpu.SemaphoreType.DMA
  hbm = pl.BlockSpec(memory_space=pltpu.HBM)  # nor VMEM, where the compiler may put small operands of "any"
  return pl.pallas_call(
    functools.partial(kernel, plan=plan),
    grid=(config.cores, blocks),
    in_specs=[hbm] * 4,
    out_specs=hbm,
    out_shape=jax.ShapeDtypeStruct((blocks, plan.rows, plan.size_n * config.cores), plan.out_dtype),
    scratch_shapes=[
      *(pltpu.VMEM(shape, dtype) for shape, dtype in plan.buffers.values()),
      dma((plan.steps_k, config.lead_copies)),
      dma((config.depth, max(config.copies, config.lead_copies))),
      dma((config.depth,)),
      dma(()),
      dma((4, len(plan.out_cuts(plan.block_n)))),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel'),
      vmem_limit_bytes=plan.vmem_bytes,
      disable_bounds_checks=True,
      disable_semaphore_checks=True,
    ),
    interpret=interpret,
    name=f'quantized_matmul_{plan.kind}',
  )(x, weights, scales, row_scales)


def rule(device: Device, facts: Facts) -> Config:
  """The parameters where nothing was measured: large bodies, but under 11,000 bundles, as far as VMEM allows."""
  kind = facts['kind']
  float32 = facts['dtype'] == 'float32'
  wide = device.tpu.matrix_width >= 256
  block_m = 128 if float32 else 256
  block_n = 512 if kind != 'int4' else 2048 if wide else 1536
  grouped = int(facts['group_size']) < int(facts['k'])
  config = Config(
    block_m=block_m,
    block_n=block_n,
    lead_n=1024 if block_n == 2048 else 512,
    depth=4,
    copies=2,
    lead_copies=8,
    last_n=256,
    cores=device.tpu.cores,
    tile_k=128 if grouped else 256,
    correction='sums' if wide and grouped and not float32 else 'products',
    by_bytes=wide and grouped,
    integer=kind == 'w8a8' and _has_integers(device),
  )
  while True:
    plan = Plan.of(facts, config, 'float32')
    work = _body(facts, config, plan)
    if config.block_n <= 256 or (work <= _LONGEST_BODY and plan.vmem_bytes <= device.tpu.vmem_bytes):
      break
    config = dataclasses.replace(config, block_n=config.block_n // 2 // LANES * LANES, lead_n=256)
  while Plan.of(facts, config, 'float32').vmem_bytes > device.tpu.vmem_bytes and (
    config.depth > 2 or config.block_m > 32
  ):
    if config.depth > 2:
      config = dataclasses.replace(config, depth=config.depth - 1)
    else:
      config = dataclasses.replace(config, block_m=config.block_m // 2)
  return config


def shorten(config: Config) -> Config:
  """The same in shorter bodies."""
  return dataclasses.replace(config, block_n=min(config.block_n, _SHORT_BLOCK_N))


def refusal(config: Config, device: Device, facts: Facts) -> str | None:
  """A reason against running a problem so on a device, or None."""
  dtype, size_k, group = facts['dtype'], int(facts['k']), int(facts['group_size'])
  if dtype not in ('bfloat16', 'float32', 'int8'):
    return f'activations are {dtype}, and it takes bfloat16, float32 and int8.'
  if group < size_k and group % LANES:
    return f'groups of {group} rows are no multiple of {LANES}.'
  for name, unit in (('block_m', 32), ('block_n', LANES), ('lead_n', LANES), ('tile_n', LANES), ('tile_k', UNIT)):
    value = getattr(config, name)
    if value < unit or value % unit:
      return f'{name} is {value}, no positive multiple of {unit}.'
  if config.depth < 2:
    return f'depth is {config.depth}, and it takes at least 2.'
  if min(config.copies, config.lead_copies) < 1:
    return f'copies are {config.copies} and {config.lead_copies}, and it takes at least one.'
  if config.last_n < 0 or config.last_n % config.tile_n:
    return f'last_n is {config.last_n}, neither 0 nor a positive multiple of tile_n, {config.tile_n}.'
  if config.integer and facts['kind'] == 'w8a8' and not _has_integers(device):
    return f'config.integer is set, and {device.name} multiplies no integers.'
  plan = Plan.of(facts, config, jnp.float32)  # results may be that wide
  if config.block_n > 256 and _body(facts, config, plan) > _LONGEST_BODY:
    return f'bodies of {plan.block_n} columns are too long for {facts["m"]} rows.'
  needed = plan.vmem_bytes
  if needed > device.tpu.vmem_bytes:
    return f'it needs {needed} bytes of VMEM, and {device.name} has {device.tpu.vmem_bytes}.'
  return None


def _body(facts: Facts, config: Config, plan: Plan) -> int:
  """The measure of a body's length: rows, past those that the weights' unpacking hides, times weights."""
  rows = min(int(facts['m']), config.block_m) * (3 if facts['dtype'] == 'float32' else 1)
  return max(rows, 64) * plan.block_n * plan.block_k


def _has_integers(device: Device) -> bool:
  return device.name not in ('v4', 'tpu7x')
