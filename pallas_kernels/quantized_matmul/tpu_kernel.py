"""The grid step of a product with quantized weights on TPU: copies in, tiles unpacked and multiplied, copies out.

The grid walks blocks of rows, for each part of the columns that a core has. The activations of a block stay in VMEM;
blocks of weights stream past them, `depth` of them in VMEM. A block is one straight run of tiles `[tile_k, tile_n]`, in
which the weights of the next tile are unpacked before the product of this one is issued, so that the vector units run
beside the matrix unit. Scales multiply products, never weights. The unpacking of four-bit weights adds to a product so
many times the sum of the activations of its group, which is taken away again: from every product of a group
(`correction='products'`), or from their sum, by a small product of sums with scales ('sums').

At a wait, and where a loop's turn ends, the matrix units run dry for some 200 cycles: all waits stand there.
What nothing else can be done beside travels in several copies, with semaphores of their own: the activations, the first
blocks of weights, and the last columns of a result. The kernel ends when the last result has left VMEM.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantized_matmul.bfloat16_parts import TERMS, split, top
from pallas_kernels.quantized_matmul.tpu_problem import Plan
from pallas_kernels.quantized_matmul.tpu_unpack import BIAS, BYTE_BIAS, permute, unpack, unpack_bytes
from pallas_kernels.tiles import LANES


def kernel(x_hbm, w_hbm, scale_hbm, row_hbm, out_hbm, x, w, scales, row_scales, out, sums, spread, total,
            x_done, w_done, scale_done, row_done, out_done, *, plan: Plan):  # fmt: skip
  """A block of rows times one core's part of the columns; operands and results lie in HBM, the rest is scratch."""
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
      sums[k * runs + run] = _surplus(tiles, rows, BYTE_BIAS if config.by_bytes else BIAS)
    if config.by_bytes:
      for at in range(0, block_k, LANES):
        place = slice(at, min(at + LANES, block_k))
        x[k, :, place] = permute(x[k, :, place])
    if plan.by_sums:
      spread[k] = _spread([sums[k * runs + run] for run in range(runs)])

  def load(slot, tile):
    n, width, _, at, height, _ = tile
    part = w[slot, at // plan.packing : (at + height) // plan.packing, n : n + width]
    if int4:
      return unpack_bytes(part) if config.by_bytes else unpack(part)
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


def _spread(sums):
  """Sums of R runs, each `[rows, 128]` with the same in all lanes, as bfloat16 `[rows, 6·R]` for `_times_scales`."""
  runs = len(sums)
  lane = jax.lax.broadcasted_iota(jnp.int32, sums[0].shape, 1)
  values = sums[0]
  for run in range(1, runs):
    values = jnp.where(jax.lax.rem(lane, runs) == run, sums[run], values)
  parts = []
  for _ in range(3):
    parts.append(top(values))
    values = values - parts[-1]
  tiles = []
  for start in range(0, len(TERMS) * runs, LANES):
    tile = parts[0]
    for index, (part, _) in enumerate(TERMS):
      tile = jnp.where(jax.lax.div(lane + start, runs) == index, parts[part], tile)
    tiles.append(tile)
  return jnp.concatenate(tiles, axis=1)[:, : len(TERMS) * runs].astype(jnp.bfloat16)


def _times_scales(spread, scales):
  """The product of `_spread` sums and scales `[R, n]`, as good as in float32, in one go: K is the six terms times R."""
  parts = split(scales, 3)
  return jnp.dot(spread, jnp.concatenate([parts[part] for _, part in TERMS]), preferred_element_type=jnp.float32)


def _widen(lanes, width: int):
  """Values that are the same in all 128 lanes, in `width` of them."""
  return jnp.concatenate([lanes] * (width // LANES), axis=1)


def _cuts(size: int, unit: int, count: int) -> list[tuple[int, int]]:
  """The start and length of at most `count` parts of a size, each of whole units but the last."""
  units = -(-size // unit)
  count = min(count, units)
  bounds = [min(unit * (units * index // count), size) for index in range(count + 1)]
  return [(start, end - start) for start, end in itertools.pairwise(bounds)]


def _remainder(step, divisor: int):
  """The remainder of a step that is not negative: cheap on the scalar unit if by a power of two."""
  return step & (divisor - 1) if divisor & (divisor - 1) == 0 else jax.lax.rem(step, divisor)
