"""Attention as a textbook has it, in NumPy and double precision, and sequences laid out in scattered pages."""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels.layouts import PageLayout

GARBAGE = np.nan  # in every place of a pool that no sequence uses: reading it shows
LARGEST = {'int8': 127, 'float8_e4m3fn': 448, 'float8_e5m2': 57344}  # of what quantized pages can store


@dataclasses.dataclass(frozen=True)
class Paged:
  """Sequences' keys and values `[S, K, D]`, and the same in a pool of pages."""

  keys: list[np.ndarray]
  values: list[np.ndarray]
  pages: np.ndarray  # [P, 2, K, G, D], or packed
  tables: np.ndarray  # [B, N]
  scales: np.ndarray | None = None  # [P, 2, K, G] of quantized pages

  @classmethod
  def random(
    cls, rng: np.random.Generator, lengths: list[int], kv_heads: int, head_dim: int, page_size: int
  ) -> 'Paged':
    """Sequences of these lengths, their pages in random order all over the pool."""
    keys, values = (
      [rng.standard_normal((length, kv_heads, head_dim), np.float32) for length in lengths] for _ in range(2)
    )
    counts = [-(-length // page_size) for length in lengths]
    free = rng.permutation(sum(counts) + 3)
    pages = np.full((len(free), 2, kv_heads, page_size, head_dim), GARBAGE, np.float32)
    tables = np.zeros((len(lengths), max(counts)), np.int32)
    for row, count in enumerate(counts):
      tables[row, :count], free = free[:count], free[count:]
      for position in range(lengths[row]):
        page, offset = tables[row, position // page_size], position % page_size
        pages[page, 0, :, offset] = keys[row][position]
        pages[page, 1, :, offset] = values[row][position]
    return cls(keys, values, pages, tables)

  def quantized(self, dtype: str) -> 'Paged':
    """The same stored as `dtype` with scales, and the keys and values that this leaves."""
    scales = np.abs(self.pages).max(-1) / LARGEST[dtype]
    stored = self.pages / scales[..., None]
    if dtype == 'int8':  # cannot be NaN: there its scales are
      stored = np.round(np.nan_to_num(stored, nan=LARGEST[dtype]))
    stored = stored.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    cached = np.moveaxis((stored.astype(np.float32) * scales[..., None])[self.tables], 3, 1)  # [B, K, N, 2, G, D]
    cached = np.moveaxis(cached, 1, 4)  # [B, N, 2, G, K, D]
    keys, values = (
      [
        tokens.reshape(-1, *tokens.shape[2:])[: len(old)]
        for tokens, old in zip(cached[:, :, part], self.keys, strict=True)
      ]
      for part in range(2)
    )
    return Paged(keys, values, stored, self.tables, scales)

  def packed(self, layout: str) -> 'Paged':
    """The same with pages in another layout."""
    _, _, kv_heads, page_size, head_dim = self.pages.shape
    pages = np.asarray(PageLayout(layout, kv_heads, page_size, head_dim).pack(self.pages))
    return dataclasses.replace(self, pages=pages)


def draw_shape(rng: np.random.Generator, layout: str) -> tuple[int, int, int, int]:
  """Page size, query heads, key/value heads and head size, odd where they may be."""
  kv_heads = int(rng.choice([2, 4] if layout == 'paired' else [1, 2, 3]))
  return int(rng.choice([1, 3, 8, 16])), kv_heads * int(rng.integers(1, 5)), kv_heads, int(rng.choice([4, 6, 16]))


def draw_options(rng: np.random.Generator, query_heads: int) -> dict[str, Any]:
  """Some of the options that both attentions have."""
  return {
    'softmax_scale': float(rng.uniform(0.1, 0.8)),
    'sliding_window': int(rng.choice([1, 7, 70])) if rng.random() < 0.4 else None,
    'soft_cap': float(rng.uniform(0.5, 3)) if rng.random() < 0.5 else None,
    'sinks': rng.normal(size=query_heads).astype(np.float32) * 3 if rng.random() < 0.5 else None,
  }


def attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float, window: int = 10**9) -> np.ndarray:
  """One query token `[H, D]` over the last `window` of keys and values `[S, K, D]`: `[H, D]`."""
  return attend_with_sum(query, keys, values, scale, window)[0]


def attend_with_sum(
  query: np.ndarray,
  keys: np.ndarray,
  values: np.ndarray,
  softmax_scale: float,
  sliding_window: int | None = None,
  soft_cap: float | None = None,
  sinks: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """As `attend` with all options, and the logarithm of each softmax's sum `[H]`; zeros and -inf over no tokens."""
  if not len(keys):
    return np.zeros(query.shape), np.full(query.shape[0], -np.inf)
  keys, values = (tokens[-(sliding_window or 10**9) :].astype(np.float64) for tokens in (keys, values))
  query_heads = query.shape[0]
  out, lse = np.zeros(query.shape), np.zeros(query_heads)
  for head in range(query_heads):
    kv_head = head // (query_heads // keys.shape[1])
    scores = keys[:, kv_head] @ query[head].astype(np.float64) * softmax_scale
    if soft_cap is not None:
      scores = soft_cap * np.tanh(scores / soft_cap)
    sink = -np.inf if sinks is None else float(sinks[head])
    top = max(scores.max(), sink)
    weights = np.exp(scores - top)
    total = weights.sum() + np.exp(sink - top)
    out[head], lse[head] = weights / total @ values[:, kv_head], top + np.log(total)
  return out, lse
