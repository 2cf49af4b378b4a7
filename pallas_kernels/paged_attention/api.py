"""Decode attention: the newest tokens of each sequence, one or a few, over the keys and values in its pages."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import (
  check_options,
  check_queries_and_pages,
  check_sequences,
  check_values,
  describe,
  named,
)
from pallas_kernels.dispatch import Plain, Tuned, choose
from pallas_kernels.paged_attention import cudnn, pallas_tpu, reference, xla

IMPLEMENTATIONS: dict[str, Plain | Tuned] = {
  'pallas_tpu': Tuned(
    pallas_tpu.paged_attention, pallas_tpu.Config, pallas_tpu.rule, pallas_tpu.refusal, ('tpu',), pallas_tpu.shorten
  ),
  'cudnn': Tuned(cudnn.paged_attention, cudnn.Config, cudnn.rule, cudnn.refusal, ('gpu',)),
  'xla': Plain(xla.paged_attention, xla.BY_PLATFORM),
  'reference': Plain(reference.paged_attention),
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
  scales: jax.Array | None = None,
  return_lse: bool = False,
  checked: bool = False,
  implementation: str | Sequence[str] | None = None,
) -> jax.Array | Any:
  """Attend from the newest tokens of each sequence to its cached ones (PagedAttention, Kwon et al. 2023).

  Args:
    q: `[B, H, D]` queries, each its sequence's last cached token; or `[B, Q, H, D]`, the last Q of them, of which query
      i stands at position `lengths[b] - Q + i` and sees the tokens up to there.
    pages: `[P, 2, K, G, D]` keys and values, or another layout of `pallas_kernels.layouts`; K divides H, and query head
      h reads key/value head h // (H / K).
    tables: `[B, N]` int32; `tables[b, i]` is the page with tokens `i·G` and up of sequence b.
    lengths: `[B]` int32 cached tokens, the queries' own among them; 0 marks a row that is not in use.
    softmax_scale: Multiplies the scores; `D ** -0.5` if None.
    sliding_window: Cached tokens that a query sees, the last of them its own; None is all of them.
    soft_cap: Scores s, scaled already, become `soft_cap * tanh(s / soft_cap)` (Gemma 2); None leaves them.
    sinks: `[H]` float32; a score for each query head that joins its softmax's sum and has no value (gpt-oss).
    scales: `[P, 2, K, G]` float32 for int8 or fp8 pages: a key or value is what is stored times its token's scale.
    return_lse: Also return the natural logarithm of each softmax's sum, by which parts of one attention are joined.
    checked: Look at the values in tables and lengths first. It reads them on the host, so not under `jit`.
    implementation: 'pallas_tpu', 'cudnn', 'xla' or 'reference', several of which the first that can run does, or None
      for the fastest here.

  Returns:
    An array like q; zeros in rows not in use and for queries before their sequence's first token. With `return_lse`,
    that and `[B, H]` or `[B, Q, H]` float32, -inf in such rows.

  Raises:
    ValueError: if shapes or dtypes do not fit together, an option has no meaning, no implementation that is asked for
      is known and can run, or `checked` finds a value out of bounds.
  """
  layout = check_queries_and_pages(q, pages, scales, {3: '[B, H, D]', 4: '[B, Q, H, D]'})
  check_options(sliding_window, soft_cap, sinks, query_heads=q.shape[-2])
  check_sequences(q.shape[0], tables=tables, lengths=lengths)
  if checked:
    check_values(
      tables,
      lengths,
      q.shape[1] if q.ndim == 4 else 1,
      num_pages=pages.shape[0],
      page_size=layout.page_size,
      sliding_window=sliding_window,
    )
  traced = softmax_scale if isinstance(softmax_scale, jax.core.Tracer) else None
  options = named(sliding_window=sliding_window, soft_cap=soft_cap, sinks=sinks, scales=scales, traced_scale=traced)
  facts = describe(layout, q, pages, tables, options) | {'query_tokens': q.shape[1] if q.ndim == 4 else 1}
  return choose('paged_attention', IMPLEMENTATIONS, implementation, facts)(
    jnp.asarray(q),
    jnp.asarray(pages),
    *(jnp.asarray(numbers, jnp.int32) for numbers in (tables, lengths)),
    softmax_scale=layout.head_dim**-0.5 if softmax_scale is None else softmax_scale,
    sliding_window=sliding_window,
    soft_cap=soft_cap,
    sinks=None if sinks is None else jnp.asarray(sinks, jnp.float32),
    scales=None if scales is None else jnp.asarray(scales),
    return_lse=return_lse,
  )
