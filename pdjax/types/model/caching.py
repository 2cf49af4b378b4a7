"""The cache kinds of a model, as its attention and its windows say them, and their bytes."""

import dataclasses
import functools
from typing import Protocol

from pdjax.types.cache import KV, CacheKind, KVDtypeName
from pdjax.types.model.parts import Attention


class Shape(Protocol):
  """The part of a model that says its cache."""

  @property
  def num_layers(self) -> int:
    """Blocks."""

  @property
  def attention(self) -> Attention:
    """The attention of every layer."""

  @property
  def cache_kinds(self) -> tuple[CacheKind, ...] | None:
    """Its kinds, if its attention does not say them."""

  @property
  def only_simulated(self) -> str | None:
    """A part that the engine does not compute."""

  def window(self, layer: int) -> int | None:
    """Tokens that a token sees in a layer; None is all before it."""


@functools.lru_cache(maxsize=16)
def kinds(model: Shape) -> tuple[CacheKind, ...]:
  """The cache kinds of a model; see `ModelSpec.cache`."""
  return derived(model) if model.cache_kinds is None else model.cache_kinds


def derived(model: Shape) -> tuple[CacheKind, ...]:
  """The kinds that a model's attention and windows say."""
  name, arrays = model.attention.cache
  if model.only_simulated is None:
    return (CacheKind(KV, tuple(range(model.num_layers)), arrays),)
  by_window: dict[int | None, list[int]] = {}
  for layer in range(model.num_layers):
    by_window.setdefault(model.window(layer), []).append(layer)
  found = []
  for window, layers in sorted(by_window.items(), key=lambda item: item[0] is not None):
    found.append(CacheKind(name if window is None else 'window', tuple(layers), arrays, window or 'all'))
  return tuple(found)


def check_kinds(model: str, num_layers: int, kinds: tuple[CacheKind, ...]) -> None:
  """Raise ValueError unless these can be the cache kinds of a model with so many layers."""
  names = [kind.name for kind in kinds]
  if len(set(names)) < len(names):
    raise ValueError(f'model {model!r} has cache kinds named {", ".join(names)}; give each a name of its own.')
  for kind in kinds:
    if others := [layer for layer in kind.layers if layer >= num_layers]:
      raise ValueError(
        f'model {model!r} has a cache kind {kind.name!r} of layer {others[0]}, but its own are 0 to {num_layers - 1}.'
      )


@dataclasses.dataclass(frozen=True, slots=True)
class CacheBytes:
  """Bytes of a model's cache in one dtype.

  Attributes:
    token: Those that every token adds.
    request: Most that a request has beside them.
    state: Those of a request that are no token's.
    by_window: Each window, None for all tokens, and the bytes of a token in the layers that have it.
  """

  token: int
  request: int
  state: int
  by_window: tuple[tuple[int | None, int], ...]


@functools.lru_cache(maxsize=64)
def cache_bytes(model: Shape, kv_dtype: KVDtypeName, shards: int = 1) -> CacheBytes:
  """The bytes of a model's cache on each of the devices that cut its heads, worked out once.

  A simulator asks for them in every step.
  """
  token = request = state = 0
  by_window: dict[int | None, int] = {}
  for kind in kinds(model):  # type: ignore[arg-type]  # as in `weights.totals`
    size = kind.num_bytes(kv_dtype, shards)
    if kind.grows:
      token += size
    else:
      request += size * (1 if kind.has_state else int(kind.reach))
    if kind.has_state:
      state += size
      continue
    for layer in kind.layers:
      reaches = [reach for reach in (model.window(layer), None if kind.grows else int(kind.reach)) if reach is not None]
      window = min(reaches, default=None)
      by_window[window] = by_window.get(window, 0) + kind.layer_bytes(kv_dtype, shards)
  return CacheBytes(token, request, state, tuple(by_window.items()))


@functools.lru_cache(maxsize=16)
def attention_layers(model: Shape) -> tuple[tuple[int | None, int], ...]:
  """Each window, None for all tokens, and the number of layers that attend over it.

  With cache kinds of its own, a model attends in the layers that keep tokens, and no further back than they keep them.
  """
  found: dict[int | None, int] = {}
  for layer in range(model.num_layers):
    windows = [model.window(layer)]
    if model.cache_kinds is not None:
      keeping = [kind for kind in model.cache_kinds if layer in kind.layers and not kind.has_state]
      if not keeping:
        continue
      if not any(kind.grows for kind in keeping):
        windows.append(max(int(kind.reach) for kind in keeping))
    window = min((one for one in windows if one is not None), default=None)
    found[window] = found.get(window, 0) + 1
  return tuple(found.items())
