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
  if model.cache_kinds is not None:
    return model.cache_kinds
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
    if not all(layer < num_layers for layer in kind.layers):
      raise ValueError(
        f'model {model!r} has a cache kind {kind.name!r} of the layers {kind.layers}, expected some of its own, 0 to '
        f'{num_layers - 1}.'
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
def cache_bytes(model: Shape, kv_dtype: KVDtypeName) -> CacheBytes:
  """The bytes of a model's cache, worked out once: a simulator asks for them in every step."""
  token = request = state = 0
  by_window: dict[int | None, int] = {}
  for kind in kinds(model):  # type: ignore[arg-type]  # as in `weights.totals`
    size = kind.num_bytes(kv_dtype)
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
      by_window[window] = by_window.get(window, 0) + kind.layer_bytes(kv_dtype)
  return CacheBytes(token, request, state, tuple(by_window.items()))
