"""Decode attention: one new token of each sequence over the keys and values in its pages."""

from typing import Any

import jax

from pallas_kernels.arguments import Implementation, check_cap, check_heads, check_sinks, check_window, choose
from pallas_kernels.paged_attention import reference, xla

_IMPLEMENTATIONS: dict[str, Implementation] = {
  'xla': xla.paged_attention,
  'reference': reference.paged_attention,
}


def paged_attention(
  q: jax.Array,
  pages: jax.Array,
  tables: jax.Array,
  lengths: jax.Array,
  *,
  softmax_scale: float | None = None,
  sliding_window: int | None = None,
  soft_cap: float | None = None,
  sinks: jax.Array | None = None,
  return_lse: bool = False,
  implementation: str | None = None,
) -> jax.Array | Any:
  """Attend from one query token a sequence to all its cached tokens (PagedAttention, Kwon et al. 2023).

  Args:
    q: `[B, H, D]` queries.
    pages: `[P, 2, K, G, D]` keys and values; K divides H, and query head h reads key/value head h // (H / K).
    tables: `[B, N]` int32; `tables[b, i]` is the page with tokens `i·G` and up of sequence b.
    lengths: `[B]` int32 cached tokens, the query's own among them; 0 marks a row that is not in use.
    softmax_scale: Multiplies the scores; `D ** -0.5` if None.
    sliding_window: Cached tokens that a query sees, the last of them its own; None is all of them.
    soft_cap: Scores s, scaled already, become `soft_cap * tanh(s / soft_cap)` (Gemma 2); None leaves them.
    sinks: `[H]` float32; a score for each query head that joins its softmax's sum and has no value (gpt-oss).
    return_lse: Also return the natural logarithm of each softmax's sum, by which parts of one attention are joined.
    implementation: 'xla', 'reference', or None for the fastest here.

  Returns:
    `[B, H, D]` in q's dtype; zeros in rows not in use. With `return_lse`, that and `[B, H]` float32, -inf in such rows.

  Raises:
    ValueError: if shapes do not fit together, the window is not positive or the implementation is unknown.
  """
  check_heads(q, pages, rows='B')
  check_window(sliding_window)
  check_cap(soft_cap)
  check_sinks(sinks, q.shape[1])
  if tables.shape[:1] != q.shape[:1] or lengths.shape != q.shape[:1]:
    raise ValueError(f'tables {tables.shape} and lengths {lengths.shape} do not belong to {q.shape[0]} sequences.')
  run = choose(_IMPLEMENTATIONS, implementation)
  scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
  return run(
    q,
    pages,
    tables,
    lengths,
    softmax_scale=scale,
    sliding_window=sliding_window,
    soft_cap=soft_cap,
    sinks=sinks,
    return_lse=return_lse,
  )
