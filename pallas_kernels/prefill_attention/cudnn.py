"""Packed prefill attention by cuDNN: a call over what is cached before a chunk, one over the chunk, and both merged.

cuDNN lets row i of a problem see its keys up to i, and cannot place the rows at the end of more keys. So chunks are cut
into tiles of rows. What lies before a tile, all of its rows see whole: one call without a mask, over the pages as they
lie. Within a tile, row i sees up to row i: one causal call, over its keys gathered from their pages. What both give is
joined by the sums of their softmaxes, in float32. One chunk alone is one tile; of several packed ones, each has tiles
of its own, so that no call sees the rows of two.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import cudnn, cudnn_trial
from pallas_kernels.devices import Device
from pallas_kernels.online_softmax import owners
from pallas_kernels.tuning import Facts


@dataclasses.dataclass(frozen=True)
class Config:
  """Parameters of the calls of cuDNN.

  `apart` keeps pages that are not full from it; `tile_rows` are the rows of a tile where chunks of several sequences
  are packed.
  """

  apart: bool = True
  tile_rows: int = 256


def rule(device: Device, facts: Facts) -> Config:
  """Larger tiles gather less, smaller ones are emptier at the end of a chunk; which is faster nobody has measured."""
  return Config(cudnn_trial.apart(device, facts, rows=True))


def refusal(config: Config, device: Device, facts: Facts) -> str | None:
  """A reason against attending so with cuDNN, or None."""
  return cudnn_trial.refusal(device, facts, rows=True, apart=config.apart)


def prefill_attention(
  q: jax.Array,
  pages: jax.Array,
  tables: jax.Array,
  offsets: jax.Array,
  lengths: jax.Array,
  *,
  softmax_scale: float,
  sliding_window: int | None = None,
  soft_cap: float | None = None,
  sinks: jax.Array | None = None,
  scales: jax.Array | None = None,
  return_lse: bool = False,
  config: Config,
  device: Device,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `pallas_kernels.prefill_attention.prefill_attention`."""
  assert sliding_window is None and soft_cap is None and sinks is None and scales is None  # refused
  tokens = q.shape[0]
  tiles = _Tiles.of(tokens, offsets, lengths, config.tile_rows)
  rows = tiles.row[:, None] + jnp.arange(tiles.rows)  # [X, R]
  queries = q[None] if tiles.alone else q.at[rows].get(mode='clip')
  tables = tables[tiles.sequence]  # [X, N]

  own = _read(pages, tables, tiles)
  count = jnp.maximum(tiles.count, 1)
  out, lse = cudnn.attend(queries, *own, count, count, softmax_scale=softmax_scale, causal=True, return_lse=True)
  assert lse is not None
  before = cudnn.attend_pages(
    queries, pages, tables, count, tiles.before, softmax_scale=softmax_scale, apart=config.apart
  )
  out, lse = cudnn.merge(out, jnp.moveaxis(lse, 1, 2), *before)
  out, lse = tiles.restore(out), tiles.restore(lse)
  live = (jnp.arange(tokens) < offsets[-1])[:, None]
  out = jnp.where(live[..., None], out, 0).astype(q.dtype)
  return (out, jnp.where(live, lse, -jnp.inf)) if return_lse else out


@dataclasses.dataclass(frozen=True)
class _Tiles:
  """Packed rows cut into X tiles of R, each of one sequence; those beyond the last are empty."""

  rows: int  # R
  alone: bool  # all rows are one tile
  sequence: jax.Array  # [X], whose rows they are
  row: jax.Array  # [X], the first of them in q
  count: jax.Array  # [X], how many
  before: jax.Array  # [X], tokens of the sequence before the tile
  place: jax.Array | None  # [T], of each row of q in all tiles' rows

  @classmethod
  def of(cls, tokens: int, offsets: jax.Array, lengths: jax.Array, rows: int) -> '_Tiles':
    starts, counts = offsets[:-1], offsets[1:] - offsets[:-1]
    batch = starts.shape[0]
    if batch == 1:
      return cls(tokens, True, jnp.zeros(1, jnp.int32), starts, counts, lengths - counts, None)
    rows = min(rows, tokens)
    each = -(-counts // rows)
    ends = jnp.cumsum(each)
    tile = jnp.arange(tokens // rows + batch)
    sequence = jnp.minimum(owners(ends, tile), batch - 1)
    first = (tile - (ends - each)[sequence]) * rows  # of its rows, counted in the chunk
    count = jnp.clip(counts[sequence] - first, 0, rows)
    row = jnp.arange(tokens)
    of_row = jnp.minimum(owners(offsets[1:], row), batch - 1)
    in_chunk = row - starts[of_row]
    place = ((ends - each)[of_row] + in_chunk // rows) * rows + in_chunk % rows
    return cls(
      rows,
      False,
      sequence,
      starts[sequence] + first,
      count,
      jnp.where(count > 0, (lengths - counts)[sequence] + first, 0),
      place,
    )

  def restore(self, tiled: jax.Array) -> jax.Array:
    """The tiles' rows `[X, R, ...]` in the order of q."""
    flat = tiled.reshape(-1, *tiled.shape[2:])
    return flat if self.place is None else flat.at[self.place].get(mode='clip')


def _read(pages: jax.Array, tables: jax.Array, tiles: _Tiles) -> tuple[jax.Array, jax.Array]:
  """Keys and values `[X, R, K, D]` of tiles' tokens, zeros behind the last."""
  page_size = pages.shape[3]
  row = jnp.arange(tiles.rows)
  position = tiles.before[:, None] + row
  slot = jnp.minimum(position // page_size, tables.shape[1] - 1)
  page, offset = jnp.take_along_axis(tables, slot, axis=1), position % page_size
  held = (row < tiles.count[:, None])[..., None, None]
  keys, values = (jnp.where(held, pages.at[page, part, :, offset].get(mode='clip'), 0) for part in (0, 1))
  return keys, values
