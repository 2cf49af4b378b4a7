"""Three layouts of the keys and values in a page, told apart by the pages' shape and the head size alone."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels.devices import LANES, Device

PLAIN, PAIRED, KV = 'plain', 'paired', 'kv'


@dataclasses.dataclass(frozen=True)
class PageLayout:
  """The order of the keys and values of K heads of size D in pages `[P, A, C, G, W]` of one layer.

  plain: `[P, 2, K, G, D]`, keys, then values.
  paired: `[P, 2, K/2, G, 2D]`, the same with heads 2i and 2i + 1 side by side (at D = 64, in the 128 lanes of a TPU).
  kv: `[P, 1, K, G, 2D]`, a head's key and its value side by side, which fills them for odd K too.
  """

  name: str
  kv_heads: int
  page_size: int
  head_dim: int

  @classmethod
  def of(cls, shape: tuple[int, ...], head_dim: int) -> 'PageLayout':
    """The layout of pages of this shape.

    Raises:
      ValueError: if they are pages of heads of another size, or no pages at all.
    """
    match shape:
      case (_, 2, kv_heads, page_size, width) if width == head_dim:
        return cls(PLAIN, kv_heads, page_size, head_dim)
      case (_, 2, pairs, page_size, width) if width == 2 * head_dim:
        return cls(PAIRED, 2 * pairs, page_size, head_dim)
      case (_, 1, kv_heads, page_size, width) if width == 2 * head_dim:
        return cls(KV, kv_heads, page_size, head_dim)
    raise ValueError(
      f'pages {shape} are not [P, 2, K, G, D], [P, 2, K/2, G, 2D] or [P, 1, K, G, 2D] with the head size '
      f'D = {head_dim} of q; take q and pages of one model.'
    )

  @classmethod
  def of_heads(cls, shape: tuple[int, ...], kv_heads: int) -> 'PageLayout':
    """The layout of pages of this shape that hold so many heads.

    Raises:
      ValueError: if no layout of such pages does.
    """
    head_dim, rest = divmod(math.prod(shape[1:3]) * shape[-1], 2 * max(kv_heads, 1))
    layout = None if rest or not kv_heads else cls.of(shape, head_dim)
    if layout is None or layout.kv_heads != kv_heads:
      raise ValueError(
        f'pages {shape} do not hold {kv_heads} key/value heads; expected [P, 2, K, G, D], [P, 2, K/2, G, 2D] or '
        f'[P, 1, K, G, 2D] with K = {kv_heads}.'
      )
    return layout

  @classmethod
  def best(cls, device: Device, kv_heads: int, page_size: int, head_dim: int) -> 'PageLayout':
    """The layout that a device reads fastest, whatever the dtype, with scales or without.

    On a TPU, heads that fill the lanes two by two (64) are packed: paired if their number is even, else kv. In plain
    pages of them XLA puts the pages in the lanes, so that none lies in one piece, and the kernels refuse them.

    Args:
      device: The device of the pages.
      kv_heads: K, on each device if heads are sharded: each sees its own alone.
      page_size: G.
      head_dim: D.
    """
    packed = device.platform == 'tpu' and head_dim % LANES and not 2 * head_dim % LANES
    name = PLAIN if not packed else KV if kv_heads % 2 else PAIRED
    return cls(name, kv_heads, page_size, head_dim)

  @property
  def halves(self) -> int:
    """Heads, or a key and its value, side by side in a row: 1 or 2."""
    return 1 if self.name == PLAIN else 2

  @property
  def page_shape(self) -> tuple[int, int, int, int]:
    """`(A, C, G, W)`, the shape of one page."""
    if self.name == PLAIN:
      return 2, self.kv_heads, self.page_size, self.head_dim
    if self.name == PAIRED:
      return 2, self.kv_heads // 2, self.page_size, 2 * self.head_dim
    return 1, self.kv_heads, self.page_size, 2 * self.head_dim

  def unpack(self, pages: jax.Array) -> jax.Array:
    """Pages `[..., A, C, G, W]` in this layout as `[..., 2, K, G, D]`; G may be any number of tokens."""
    if self.name == PLAIN:
      return pages
    *rest, tokens, _ = pages.shape
    halves = pages.reshape(*rest, tokens, 2, self.head_dim)
    halves = jnp.moveaxis(halves, -2, self._axis_of_halves)
    return halves.reshape(*rest[:-2], 2, self.kv_heads, tokens, self.head_dim)

  def pack(self, unpacked: jax.Array) -> jax.Array:
    """The inverse of `unpack`."""
    if self.name == PLAIN:
      return unpacked
    *rest, _, _, tokens, _ = unpacked.shape
    one, heads, _, width = self.page_shape
    halves = unpacked.reshape(
      *rest, *((2, heads, 2) if self.name == PAIRED else (2, one, heads)), tokens, self.head_dim
    )
    return jnp.moveaxis(halves, self._axis_of_halves, -2).reshape(*rest, one, heads, tokens, width)

  @property
  def _axis_of_halves(self) -> int:
    """The axis of a row's two halves among `[..., 2, K/2, 2, G, D]` or `[..., 2, 1, K, G, D]`."""
    return -3 if self.name == PAIRED else -5
