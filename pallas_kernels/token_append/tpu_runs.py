"""New tokens cut into blocks and runs, in XLA: a run is as many rows of one tile as follow one another."""

import jax
import jax.numpy as jnp

AHEAD, FULL, LATE = 0, 1, 2  # a run's tile is read some runs ahead, never, or after all earlier writes
PAGE, ROW, SOURCE, FIRST, END, KIND, COUNT = range(7)  # rows of the plan


def plan_runs(live: jax.Array, page: jax.Array, offset: jax.Array, tile: int, page_size: int) -> jax.Array:
  """The runs of every block, `[blocks, 8, block_tokens]` int32, from `[blocks, block_tokens]` of each."""
  tokens = live.shape[1]
  place = jnp.where(live, page * page_size + offset, -1)
  before = jnp.pad(place, ((0, 0), (1, 0)), constant_values=-2)[:, :-1]
  first = live & ((place != before + 1) | (place % tile == 0) | (before < 0))
  run = jnp.cumsum(first, axis=1) - 1  # [blocks, tokens]
  mine = live[:, None] & (run[:, None] == jnp.arange(tokens)[:, None])  # [blocks, runs, tokens]
  start = mine & first[:, None]

  def pick(values):
    return jnp.sum(jnp.where(start, values[:, None], 0), axis=2)

  page, offset, source = pick(page), pick(offset), pick(jnp.broadcast_to(jnp.arange(tokens), live.shape))
  length = jnp.sum(mine, axis=2)
  begin = offset % tile
  key = jnp.where(length > 0, page * (page_size // tile) + offset // tile, -1)
  late = jnp.any((key[:, None] == key[:, :, None]) & jnp.tril(jnp.ones((tokens, tokens), bool), -1), axis=2)
  kind = jnp.where(late, LATE, jnp.where(length == tile, FULL, AHEAD))
  total = jnp.broadcast_to(jnp.sum(first, axis=1)[:, None], live.shape)
  plan = [page, offset - begin, source - begin + tile, begin, begin + length, kind, total, jnp.zeros_like(page)]
  return jnp.stack(plan, axis=1).astype(jnp.int32)


def cut_into_blocks(rows: jax.Array, axis: int, tokens: int, margin: int) -> jax.Array:
  """Cut the axis of tokens into blocks, put these first, and add rows on both sides, so that every window is inside."""
  rows = jnp.moveaxis(rows, axis, 0)
  rows = jnp.pad(rows, ((0, -rows.shape[0] % tokens), *((0, 0),) * (rows.ndim - 1)))
  rows = jnp.moveaxis(rows.reshape(-1, tokens, *rows.shape[1:]), 1, axis + 1)
  return jnp.pad(rows, [(margin, margin) if i == axis + 1 else (0, 0) for i in range(rows.ndim)])
