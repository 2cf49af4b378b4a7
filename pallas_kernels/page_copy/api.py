"""Pages of the KV cache gathered into one contiguous array, put back, and new tokens written into them.

All three take the layouts of `PageLayout` and convert on the way when the two sides differ: float32, bfloat16, float16
and fp8 into each other, and floats to and from int8 (or fp8) with a float32 scale a token and head, value = stored ×
scale, scale = largest magnitude / 127.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Plain, Tuned, choose
from pallas_kernels.layouts import PageLayout
from pallas_kernels.page_copy import pallas_tpu, pallas_tpu_append, reference, xla
from pallas_kernels.page_copy.conversion import QUANTIZED

Layers = jax.Array | Sequence[jax.Array]  # one layer's array, or one of each layer
_FLOATS = ('float32', 'bfloat16', 'float16', 'float8_e4m3fn', 'float8_e5m2')


def gather_pages(
  pages: Layers,
  ids: jax.Array,
  *,
  scales: Layers | None = None,
  dtype: Any = None,
  head_dim: int | None = None,
  implementation: str | Sequence[str] | None = None,
) -> Any:
  """Copy pages into one contiguous array.

  Args:
    pages: `[P, A, C, G, W]`, one layer, or a sequence of L layers.
    ids: `[n]` int32 page numbers; numbers out of the pool read its nearest page.
    scales: `[P, 2, K, G]` float32 beside quantized pages, as many as layers.
    dtype: Of the result; that of `pages` if None. int8 from floats quantizes; floats from pages with scales multiply by
      them; pages with scales in their own dtype are copied with their scales.
    head_dim: D, needed to quantize pages whose W is not D; W if None (W / 2 when A is 1).
    implementation: 'pallas_tpu', 'xla' or 'reference', several of which the first that can run does, or None for the
      fastest here.

  Returns:
    `[n, A, C, G, W]`, or `[n, L, A, C, G, W]` for a sequence of layers; if the result is quantized with scales, a pair
    with these, `[n, 2, K, G]` or `[n, L, 2, K, G]`.

  Raises:
    ValueError: if shapes or dtypes do not fit together, or the implementation is unknown or cannot run.
  """
  layers, many = _layers(pages)
  layer_scales = None if scales is None else _layers(scales)[0]
  _check_ids(ids)
  source = layers[0].dtype
  target = source if dtype is None else jnp.dtype(dtype)
  _check_scales(layers, layer_scales)
  scaled = target == jnp.int8 if layer_scales is None else target == source
  layout = _layout(layers, layer_scales, head_dim)
  _check_conversion(source, layer_scales is not None, target, scaled)
  with_scales = scaled, layer_scales is not None
  run = _choose('gather_pages', implementation, layers[0], layout, target, with_scales, ids.shape[0], len(layers))
  values, value_scales = run(layers, jnp.asarray(ids), layer_scales, dtype=target, scaled=scaled, layout=layout)
  if not many:
    values, value_scales = values[:, 0], None if value_scales is None else value_scales[:, 0]
  return values if value_scales is None else (values, value_scales)


def scatter_pages(
  pages: Layers,
  ids: jax.Array,
  values: jax.Array,
  *,
  scales: Layers | None = None,
  value_scales: jax.Array | None = None,
  implementation: str | Sequence[str] | None = None,
) -> Any:
  """Put contiguous pages back, in place where the caller donates `pages` and `scales`.

  Args:
    pages: `[P, A, C, G, W]`, one layer, or a sequence of L layers.
    ids: `[n]` int32 page numbers, each at most once; a number out of the pool drops the page.
    values: `[n, A, C, G, W]`, or `[n, L, A, C, G, W]` for a sequence of layers; converted to what the pages are.
    scales: `[P, 2, K, G]` float32 beside quantized pages, as many as layers.
    value_scales: `[n, 2, K, G]` or `[n, L, 2, K, G]`, beside quantized values.
    implementation: 'pallas_tpu', 'xla' or 'reference', several of which the first that can run does, or None for the
      fastest here.

  Returns:
    The pages, as they were given; with `scales`, a pair of the pages and these.

  Raises:
    ValueError: if shapes or dtypes do not fit together, or the implementation is unknown or cannot run.
  """
  layers, many = _layers(pages)
  layer_scales = None if scales is None else _layers(scales)[0]
  _check_ids(ids)
  _check_scales(layers, layer_scales)
  if not many:
    values, value_scales = values[:, None], None if value_scales is None else value_scales[:, None]
  expected = (ids.shape[0], len(layers), *layers[0].shape[1:])
  if values.shape != expected:
    raise ValueError(f'values {values.shape} are not the {expected} of {ids.shape[0]} pages of {layers[0].shape}.')
  if value_scales is not None:
    kv_heads = value_scales.shape[3] if value_scales.ndim == 5 else 0
    PageLayout.of_heads(layers[0].shape, kv_heads)
    if value_scales.shape != (*expected[:2], 2, kv_heads, expected[4]) or value_scales.dtype != jnp.float32:
      raise ValueError(
        f'value_scales {value_scales.dtype} {value_scales.shape} are not the float32 [n, L, 2, K, G] of values '
        f'{values.shape}.'
      )
  _check_conversion(values.dtype, value_scales is not None, layers[0].dtype, layer_scales is not None)
  hint = layer_scales if layer_scales is not None else value_scales if value_scales is None else [value_scales[:, 0]]
  layout = _layout(layers, hint, None)
  with_scales = value_scales is not None, layer_scales is not None
  run = _choose(
    'scatter_pages', implementation, layers[0], layout, values.dtype, with_scales, ids.shape[0], len(layers)
  )
  out, out_scales = run(layers, jnp.asarray(ids), values, layer_scales, value_scales, layout=layout)
  if not many:
    out, out_scales = out[0], None if out_scales is None else out_scales[0]
  elif isinstance(pages, list):
    out, out_scales = list(out), None if out_scales is None else list(out_scales)
  return out if out_scales is None else (out, out_scales)


def append_tokens(
  pages: jax.Array,
  k: jax.Array,
  v: jax.Array,
  page: jax.Array,
  offset: jax.Array,
  *,
  scales: jax.Array | None = None,
  implementation: str | Sequence[str] | None = None,
) -> Any:
  """Write new tokens' keys and values into one layer's pages, in place where the caller donates `pages` and `scales`.

  Args:
    pages: `[P, A, C, G, W]`.
    k: `[T, K, D]` keys, floats; converted to what the pages are.
    v: `[T, K, D]` values.
    page: `[T]` int32, the page of each token; a number out of the pool drops the token.
    offset: `[T]` int32, where in its page each token goes; no two tokens go to one place.
    scales: `[P, 2, K, G]` float32 beside quantized pages.
    implementation: 'pallas_tpu', 'xla' or 'reference', several of which the first that can run does, or None for the
      fastest here.

  Returns:
    The pages; with `scales`, a pair of the pages and these.

  Raises:
    ValueError: if shapes or dtypes do not fit together, or the implementation is unknown or cannot run.
  """
  _layers(pages)
  if k.ndim != 3 or k.shape != v.shape or k.dtype != v.dtype:
    raise ValueError(f'k {k.dtype} {k.shape} and v {v.dtype} {v.shape} are not both [T, K, D] of one dtype.')
  if page.shape != k.shape[:1] or offset.shape != k.shape[:1]:
    raise ValueError(f'page {page.shape} and offset {offset.shape} do not belong to {k.shape[0]} tokens.')
  for name, numbers in (('page', page), ('offset', offset)):
    if not jnp.issubdtype(numbers.dtype, jnp.integer):
      raise ValueError(f'{name} has dtype {numbers.dtype}, expected int32.')
  layout = PageLayout.of_heads(pages.shape, k.shape[1])
  if layout.head_dim != k.shape[2]:
    raise ValueError(f'pages {pages.shape} hold heads of {layout.head_dim}, but k {k.shape} has heads of {k.shape[2]}.')
  _check_scales([pages], None if scales is None else [scales])
  if scales is not None and scales.shape[2] != k.shape[1]:
    raise ValueError(f'scales {scales.shape} are for {scales.shape[2]} heads, but k {k.shape} has {k.shape[1]}.')
  _check_conversion(k.dtype, False, pages.dtype, scales is not None)
  run = _choose('append_tokens', implementation, pages, layout, k.dtype, (False, scales is not None), k.shape[0])
  if not k.shape[0]:
    return pages if scales is None else (pages, scales)
  out, out_scales = run(pages, k, v, jnp.asarray(page), jnp.asarray(offset), scales, layout=layout)
  return out if out_scales is None else (out, out_scales)


# ---------------------------------------------------------------------------- checks


def _layers(arrays: Layers) -> tuple[tuple[jax.Array, ...], bool]:
  """The arrays as a tuple, and whether they came as a sequence."""
  many = isinstance(arrays, (list, tuple))
  layers = tuple(arrays) if many else (arrays,)
  if not layers:
    raise ValueError('pages has no layers; expected at least one.')
  for layer in layers:
    if (layer.shape, layer.dtype) != (layers[0].shape, layers[0].dtype):
      raise ValueError(
        f'layers of one pool differ: {layers[0].dtype} {layers[0].shape} and {layer.dtype} {layer.shape}.'
      )
  if layers[0].ndim not in (4, 5):
    raise ValueError(f'pages {layers[0].shape} are not [P, A, C, G, W].')
  return layers, many


def _check_ids(ids: jax.Array) -> None:
  if ids.ndim != 1 or not ids.shape[0] or not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(f'ids {ids.dtype} {ids.shape} are not page numbers, [n] int32 with n at least 1.')


def _check_scales(layers: Sequence[jax.Array], scales: Sequence[jax.Array] | None) -> None:
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


def _layout(layers: Sequence[jax.Array], scales: Sequence[jax.Array] | None, head_dim: int | None) -> PageLayout:
  shape = layers[0].shape
  _, split, blocks, _, width = shape
  if scales is not None:
    layout = PageLayout.of_heads(shape, scales[0].shape[2])
  else:
    dim = head_dim or (width if split == 2 else width // 2)
    layout = PageLayout.of_heads(shape, split * blocks * width // (2 * dim))
  if head_dim is not None and layout.head_dim != head_dim:
    raise ValueError(f'head_dim is {head_dim}, but pages {layers[0].shape} hold heads of {layout.head_dim}.')
  return layout


def _check_conversion(source: jnp.dtype, scaled: bool, target: jnp.dtype, target_scaled: bool) -> None:
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


# ---------------------------------------------------------------------------- choice


def _implementations(function: str, tpu: Any) -> dict[str, Plain | Tuned]:
  run = getattr(tpu, function)
  return {
    'pallas_tpu': Tuned(
      lambda *args, device, **named: run(*args, **named), tpu.Config, tpu.rule, tpu.refusal, ('tpu',)
    ),
    'xla': Plain(getattr(xla, function)),
    'reference': Plain(getattr(reference, function)),
  }


IMPLEMENTATIONS = {
  'gather_pages': _implementations('gather_pages', pallas_tpu),
  'scatter_pages': _implementations('scatter_pages', pallas_tpu),
  'append_tokens': _implementations('append_tokens', pallas_tpu_append),
}


def problem(
  function: str,
  pages: jax.Array | jax.ShapeDtypeStruct,
  layout: PageLayout,
  values: jnp.dtype,
  scaled: tuple[bool, bool] = (False, False),
  count: int = 1,
  layers: int = 1,
) -> dict[str, int | str]:
  """Facts by which an implementation is chosen; `scaled` says whether the values and the pages have scales."""
  return {
    'function': function,
    'dtype': pages.dtype.name,
    'values': jnp.dtype(values).name,
    'scaled': ('neither', 'pages', 'values', 'both')[2 * scaled[0] + scaled[1]],
    'layout': layout.name,
    'kv_heads': layout.kv_heads,
    'head_dim': layout.head_dim,
    'page_size': layout.page_size,
    'layers': layers,
    'tokens': count,
  }


def _choose(
  function: str,
  implementation: str | Sequence[str] | None,
  pages: jax.Array,
  layout: PageLayout,
  values: jnp.dtype,
  scaled: tuple[bool, bool],
  count: int,
  layers: int = 1,
) -> Callable[..., Any]:
  """The implementation to call; see `problem`."""
  facts = problem(function, pages, layout, values, scaled, count, layers)
  return choose('page_copy', IMPLEMENTATIONS[function], implementation, facts)
