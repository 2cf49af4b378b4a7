"""Quantized matrix product on TPU: activations stay in VMEM, quantized weights stream past them once.

One grid step a block of rows (and a part of the columns a core): it copies its activations to VMEM, then walks over the
columns, `block_n` at a time and, for large K, `block_k` rows at a time, with `depth` blocks of weights in flight. The
columns that `block_n` leaves over come first, in pieces: while they are computed the first whole block arrives.

A block is one straight run of tiles `[tile_k, tile_n]`, in which the weights of the next tile are unpacked before the
product of this one is issued, so that the vector units run beside the matrix unit. Scales multiply products, never
weights. A four-bit value n becomes the bfloat16 128 + n by two masks and no conversion (its bits are `0x4300 | n`); what
that adds to a product is 136 times the sum of the activations of its group, which is taken away again: from every
product of a group (`correction='products'`), or from their sum, by a small product of sums with scales ('sums').
It ends when the last block's result has left VMEM.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
UNIT = 64  # rows of K that packing keeps together
_BIAS = 136  # what the bit pattern of a four-bit value, read as a number, is above it: 128, and 8 of the stored value
_VMEM_BYTES = {'v4': 16 << 20, 'v5e': 128 << 20, 'v5p': 64 << 20, 'v6e': 128 << 20, 'tpu7x': 64 << 20}


@dataclasses.dataclass(frozen=True)
class Config:
  """How the kernel cuts its work; any value gives the same answer."""

  block_m: int = 256  # rows of activations at most, in VMEM at once
  block_n: int = 1280  # columns a step
  block_k: int = 4096  # rows of K a step at most
  lead_k: int = 1024  # rows of K a piece of the first, narrower step
  tile_n: int = 256  # columns a product
  tile_k: int = 256  # rows of K a product; no more than a group
  depth: int = 3  # blocks of weights in VMEM
  cores: int = 1  # parts of the columns, which a chip of several cores computes side by side
  correction: str = 'products'  # 'products' or 'sums': where four-bit weights lose what reading their bits added
  integer: bool = True  # eight-bit activations times eight-bit weights in integers, where the chip has that


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Static facts of one call: sizes after padding, and what follows from them."""

  config: Config
  kind: str  # 'int4', 'int8' or 'w8a8'
  pieces: int  # bfloat16 parts that make up one activation
  rows: int  # of a block, of each piece
  size_k: int
  size_n: int  # of one core's part
  group: int  # rows of K of one scale
  out_dtype: str

  @property
  def block_k(self) -> int:
    return _divisor(self.size_k, self.config.block_k, max(LANES, min(self.group, self.config.block_k)))

  @property
  def steps_k(self) -> int:
    return self.size_k // self.block_k

  @property
  def block_n(self) -> int:
    return min(self.config.block_n, self.size_n)

  @property
  def steps_n(self) -> int:
    return self.size_n // self.block_n

  @property
  def lead_n(self) -> int:
    return self.size_n % self.block_n

  @property
  def run(self) -> int:
    """Rows of K whose products one scale multiplies, within a block."""
    return min(self.group, self.block_k)

  @property
  def packing(self) -> int:
    """Rows of K in one row of the stored weights."""
    return 8 if self.kind == 'int4' else 1


def _divisor(size: int, most: int, unit: int) -> int:
  """The largest multiple of unit that divides size and is at most `most`; size itself if that is small or none does."""
  if size <= most:
    return size
  return next((block for block in range(most // unit * unit, 0, -unit) if size % block == 0), size)


def _unpack(words):
  """Words `[R, n]` as bfloat16 `[8R, n]`, each value 136 too large."""
  height, width = words.shape
  parts = []
  for index in range(4):
    pairs = jax.lax.shift_right_logical(words, jnp.int32(4 * index)) if index else words
    numbers = pltpu.bitcast((pairs & 0x000F000F) | 0x43004300, jnp.bfloat16)  # [2R, n]
    parts.append(numbers.reshape(height // 8, 1, 16, width))
  return jnp.concatenate(parts, axis=1).reshape(8 * height, width)


def _kernel(x_hbm, w_hbm, scale_hbm, row_hbm, out_hbm, x, w, lead_w, scales, lead_scales, row_scales, out, lead_out,
            sums, total, x_done, w_done, lead_done, scale_done, lead_scale_done, row_done, out_done, lead_out_done,
            *, plan: _Plan):  # fmt: skip
  config, rows = plan.config, plan.rows
  block_n, block_k, lead_n = plan.block_n, plan.block_k, plan.lead_n
  steps_n, steps_k = plan.steps_n, plan.steps_k
  steps = steps_n * steps_k
  row_block = pl.program_id(0)
  base = pl.multiple_of(pl.program_id(1) * plan.size_n, LANES)
  runs = block_k // plan.run  # scales of a block
  int4, w8a8 = plan.kind == 'int4', plan.kind == 'w8a8'

  def column(step):  # where a whole block begins
    return pl.multiple_of(base + lead_n + jax.lax.div(step, steps_k) * block_n, LANES)

  def block_copies(step):
    slot, index_k = jax.lax.rem(step, config.depth), jax.lax.rem(step, steps_k)
    height = block_k // plan.packing
    start = pl.multiple_of(index_k * height, 8)
    columns = pl.ds(column(step), block_n)
    return (
      pltpu.make_async_copy(w_hbm.at[pl.ds(start, height), columns], w.at[slot], w_done.at[slot]),
      pltpu.make_async_copy(
        scale_hbm.at[jax.lax.div(index_k * block_k, plan.group) if plan.group > block_k else index_k, :, columns],
        scales.at[slot],
        scale_done.at[slot],
      ),
    )

  def out_copy(step_n):
    slot = jax.lax.rem(step_n, 2)
    columns = pl.ds(pl.multiple_of(base + lead_n + step_n * block_n, LANES), block_n)
    return pltpu.make_async_copy(out.at[slot], out_hbm.at[row_block, :, columns], out_done.at[slot])

  def start(step):
    for copy in block_copies(step):
      copy.start()

  # Pieces of the activations: whole blocks of K, or, for a narrower first step, smaller.
  piece = _divisor(block_k, config.lead_k, max(LANES, plan.run if plan.run <= config.lead_k else LANES))
  pieces = [(k, a) for k in range(steps_k) for a in range(0, block_k, piece)]
  x_copies = [
    pltpu.make_async_copy(
      x_hbm.at[row_block, :, k * block_k + a : k * block_k + a + piece], x.at[k, :, a : a + piece], x_done.at[index]
    )
    for index, (k, a) in enumerate(pieces)
  ]
  lead_copies = []
  if lead_n:
    columns = pl.ds(base, lead_n)
    for index, (k, a) in enumerate(pieces):
      place = pl.ds((k * block_k + a) // plan.packing, piece // plan.packing)
      lead_copies.append(pltpu.make_async_copy(w_hbm.at[place, columns], lead_w.at[place], lead_done.at[index]))
    lead_scale_copy = pltpu.make_async_copy(scale_hbm.at[:, :, columns], lead_scales, lead_scale_done)
  if w8a8:
    row_copy = pltpu.make_async_copy(row_hbm.at[row_block], row_scales, row_done)
    row_copy.start()
  if lead_n:
    lead_scale_copy.start()
  for index, copy in enumerate(x_copies):
    copy.start()
    if lead_n:
      lead_copies[index].start()
  if steps and not lead_n:
    start(0)

  def sum_activations(k, a):
    """Sums of the activations of each run of a piece, times what each is too much by, in all lanes: by run."""
    found = {}
    ones = jnp.full((LANES, LANES), _BIAS, jnp.bfloat16)
    for run_start in range(a // plan.run * plan.run, a + piece, plan.run):
      run = run_start // plan.run
      result = None
      for at in range(max(a, run_start), min(a + piece, run_start + plan.run), LANES):
        depth = min(LANES, block_k - at)
        part = jnp.dot(x[k, :, at : at + depth], ones[:depth], preferred_element_type=jnp.float32)
        result = part if result is None else result + part
      result = _join(result)
      found[run] = result
      sums[k * runs + run] = result if a <= run_start else sums[k * runs + run] + result
    return found

  def _join(product):
    """The sum over the pieces of the activations."""
    result = product[:rows]
    for index in range(1, plan.pieces):
      result = result + product[index * rows : (index + 1) * rows]
    return result

  def load(weights, height, width, k, n):
    part = weights[k // plan.packing : (k + height) // plan.packing, n : n + width]
    if int4:
      return _unpack(part)
    return part if w8a8 and config.integer else part.astype(jnp.bfloat16)

  accumulate = jnp.int32 if w8a8 and config.integer else jnp.float32

  def multiply(k, weights, scale_rows, low, high, width, tile_done, surplus):
    """Rows low to high of block k of K times `width` columns of weights, tile by tile, to `tile_done(n, columns, sum)`."""
    tiles = []
    for n in range(0, width, config.tile_n):
      for run_start in range(low // plan.run * plan.run, high, plan.run):
        end = min(high, run_start + plan.run)
        at = max(low, run_start)
        while at < end:
          height = min(config.tile_k, end - at)
          tiles.append((n, min(config.tile_n, width - n), run_start // plan.run, at, height, at + height == end))
          at += height
    get = lambda tile: load(weights, tile[4], tile[1], tile[3] - low, tile[0])  # noqa: E731
    coming = get(tiles[0])
    product = result = None
    for index, (n, columns, run, at, height, run_ends) in enumerate(tiles):
      tile, coming = coming, get(tiles[index + 1]) if index + 1 < len(tiles) else None
      activations = x[k, :, at : at + height]
      if w8a8 and not config.integer:
        activations = activations.astype(jnp.bfloat16)
      part = _join(jnp.dot(activations, tile, preferred_element_type=accumulate))
      product = part if product is None else product + part
      if not run_ends:
        continue
      product = product.astype(jnp.float32)
      if int4:
        product = product - jnp.concatenate([surplus(run)] * (columns // LANES), axis=1)
      product = product * scale_rows(run, n, columns)
      result = product if result is None else result + product
      product = None
      if at + height == high:
        tile_done(n, columns, result)
        result = None

  def finish(value):
    if w8a8:
      value = value * jnp.concatenate([row_scales[...]] * (value.shape[1] // LANES), axis=1)
    return value.astype(plan.out_dtype)

  # The columns left over, as soon as there is something to multiply.
  if lead_n:
    lead_scale_copy.wait()
  for index, (k, a) in enumerate(pieces):
    x_copies[index].wait()
    surplus = sum_activations(k, a).get if int4 else None
    if not lead_n:
      continue
    lead_copies[index].wait()
    if index == len(pieces) - 1 and steps:
      start(0)
    whole = k * block_k + a

    def lead_done_tile(n, columns, value, index=index):
      if index:
        value = value + total[:, n : n + columns]
      if index < len(pieces) - 1:
        total[:, n : n + columns] = value
      else:
        lead_out[:, n : n + columns] = finish(value)

    def lead_scale(run, n, columns, k=k):
      entry = k * block_k // plan.group if plan.group > block_k else k
      return lead_scales[entry, run : run + 1, n : n + columns]

    place = lead_w.at[whole // plan.packing : (whole + piece) // plan.packing]
    multiply(k, place, lead_scale, a, a + piece, lead_n, lead_done_tile, surplus)
  if w8a8:
    row_copy.wait()
  lead_out_copy = None
  if lead_n:
    lead_out_copy = pltpu.make_async_copy(lead_out, out_hbm.at[row_block, :, pl.ds(base, lead_n)], lead_out_done)
    lead_out_copy.start()

  def body(step, _):
    slot, index_k, step_n = jax.lax.rem(step, config.depth), jax.lax.rem(step, steps_k), jax.lax.div(step, steps_k)
    for copy in block_copies(step):
      copy.wait()
    ahead = config.depth - 1

    @pl.when(step == 0)
    def _():
      for later in range(1, min(ahead, steps)):
        start(later)

    @pl.when(step + ahead < steps)
    def _():
      start(step + ahead)

    out_slot = jax.lax.rem(step_n, 2)

    @pl.when((index_k == 0) & (step_n >= 2))
    def _():
      out_copy(step_n - 2).wait()

    def done(n, columns, value):
      place = slice(n, n + columns)
      if steps_k == 1:
        out[out_slot, :, place] = finish(value)
        return
      value = value + jnp.where(index_k == 0, 0, total[:, place])
      total[:, place] = value
      out[out_slot, :, place] = finish(value)  # until the last block of K, in vain

    multiply(
      index_k,
      w.at[slot],
      lambda run, n, columns: scales[slot, run : run + 1, n : n + columns],
      0,
      block_k,
      block_n,
      done,
      lambda run: sums[index_k * runs + run],
    )
    if steps_k == 1:
      out_copy(step_n).start()
    else:
      pl.when(index_k == steps_k - 1)(lambda: out_copy(step_n).start())
    return 0

  if steps:
    jax.lax.fori_loop(0, steps, body, 0)
    for step_n in range(max(0, steps_n - 2), steps_n):
      out_copy(step_n).wait()
  if lead_out_copy is not None:
    lead_out_copy.wait()


def vmem_bytes(plan: _Plan) -> int:
  """VMEM that the kernel's buffers take."""
  return sum(size for size, _ in _buffers(plan).values())


def _buffers(plan: _Plan):
  """Each buffer's bytes, rounded up to whole tiles, and its scratch shape."""
  config, rows, kinds = plan.config, plan.rows, {}
  weights = jnp.int32 if plan.kind == 'int4' else jnp.int8
  activations = jnp.int8 if plan.kind == 'w8a8' else jnp.bfloat16
  runs = plan.block_k // plan.run
  height = plan.size_k // plan.packing
  lead_n = max(plan.lead_n, LANES)
  entries = plan.size_k // plan.group if plan.group > plan.block_k else plan.steps_k
  one_row = rows if plan.kind == 'w8a8' else 8
  shapes = dict(
    x=((plan.steps_k, plan.pieces * rows, plan.block_k), activations),
    w=((config.depth, plan.block_k // plan.packing, plan.block_n), weights),
    lead_w=((height if plan.lead_n else 32, lead_n), weights),
    scales=((config.depth, runs, plan.block_n), jnp.float32),
    lead_scales=((entries, runs, lead_n), jnp.float32),
    row_scales=((one_row, LANES), jnp.float32),
    out=((2, rows, plan.block_n), plan.out_dtype),
    lead_out=((rows, lead_n), plan.out_dtype),
    sums=((plan.steps_k * runs, rows, LANES) if plan.kind == 'int4' else (1, 8, LANES), jnp.float32),
    total=((rows, max(lead_n, plan.block_n if plan.steps_k > 1 else 0)), jnp.float32),
  )
  for name, (shape, dtype) in shapes.items():
    *outer, height, width = shape
    size = jnp.dtype(dtype).itemsize
    tile = 32 // size
    count = functools.reduce(lambda a, b: a * b, outer, 1)
    kinds[name] = (count * -(-height // tile) * tile * -(-width // LANES) * LANES * size, pltpu.VMEM(shape, dtype))
  return kinds


def _call(x, weights, scales, row_scales, plan: _Plan, interpret):
  """The kernel on padded operands: x `[blocks, pieces · rows, K]`, weights as stored, scales `[.., runs, N]`."""
  config = plan.config
  blocks = x.shape[0]
  pieces = plan.steps_k * -(-plan.block_k // LANES)
  dma = pltpu.SemaphoreType.DMA
  hbm = pl.BlockSpec(memory_space=pl.ANY)
  return pl.pallas_call(
    functools.partial(_kernel, plan=plan),
    grid=(blocks, config.cores),
    in_specs=[hbm] * 4,
    out_specs=hbm,
    out_shape=jax.ShapeDtypeStruct((blocks, plan.rows, plan.size_n * config.cores), plan.out_dtype),
    scratch_shapes=[
      *(shape for _, shape in _buffers(plan).values()),
      dma((pieces,)),
      dma((config.depth,)),
      dma((pieces,)),
      dma((config.depth,)),
      dma(()),
      dma(()),
      dma((2,)),
      dma(()),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel'),
      vmem_limit_bytes=min(vmem_bytes(plan) + (12 << 20), 127 << 20),
      disable_bounds_checks=True,
      disable_semaphore_checks=True,
    ),
    interpret=interpret,
    name=f'quantized_matmul_{plan.kind}',
  )(x, weights, scales, row_scales)


def _round_up(size: int, unit: int) -> int:
  return -(-size // unit) * unit


def make_plan(x, weights, scales, config: Config, out_dtype) -> _Plan:
  """What a call with such arguments does."""
  kind = 'int4' if weights.dtype == jnp.int32 else 'w8a8' if x.dtype == jnp.int8 else 'int8'
  size_m, size_k = x.shape
  groups = scales.shape[0]
  unit = 16 if kind != 'w8a8' else 32
  blocks = -(-size_m // config.block_m)
  padded_k = _round_up(size_k, UNIT)
  return _Plan(
    config=config,
    kind=kind,
    pieces=3 if x.dtype == jnp.float32 else 1,
    rows=_round_up(-(-size_m // blocks), unit),
    size_k=padded_k,
    size_n=_round_up(weights.shape[1], LANES * config.cores) // config.cores,
    group=size_k // groups if groups > 1 else padded_k,
    out_dtype=jnp.dtype(out_dtype).name,
  )


def quantized_matmul(x, weights, scales, *, x_scales=None, out_dtype, config: Config, interpret=False):
  """See `pallas_kernels.quantized_matmul.quantized_matmul`."""
  plan = make_plan(x, weights, scales, config, out_dtype)
  size_m, size_k = x.shape
  size_n = weights.shape[1]
  blocks = -(-size_m // config.block_m)
  x = jnp.pad(x, ((0, blocks * plan.rows - size_m), (0, plan.size_k - size_k)))
  x = _split(x, plan.pieces).reshape(plan.pieces, blocks, plan.rows, plan.size_k)
  x = jnp.moveaxis(x, 0, 1).reshape(blocks, plan.pieces * plan.rows, plan.size_k)
  wide = plan.size_n * config.cores
  weights = jnp.pad(weights, ((0, plan.size_k // plan.packing - weights.shape[0]), (0, wide - size_n)))
  runs = plan.block_k // plan.run
  scales = jnp.pad(scales.astype(jnp.float32), ((0, 0), (0, wide - size_n))).reshape(-1, runs, wide)
  if plan.kind == 'w8a8':
    row_scales = jnp.pad(x_scales.astype(jnp.float32), (0, blocks * plan.rows - size_m)).reshape(blocks, plan.rows, 1)
    row_scales = jnp.broadcast_to(row_scales, (blocks, plan.rows, LANES))
  else:
    row_scales = jnp.zeros((blocks, 8, LANES), jnp.float32)
  out = _call(x, weights, scales, row_scales, plan, interpret)
  return out.reshape(blocks * plan.rows, wide)[:size_m, :size_n]


def _split(x, pieces: int):
  """Activations as bfloat16 parts `[pieces, M, K]` that add up to them."""
  if x.dtype != jnp.float32:
    return x[None]
  parts = []
  for _ in range(pieces):
    parts.append(x.astype(jnp.bfloat16))
    x = x - parts[-1].astype(jnp.float32)
  return jnp.stack(parts)
