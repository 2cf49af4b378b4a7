"""Quantized matrix product on TPU: activations stay in VMEM, quantized weights stream past them once.

One grid step a block of rows (and a part of the columns a core): it copies its activations to VMEM, then walks over the
columns, `block_n` at a time and, for large K, `block_k` rows at a time, with `depth` blocks of weights in flight. The
columns that `block_n` leaves over come first, in pieces: while they are computed the first whole block arrives.

A block is one straight run of tiles `[tile_k, tile_n]`, in which the weights of the next tile are unpacked before the
product of this one is issued, so that the vector units run beside the matrix unit. Scales multiply products, never
weights. A four-bit value n becomes the bfloat16 128 + n by two masks and no conversion (its bits are `0x4300 | n`);
what that adds to a product is 136 times the sum of the activations of its group, which is taken away again: from every
product of a group (`correction='products'`), or from their sum, by a small product of sums with scales ('sums').
Where bytes become bfloat16 cheaply (`by_bytes`), words become bytes by a mask, and the surplus is 8 instead of 136; the
activations' columns then are brought into the order in which the bytes come, 64 by 64, once.

At a wait, and where a loop's turn ends, the matrix units run dry for some 200 cycles: all waits stand there.
What nothing else can be done beside travels in several copies, with semaphores of their own: the activations, the first
blocks of weights, and the last columns of a result. The kernel ends when the last result has left VMEM.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.devices import Device
from pallas_kernels.quantized_matmul.storage import UNIT
from pallas_kernels.tiles import LANES, padded_bytes, round_up
from pallas_kernels.tuning import Facts

_BYTE_BIAS = 8  # what a stored four-bit value is above the value that it stands for
_BIAS = 136  # what the bit pattern of a four-bit value, read as a number, is above it: 128, and 8 of the stored value
_HEADROOM = 3 << 20  # bytes of VMEM for what the compiler keeps there
_SHORT_BLOCK_N = 640  # columns of a body of under 6,000 bundles, at 64 rows
_LONGEST_BODY = 64 * 2048 * 4096  # rows times weights of a grid step


@dataclasses.dataclass(frozen=True)
class Config:
  """Parameters of the kernel; any value gives the same answer."""

  block_m: int = 256  # rows of activations at most, in VMEM at once
  block_n: int = 1280  # columns a step
  block_k: int = 4096  # rows of K a step at most
  lead_n: int = 512  # columns a step at the beginning, as long as `block_n` does not divide what is left
  lead_blocks: int = 1  # as many whole blocks are walked in narrower steps too: the first arrive sooner
  tile_n: int = 256  # columns a product
  tile_k: int = 256  # rows of K a product; no more than a group
  depth: int = 3  # blocks of weights in VMEM
  copies: int = 1  # copies, side by side, in which the weights of a whole block travel
  lead_copies: int = 1  # copies in which the activations, and the weights of each narrower block, travel
  last_n: int = 0  # columns at the end of a block, whole tiles, whose results travel by themselves, after the rest
  cores: int = 1  # parts of the columns, which a chip of several cores computes side by side
  correction: str = 'products'  # 'products' or 'sums': where four-bit weights lose what reading their bits added
  by_bytes: bool = False  # four-bit weights become bytes first, where these become bfloat16 cheaply
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
    """Rows of K a step: whole groups or a whole part of one, and of those that divide K the best."""
    most = self.config.block_k
    fitting = [
      block
      for block in range(LANES, self.size_k, LANES)
      if self.size_k % block == 0 and (self.group % block == 0 or block % self.group == 0)
    ]
    fitting.append(self.size_k)
    if self.group < self.size_k:  # scales of whole tiles need no copy
      fitting = [block for block in fitting if block // self.group % 8 == 0 and block >= self.group] or fitting
    good = [block for block in fitting if most // 2 <= block <= most]
    return max(good) if good else min([block for block in fitting if block > most], default=self.size_k)

  @property
  def steps_k(self) -> int:
    return self.size_k // self.block_k

  @property
  def block_n(self) -> int:
    return min(self.config.block_n, self.size_n)

  @property
  def steps_n(self) -> int:
    return (self.size_n - self.lead_n) // self.block_n

  @property
  def lead_n(self) -> int:
    """Columns that go before the whole blocks, in narrower ones."""
    left = self.size_n % self.block_n
    if self.config.lead_n >= self.block_n:
      return left
    return left + self.block_n * min(self.config.lead_blocks, self.size_n // self.block_n)

  @property
  def lead_width(self) -> int:
    return _divisor(self.lead_n, self.config.lead_n) if self.lead_n else LANES

  def copies(self, width: int) -> int:
    """The copies in which the weights of a block of `width` columns travel."""
    return self.config.copies if width == self.block_n else self.config.lead_copies

  def out_cuts(self, width: int) -> list[tuple[int, int]]:
    """The parts in which a block's results travel: the first column and the number of columns of each."""
    last = self.config.last_n
    return [(0, width - last), (width - last, last)] if 0 < last < width else [(0, width)]

  @property
  def run(self) -> int:
    """Rows of K whose products one scale multiplies, within a block."""
    return min(self.group, self.block_k)

  @property
  def by_sums(self) -> bool:
    """Whether the surplus of four-bit weights is taken away all at once."""
    return self.kind == 'int4' and self.config.correction == 'sums' and self.block_k // self.run in (16, 32, 64, 128)

  @property
  def packing(self) -> int:
    """Rows of K in one row of the stored weights."""
    return 8 if self.kind == 'int4' else 1


def _divisor(size: int, most: int) -> int:
  """The largest multiple of 128 that divides a size, which is one, and is at most `most`; 128 if none is."""
  return next((width for width in range(most // LANES * LANES, LANES, -LANES) if size % width == 0), LANES)


def _cuts(size: int, unit: int, count: int) -> list[tuple[int, int]]:
  """The start and length of at most `count` parts of a size, each of whole units but the last."""
  units = -(-size // unit)
  count = min(count, units)
  bounds = [min(unit * (units * index // count), size) for index in range(count + 1)]
  return [(start, end - start) for start, end in itertools.pairwise(bounds)]


def _remainder(step, divisor: int):
  """The remainder of a step that is not negative: cheap on the scalar unit if by a power of two."""
  return step & (divisor - 1) if divisor & (divisor - 1) == 0 else jax.lax.rem(step, divisor)


def _unpack(words):
  """Words `[R, n]` as bfloat16 `[8R, n]`, each value 136 too large."""
  height, width = words.shape
  parts = []
  for index in range(4):
    pairs = jax.lax.shift_right_logical(words, jnp.int32(4 * index)) if index else words
    numbers = pltpu.bitcast((pairs & 0x000F000F) | 0x43004300, jnp.bfloat16)  # [2R, n]
    parts.append(numbers.reshape(height // 8, 1, 16, width))
  return jnp.concatenate(parts, axis=1).reshape(8 * height, width)


def _unpack_bytes(words):
  """Words `[R, n]` as bfloat16 `[8R, n]`, each value 8 too large, in the order of `_permute`."""
  height, width = words.shape
  parts = []
  for index in range(2):
    quads = jax.lax.shift_right_logical(words, jnp.int32(4 * index)) if index else words
    parts.append(pltpu.bitcast(quads & 0x0F0F0F0F, jnp.int8).reshape(height // 8, 1, 32, width))
  return jnp.concatenate(parts, axis=1).reshape(8 * height, width).astype(jnp.bfloat16)


def _permute(x):
  """Columns of bfloat16 x `[rows, 64 or 128]`, 64 by 64 in the order in which `_unpack_bytes` has rows of weights."""
  width = x.shape[1]
  place, source = (jax.lax.broadcasted_iota(jnp.int32, (width, width), axis) for axis in (1, 0))
  byte, row, high = place & 3, place >> 2 & 7, place >> 5 & 1
  wanted = (place & -UNIT) + 16 * (2 * (byte & 1) + high) + 2 * row + (byte >> 1)
  return jnp.dot(x, (source == wanted).astype(jnp.bfloat16), preferred_element_type=jnp.float32).astype(jnp.bfloat16)


def _kernel(x_hbm, w_hbm, scale_hbm, row_hbm, out_hbm, x, w, scales, row_scales, out, sums, spread, total,
            x_done, w_done, scale_done, row_done, out_done, *, plan: _Plan):  # fmt: skip
  config, rows, steps_k, block_k = plan.config, plan.rows, plan.steps_k, plan.block_k
  int4, w8a8 = plan.kind == 'int4', plan.kind == 'w8a8'
  runs = block_k // plan.run  # scales of a block
  base = pl.program_id(0) * plan.size_n
  row_block = pl.program_id(1)
  narrow = plan.lead_n // plan.lead_width * steps_k  # steps of the narrower blocks
  steps = narrow + plan.steps_n * steps_k

  def columns(step, width):
    if width == plan.block_n:
      start = plan.lead_n + jax.lax.div(step - narrow, steps_k) * width
    else:
      start = jax.lax.div(step, steps_k) * width
    return pl.ds(pl.multiple_of(base + start, LANES), width)

  def block_copies(step, width):
    slot, index_k = _remainder(step, config.depth), _remainder(step, steps_k)
    height = block_k // plan.packing
    entry = jax.lax.div(index_k * block_k, plan.group) if plan.group > block_k else index_k
    copies = [
      pltpu.make_async_copy(
        w_hbm.at[pl.ds(pl.multiple_of(index_k * height + row, 8), rows_of_part), columns(step, width)],
        w.at[slot, row : row + rows_of_part, :width],
        w_done.at[slot, part],
      )
      for part, (row, rows_of_part) in enumerate(_cuts(height, 8 if int4 else 32, plan.copies(width)))
    ]
    copies.append(
      pltpu.make_async_copy(
        scale_hbm.at[entry, :, columns(step, width)], scales.at[slot, :, :width], scale_done.at[slot]
      )
    )
    return copies

  def out_slot_of(step, width):
    slot = _remainder(jax.lax.div(step, steps_k), 2)
    return slot + 2 if narrow and width == plan.block_n else slot

  def out_copies(step, width):
    slot, first = out_slot_of(step, width), columns(step, width).start
    return [
      pltpu.make_async_copy(
        out.at[slot, :, start : start + size],
        out_hbm.at[row_block, :, pl.ds(pl.multiple_of(first + start, LANES), size)],
        out_done.at[slot, part],
      )
      for part, (start, size) in enumerate(plan.out_cuts(width))
    ]

  def start(step):
    """Start to copy the weights of a step, if there is one."""

    def go(width):
      for copy in block_copies(step, width):
        copy.start()

    if narrow:
      pl.when(step < narrow)(lambda: go(plan.lead_width))
    pl.when((step >= narrow) & (step < steps))(lambda: go(plan.block_n))

  def wait_out(step, width):
    """Wait for the results of a step, if there is one and it has so many columns."""

    @pl.when(step >= (narrow if width == plan.block_n else 0))
    def _():
      for copy in out_copies(step, width):
        copy.wait()

  def join(product):
    """The sum over the parts of the activations."""
    result = product[:rows]
    for index in range(1, plan.pieces):
      result = result + product[index * rows : (index + 1) * rows]
    return result

  def x_copy(k, part, at, size):
    source = x_hbm.at[row_block, :, k * block_k + at : k * block_k + at + size]
    return pltpu.make_async_copy(source, x.at[k, :, at : at + size], x_done.at[k, part])

  x_cuts = _cuts(block_k, LANES, config.lead_copies)
  x_copies = [[x_copy(k, part, *cut) for part, cut in enumerate(x_cuts)] for k in range(steps_k)]
  for copy in itertools.chain(*x_copies):
    copy.start()
  start(jnp.int32(0))
  if w8a8:
    row_copy = pltpu.make_async_copy(row_hbm.at[row_block], row_scales, row_done)
    row_copy.start()
    row_copy.wait()
  for k, copies in enumerate(x_copies):
    for copy in copies:
      copy.wait()
    if k == steps_k - 1 and config.depth > 2:
      start(jnp.int32(1))  # not before: the first blocks shall not share the bandwidth with later ones
    if not int4:
      continue
    for run in range(runs):
      starts = range(run * plan.run, (run + 1) * plan.run, LANES)
      tiles = [x[k, :, at : min(at + LANES, (run + 1) * plan.run)] for at in starts]
      sums[k * runs + run] = _surplus(tiles, rows, _BYTE_BIAS if config.by_bytes else _BIAS)
    if config.by_bytes:
      for at in range(0, block_k, LANES):
        place = slice(at, min(at + LANES, block_k))
        x[k, :, place] = _permute(x[k, :, place])
    if plan.by_sums:
      spread[k] = _spread([sums[k * runs + run] for run in range(runs)])

  def load(slot, tile):
    n, width, _, at, height, _ = tile
    part = w[slot, at // plan.packing : (at + height) // plan.packing, n : n + width]
    if int4:
      return _unpack_bytes(part) if config.by_bytes else _unpack(part)
    return part if w8a8 and config.integer else part.astype(jnp.bfloat16)

  def finish(value):
    if w8a8:
      value = value * _widen(row_scales[...], value.shape[1])
    return value.astype(plan.out_dtype)

  accumulate = jnp.int32 if w8a8 and config.integer else jnp.float32

  def step_of(width):
    tiles = []  # first column, columns, run, first row of K, rows of K, whether the run ends
    for n in range(0, width, config.tile_n):
      for run in range(runs):
        end = (run + 1) * plan.run
        for at in range(run * plan.run, end, config.tile_k):
          height = min(config.tile_k, end - at)
          tiles.append((n, min(config.tile_n, width - n), run, at, height, at + height == end))

    def body(step, _):
      slot, index_k = _remainder(step, config.depth), _remainder(step, steps_k)
      out_slot = out_slot_of(step, width)
      for copy in block_copies(step, width):
        copy.wait()
      if steps_k == 1:
        wait_out(step - 2, width)
      else:
        pl.when(index_k == 0)(lambda: wait_out(step - 2 * steps_k, width))
      if width != plan.block_n or not narrow:

        @pl.when(step == 0)
        def _():
          for later in range(2, config.depth - 1):
            start(jnp.int32(later))

      coming = load(slot, tiles[0])
      product = result = None
      ends = [start + size for start, size in plan.out_cuts(width)]
      results = out_copies(step, width)
      for index, (n, size, run, at, height, run_ends) in enumerate(tiles):
        tile, coming = coming, load(slot, tiles[index + 1]) if index + 1 < len(tiles) else None
        activations = x[index_k, :, at : at + height]
        if index == min(1, len(tiles) - 1):
          start(step + config.depth - 1)  # its scalar work runs beside the products
        if w8a8 and not config.integer:
          activations = activations.astype(jnp.bfloat16)
        part = join(jnp.dot(activations, tile, preferred_element_type=accumulate))
        product = part if product is None else product + part
        if not run_ends:
          continue
        product = product.astype(jnp.float32)
        if int4 and not plan.by_sums:
          product = product - _widen(sums[index_k * runs + run], size)
        product = product * scales[slot, run : run + 1, n : n + size]
        result = product if result is None else result + product
        product = None
        if run < runs - 1:
          continue
        if plan.by_sums:
          result = result - _times_scales(spread[index_k], scales[slot, :, n : n + size])
        place = slice(n, n + size)
        if steps_k > 1:
          result = result + jnp.where(index_k == 0, 0, total[:, place])
          total[:, place] = result
        out[out_slot, :, place] = finish(result)  # before the last block of K, in vain
        result = None
        for end, copy in zip(ends, results, strict=True):
          if not n < end <= n + size:
            continue
          if steps_k == 1:
            copy.start()
          else:
            pl.when(index_k == steps_k - 1)(copy.start)
      return 0

    return body

  if narrow:
    jax.lax.fori_loop(0, narrow, step_of(plan.lead_width), 0)
  if steps > narrow:
    jax.lax.fori_loop(narrow, steps, step_of(plan.block_n), 0)
  for first, end, width in ((0, narrow, plan.lead_width), (narrow, steps, plan.block_n)):
    for step in range(max(end - 2 * steps_k, first), end, steps_k):
      wait_out(jnp.int32(step), width)


def _surplus(tiles, rows: int, bias: int):
  """Sums of activations `[pieces · rows, ≤ 128]` over lanes, tiles and pieces, times what weights are too large by.

  `[rows, 128]`, the same in all lanes: a product with ones, which unlike a reduction leaves it spread out.
  """
  whole = [tile.astype(jnp.float32) for tile in tiles if tile.shape[1] == LANES]
  parts = [tile for tile in tiles if tile.shape[1] < LANES]
  if len(whole) == 1:
    parts.append(tiles[0])
  elif whole:
    parts.append(functools.reduce(jnp.add, whole))
  products = []
  for part in parts:
    ones = jnp.full((part.shape[1], LANES), bias, part.dtype)
    precision = jax.lax.Precision.HIGHEST if part.dtype == jnp.float32 else None
    products.append(jnp.dot(part, ones, precision=precision, preferred_element_type=jnp.float32))
  result = functools.reduce(jnp.add, products)
  return functools.reduce(jnp.add, [result[at : at + rows] for at in range(0, result.shape[0], rows)])


_TERMS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0))  # of a product of two values in three parts: those that count


def _spread(sums):
  """Sums of R runs, each `[rows, 128]` with the same in all lanes, as bfloat16 `[rows, 6·R]` for `_times_scales`."""
  runs = len(sums)
  lane = jax.lax.broadcasted_iota(jnp.int32, sums[0].shape, 1)
  values = sums[0]
  for run in range(1, runs):
    values = jnp.where(jax.lax.rem(lane, runs) == run, sums[run], values)
  parts = []
  for _ in range(3):
    parts.append(_top(values))
    values = values - parts[-1]
  tiles = []
  for start in range(0, len(_TERMS) * runs, LANES):
    tile = parts[0]
    for index, (part, _) in enumerate(_TERMS):
      tile = jnp.where(jax.lax.div(lane + start, runs) == index, parts[part], tile)
    tiles.append(tile)
  return jnp.concatenate(tiles, axis=1)[:, : len(_TERMS) * runs].astype(jnp.bfloat16)


def _times_scales(spread, scales):
  """The product of `_spread` sums and scales `[R, n]`, as good as in float32, in one go: K is the six terms times R."""
  parts = _split(scales, 3)
  return jnp.dot(spread, jnp.concatenate([parts[part] for _, part in _TERMS]), preferred_element_type=jnp.float32)


def _widen(lanes, width: int):
  """Values that are the same in all 128 lanes, in `width` of them."""
  return jnp.concatenate([lanes] * (width // LANES), axis=1)


def vmem_bytes(plan: _Plan) -> int:
  """VMEM that the kernel may take: its buffers, and what the compiler keeps there."""
  return sum(size for size, _ in _buffers(plan).values()) + _HEADROOM


def _buffers(plan: _Plan):
  """Each buffer's bytes, rounded up to whole tiles, and its scratch shape, in the kernel's order."""
  config, rows, block_n = plan.config, plan.rows, max(plan.block_n, plan.lead_width)
  runs = plan.block_k // plan.run
  shapes = {
    'x': ((plan.steps_k, plan.pieces * rows, plan.block_k), jnp.int8 if plan.kind == 'w8a8' else jnp.bfloat16),
    'w': ((config.depth, plan.block_k // plan.packing, block_n), jnp.int32 if plan.kind == 'int4' else jnp.int8),
    'scales': ((config.depth, runs, block_n), jnp.float32),
    'row_scales': ((rows if plan.kind == 'w8a8' else 8, LANES), jnp.float32),
    'out': ((4 if plan.lead_n else 2, rows, block_n), plan.out_dtype),
    'sums': ((plan.steps_k * runs, rows, LANES) if plan.kind == 'int4' else (1, 8, LANES), jnp.float32),
    'spread': ((plan.steps_k, rows, len(_TERMS) * runs) if plan.by_sums else (1, 16, LANES), jnp.bfloat16),
    'total': ((rows, block_n) if plan.steps_k > 1 else (8, LANES), jnp.float32),
  }
  return {name: (padded_bytes(shape, dtype), pltpu.VMEM(shape, dtype)) for name, (shape, dtype) in shapes.items()}


def _call(x, weights, scales, row_scales, plan: _Plan, interpret):
  """The kernel on padded operands: x `[blocks, pieces · rows, K]`, weights as stored, scales `[.., runs, N]`."""
  config = plan.config
  blocks = x.shape[0]
  dma = pltpu.SemaphoreType.DMA
  hbm = pl.BlockSpec(memory_space=pltpu.HBM)  # nor VMEM, where the compiler may put small operands of "any"
  return pl.pallas_call(
    functools.partial(_kernel, plan=plan),
    grid=(config.cores, blocks),
    in_specs=[hbm] * 4,
    out_specs=hbm,
    out_shape=jax.ShapeDtypeStruct((blocks, plan.rows, plan.size_n * config.cores), plan.out_dtype),
    scratch_shapes=[
      *(shape for _, shape in _buffers(plan).values()),
      dma((plan.steps_k, config.lead_copies)),
      dma((config.depth, max(config.copies, config.lead_copies))),
      dma((config.depth,)),
      dma(()),
      dma((4, len(plan.out_cuts(plan.block_n)))),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel'),
      vmem_limit_bytes=vmem_bytes(plan),
      disable_bounds_checks=True,
      disable_semaphore_checks=True,
    ),
    interpret=interpret,
    name=f'quantized_matmul_{plan.kind}',
  )(x, weights, scales, row_scales)


def _plan(facts: Facts, config: Config, out_dtype) -> _Plan:
  """The plan of a call for a problem."""
  size_m, size_k, group = int(facts['m']), int(facts['k']), int(facts['group_size'])
  kind = str(facts['kind'])
  padded_k = round_up(size_k, UNIT)
  return _Plan(
    config=config,
    kind=kind,
    pieces=3 if facts['dtype'] == 'float32' else 1,
    rows=round_up(-(-size_m // _blocks(size_m, config)), 32 if kind == 'w8a8' else 16),
    size_k=padded_k,
    size_n=round_up(int(facts['n']), LANES * config.cores) // config.cores,
    group=padded_k if group == size_k else group,
    out_dtype=jnp.dtype(out_dtype).name,
  )


def _blocks(size_m: int, config: Config) -> int:
  return -(-size_m // config.block_m)


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
  plan = _plan(facts, config, jnp.float32)  # results may be that wide
  if config.block_n > 256 and _body(facts, config, plan) > _LONGEST_BODY:
    return f'bodies of {plan.block_n} columns are too long for {facts["m"]} rows.'
  needed = vmem_bytes(plan)
  if needed > device.tpu.vmem_bytes:
    return f'it needs {needed} bytes of VMEM, and {device.name} has {device.tpu.vmem_bytes}.'
  return None


def _body(facts: Facts, config: Config, plan: '_Plan') -> int:
  """The measure of a body's length: rows, past those that the weights' unpacking hides, times weights."""
  rows = min(int(facts['m']), config.block_m) * (3 if facts['dtype'] == 'float32' else 1)
  return max(rows, 64) * plan.block_n * plan.block_k


def _has_integers(device: Device) -> bool:
  return device.name not in ('v4', 'tpu7x')


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
    plan = _plan(facts, config, 'float32')
    work = _body(facts, config, plan)
    if config.block_n <= 256 or (work <= _LONGEST_BODY and vmem_bytes(plan) <= device.tpu.vmem_bytes):
      break
    config = dataclasses.replace(config, block_n=config.block_n // 2 // LANES * LANES, lead_n=256)
  while vmem_bytes(_plan(facts, config, 'float32')) > device.tpu.vmem_bytes and (
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
  plan = _plan(facts, config, out_dtype)
  (size_m, size_k), size_n = x.shape, weights.shape[1]
  blocks = _blocks(size_m, config)
  x = jnp.pad(x, ((0, blocks * plan.rows - size_m), (0, plan.size_k - size_k)))
  x = jnp.stack(_split(x, plan.pieces)).reshape(plan.pieces, blocks, plan.rows, plan.size_k)
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


def _split(x, pieces: int):
  """Float32 values as so many bfloat16 parts that add up to them; bfloat16 and int8 as they are."""
  if x.dtype != jnp.float32:
    return [x]
  parts = []
  for _ in range(pieces):
    parts.append(_top(x).astype(jnp.bfloat16))
    x = x - _top(x)
  return parts


def _top(x):
  """Float32 values less what bfloat16 has no bits for. Not a conversion and back: compilers leave that out."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32) & -65536
  return jax.lax.bitcast_convert_type(bits, jnp.float32)
