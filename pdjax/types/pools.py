"""Cache kinds on workers: the pages in which one holds them, and the units in which they travel between two."""

import dataclasses
import math
from collections.abc import Mapping

from pdjax.types.cache import CacheKind, wire_dtype
from pdjax.types.model import ModelSpec, mesh_shape
from pdjax.types.worker import WorkerSpec


@dataclasses.dataclass(frozen=True, slots=True)
class PoolSpec:
  """A cache kind as one worker holds it.

  Attributes:
    kind: The kind.
    page_size: Entries per page.
    page_bytes: Bytes of a page over all devices, those that several devices have a copy of counted once.
    device_bytes: Bytes of a page on each device.
  """

  kind: CacheKind
  page_size: int
  page_bytes: int
  device_bytes: int

  def num_pages(self, tokens: int) -> int:
    """Pages for a sequence of so many tokens."""
    return -(-self.kind.kept(tokens) // self.page_size)


@dataclasses.dataclass(frozen=True, slots=True)
class PoolSpecs:
  """All cache kinds as one worker holds them, in one memory that they share.

  `WorkerSpec.num_pages` counts that memory: a page is what `page_size` tokens add to all kinds that grow with every
  token. What others keep, windows and states, counts by its bytes in it.

  Attributes:
    by_kind: Each kind's, by its name.
    page_bytes: Bytes on each device that a page of `num_pages` stands for.
    whole_page_bytes: The same over all devices, copies counted once.
  """

  by_kind: Mapping[str, PoolSpec]
  page_bytes: int
  whole_page_bytes: int

  @classmethod
  def of(cls, model: ModelSpec, worker: WorkerSpec) -> 'PoolSpecs':
    """The cache of a model as a worker holds it, whose page size is filled in.

    Raises:
      ValueError: if its devices do not fit the model's heads, or a cache array.
    """
    assert worker.page_size is not None
    shards, _ = mesh_shape(model, worker.tp)
    pools = {}
    for kind in model.cache:
      size = kind.entries_per_page(worker.page_size)
      try:
        whole, part = (size * kind.num_bytes(worker.cached_dtype, count) for count in (1, shards))
      except ValueError as error:
        raise ValueError(
          f'worker {worker.name!r} with tp={worker.tp} cannot hold cache kind {kind.name!r} of {model.name!r}: {error}'
        ) from error
      pools[kind.name] = PoolSpec(kind, size, whole, part)
    kinds = model.cache
    growing = [kind for kind in kinds if kind.grows] or [kind for kind in kinds if not kind.has_state]
    if growing:
      size = worker.page_size
      whole, part = (size * sum(kind.num_bytes(worker.cached_dtype, one) for kind in growing) for one in (1, shards))
    else:
      whole, part = (sum(getattr(one, name) for one in pools.values()) for name in ('page_bytes', 'device_bytes'))
    return cls(pools, part, whole)

  def pages_for(self, tokens: int) -> dict[str, int]:
    """Pages of each kind for a sequence of so many tokens."""
    return {name: pool.num_pages(tokens) for name, pool in self.by_kind.items()}

  def pages_ahead_of(self, tokens: int, ahead: int, most: int) -> dict[str, int]:
    """Pages of each kind for a sequence of so many tokens and so many ahead, of those that `most` tokens need."""
    return {name: pool.num_pages(min(tokens + ahead * pool.page_size, most)) for name, pool in self.by_kind.items()}

  def tokens_in(self, pages: Mapping[str, int], most: int) -> int:
    """The tokens of a sequence of up to `most` for which so many pages of each kind suffice."""
    found = most
    for name, pool in self.by_kind.items():
      if pages[name] < pool.num_pages(most):
        found = min(found, pages[name] * pool.page_size)
    return found

  def device_bytes(self, pages: Mapping[str, int]) -> int:
    """Bytes on each device of so many pages of each kind."""
    return sum([count * self.by_kind[name].device_bytes for name, count in pages.items()])

  def describe(self, pages: Mapping[str, int]) -> str:
    """So many pages of each kind in words, such as '61 (kv 32, state 24, window 5)'; the first is of `num_pages`."""
    split = ', '.join(f'{name} {count}' for name, count in pages.items())
    return f'{self.whole_pages(pages)}{f" ({split})" if len(pages) > 1 else ""}'

  def whole_pages(self, pages: Mapping[str, int]) -> int:
    """So many pages of each kind as pages of `num_pages`, rounded up."""
    return -(-self.device_bytes(pages) // self.page_bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class Lane:
  """A cache kind on its way from one worker to another.

  Attributes:
    kind: The kind.
    unit: Entries of a unit, the fewest that travel: pages of both sides are made of whole ones.
    source_page_size: Entries per page where it comes from.
    target_page_size: Entries per page where it goes.
    layer_bytes: Bytes of a unit in one layer while it travels.
  """

  kind: CacheKind
  unit: int
  source_page_size: int
  target_page_size: int
  layer_bytes: int

  @property
  def unit_bytes(self) -> int:
    """Bytes of a unit in all layers while it travels."""
    return self.layer_bytes * len(self.kind.layers)

  def sendable(self, tokens: int, total: int) -> int:
    """Entries that may leave once so many of a prompt's `total` tokens are computed: whole units, but at its end."""
    entries = self.kind.sendable(tokens, total)
    return entries if tokens >= total else entries // self.unit * self.unit

  def num_bytes(self, entries: int, layers: tuple[int, int] | None = None) -> int:
    """Bytes of so many entries, filled up to whole units, in all layers or in those of a group."""
    return -(-entries // self.unit) * self.layer_bytes * self.kind.num_layers(layers)


def grown_pages(kind: CacheKind, worker: WorkerSpec) -> int:
  """Pages of a kind that grows with every token on a worker: as many as the tokens of its `num_pages` fill.

  Raises:
    ValueError: if they fill none.
  """
  assert isinstance(worker.num_pages, int) and worker.page_size is not None and kind.grows
  tokens, page_size = worker.num_pages * worker.page_size, kind.entries_per_page(worker.page_size)
  if tokens < page_size:
    raise ValueError(
      f'worker {worker.name!r} has num_pages={worker.num_pages} of {worker.page_size} tokens, which are no page of '
      f'{page_size} of the cache kind {kind.name!r}; raise num_pages.'
    )
  return tokens // page_size


def lanes(model: ModelSpec, source: WorkerSpec, target: WorkerSpec) -> tuple[Lane, ...]:
  """Each cache kind on its way between two workers whose page sizes are filled in."""
  dtype = wire_dtype(source.cached_dtype, target.cached_dtype)
  assert source.page_size is not None and target.page_size is not None
  found = []
  for kind in model.cache:
    ours, theirs = (kind.entries_per_page(page_size) for page_size in (source.page_size, target.page_size))
    unit = math.gcd(ours, theirs)
    found.append(Lane(kind, unit, ours, theirs, unit * kind.layer_bytes(dtype)))
  return tuple(found)


def sent_bytes(model: ModelSpec, source: WorkerSpec, target: WorkerSpec, tokens: int) -> int:
  """Bytes that travel when a computed sequence of so many tokens moves from one worker to another."""
  return sum(lane.num_bytes(lane.kind.kept(tokens)) for lane in lanes(model, source, target))
