"""Decoding sequences on the device: a row for each slot, and the history that penalties ask for."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pdjax.model.sampling import Chosen, Sampling, count


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequences:
  """The state of B sequences between two decode steps."""

  tokens: jax.Array  # [B] int32, the last token, not in the pages yet
  lengths: jax.Array  # [B] int32, cached tokens
  generated: jax.Array  # [B] int32
  alive: jax.Array  # [B] bool
  tables: jax.Array  # [B, N] int32, its pages
  sampling: Sampling

  @classmethod
  def empty(cls, rows: int, table_width: int) -> 'Sequences':
    """NumPy rows of which none is alive."""
    new: dict[str, Any] = {
      'tokens': np.zeros(rows, np.int32),
      'lengths': np.zeros(rows, np.int32),
      'generated': np.zeros(rows, np.int32),
      'alive': np.zeros(rows, bool),
      'tables': np.zeros((rows, table_width), np.int32),
    }
    return cls(**new, sampling=Sampling.stack((), (), (), rows))

  def advance(self, chosen: Chosen) -> 'Sequences':
    """The rows one token later; those not alive stay as they are, and one without a token to choose ends."""
    alive, tokens = self.alive, chosen.tokens
    generated = self.generated + alive
    return dataclasses.replace(
      self,
      tokens=jnp.where(alive, tokens, self.tokens),
      lengths=self.lengths + alive,
      generated=generated,
      alive=alive & chosen.finite & ~self.sampling.ended(tokens, generated),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """The S sequences of a worker, and the history that penalties ask for.

  A row past the last reads as zeros, so not alive, and writing it does nothing: that is what batches are padded with.
  The history is as wide as the vocabulary, so it is read only where a penalty asks for it and never moves with its
  sequence; its rows are kept for those with penalties only. The C rows after the slots' are for chunks, whose
  sequences may have no slot here.
  """

  rows: Sequences  # [S]
  history: jax.Array  # [S + C, V] uint16, see `past`

  @property
  def size(self) -> int:
    """The number of slots."""
    return self.rows.alive.shape[0]

  def take(self, ids: jax.Array) -> Sequences:
    """The rows `ids` `[B]`."""
    return jax.tree.map(lambda a: a.at[ids].get(mode='fill', fill_value=0), self.rows)

  def put(self, ids: jax.Array, rows: Sequences) -> 'Slots':
    """All slots, with the rows `ids` `[B]` replaced."""
    new = jax.tree.map(lambda a, new: a.at[ids].set(new, mode='drop'), self.rows, rows)
    return dataclasses.replace(self, rows=new)

  def grow(self, slots: jax.Array, places: jax.Array, pages: jax.Array) -> 'Slots':
    """All slots, with pages `[n]` at these places of the tables of slots `[n]`."""
    tables = self.rows.tables.at[slots, places].set(pages, mode='drop')
    return dataclasses.replace(self, rows=dataclasses.replace(self.rows, tables=tables))

  def remember(self, row: jax.Array, past: jax.Array) -> 'Slots':
    """All slots, with one row of the history replaced by `past` `[V]`."""
    return dataclasses.replace(self, history=self.history.at[row].set(past))

  def count(self, ids: jax.Array, sequences: Sequences, tokens: jax.Array) -> 'Slots':
    """All slots, with tokens `[B]` noted for those of the sequences in slots `ids` `[B]` that ask for penalties."""
    wanted = sequences.alive & sequences.sampling.penalised & (ids < self.size)
    rows = jnp.where(wanted, ids, self.history.shape[0])
    return dataclasses.replace(self, history=count(self.history, rows, tokens))
