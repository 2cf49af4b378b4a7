"""The runs of a block in order, through a ring of tiles in vector memory; it ends when the last write has landed.

The grid walks blocks of tokens. A tile is read some runs ahead, merged with what is new, and its write left under way;
a run whose tile an earlier run of the block writes waits for all writes before it reads.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.token_append.tpu_runs import AHEAD, FULL, LATE


def walk_runs(runs, slots, ahead, kind, read, wait_read, merge, write, wait_write):
  """A block's runs in order, through a ring of `slots` tiles."""

  def landed(written, upto):
    """Wait until the first `upto` writes have landed, `written` of which have."""
    jax.lax.fori_loop(written, upto, lambda run, carry: (wait_write(run), carry)[1], 0)
    return jnp.maximum(written, upto)

  def prefetch(run):
    pl.when(run < runs)(lambda: pl.when(kind(run) == AHEAD)(lambda: read(run)))

  def step(run, written):
    written = landed(written, jnp.where(kind(run) == LATE, run, run + 1 - (slots - ahead)))
    prefetch(run + ahead)
    pl.when(kind(run) == LATE)(lambda: read(run))
    pl.when(kind(run) != FULL)(lambda: wait_read(run))
    merge(run)
    write(run)
    return written

  jax.lax.fori_loop(0, ahead, lambda run, carry: (prefetch(run), carry)[1], 0)
  landed(jax.lax.fori_loop(0, runs, step, jnp.int32(0)), runs)


def walk_known_runs(runs, slots, ahead, kind, read, wait_read, merge, write, wait_write):
  """The same over a known number of runs, each read ahead, without a branch: what static cost can follow."""
  del kind

  def step(run, free, more):
    if free:
      wait_write(run - (slots - ahead))
    if more:
      read(run + ahead)
    wait_read(run)
    merge(run)
    write(run)

  ahead = min(ahead, runs)
  for run in range(ahead):
    read(run)
  room = min(slots - ahead, runs)
  for run in range(room):
    step(run, False, run + ahead < runs)
  middle = max(room, runs - ahead)
  jax.lax.fori_loop(room, middle, lambda run, carry: (step(run, True, True), carry)[1], 0)
  for run in range(middle, runs):
    step(run, True, False)
  for run in range(max(0, runs - (slots - ahead)), runs):
    wait_write(run)
