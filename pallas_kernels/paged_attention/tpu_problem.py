"""The cut of one decode step for a TPU: its parameters, and the sizes that follow from them."""

import dataclasses
import math

import jax.numpy as jnp

from pallas_kernels.tiles import LANES, SUBLANES, padded_bytes, round_up

PREFETCHED_PAGES = 65_536  # page numbers that may lie in scalar memory all the time; else blocks look theirs up


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes by which the work is cut."""

  block_tokens: int = 2048  # cached tokens of one sequence that are attended to at once
  blocks: int = 1  # such blocks a grid step; several where heads are few
  share: int = 4  # page columns (heads, or what is packed into their lanes) whose queries share a product
  copy_tokens: int = 128  # tokens whose pages are copied together; what is read of a block is a multiple of these
  joined: int = 1  # blocks that share products too; worth it where one column does not fill the matrix units


@dataclasses.dataclass(frozen=True)
class Problem:
  """The sizes of one call, after the queries are laid out in rows."""

  config: Config
  batch: int
  query_tokens: int
  query_heads: int
  head_dim: int
  page: tuple[int, ...]  # [A, C, G, W]
  table_pages: int  # N
  cores: int = 1
  softmax_scale: float = 1.0
  sliding_window: int | None = None
  soft_cap: float | None = None
  static_length: int | None = None  # of every sequence, where known at trace time

  @property
  def columns(self) -> int:
    """C: heads, or what is packed into their lanes."""
    return self.page[1]

  @property
  def page_size(self) -> int:
    """Tokens a page."""
    return self.page[2]

  @property
  def width(self) -> int:
    """W: lanes of a column."""
    return self.page[3]

  @property
  def heads(self) -> int:
    """Key/value heads a column."""
    return self.page[0] * self.width // (2 * self.head_dim)

  @property
  def group(self) -> int:
    """Query heads a key/value head."""
    return self.query_heads // (self.columns * self.heads)

  @property
  def share(self) -> int:
    """Columns that share a product."""
    return next(n for n in range(min(self.config.share, self.columns), 0, -1) if self.columns % n == 0)

  @property
  def joined(self) -> int:
    """Blocks that share a product."""
    return math.gcd(self.config.joined, self.config.blocks)

  @property
  def column_rows(self) -> int:
    """Query rows of one column; padded so that rows of different products lie in different sublanes."""
    rows = self.heads * self.group * self.query_tokens
    if self.share == self.columns:
      return rows
    return round_up(rows, SUBLANES // math.gcd(self.share, SUBLANES))

  @property
  def rows(self) -> int:
    """Query rows of a sequence."""
    return self.columns * self.column_rows

  @property
  def share_rows(self) -> int:
    """Query rows of a sequence that share a product."""
    return self.share * self.column_rows

  @property
  def copy_pages(self) -> int:
    """Pages whose copies are started together."""
    return min(max(self.config.copy_tokens // self.page_size, 1), round_up_power(self.table_pages))

  @property
  def block_pages(self) -> int:
    """Pages a block."""
    pages = min(self.config.block_tokens // self.page_size, self.table_pages)
    return round_up(max(pages, 1), self.copy_pages)

  @property
  def block_tokens(self) -> int:
    """Tokens a block."""
    return self.block_pages * self.page_size

  @property
  def table_blocks(self) -> int:
    """Blocks of the longest sequence."""
    return -(-self.table_pages // self.block_pages)

  @property
  def static_blocks(self) -> int | None:
    """Blocks that every sequence fills to the last token, where known at trace time."""
    if self.static_length is None:
      return None
    if self.static_length % self.block_tokens or self.sliding_window is not None:
      raise ValueError(f'static_length {self.static_length} is not made of whole blocks of {self.block_tokens} tokens.')
    return self.static_length // self.block_tokens

  @property
  def static_steps(self) -> int | None:
    """Grid steps of a core, where known at trace time."""
    blocks = self.static_blocks
    return None if blocks is None else -(-(-(-self.batch // self.cores) * blocks) // self.config.blocks)

  @property
  def max_steps(self) -> int:
    """Grid steps of a core that has all the work."""
    return -(-self.batch * self.table_blocks // self.config.blocks)

  @property
  def smem_bytes(self) -> int:
    """Scalar memory that the work list, the lengths and the page numbers take."""
    items = self.cores * (self.max_steps + 1) * self.config.blocks
    return 4 * (items + self.batch + min(self.batch * self.table_blocks * self.block_pages, PREFETCHED_PAGES))

  def vmem_bytes(self, page_dtype: jnp.dtype, q_dtype: jnp.dtype) -> int:
    """Vector memory that the kernel needs: what it keeps, and room for what the compiler keeps between products."""
    blocks, tokens, width = self.config.blocks, self.block_tokens, self.width
    pages = 2 * blocks * self.block_pages * math.prod(self.page) * page_dtype.itemsize
    scales = 2 * blocks * 2 * self.columns * self.heads * tokens * 4 if page_dtype.itemsize == 1 else 0
    queries_and_results = padded_bytes((4 * blocks, self.rows, self.head_dim), q_dtype)
    logs_of_sums = padded_bytes((2 * blocks, self.rows, LANES), jnp.dtype(jnp.float32))
    rows, lanes = self.joined * self.share_rows, self.joined * self.share * width
    state = padded_bytes((self.rows, self.head_dim + 2 * LANES), jnp.dtype(jnp.float32))
    own = padded_bytes((rows, lanes), jnp.dtype(jnp.float32))
    scores = 6 * max(rows, SUBLANES) * tokens * 4
    values = 2 * lanes * tokens * q_dtype.itemsize
    return pages + scales + queries_and_results + logs_of_sums + state + own + scores + values + (1 << 20)


def round_up_power(value: int) -> int:
  """The next power of two."""
  return 1 << (value - 1).bit_length()
