"""One problem of the TPU kernel: its shapes, how they are cut, and what they take of the vector memory."""

import dataclasses
import math

import jax.numpy as jnp

from pallas_kernels.tiles import LANES, SUBLANES, padded_bytes, round_up

_SPILLS = 8 << 20  # bytes of vector memory for what the compiler puts aside


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes by which the work is cut.

  Attributes:
    block_rows: Packed rows a grid step.
    tile_rows: Rows of one head a tile of scores; divides block_rows.
    block_tokens: Cached tokens copied at a time, about: whole tiles.
    tile_tokens: Cached tokens a matrix product, about: whole pages.
    ahead: Tiles whose scores are asked for before the softmax of the present one.
    heads_at_once: Key/value heads in one straight-line piece of code, in the interior; as far as they divide all.
    edge_heads_at_once: The same for the edges.
    outer_heads_at_once: The same, about, where queries come and results go; all of them if None.
    fixed_reference: Whether the interior refers to the edges' maximum; else every block has a running maximum.
    join_results: Whether results of all tiles of a head go out in one piece of code: longer, a little faster, and on
      tpu7x the simulation gives up otherwise, unless a piece holds all heads.
  """

  block_rows: int = 512
  tile_rows: int = 256
  block_tokens: int = 512
  tile_tokens: int = 256
  ahead: int = 2
  heads_at_once: int = 1
  edge_heads_at_once: int = 1
  outer_heads_at_once: int | None = None
  fixed_reference: bool = True
  join_results: bool = False


@dataclasses.dataclass(frozen=True)
class Problem:
  """The shapes of one call, all of them static.

  A page holds C packed heads of W lanes, keys and values in A parts; a packed head answers `group` query heads.
  """

  config: Config
  tokens: int  # T
  query_heads: int  # H
  head_dim: int  # D
  page: tuple[int, ...]  # [A, C, G, W]
  dtype: jnp.dtype  # of queries
  page_dtype: jnp.dtype
  softmax_scale: float = 1.0
  sliding_window: int | None = None
  soft_cap: float | None = None

  @property
  def parts(self) -> int:
    """A: keys and values apart, or side by side."""
    return self.page[0]

  @property
  def heads(self) -> int:
    """C, the packed heads."""
    return self.page[1]

  @property
  def page_size(self) -> int:
    """G, tokens a page."""
    return self.page[2]

  @property
  def width(self) -> int:
    """W, lanes."""
    return self.page[3]

  @property
  def quantized(self) -> bool:
    """Whether pages have scales."""
    return self.page_dtype.itemsize == 1

  @property
  def kv_heads(self) -> int:
    """K."""
    return self.parts * self.heads * self.width // (2 * self.head_dim)

  @property
  def group(self) -> int:
    """Query heads a packed head."""
    return self.query_heads // self.heads

  @property
  def rows(self) -> int:
    """T, padded to whole blocks."""
    return round_up(self.tokens, self.config.block_rows)

  @property
  def row_tiles(self) -> int:
    """Tiles a head in a block of rows."""
    return self.config.block_rows // self.config.tile_rows

  @property
  def tile_tokens(self) -> int:
    """Cached tokens a tile, whole pages."""
    return self.page_size * max(self.config.tile_tokens // self.page_size, 1)

  @property
  def tiles(self) -> int:
    """Tiles of cached tokens a block."""
    return max(self.config.block_tokens // self.tile_tokens, 1)

  @property
  def block_tokens(self) -> int:
    """Cached tokens a block, whole tiles."""
    return self.tiles * self.tile_tokens

  @property
  def block_pages(self) -> int:
    """Pages a block."""
    return self.block_tokens // self.page_size

  @property
  def rows_in_place(self) -> bool:
    """Whether the kernel reads and writes rows `[T, H, D]` as they lie; else they are `[H, T, W]` to it."""
    return self.dtype == jnp.bfloat16 and self.head_dim == self.width == LANES and self.query_heads % 16 == 0

  @property
  def heads_a_word(self) -> int:
    """Query heads that the kernel reads and writes together: two of 16 bits share a word of memory."""
    return 2 if self.rows_in_place else 1

  @property
  def heads_at_once(self) -> int:
    """Packed heads in one piece of code, in the interior: as many as asked for, as far as they divide all."""
    return math.gcd(self.config.heads_at_once, self.heads)

  @property
  def edge_heads_at_once(self) -> int:
    """The same for the edges."""
    return math.gcd(self.config.edge_heads_at_once, self.heads)

  @property
  def outer_heads(self) -> int:
    """Packed heads whose rows are read, or written, in one piece of code: those of whole tiles of memory."""
    together = SUBLANES if self.rows_in_place else 1
    several = range(self.config.outer_heads_at_once or self.heads, self.heads)
    return next((n for n in several if self.heads % n == 0 and n * self.group % together == 0), self.heads)

  @property
  def rows_block(self) -> tuple[int, int, int]:
    """The shape of a block of rows as the kernel sees it."""
    if self.rows_in_place:
      return self.config.block_rows, self.query_heads, self.width
    return self.query_heads, self.config.block_rows, self.width

  def key_lane(self, head: int) -> int:
    """The lane in which the keys that a query head reads begin."""
    return head * self.kv_heads // self.query_heads % (self.kv_heads // self.heads) * self.head_dim

  def value_lane(self, head: int) -> int:
    """The lane in which its values begin."""
    return self.head_dim if self.parts == 1 else self.key_lane(head)

  def held_in(self, part: int, head: int, segment: int) -> tuple[int, int]:
    """The contents of a packed head's segment-th D lanes: 0 for keys or 1 for values, and their head."""
    return (segment, head) if self.parts == 1 else (part, head * (self.width // self.head_dim) + segment)

  def state(self) -> list[tuple[tuple[int, ...], jnp.dtype]]:
    """Shapes of the scratch that holds a block's queries, and each row's top, total and sums of values."""
    tile = (self.heads, self.row_tiles, self.group, self.config.tile_rows)
    lanes = self.group * self.config.tile_rows
    return [
      ((*tile, self.width), self.dtype),
      ((self.heads, self.row_tiles, SUBLANES, lanes), jnp.dtype(jnp.float32)),
      ((self.heads, self.row_tiles, SUBLANES, lanes), jnp.dtype(jnp.float32)),
      ((self.heads, self.row_tiles, self.width, lanes), jnp.dtype(jnp.float32)),
    ]

  def copies(self) -> list[tuple[tuple[int, ...], jnp.dtype]]:
    """Shapes and dtypes of two blocks of pages; if quantized, of their scales, and of a block multiplied by them."""
    pages: list[tuple[tuple[int, ...], jnp.dtype]] = [((2, self.block_pages, *self.page), self.page_dtype)]
    if self.quantized:
      pages.append(((2, self.block_pages, 2, self.kv_heads, self.page_size), jnp.dtype(jnp.float32)))
      pages.append(((self.block_pages, *self.page), self.dtype))
    return pages

  def vmem_bytes(self) -> int:
    """Vector memory of it all: scratch, rows coming and going two blocks at a time, and room for spills."""
    log_sums = (2 * self.query_heads, self.config.block_rows), jnp.dtype(jnp.float32)
    rows = (4, *self.rows_block), self.dtype
    return sum(padded_bytes(*each) for each in (log_sums, rows, *self.state(), *self.copies())) + _SPILLS
