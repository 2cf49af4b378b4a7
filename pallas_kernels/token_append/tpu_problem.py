"""The cut of an append on a TPU: its parameters, and the vector memory that follows from them."""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Config:
  """Tuning of the append.

  Attributes:
    tile_rows: Tokens of a tile; divides the page size and is whole hardware tiles.
    block_tokens: Tokens of a grid step.
    slots: Tiles in VMEM.
    ahead: Tiles that are read before they are needed; fewer than `slots`.
    cores: Cores that share the heads; 2 where one device is two cores (v4, v5p).
  """

  tile_rows: int
  block_tokens: int = 128
  slots: int = 32
  ahead: int = 16
  cores: int = 1


def vmem_bytes(config: Config, page: tuple[int, ...], dtype: jnp.dtype) -> int:
  """VMEM of an append: two blocks of tokens and the ring of tiles."""
  both, blocks, _, width = page
  row_elements = both * blocks * -(-width // 128) * 128
  tokens = config.block_tokens + 2 * config.tile_rows
  return row_elements * (2 * tokens * 4 + config.slots * config.tile_rows * jnp.dtype(dtype).itemsize)
