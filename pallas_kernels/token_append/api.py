"""New tokens' keys and values written into the pages of the KV cache.

It takes the layouts of `PageLayout` and converts on the way where pages are of another dtype than the tokens: float32,
bfloat16, float16 and fp8 into each other, and floats to int8 (or fp8) with a float32 scale a token and head, value =
stored × scale, scale = largest magnitude / 127.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.conversion import check_conversion, check_scales, describe
from pallas_kernels.dispatch import Plain, Tuned, choose
from pallas_kernels.layouts import PageLayout
from pallas_kernels.token_append import pallas_tpu, reference, xla

IMPLEMENTATIONS: dict[str, Plain | Tuned] = {
  'pallas_tpu': Tuned(
    lambda *args, device, **named: pallas_tpu.append_tokens(*args, **named),
    pallas_tpu.Config,
    pallas_tpu.rule,
    pallas_tpu.refusal,
    ('tpu',),
  ),
  'xla': Plain(xla.append_tokens),
  'reference': Plain(reference.append_tokens),
}


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
  if pages.ndim != 5:
    raise ValueError(f'pages {pages.shape} are not [P, A, C, G, W].')
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
  check_scales([pages], None if scales is None else [scales])
  if scales is not None and scales.shape[2] != k.shape[1]:
    raise ValueError(f'scales {scales.shape} are for {scales.shape[2]} heads, but k {k.shape} has {k.shape[1]}.')
  check_conversion(k.dtype, False, pages.dtype, scales is not None)
  facts = problem(pages, layout, k.dtype, scales is not None, k.shape[0])
  run = choose('token_append', IMPLEMENTATIONS, implementation, facts)
  if not k.shape[0]:
    return pages if scales is None else (pages, scales)
  out, out_scales = run(pages, k, v, jnp.asarray(page), jnp.asarray(offset), scales, layout=layout)
  return out if out_scales is None else (out, out_scales)


def problem(
  pages: jax.Array | jax.ShapeDtypeStruct,
  layout: PageLayout,
  values: jnp.dtype,
  scaled: bool = False,
  count: int = 1,
) -> dict[str, int | str]:
  """Facts by which an implementation is chosen; `scaled` says whether the pages have scales."""
  return {**describe(pages, layout, values, (False, scaled)), 'tokens': count}
