"""Prefill attention: chunks of new prompt tokens, packed one after another, over the keys and values in their pages."""

from typing import Any

import jax

from pallas_kernels.arguments import Implementation, check_cap, check_heads, check_sinks, check_window, choose
from pallas_kernels.prefill_attention import reference, xla

_IMPLEMENTATIONS: dict[str, Implementation] = {
  'xla': xla.prefill_attention,
  'reference': reference.prefill_attention,
}


def prefill_attention(
  q: jax.Array,
  pages: jax.Array,
  tables: jax.Array,
  offsets: jax.Array,
  lengths: jax.Array,
  *,
  softmax_scale: float | None = None,
  sliding_window: int | None = None,
  soft_cap: float | None = None,
  sinks: jax.Array | None = None,
  return_lse: bool = False,
  implementation: str | None = None,
) -> jax.Array | Any:
  """Attend causally from chunks of new tokens to the pages so far, which hold the chunks' own keys and values already.

  Args:
    q: `[T, H, D]` queries of all chunks, packed; rows past `offsets[-1]` are padding.
    pages: `[P, 2, K, G, D]` keys and values; K divides H, and query head h reads key/value head h // (H / K).
    tables: `[B, N]` int32; `tables[b, i]` is the page with tokens `i·G` and up of sequence b.
    offsets: `[B + 1]` int32, ascending; rows `offsets[b]` to `offsets[b + 1]` are the chunk of sequence b, maybe none.
    lengths: `[B]` int32 cached tokens with the chunk: its last token stands at position `lengths[b] - 1`.
    softmax_scale: Multiplies the scores; `D ** -0.5` if None.
    sliding_window: Cached tokens that a query sees, the last of them its own; None is all of them.
    soft_cap: Scores s, scaled already, become `soft_cap * tanh(s / soft_cap)` (Gemma 2); None leaves them.
    sinks: `[H]` float32; a score for each query head that joins its softmax's sum and has no value (gpt-oss).
    return_lse: Also return the natural logarithm of each softmax's sum, by which parts of one attention are joined.
    implementation: 'xla', 'reference', or None for the fastest here.

  Returns:
    `[T, H, D]` in q's dtype; zeros in padding rows. With `return_lse`, that and `[T, H]` float32, -inf in padding rows.

  Raises:
    ValueError: if shapes do not fit together, the window is not positive or the implementation is unknown.
  """
  check_heads(q, pages, rows='T')
  check_window(sliding_window)
  check_cap(soft_cap)
  check_sinks(sinks, q.shape[1])
  sequences = tables.shape[0]
  if offsets.shape != (sequences + 1,) or lengths.shape != (sequences,):
    raise ValueError(f'offsets {offsets.shape} and lengths {lengths.shape} do not belong to {sequences} sequences.')
  run = choose(_IMPLEMENTATIONS, implementation)
  scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
  return run(
    q,
    pages,
    tables,
    offsets,
    lengths,
    softmax_scale=scale,
    sliding_window=sliding_window,
    soft_cap=soft_cap,
    sinks=sinks,
    return_lse=return_lse,
  )
