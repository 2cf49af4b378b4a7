"""What becomes of a page's elements on the way: another float type, or int8 or fp8 with a scale a token and head."""

import dataclasses

import jax
import jax.numpy as jnp

QUANTIZED = {  # the largest magnitude that a stored element takes, by dtype
  jnp.dtype('int8'): 127.0,
  jnp.dtype('float8_e4m3fn'): 448.0,
  jnp.dtype('float8_e5m2'): 57344.0,
}
SMALLEST_ABSMAX = 1e-30  # below it a token counts as zeros; its inverse is still finite


@dataclasses.dataclass(frozen=True)
class PageLayout:
  """How one page `[A, C, G, W]` holds the keys and values `[2, K, G, D]`.

  *plain* is `[2, K, G, D]`; *paired* `[2, K/2, G, 2D]` has heads 2i and 2i+1 side by side in the lanes; *kv*
  `[1, K, G, 2D]` has a head's key before its value.
  """

  page: tuple[int, int, int, int]  # A, C, G, W
  head_dim: int

  @classmethod
  def of(cls, page: tuple[int, ...], kv_heads: int) -> 'PageLayout':
    """The layout of a page that holds so many heads.

    Raises:
      ValueError: if no layout of such a page does.
    """
    split, blocks, _, width = page
    head_dim = split * blocks * width // (2 * kv_heads) if kv_heads > 0 else 0
    fits = [(2, kv_heads, head_dim), (2, kv_heads / 2, 2 * head_dim), (1, kv_heads, 2 * head_dim)]
    if head_dim < 1 or (split, blocks, width) not in fits:
      raise ValueError(
        f'pages of {page} do not hold {kv_heads} key/value heads; expected [2, K, G, D], [2, K/2, G, 2D] or '
        f'[1, K, G, 2D] with K = {kv_heads}.'
      )
    return cls((split, blocks, page[2], width), head_dim)

  @property
  def halves(self) -> int:
    """Heads, or a key and a value, side by side in the lanes: 1 or 2."""
    return self.page[3] // self.head_dim

  @property
  def kv_heads(self) -> int:
    """K."""
    return self.page[0] * self.page[1] * self.halves // 2

  def split(self, pages: jax.Array) -> jax.Array:
    """`[..., A, C, G, W]` as `[..., 2, K, G, D]`."""
    lead, (both, blocks, size, _) = pages.shape[:-4], self.page
    parts = pages.reshape(*lead, both, blocks, size, self.halves, self.head_dim)
    parts = jnp.moveaxis(parts, -2, -3 if both == 2 else -5)
    return parts.reshape(*lead, 2, self.kv_heads, size, self.head_dim)

  def join(self, parts: jax.Array) -> jax.Array:
    """`[..., 2, K, G, D]` as `[..., A, C, G, W]`; G may differ from the layout's."""
    lead, size, (both, blocks, _, width) = parts.shape[:-4], parts.shape[-2], self.page
    shape = (both, blocks, self.halves) if both == 2 else (self.halves, both, blocks)
    parts = parts.reshape(*lead, *shape, size, self.head_dim)
    parts = jnp.moveaxis(parts, -3 if both == 2 else -5, -2)
    return parts.reshape(*lead, both, blocks, size, width)


def quantize(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
  """`[..., D]` as stored elements and float32 scales `[...]`: the largest magnitude over the largest stored one."""
  largest = QUANTIZED[jnp.dtype(dtype)]
  x = x.astype(jnp.float32)
  absmax = jnp.max(jnp.abs(x), axis=-1)
  stored = x * (largest / jnp.maximum(absmax, SMALLEST_ABSMAX))[..., None]
  if jnp.dtype(dtype) == jnp.int8:
    stored = jnp.round(stored)
  return cast(stored, dtype), absmax * (1 / largest)


def cast(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Another type; fp8 and int8 saturate instead of overflowing."""
  largest = QUANTIZED.get(jnp.dtype(dtype))
  if largest is not None and x.dtype != dtype:
    x = jnp.clip(x.astype(jnp.float32), -largest, largest)
  return x.astype(dtype)


def convert(
  pages: jax.Array, scales: jax.Array | None, dtype: jnp.dtype, scaled: bool, layout: PageLayout
) -> tuple[jax.Array, jax.Array | None]:
  """Pages `[..., A, C, G, W]` with scales `[..., 2, K, G]` or None as pages of `dtype` with scales or without."""
  if scales is None and scaled:
    parts, scales = quantize(layout.split(pages), dtype)
    return layout.join(parts), scales
  if scales is not None and not scaled:
    parts = layout.split(pages).astype(jnp.float32) * scales[..., None]
    return cast(layout.join(parts), dtype), None
  return cast(pages, dtype), scales
