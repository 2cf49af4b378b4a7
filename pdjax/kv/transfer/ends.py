"""The two ends of a way: the source's gathers pages and cuts them, the target's joins what arrived and writes it."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from pdjax.kv.pages import LAYER_SPEC, KVPages, Units, gather, scatter
from pdjax.kv.transfer.base import PagePool, Parcel
from pdjax.kv.transfer.pieces import Pieces, Shape
from pdjax.sharding import replicated
from pdjax.types.span import Span

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


class SourceEnd:
  """Gathers cached tokens of a pool, cut into pieces."""

  def __init__(self, pieces: Pieces, pool: PagePool):
    self.pieces = pieces
    self._pool = pool
    self._gathers: dict[Shape, jax.stages.Compiled] = {}

  def prepare(self, shape: Shape) -> None:
    """Compile what one size of batch needs."""
    self._gathers[shape] = self._lower_gather(shape).compile()

  def gather(self, span: Span) -> list[Gathered]:
    """Dispatch the gathers of a span, in batches; they wait for steps under way, and nobody for them."""
    plan = self.pieces
    pages, sources, targets = self._pool.pages.part(*plan.layers_of(span)), plan.sources(span), plan.targets(span)
    return [
      Gathered(targets[batch], shape[0], self._gathers[shape](pages, sources[batch]))
      for batch, shape in plan.batches(span)
    ]

  def leaving(self, batch: Gathered) -> list[jax.Array]:
    """The pieces of a batch, each on the source device that has it: by piece, leaf of units and target shard."""
    plan, source = self.pieces, self._pool.mesh.devices
    leaves = [jax.tree.leaves(units) for units in batch.pieces]
    pieces = []
    for piece in range(plan.cut.target_pieces):
      for leaf in range(len(leaves[0])):
        for target_shard in range(plan.target_shards):
          source_shard, source_piece = plan.cut.source_of(target_shard, piece)
          pieces.append(_shard_on(leaves[source_piece][leaf], source[source_shard, 0]))
    return pieces

  def _lower_gather(self, shape: Shape) -> jax.stages.Lowered:
    plan, (layers, size) = self.pieces, shape

    def pieces(pages: KVPages, places: jax.Array) -> tuple[Units, ...]:
      whole = gather(pages, places, plan.unit, plan.dtype)
      parts = jax.tree.map(lambda x: jnp.split(x[None], plan.cut.source_pieces, axis=_HEADS_AXIS), whole)
      return tuple(
        jax.tree.map(lambda part, piece=piece: part[piece], parts, is_leaf=lambda x: isinstance(x, list))
        for piece in range(plan.cut.source_pieces)
      )

    local = jax.shard_map(
      pieces,
      mesh=self._pool.mesh,
      in_specs=(LAYER_SPEC, PartitionSpec()),
      out_specs=(_PIECE_SPEC,) * plan.cut.source_pieces,
      check_vma=False,
    )
    return jax.jit(local).lower(self._pool.page_shapes.part(0, layers), _places(self._pool, size))


class TargetEnd:
  """Joins pieces that arrived and writes them into a pool."""

  def __init__(self, pieces: Pieces, pool: PagePool):
    self.pieces = pieces
    self._pool = pool
    self._scatters: dict[Shape, jax.stages.Compiled] = {}
    self._fillers: dict[Shape, list[Units]] = {}
    self._shapes: dict[Shape, Units] = {}  # worked out once: every transfer asks for them
    self._arriving: dict[Shape, list[jax.ShapeDtypeStruct]] = {}

  def prepare(self, shape: Shape) -> None:
    """Compile what one size of batch needs, and put there what that needs."""
    self._scatters[shape] = self._lower_scatter(shape).compile()
    self._fillers[shape] = self._make_fillers(shape)

  def arriving(self, shape: Shape) -> list[jax.ShapeDtypeStruct]:
    """Shape, dtype and target device of every piece of a batch, in the order in which they leave."""
    if shape in self._arriving:
      return self._arriving[shape]
    leaves = jax.tree.leaves(self._landed(shape))
    found = self._arriving[shape] = [
      jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype, sharding=SingleDeviceSharding(device))
      for _ in range(self.pieces.cut.target_pieces)
      for leaf in leaves
      for device in self._pool.mesh.devices[:, 0]
    ]
    return found

  def assemble(self, shape: Shape, arrived: Iterable[jax.Array]) -> tuple[Units, ...]:
    """Arrays on the target's mesh out of the next pieces that arrived, as many as a batch has, in the same order."""
    leaves, tree = jax.tree.flatten(self._landed(shape))
    fillers = [jax.tree.leaves(units) for units in self._fillers[shape]]
    shards, rest = self._pool.mesh.shape['kv'], iter(arrived)

    def joined(index: int, leaf: Any) -> jax.Array:
      if self._pool.mesh.size == 1:
        return next(rest)
      arrays = [*itertools.islice(rest, shards), *(units[index] for units in fillers)]
      return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)

    return tuple(
      jax.tree.unflatten(tree, [joined(index, leaf) for index, leaf in enumerate(leaves)])
      for _ in range(self.pieces.cut.target_pieces)
    )

  def receive(self, parcel: Parcel) -> jax.Array:
    """Write a parcel whose pieces are there into the target's pool; an array that is ready when it is written."""
    first, stop = parcel.layers
    for targets, pieces in parcel.batches:
      pages = self._pool.pages.part(first, stop)
      pages, written = self._scatters[stop - first, len(targets)](pages, targets, pieces)
      self._pool.pages = self._pool.pages.with_part(first, pages)
    return written

  def _lower_scatter(self, shape: Shape) -> jax.stages.Lowered:
    layers, size = shape
    group = self._pool.mesh.shape['group']

    def join(pages: KVPages, places: jax.Array, pieces: tuple[Units, ...]) -> tuple[KVPages, jax.Array]:
      units = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=_HEADS_AXIS), *pieces)
      if group > 1:  # the others brought zeros
        units = jax.tree.map(lambda x: jax.lax.psum(x, 'group'), units)
      return scatter(pages, places, jax.tree.map(lambda x: x[0], units)), places[0]

    local = jax.shard_map(
      join,
      mesh=self._pool.mesh,
      in_specs=(LAYER_SPEC, PartitionSpec(), _LANDED_SPEC),
      out_specs=(LAYER_SPEC, PartitionSpec()),
      check_vma=False,
    )
    landed = (self._landed(shape),) * self.pieces.cut.target_pieces
    pages = self._pool.page_shapes.part(0, layers)
    return jax.jit(local, donate_argnums=0).lower(pages, _places(self._pool, size), landed)

  def _landed(self, shape: Shape) -> Units:
    """Shapes of the pieces of one batch that share an array on the target's mesh."""
    if shape in self._shapes:
      return self._shapes[shape]
    layers, size = shape
    plan, mesh = self.pieces, self._pool.mesh
    heads, sharding = mesh.shape['kv'] * plan.cut.piece_heads, NamedSharding(mesh, _LANDED_SPEC)
    shapes = plan.source.part(0, layers)
    found = Units.shapes(shapes, size, heads, plan.unit, plan.dtype, mesh.shape['group'], sharding)
    self._shapes[shape] = found
    return found

  def _make_fillers(self, shape: Shape) -> list[Units]:
    """Zeros on every target device that no piece is put on, row by row of the mesh; they stay there."""

    def zeros(leaf: jax.ShapeDtypeStruct, device: jax.Device) -> jax.Array:
      return jax.device_put(np.zeros(leaf.sharding.shard_shape(leaf.shape), leaf.dtype), device)

    landed = self._landed(shape)
    devices = self._pool.mesh.devices[:, 1:].flat
    return [jax.tree.map(lambda leaf, device=device: zeros(leaf, device), landed) for device in devices]


def device_of(piece: jax.ShapeDtypeStruct) -> jax.Device:
  """The device at which a piece arrives. JAX puts an array on a device sooner than into a sharding."""
  (device,) = piece.sharding.device_set
  return device


def _places(pool: PagePool, size: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((size, 2), jnp.int32, sharding=replicated(pool.mesh))


def _shard_on(array: jax.Array, device: jax.Device) -> jax.Array:
  if len(array.sharding.device_set) == 1:
    return array  # to ask for its shards takes as long as a hundred kilobytes on their way
  return next(shard.data for shard in array.addressable_shards if shard.device == device)
