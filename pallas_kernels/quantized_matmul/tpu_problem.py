"""The cut of one product with quantized weights for a TPU: its parameters, and the sizes that follow from them."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels.quantized_matmul.bfloat16_parts import TERMS
from pallas_kernels.quantized_matmul.storage import UNIT
from pallas_kernels.tiles import LANES, padded_bytes, round_up
from pallas_kernels.tuning import Facts

_HEADROOM = 3 << 20  # bytes of VMEM for what the compiler keeps there


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
class Plan:
  """Static facts of one call: sizes after padding, and what follows from them."""

  config: Config
  kind: str  # 'int4', 'int8' or 'w8a8'
  pieces: int  # bfloat16 parts that make up one activation
  rows: int  # of a block, of each piece
  size_k: int
  size_n: int  # of one core's part
  group: int  # rows of K of one scale
  out_dtype: str

  @classmethod
  def of(cls, facts: Facts, config: Config, out_dtype: Any) -> 'Plan':
    """The plan of a call for a problem."""
    size_m, size_k, group = int(facts['m']), int(facts['k']), int(facts['group_size'])
    kind = str(facts['kind'])
    padded_k = round_up(size_k, UNIT)
    return cls(
      config=config,
      kind=kind,
      pieces=3 if facts['dtype'] == 'float32' else 1,
      rows=round_up(-(-size_m // row_blocks(size_m, config)), 32 if kind == 'w8a8' else 16),
      size_k=padded_k,
      size_n=round_up(int(facts['n']), LANES * config.cores) // config.cores,
      group=padded_k if group == size_k else group,
      out_dtype=jnp.dtype(out_dtype).name,
    )

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
    """Steps over K."""
    return self.size_k // self.block_k

  @property
  def block_n(self) -> int:
    """Columns a step, of whole blocks."""
    return min(self.config.block_n, self.size_n)

  @property
  def steps_n(self) -> int:
    """Whole blocks of columns."""
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
    """Columns of each of the narrower blocks."""
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

  @property
  def buffers(self) -> dict[str, tuple[tuple[int, ...], Any]]:
    """The shape and the dtype of each buffer in VMEM, in the kernel's order."""
    config, rows, block_n = self.config, self.rows, max(self.block_n, self.lead_width)
    runs = self.block_k // self.run
    return {
      'x': ((self.steps_k, self.pieces * rows, self.block_k), jnp.int8 if self.kind == 'w8a8' else jnp.bfloat16),
      'w': ((config.depth, self.block_k // self.packing, block_n), jnp.int32 if self.kind == 'int4' else jnp.int8),
      'scales': ((config.depth, runs, block_n), jnp.float32),
      'row_scales': ((rows if self.kind == 'w8a8' else 8, LANES), jnp.float32),
      'out': ((4 if self.lead_n else 2, rows, block_n), self.out_dtype),
      'sums': ((self.steps_k * runs, rows, LANES) if self.kind == 'int4' else (1, 8, LANES), jnp.float32),
      'spread': ((self.steps_k, rows, len(TERMS) * runs) if self.by_sums else (1, 16, LANES), jnp.bfloat16),
      'total': ((rows, block_n) if self.steps_k > 1 else (8, LANES), jnp.float32),
    }

  @property
  def vmem_bytes(self) -> int:
    """VMEM that the kernel may take: its buffers in whole tiles, and what the compiler keeps there."""
    return sum(padded_bytes(shape, dtype) for shape, dtype in self.buffers.values()) + _HEADROOM


def row_blocks(size_m: int, config: Config) -> int:
  """Blocks of rows of a call."""
  return -(-size_m // config.block_m)


def _divisor(size: int, most: int) -> int:
  """The largest multiple of 128 that divides a size, which is one, and is at most `most`; 128 if none is."""
  return next((width for width in range(most // LANES * LANES, LANES, -LANES) if size % width == 0), LANES)
