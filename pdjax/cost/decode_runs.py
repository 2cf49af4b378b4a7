"""FLOPs and bytes of decode steps in a row, all at once."""

from collections.abc import Callable, Sequence

import numpy as np

from pdjax.types.cache import KVDtypeName
from pdjax.types.model import ModelSpec, caching
from pdjax.types.model.parts import GQA

_AHEAD = np.arange(1024)

DecodeRun = Callable[[Sequence[int], int], tuple[np.ndarray, np.ndarray]]


def decode_run(model: ModelSpec, kv_dtype: KVDtypeName, shards: int = 1) -> DecodeRun:
  """`ModelSpec.decode_attention_flops` and `read_bytes` of decode steps in a row, in each of which all get a token.

  Args:
    model: The model.
    kv_dtype: The dtype of the cache.
    shards: Devices that cut the heads.

  Returns:
    Takes the cached tokens of each sequence when the first step begins, and the number of steps; gives two `[steps]`.
  """
  layers_of, reads = caching.attention_layers(model), caching.cache_bytes(model, kv_dtype, shards)
  if isinstance(model.attention, GQA) and all(window is None for window, _ in (*layers_of, *reads.by_window)):
    pair_flops = model.attention.pair_flops * sum(layers for _, layers in layers_of)
    token_bytes = sum(size for _, size in reads.by_window)

    def straight(contexts: Sequence[int], steps: int) -> tuple[np.ndarray, np.ndarray]:
      batch, total = len(contexts), sum(contexts)
      ahead = _AHEAD[:steps] if steps <= len(_AHEAD) else np.arange(steps)
      flops = ahead * (pair_flops * batch) + pair_flops * (total + batch)
      return flops, ahead * (token_bytes * batch) + (token_bytes * total + 2 * reads.state * batch)

    return straight

  def run(contexts: Sequence[int], steps: int) -> tuple[np.ndarray, np.ndarray]:
    batch, ahead = len(contexts), np.arange(steps)
    total, rows = batch * ahead + sum(contexts), np.array(contexts, np.int64) + ahead[:, None]

    def seen(window: int | None, more: int = 0) -> np.ndarray:
      return total + more * batch if window is None else np.minimum(rows + more, window).sum(axis=1)

    flops, size = np.zeros(steps, np.int64), np.full(steps, 2 * reads.state * batch, np.int64)
    for window, layers in layers_of:
      flops = flops + layers * _attention_flops(model, seen(window, 1), seen(window))
    for window, token in reads.by_window:
      size = size + token * seen(window)
    return flops, size

  return run


def _attention_flops(model: ModelSpec, pairs: np.ndarray, cached: np.ndarray) -> np.ndarray:
  if isinstance(model.attention, GQA):
    return pairs * model.attention.pair_flops
  both = zip(pairs.tolist(), cached.tolist(), strict=True)
  return np.array([model.attention.flops(*one) for one in both], np.int64)
