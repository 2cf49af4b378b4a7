"""Pages of the KV cache gathered into one contiguous array, and put back.

Both take the layouts of `PageLayout` and convert on the way when the two sides differ: float32, bfloat16, float16 and
fp8 into each other, and floats to and from int8 (or fp8) with a float32 scale a token and head, value = stored × scale,
scale = largest magnitude / 127.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.conversion import check_conversion, check_scales, describe
from pallas_kernels.dispatch import Plain, Tuned, choose
from pallas_kernels.layouts import PageLayout
from pallas_kernels.page_copy import pallas_tpu, reference, xla

Layers = jax.Array | Sequence[jax.Array]  # one layer's array, or one of each layer


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
  check_scales(layers, layer_scales)
  scaled = target == jnp.int8 if layer_scales is None else target == source
  layout = _layout(layers, layer_scales, head_dim)
  check_conversion(source, layer_scales is not None, target, scaled)
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
  check_scales(layers, layer_scales)
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
  check_conversion(values.dtype, value_scales is not None, layers[0].dtype, layer_scales is not None)
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


# ---------------------------------------------------------------------------- choice


def _implementations(function: str) -> dict[str, Plain | Tuned]:
  run = getattr(pallas_tpu, function)
  return {
    'pallas_tpu': Tuned(
      lambda *args, device, **named: run(*args, **named),
      pallas_tpu.Config,
      pallas_tpu.rule,
      pallas_tpu.refusal,
      ('tpu',),
    ),
    'xla': Plain(getattr(xla, function)),
    'reference': Plain(getattr(reference, function)),
  }


IMPLEMENTATIONS = {
  'gather_pages': _implementations('gather_pages'),
  'scatter_pages': _implementations('scatter_pages'),
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
  return {'function': function, **describe(pages, layout, values, scaled), 'layers': layers, 'tokens': count}


def _choose(
  function: str,
  implementation: str | Sequence[str] | None,
  pages: jax.Array,
  layout: PageLayout,
  values: jnp.dtype,
  scaled: tuple[bool, bool],
  count: int,
  layers: int,
) -> Callable[..., Any]:
  """The implementation to call; see `problem`."""
  facts = problem(function, pages, layout, values, scaled, count, layers)
  return choose('page_copy', IMPLEMENTATIONS[function], implementation, facts)
