"""A slice of page numbers on TPU, in either of two ways: by plain copies from HBM to HBM, or through VMEM, converted.

The grid walks slices of page numbers, and a slice its units, each one page of every layer. Plain copies keep so many
units in flight on a ring of semaphores, and nothing in fast memory but the numbers. Copies that convert keep two
buffers of a unit, or of a group of its layers, to read into and two to write from. A slice ends when its last writes
have landed.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.page_copy.tpu_convert import convert_pages
from pallas_kernels.page_copy.tpu_loops import loop, when


def copy_directly(page_of, here, base, pools, rows, sems, *, gather, depth, valid):
  """The units of a slice, of `here` page numbers, from HBM to HBM, `depth` of them in flight."""

  def each(i, do):
    when(True if valid is None else valid(page_of(i)), do)

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
  loop(0, ring, start)
  loop(ring, here, step)
  loop(here - ring, here, wait)


def copy_through_vmem(page_of, here, base, pools, rows, pool_buffers, row_buffers, read_sems, write_sems, **options):
  """The units of a slice, of `here` page numbers, read into VMEM, converted there, and written."""
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
      when(is_valid(i + before_i), lambda: wait(write_buffers, before_g, slot, write_sems))
    convert_pages(groups[g][1], slot, read_buffers, write_buffers, layout)
    when(is_valid(i), lambda: write(i, g, slot, write_sems))

  read(0, 0, 0, read_sems)
  peeled = 2 if len(groups) == 1 else 1
  for i in range(peeled):

    def first(i=i):
      for g in range(len(groups)):
        unit(i, g, i * len(groups) + g)

    when(i < here if isinstance(here, int) else (True if i == 0 else i < here), first)

  def later(i):
    for g in range(len(groups)):
      unit(i, g, 2)

  loop(peeled, here, later)

  last = here * len(groups)
  wait(read_buffers, 0, last % 2, read_sems)
  for back in (2, 1):
    before_i, before_g = divmod(-back, len(groups))
    i = here + before_i
    exists = i >= 0
    if isinstance(here, int) and not exists:
      continue

    def end(i=i, g=before_g, slot=(last - back) % 2):
      when(is_valid(i), lambda: wait(write_buffers, g, slot, write_sems))

    when(True if isinstance(here, int) else exists, end)


def _least(a, b):
  return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)
