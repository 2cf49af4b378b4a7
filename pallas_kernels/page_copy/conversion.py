"""Conversion of a page's elements on the way: to other floats, or to int8 or fp8 with a scale a token and head."""

import jax
import jax.numpy as jnp

from pallas_kernels.layouts import PageLayout

QUANTIZED = {  # the largest magnitude that a stored element takes, by dtype
  jnp.dtype('int8'): 127.0,
  jnp.dtype('float8_e4m3fn'): 448.0,
  jnp.dtype('float8_e5m2'): 57344.0,
}
SMALLEST_ABSMAX = 1e-30  # below it a token counts as zeros; its inverse is still finite


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
    parts, scales = quantize(layout.unpack(pages), dtype)
    return layout.pack(parts), scales
  if scales is not None and not scaled:
    parts = layout.unpack(pages).astype(jnp.float32) * scales[..., None]
    return cast(layout.pack(parts), dtype), None
  return cast(pages, dtype), scales
