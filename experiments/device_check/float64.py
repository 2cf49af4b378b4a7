"""Right answers of kernels, in NumPy and double precision, and sequences in pages that hold NaN elsewhere."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np


def dtype_of(name: str) -> np.dtype:
  """The NumPy dtype of a name, bfloat16 among them."""
  return np.dtype(getattr(ml_dtypes, name, name))


@dataclasses.dataclass(frozen=True)
class Sequences:
  """Cached keys and values, and the same in plain pages."""

  keys: list[np.ndarray]  # [S, K, D] float64, of each sequence
  values: list[np.ndarray]
  pages: np.ndarray  # [P, 2, K, G, D]
  tables: np.ndarray  # [B, N] int32
  scales: np.ndarray | None = None  # [P, 2, K, G] float32

  @classmethod
  def random(
    cls, rng: np.random.Generator, lengths: Sequence[int], kv_heads: int, head_dim: int, page_size: int, dtype: str
  ) -> 'Sequences':
    """Sequences of these lengths in pages all over a pool; every place that none has holds NaN.

    With int8 there is a scale for each token and head, and NaN is in the scales of the others.
    """
    counts = [-(-length // page_size) for length in lengths]
    free = rng.permutation(sum(counts) + 3)
    shape = (len(free), 2, kv_heads, page_size)
    cached = np.full((*shape, head_dim), np.nan, np.float32)
    tables = np.full((len(lengths), max(counts)), free[-1], np.int32)  # a page of NaN where there is none
    places = []
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
      tables[row, :count], free = free[:count], free[count:]
      position = np.arange(length)
      places.append((tables[row, position // page_size], position % page_size))
      cached[places[-1][0], :, :, places[-1][1]] = rng.standard_normal((length, 2, kv_heads, head_dim), np.float32)
    if dtype == 'int8':
      scales = np.abs(cached).max(-1) / np.float32(127)
      pages = np.round(np.nan_to_num(cached / scales[..., None], nan=127)).astype(np.int8)
      exact = pages.astype(np.float64) * scales[..., None].astype(np.float64)
    else:
      scales, pages = None, cached.astype(dtype_of(dtype))
      exact = pages.astype(np.float64)
    keys, values = ([exact[page, part, :, offset] for page, offset in places] for part in (0, 1))
    return cls(keys, values, pages, tables, scales)


def attend(
  q: np.ndarray,
  keys: np.ndarray,
  values: np.ndarray,
  position: np.ndarray,
  *,
  sliding_window: int | None = None,
  soft_cap: float | None = None,
  sinks: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Attention of queries `[T, H, D]` at positions `[T]` over one sequence's keys and values `[S, K, D]`.

  Returns:
    `[T, H, D]` and the logarithm of each softmax's sum `[T, H]`; zeros and -inf for queries that see nothing.
  """
  (tokens, query_heads, head_dim), kv_heads = q.shape, keys.shape[1]
  rows = np.moveaxis(q.astype(np.float64).reshape(tokens, kv_heads, -1, head_dim), 0, 1)  # [K, T, H/K, D]
  shape = *rows.shape[:3], len(keys)
  scores = (rows.reshape(kv_heads, -1, head_dim) @ np.moveaxis(keys, 0, 2)).reshape(shape) * head_dim**-0.5
  if soft_cap is not None:
    scores = soft_cap * np.tanh(scores / soft_cap)
  place = np.arange(len(keys))
  seen = place <= position[:, None]
  if sliding_window is not None:
    seen &= place > position[:, None] - sliding_window
  scores = np.where(seen[:, None], scores, -np.inf)
  sink = np.full((kv_heads, 1, shape[2], 1), -np.inf) if sinks is None else sinks.reshape(kv_heads, 1, -1, 1)
  scores = np.concatenate([scores, np.broadcast_to(sink, (*scores.shape[:-1], 1))], -1)
  top = np.maximum(scores.max(-1, keepdims=True), -1e300)
  weights = np.exp(scores - top)
  total = weights.sum(-1, keepdims=True)
  weights = (weights[..., :-1] / np.where(total == 0, 1, total)).reshape(kv_heads, -1, len(keys))
  out = np.moveaxis((weights @ np.moveaxis(values, 0, 1)).reshape(rows.shape), 1, 0).reshape(q.shape)
  with np.errstate(divide='ignore'):
    lse = np.moveaxis(top + np.log(total), 1, 0).reshape(tokens, query_heads)
  blind = position < 0
  out[blind], lse[blind] = 0, -np.inf
  return out, lse


def error(actual: Any, expected: np.ndarray) -> float:
  """‖actual − expected‖ / ‖expected‖; NaN where anything is NaN, infinity where zeros or infinities differ."""
  actual = np.asarray(actual).astype(np.float64)
  endless = np.isinf(expected)
  if actual.shape != expected.shape or not np.array_equal(np.isinf(actual), endless):
    return float('nan') if np.isnan(actual).any() else float('inf')
  if not np.array_equal(actual[endless], expected[endless]):
    return float('inf')
  actual, expected = actual[~endless], expected[~endless]
  norm = float(np.linalg.norm(expected))
  missed = float(np.linalg.norm(actual - expected))
  return missed / norm if norm else (float('inf') if missed else missed)
