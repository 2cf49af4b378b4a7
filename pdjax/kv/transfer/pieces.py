"""KV from mesh to mesh as pieces that fit both cuts of the heads: what all transports have in common.

Each source device gathers the pages asked for and cuts its heads into pieces of gcd(heads per source shard, heads per
target shard). Every piece goes from one device to one device, by which way is a transport's business, and each target
device joins its pieces and writes them.

What is gathered are units, tokens of the greatest common divisor of both page sizes, so that no token too many moves
between pools of unlike pages. Units travel in batches of a few sizes, each about four times the one before it, so that
few programs serve every count. Between unlike dtypes they are converted once: on the source if they are smaller then,
else on the target. Where the target copies its heads over several devices, a piece crosses once and is spread inside
the target's mesh.
"""

import abc
import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from pdjax.kv.pages import LAYER_SPEC, KVPages, Units, gather, scatter
from pdjax.kv.transfer.base import PagePool, Parcel, places
from pdjax.sharding import replicated
from pdjax.types.cluster import KVDtypeName, TransferSpec, wire_dtype
from pdjax.types.span import Span

Shape = tuple[int, int]  # of a batch: its layers and units
# Pieces are units with an axis of copies before all others: one copy leaves, `group` arrive.
_HEADS_AXIS = 1 + Units.HEADS_AXIS
_PIECE_SPEC = PartitionSpec(None, *Units.SPEC)  # on the source
_LANDED_SPEC = PartitionSpec('group', *Units.SPEC)  # on the target


@dataclasses.dataclass(frozen=True)
class Gathered:
  """A batch of units on the source's devices."""

  targets: np.ndarray  # [n, 2], their places in the target's pool
  layers: int
  pieces: tuple[Units, ...]  # the source pieces of every shard

  @property
  def shape(self) -> 'Shape':
    """Layers and units."""
    return self.layers, len(self.targets)


@dataclasses.dataclass(frozen=True)
class Cut:
  """The mapping of KV heads cut over one mesh to heads cut over another.

  Attributes:
    piece_heads: Heads of one piece.
    source_pieces: Pieces of one source shard.
    target_pieces: Pieces of one target shard.
  """

  piece_heads: int
  source_pieces: int
  target_pieces: int

  @classmethod
  def between(cls, kv_heads: int, source_shards: int, target_shards: int) -> 'Cut':
    """The coarsest pieces that fit both cuts."""
    source, target = kv_heads // source_shards, kv_heads // target_shards
    piece = math.gcd(source, target)
    return cls(piece, source // piece, target // piece)

  def source_of(self, target_shard: int, piece: int) -> tuple[int, int]:
    """The (source shard, piece there) that is piece `piece` of a target shard."""
    return divmod(target_shard * self.target_pieces + piece, self.source_pieces)


def batch_bounds(wanted: int, most: int) -> tuple[int, ...]:
  """Sizes of batches, ascending: 1, then about four times the one before.

  The last is `wanted` if a pool has so many units (`most`); else a power of four, as a transfer rarely takes nearly the
  whole pool.
  """
  sizes = [max(wanted, 1) if wanted <= most else 4 ** ((most.bit_length() - 1) // 2)]
  while sizes[-1] > 1:
    sizes.append(-(-sizes[-1] // 4))
  return tuple(reversed(sizes))


def batch_sizes(units: int, sizes: Sequence[int]) -> list[int]:
  """Some of the ascending `sizes`, of which the first is 1, that add up to `units`: always the largest that fits."""
  batches = []
  for size in reversed(sizes):
    batches += [size] * (units // size)
    units %= size
  return batches


class ByPieces(abc.ABC):
  """A transport, all but the way that pieces take."""

  def __init__(self, source: PagePool, target: PagePool, spec: TransferSpec):
    """Plan the pieces.

    Raises:
      ValueError: if the pools hold keys and values of unlike models, or in a dtype that does not travel.
    """
    ours, theirs = source.page_shapes, target.page_shapes
    if _model(ours) != _model(theirs):
      raise ValueError(
        f'pools of unlike models: layers, key/value heads and head size are {_model(ours)} and {_model(theirs)}; give '
        'both workers one model.'
      )
    dtypes: list[KVDtypeName] = []
    for pool in (ours, theirs):
      name = next((name for name in get_args(KVDtypeName) if name == pool.dtype.name), None)
      if name is None:
        raise ValueError(f'a pool is {pool.dtype.name}, expected one of {", ".join(get_args(KVDtypeName))}.')
      dtypes.append(name)
    self._source = source
    self._target = target
    self.has_checksums = spec.checksums
    self.cut = Cut.between(ours.kv_heads, source.mesh.shape['kv'], target.mesh.shape['kv'])
    self.dtype = jnp.dtype(wire_dtype(*dtypes))
    self.unit = math.gcd(ours.page_size, theirs.page_size)  # tokens
    self.num_layers = len(ours.layers)
    groups = () if spec.layered_from is None else spec.groups(self.num_layers)
    most = min(pool.num_pages * pool.page_size // self.unit for pool in (ours, theirs))
    shapes = {stop - first for first, stop in ((0, self.num_layers), *groups)}
    self._sizes = {layers: batch_bounds(spec.piece_bytes // self.unit_bytes(layers), most) for layers in shapes}
    self._gathers: dict[Shape, jax.stages.Compiled] = {}
    self._scatters: dict[Shape, jax.stages.Compiled] = {}
    self._fillers: dict[Shape, list[Units]] = {}
    self._shapes: dict[Shape, Units] = {}  # worked out once: every transfer asks for them
    self._arriving: dict[Shape, list[jax.ShapeDtypeStruct]] = {}

  # -------------------------------------------------------------------------- programs

  def compile(self) -> dict[str, float]:
    """Compile the gather and scatter of every batch size, and run each once; seconds of compiling by program.

    Both pools are empty still, so it moves nothing that counts.
    """
    seconds = self.compile_programs()
    self.rehearse_all()
    return seconds

  def compile_programs(self) -> dict[str, float]:
    """Compile the programs of every size of batch; return the seconds by program."""

    def timed(shape: Shape) -> float:
      begin = time.perf_counter()
      self.prepare(shape)
      return time.perf_counter() - begin

    names = [f'{size} units' if layers == self.num_layers else f'{size} units of {layers} layers'
             for layers, size in self.shapes]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
      return dict(zip(names, pool.map(timed, self.shapes), strict=True))

  def rehearse_all(self) -> None:
    """Run every program once, between pools that are empty still."""
    for shape in self.shapes:
      self.rehearse(shape)

  @property
  def shapes(self) -> list[Shape]:
    """Every size that a batch may have."""
    return [(layers, size) for layers, sizes in self._sizes.items() for size in sizes]

  def prepare(self, shape: Shape) -> None:
    """Compile the programs of one size of batch."""
    self.prepare_source(shape)
    self.prepare_target(shape)

  def prepare_source(self, shape: Shape) -> None:
    """Compile the programs of the source."""
    self._gathers[shape] = self._lower_gather(shape).compile()

  def prepare_target(self, shape: Shape) -> None:
    """Compile the programs of the target, and put their fillers there."""
    self._scatters[shape] = self._lower_scatter(shape).compile()
    self._fillers[shape] = self._make_fillers(shape)

  def rehearse(self, shape: Shape) -> None:
    """Run the programs of one size of batch once."""
    parcel = self.send(self.first_span(shape))
    parcel.wait()
    self.receive(parcel).block_until_ready()

  def first_span(self, shape: Shape) -> Span:
    """As much as one batch holds, at the begin of both pools."""
    layers, size = shape
    tokens = size * self.unit
    ours, theirs = (tuple(range(-(-tokens // pool.page_shapes.page_size))) for pool in (self._source, self._target))
    return Span(ours, theirs, 0, tokens, (0, layers))

  def _lower_gather(self, shape: Shape) -> jax.stages.Lowered:
    cut, (layers, size) = self.cut, shape

    def pieces(pages: KVPages, places: jax.Array) -> tuple[Units, ...]:
      whole = gather(pages, places, self.unit, self.dtype)
      parts = jax.tree.map(lambda x: jnp.split(x[None], cut.source_pieces, axis=_HEADS_AXIS), whole)
      return tuple(
        jax.tree.map(lambda part, piece=piece: part[piece], parts, is_leaf=lambda x: isinstance(x, list))
        for piece in range(cut.source_pieces)
      )

    local = jax.shard_map(
      pieces,
      mesh=self._source.mesh,
      in_specs=(LAYER_SPEC, PartitionSpec()),
      out_specs=(_PIECE_SPEC,) * cut.source_pieces,
      check_vma=False,
    )
    return jax.jit(local).lower(self._source.page_shapes.part(0, layers), self._places(self._source, size))

  def _lower_scatter(self, shape: Shape) -> jax.stages.Lowered:
    layers, size = shape
    group = self._target.mesh.shape['group']

    def join(pages: KVPages, places: jax.Array, pieces: tuple[Units, ...]) -> tuple[KVPages, jax.Array]:
      units = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=_HEADS_AXIS), *pieces)
      if group > 1:  # the others brought zeros
        units = jax.tree.map(lambda x: jax.lax.psum(x, 'group'), units)
      return scatter(pages, places, jax.tree.map(lambda x: x[0], units)), places[0]

    local = jax.shard_map(
      join,
      mesh=self._target.mesh,
      in_specs=(LAYER_SPEC, PartitionSpec(), _LANDED_SPEC),
      out_specs=(LAYER_SPEC, PartitionSpec()),
      check_vma=False,
    )
    landed = (self._landed(shape),) * self.cut.target_pieces
    pages = self._target.page_shapes.part(0, layers)
    return jax.jit(local, donate_argnums=0).lower(pages, self._places(self._target, size), landed)

  def _places(self, pool: PagePool, size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, 2), jnp.int32, sharding=replicated(pool.mesh))

  def unit_bytes(self, layers: int) -> int:
    """Bytes of one unit of the largest array that travels: the values of a piece."""
    shapes = self._source.page_shapes
    return layers * 2 * self.cut.piece_heads * self.unit * shapes.head_dim * self.dtype.itemsize

  def _landed(self, shape: Shape) -> Units:
    """Shapes of the pieces of one batch that share an array on the target's mesh."""
    if shape in self._shapes:
      return self._shapes[shape]
    layers, size = shape
    mesh = self._target.mesh
    heads, sharding = mesh.shape['kv'] * self.cut.piece_heads, NamedSharding(mesh, _LANDED_SPEC)
    shapes = self._source.page_shapes.part(0, layers)
    found = Units.shapes(shapes, size, heads, self.unit, self.dtype, mesh.shape['group'], sharding)
    self._shapes[shape] = found
    return found

  def _make_fillers(self, shape: Shape) -> list[Units]:
    """Zeros on every target device that no piece is put on, row by row of the mesh; they stay there."""

    def zeros(leaf: jax.ShapeDtypeStruct, device: jax.Device) -> jax.Array:
      return jax.device_put(np.zeros(leaf.sharding.shard_shape(leaf.shape), leaf.dtype), device)

    landed = self._landed(shape)
    devices = self._target.mesh.devices[:, 1:].flat
    return [jax.tree.map(lambda leaf, device=device: zeros(leaf, device), landed) for device in devices]

  # -------------------------------------------------------------------------- moving

  def layers_of(self, span: Span) -> tuple[int, int]:
    """The first layer of a span and the one after the last."""
    return span.bounds(self.num_layers)

  def batches(self, span: Span) -> list[tuple[slice, Shape]]:
    """The units of a span, in batches; each with its shape."""
    first, stop = self.layers_of(span)
    sizes = batch_sizes(span.tokens // self.unit, self._sizes[stop - first])
    ends = itertools.accumulate(sizes)
    return [(slice(end - size, end), (stop - first, size)) for size, end in zip(sizes, ends, strict=True)]

  def targets(self, span: Span) -> np.ndarray:
    """The units' places in the target's pool, `[n, 2]`."""
    return places(span, span.target_pages, self._target.page_shapes.page_size, self.unit)

  def gather(self, span: Span) -> list[Gathered]:
    """Dispatch the gathers of a span, in batches; they wait for steps under way, and nobody for them."""
    pages, targets = self._source.pages.part(*self.layers_of(span)), self.targets(span)
    sources = places(span, span.source_pages, self._source.page_shapes.page_size, self.unit)
    return [
      Gathered(targets[batch], shape[0], self._gathers[shape](pages, sources[batch]))
      for batch, shape in self.batches(span)
    ]

  def leaving(self, batch: Gathered) -> list[jax.Array]:
    """The pieces of a batch, each on the source device that has it: by piece, leaf of units and target shard."""
    source = self._source.mesh.devices
    leaves = [jax.tree.leaves(units) for units in batch.pieces]
    pieces = []
    for piece in range(self.cut.target_pieces):
      for leaf in range(len(leaves[0])):
        for target_shard in range(self._target.mesh.shape['kv']):
          source_shard, source_piece = self.cut.source_of(target_shard, piece)
          pieces.append(_shard_on(leaves[source_piece][leaf], source[source_shard, 0]))
    return pieces

  def arriving(self, shape: Shape) -> list[jax.ShapeDtypeStruct]:
    """Shape, dtype and target device of every piece of a batch, in the same order."""
    if shape in self._arriving:
      return self._arriving[shape]
    leaves = jax.tree.leaves(self._landed(shape))
    found = self._arriving[shape] = [
      jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype, sharding=SingleDeviceSharding(device))
      for _ in range(self.cut.target_pieces)
      for leaf in leaves
      for device in self._target.mesh.devices[:, 0]
    ]
    return found

  def assemble(self, shape: Shape, arrived: Iterable[jax.Array]) -> tuple[Units, ...]:
    """Arrays on the target's mesh out of the next pieces that arrived, as many as a batch has, in the same order."""
    leaves, tree = jax.tree.flatten(self._landed(shape))
    fillers = [jax.tree.leaves(units) for units in self._fillers[shape]]
    shards, rest = self._target.mesh.shape['kv'], iter(arrived)

    def joined(index: int, leaf: Any) -> jax.Array:
      if self._target.mesh.size == 1:
        return next(rest)
      arrays = [*itertools.islice(rest, shards), *(units[index] for units in fillers)]
      return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)

    return tuple(
      jax.tree.unflatten(tree, [joined(index, leaf) for index, leaf in enumerate(leaves)])
      for _ in range(self.cut.target_pieces)
    )

  @abc.abstractmethod
  def send(self, span: Span) -> Parcel:
    """Put cached tokens on their way; see `Transport`."""

  def receive(self, parcel: Parcel) -> jax.Array:
    """Write a parcel whose pieces are there into the target's pool; an array that is ready when it is written."""
    first, stop = parcel.layers
    for targets, pieces in parcel.batches:
      pages = self._target.pages.part(first, stop)
      pages, written = self._scatters[stop - first, len(targets)](pages, targets, pieces)
      self._target.pages = self._target.pages.with_part(first, pages)
    return written


def device_of(piece: jax.ShapeDtypeStruct) -> jax.Device:
  """The device at which a piece arrives. JAX puts an array on a device sooner than into a sharding."""
  (device,) = piece.sharding.device_set
  return device


def _model(pages: KVPages) -> tuple[int, int, int]:
  """Layers, key/value heads and head size."""
  return len(pages.layers), pages.kv_heads, pages.head_dim


def _shard_on(array: jax.Array, device: jax.Device) -> jax.Array:
  if len(array.sharding.device_set) == 1:
    return array  # to ask for its shards takes as long as a hundred kilobytes on their way
  return next(shard.data for shard in array.addressable_shards if shard.device == device)
