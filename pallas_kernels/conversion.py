"""Conversion of a page's elements on the way: to other floats, or to int8 or fp8 with a scale a token and head.

Every copy of pages and every append converts so, checks by the same rules whether it can, and tells by the same facts
which conversion it is.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.layouts import PageLayout

QUANTIZED = {  # the largest magnitude that a stored element takes, by dtype
  jnp.dtype('int8'): 127.0,
  jnp.dtype('float8_e4m3fn'): 448.0,
  jnp.dtype('float8_e5m2'): 57344.0,
}
_FLOATS = ('float32', 'bfloat16', 'float16', 'float8_e4m3fn', 'float8_e5m2')
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


def check_scales(layers: Sequence[jax.Array], scales: Sequence[jax.Array] | None) -> None:
  """See that pages `[P, A, C, G, W]` of one or several layers have scales `[P, 2, K, G]` that fit, int8 ones always.

  Raises:
    ValueError: if not.
  """
  page = layers[0].shape
  if len(page) != 5:
    raise ValueError(f'pages {page} are not [P, A, C, G, W].')
  if scales is None:
    if layers[0].dtype == jnp.int8:
      raise ValueError(f'pages are {layers[0].dtype} and scales None; int8 pages need scales [P, 2, K, G].')
    return
  if layers[0].dtype not in QUANTIZED:
    raise ValueError(f'pages are {layers[0].dtype}, but scales {scales[0].shape} belong to int8 or fp8 pages.')
  if len(scales) != len(layers):
    raise ValueError(f'{len(scales)} layers of scales do not belong to {len(layers)} layers of pages.')
  if scales[0].ndim == 4:
    PageLayout.of_heads(page, scales[0].shape[2])
  if (
    scales[0].ndim != 4
    or scales[0].dtype != jnp.float32
    or scales[0].shape[::3] != page[::3]
    or scales[0].shape[1] != 2
  ):
    raise ValueError(f'scales {scales[0].dtype} {scales[0].shape} are not the float32 [P, 2, K, G] of pages {page}.')


def check_conversion(source: jnp.dtype, scaled: bool, target: jnp.dtype, target_scaled: bool) -> None:
  """See that elements of a dtype, with scales or without, can become those of another.

  Raises:
    ValueError: if not.
  """
  source, target = jnp.dtype(source), jnp.dtype(target)
  for dtype, with_scales in ((source, scaled), (target, target_scaled)):
    if not (dtype in QUANTIZED if with_scales else dtype.name in _FLOATS) and source != target:
      what = 'with scales, expected int8 or fp8' if with_scales else f'without scales, expected {", ".join(_FLOATS)}'
      raise ValueError(f'{source} to {target}: {dtype} {what}.')
  if scaled and target_scaled and source != target:
    raise ValueError(f'{source} with scales to {target} with scales: go by way of a float type.')
  if scaled != target_scaled and jnp.int8 in ((source,) if not scaled else ()) + (
    (target,) if not target_scaled else ()
  ):
    raise ValueError(f'{source} to {target}: int8 has no value without scales.')


def describe(
  pages: jax.Array | jax.ShapeDtypeStruct, layout: PageLayout, values: jnp.dtype, scaled: tuple[bool, bool]
) -> dict[str, int | str]:
  """Facts of pages and of the values beside them; `scaled` says whether the values and the pages have scales."""
  return {
    'dtype': pages.dtype.name,
    'values': jnp.dtype(values).name,
    'scaled': ('neither', 'pages', 'values', 'both')[2 * scaled[0] + scaled[1]],
    'layout': layout.name,
    'kv_heads': layout.kv_heads,
    'head_dim': layout.head_dim,
    'page_size': layout.page_size,
  }
