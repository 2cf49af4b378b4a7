"""The handshake of processes before they exchange pages, which checks that they fit together."""

import dataclasses
from collections.abc import Sequence

from pdjax.types.cache import CacheKind, KVDtypeName
from pdjax.types.hardware import DeviceKind
from pdjax.types.model import ModelSpec
from pdjax.types.pools import grown_pages
from pdjax.types.worker import WorkerSpec

Manifest = tuple[tuple[tuple[int, ...], str], ...]  # shape and dtype of each array that a transfer offers


class HandshakeError(ValueError):
  """Processes do not fit together; the message names both values."""


@dataclasses.dataclass(frozen=True, slots=True)
class PoolShape:
  """A worker's pool of pages of one cache kind, as far as another process must know it.

  Attributes:
    kind: The kind.
    num_pages: Pages.
    page_size: Entries per page.
    dtype: Of their elements.
    layout: Their layout in a page, a name of `pallas_kernels.PageLayout`.
    mesh: Devices over which key/value heads are cut, and over which each cut is copied.
  """

  kind: CacheKind
  num_pages: int
  page_size: int
  dtype: KVDtypeName
  layout: str
  mesh: tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
  """The host and devices of a process.

  Attributes:
    node: The host, by a name that no other host of the cluster has.
    pid: The process.
    kinds: The kind of each of its devices.
    devices: Their names.
    memory_bytes: Bytes that weights and pages may fill on each device; on CPU, on all of the host together.
    address: The address from which others pull its pages.
  """

  node: str
  pid: int
  kinds: tuple[DeviceKind, ...]
  devices: tuple[str, ...]
  memory_bytes: float
  address: str

  @property
  def platform(self) -> str:
    """The platform of its devices."""
    return self.kinds[0].platform


@dataclasses.dataclass(frozen=True, slots=True)
class Hello:
  """The report of a worker's process on itself once its weights are loaded.

  Attributes:
    worker: The worker's name.
    incarnation: The number of the worker's incarnation.
    machine: Its host and devices.
    versions: Those of the packages that both sides of a transfer must have in one version, by name.
    model: The model's shape.
    weights: Sums over every bit of the weights.
    dtype: Of the weights; empty of a place that only holds pages, and has none.
    pools: Its pages, by the cache kinds of the model.
  """

  worker: str
  incarnation: int
  machine: Machine
  versions: tuple[tuple[str, str], ...]
  model: ModelSpec
  weights: str
  dtype: str
  pools: tuple[PoolShape, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class WayPlan:
  """The pieces in which KV travels from one worker to another, as one end of the way worked them out.

  Attributes:
    kind: The name of the cache kind.
    unit: Entries of a unit.
    dtype: The dtype in which units travel.
    piece_heads: Key/value heads of a piece.
    pieces: Pieces of each shard of source and target.
    batches: Sizes of batches, in layers and units.
  """

  kind: str
  unit: int
  dtype: str
  piece_heads: int
  pieces: tuple[int, int]
  batches: tuple[tuple[int, int], ...]


def check_worker(hello: Hello, spec: WorkerSpec, model: ModelSpec) -> None:
  """See that a process holds the pool that the controller counts on.

  Args:
    hello: Its report.
    spec: The worker, all counts filled in.
    model: The model that the controller serves.

  Raises:
    HandshakeError: naming what it holds and what was expected.
  """
  facts: list[tuple[str, object, object]] = [
    ('name', hello.worker, spec.name),
    ('weights', hello.dtype, spec.weights or ''),
    ('model', hello.model, model),
    ('cache kinds', tuple(pool.kind for pool in hello.pools), model.cache),
  ]
  assert spec.page_size is not None
  for pool in hello.pools:
    facts += [
      ('num_pages', pool.num_pages, grown_pages(pool.kind, spec)),
      ('page_size', pool.page_size, pool.kind.entries_per_page(spec.page_size)),
      ('kv_dtype', pool.dtype, spec.kv_dtype),
      ('page_layout', pool.layout, pool.layout if spec.page_layout == 'auto' else spec.page_layout),
      ('tp', pool.mesh[0] * pool.mesh[1], spec.tp),
    ]
  for what, found, expected in facts:
    if found != expected:
      raise HandshakeError(
        f'the process of worker {spec.name!r} has {what} {found!r}, but the controller expects {expected!r}; start '
        'both from one config.'
      )


def check_together(hellos: Sequence[Hello]) -> None:
  """See that processes serve the same model with the same software, and the same weights where these have one dtype.

  Raises:
    HandshakeError: naming two workers and both values.
  """
  first, *others = hellos
  for other in others:
    ours, theirs = dict(first.versions), dict(other.versions)
    for package in {**ours, **theirs}:
      _compare(first, other, f'{package} version', ours.get(package), theirs.get(package), 'install one version')
    _compare(first, other, 'the model', first.model, other.model, 'give both the same checkpoint')
  same: dict[str, Hello] = {}
  for hello in hellos:
    one = same.setdefault(hello.dtype, hello)
    _compare(one, hello, 'weights that sum to', one.weights, hello.weights, 'give both the same checkpoint')


def check_plans(source: str, target: str, ours: Sequence[WayPlan], theirs: Sequence[WayPlan]) -> None:
  """See that both ends of a way cut what travels alike.

  Raises:
    HandshakeError: naming what differs, and both values.
  """
  remedy = 'start both from one config and one version of pdjax.'
  kinds, expected = ([plan.kind for plan in plans] for plans in (ours, theirs))
  if kinds != expected:
    raise HandshakeError(
      f'from {source!r} to {target!r}, the cache kinds {kinds} leave, but {expected} are expected there; {remedy}'
    )
  for at_source, at_target in zip(ours, theirs, strict=True):
    for field in dataclasses.fields(WayPlan):
      one, other = getattr(at_source, field.name), getattr(at_target, field.name)
      if one != other:
        raise HandshakeError(
          f'from {source!r} to {target!r}, the cache kind {at_source.kind!r} leaves with {field.name} {one!r}, but '
          f'{other!r} is expected there; {remedy}'
        )


def _compare(first: Hello, other: Hello, what: str, ours: object, theirs: object, remedy: str) -> None:
  if ours != theirs:
    raise HandshakeError(
      f'worker {first.worker!r} has {what} {ours}, but worker {other.worker!r} has {what} {theirs}; {remedy}.'
    )
