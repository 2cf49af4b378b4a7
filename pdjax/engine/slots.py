"""What a decoding sequence needs on the device, one row a slot."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pdjax.model.sampling import Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """The state of S sequences between two decode steps.

  A row past the last reads as zeros, so not alive, and writing it does nothing: that is what batches are padded with.
  """

  tokens: jax.Array  # [S] int32, the last token, not in the pages yet
  lengths: jax.Array  # [S] int32, cached tokens
  generated: jax.Array  # [S] int32
  alive: jax.Array  # [S] bool
  tables: jax.Array  # [S, N] int32, its pages
  sampling: Sampling

  @classmethod
  def empty(cls, rows: int, table_width: int) -> 'Slots':
    """NumPy rows of which none is alive."""
    new: dict[str, Any] = {
      'tokens': np.zeros(rows, np.int32),
      'lengths': np.zeros(rows, np.int32),
      'generated': np.zeros(rows, np.int32),
      'alive': np.zeros(rows, bool),
      'tables': np.zeros((rows, table_width), np.int32),
    }
    return cls(**new, sampling=Sampling.stack((), (), (), rows))

  def take(self, ids: jax.Array) -> 'Slots':
    """The rows `ids` `[B]`."""
    return jax.tree.map(lambda a: a.at[ids].get(mode='fill', fill_value=0), self)

  def put(self, ids: jax.Array, rows: 'Slots') -> 'Slots':
    """All rows, with `ids` `[B]` replaced by `rows`."""
    return jax.tree.map(lambda a, new: a.at[ids].set(new, mode='drop'), self, rows)

  def advance(self, tokens: jax.Array) -> 'Slots':
    """The rows one token later; those not alive stay as they are."""
    alive = self.alive
    generated = self.generated + alive
    return dataclasses.replace(
      self,
      tokens=jnp.where(alive, tokens, self.tokens),
      lengths=self.lengths + alive,
      generated=generated,
      alive=alive & ~self.sampling.ended(tokens, generated),
    )
