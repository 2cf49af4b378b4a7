"""Attention as a textbook has it, in NumPy and double precision, and sequences laid out in scattered pages."""

import dataclasses

import numpy as np

GARBAGE = 1e3  # in every place of a pool that no sequence uses: reading it shows


@dataclasses.dataclass(frozen=True)
class Paged:
  """Sequences' keys and values `[S, K, D]`, and the same in a pool of pages."""

  keys: list[np.ndarray]
  values: list[np.ndarray]
  pages: np.ndarray  # [P, 2, K, G, D]
  tables: np.ndarray  # [B, N]

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


def attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float, window: int = 10**9) -> np.ndarray:
  """One query token `[H, D]` over the last `window` of keys and values `[S, K, D]`: `[H, D]`."""
  return attend_with_sum(query, keys, values, scale, window)[0]


def attend_with_sum(
  query: np.ndarray,
  keys: np.ndarray,
  values: np.ndarray,
  scale: float,
  window: int | None = None,
  soft_cap: float | None = None,
  sinks: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """As `attend`, and the logarithm of each softmax's sum `[H]`."""
  keys, values = (tokens[-(window or 10**9) :].astype(np.float64) for tokens in (keys, values))
  query_heads = query.shape[0]
  out, lse = np.zeros(query.shape), np.zeros(query_heads)
  for head in range(query_heads):
    kv_head = head // (query_heads // keys.shape[1])
    scores = keys[:, kv_head] @ query[head].astype(np.float64) * scale
    if soft_cap is not None:
      scores = soft_cap * np.tanh(scores / soft_cap)
    sink = -np.inf if sinks is None else float(sinks[head])
    top = max(scores.max(), sink)
    weights = np.exp(scores - top)
    total = weights.sum() + np.exp(sink - top)
    out[head], lse[head] = weights / total @ values[:, kv_head], top + np.log(total)
  return out, lse
