"""KV between two meshes of one process, as pieces that fit both cuts of the heads.

A `device_put` between unlike shardings waits for its source and goes through the host. So each source device gathers
the pages asked for and cuts its heads into pieces of gcd(heads per source shard, heads per target shard); every piece
goes from one device to one device, which returns at once; and each target device joins its pieces and writes them.

Pages travel in batches whose sizes are powers of four, so that few programs serve every count and no page too many
moves.
Where the target copies its heads over several devices, a piece crosses once and is spread inside the target's mesh.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pdjax.kv.pages import (
  GATHERED_HEADS_AXIS,
  GATHERED_SPEC,
  LAYER_SPEC,
  KVPages,
  gather,
  gathered_shape,
  scatter,
)
from pdjax.kv.transfer.base import PagePool, Parcel
from pdjax.sharding import replicated
from pdjax.types.cluster import TransferSpec

# Pieces are gathered pages with an axis of copies before all others: one copy leaves, `group` arrive.
_HEADS_AXIS = 1 + GATHERED_HEADS_AXIS
_PIECE_SPEC = PartitionSpec(None, *GATHERED_SPEC)  # on the source
_LANDED_SPEC = PartitionSpec('group', *GATHERED_SPEC)  # on the target


@dataclasses.dataclass(frozen=True)
class Cut:
  """How KV heads cut over one mesh map to heads cut over another.

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


def batch_sizes(pages: int, sizes: Sequence[int]) -> list[int]:
  """The fewest of the ascending `sizes`, powers of four, that add up to `pages`, largest first."""
  batches = []
  for size in reversed(sizes):
    batches += [size] * (pages // size)
    pages %= size
  return batches


class DevicePut:
  """The way from one worker's pool to another's in the same process."""

  def __init__(self, source: PagePool, target: PagePool, spec: TransferSpec):
    """Plan the pieces.

    Raises:
      ValueError: if the pools differ in anything but the number of pages and the mesh.
    """
    ours, theirs = source.page_shapes, target.page_shapes
    if (gathered_shape(ours, 1, ours.kv_heads), ours.dtype) != (
      gathered_shape(theirs, 1, theirs.kv_heads),
      theirs.dtype,
    ):
      raise ValueError(
        f'pools of unlike pages: {ours.layers[0]} and {theirs.layers[0]}; give both one model, page size and dtype.'
      )
    self._source = source
    self._target = target
    self.cut = Cut.between(ours.kv_heads, source.mesh.shape['kv'], target.mesh.shape['kv'])
    most = min(spec.max_batch_pages, ours.num_pages, theirs.num_pages)
    self._sizes = tuple(4**power for power in range(most.bit_length()) if 4**power <= most)
    self._gathers: dict[int, jax.stages.Compiled] = {}
    self._scatters: dict[int, jax.stages.Compiled] = {}
    self._fillers: dict[int, list[jax.Array]] = {}

  # -------------------------------------------------------------------------- programs

  def compile(self) -> dict[str, float]:
    """Compile the gather and scatter of every batch size, and run each once; seconds of compiling by program.

    Both pools are empty still, so it moves nothing that counts.
    """

    def timed(size: int) -> float:
      begin = time.perf_counter()
      self._gathers[size] = self._lower_gather(size).compile()
      self._scatters[size] = self._lower_scatter(size).compile()
      self._fillers[size] = self._make_fillers(size)
      return time.perf_counter() - begin

    with ThreadPoolExecutor(2) as pool:
      seconds = {f'{size} pages': s for size, s in zip(self._sizes, pool.map(timed, self._sizes), strict=True)}
    for size in self._sizes:
      self.receive(self.send(range(size), range(size))).block_until_ready()
    return seconds

  def _lower_gather(self, size: int) -> jax.stages.Lowered:
    cut = self.cut

    def pieces(pages: KVPages, ids: jax.Array) -> tuple[jax.Array, ...]:
      return tuple(jnp.split(gather(pages, ids)[None], cut.source_pieces, axis=_HEADS_AXIS))

    local = jax.shard_map(
      pieces,
      mesh=self._source.mesh,
      in_specs=(LAYER_SPEC, PartitionSpec()),
      out_specs=(_PIECE_SPEC,) * cut.source_pieces,
      check_vma=False,
    )
    return jax.jit(local).lower(self._source.page_shapes, self._ids(self._source, size))

  def _lower_scatter(self, size: int) -> jax.stages.Lowered:
    group = self._target.mesh.shape['group']

    def join(pages: KVPages, ids: jax.Array, pieces: tuple[jax.Array, ...]) -> tuple[KVPages, jax.Array]:
      values = jnp.concatenate(pieces, axis=_HEADS_AXIS)
      if group > 1:  # the others brought zeros
        values = jax.lax.psum(values, 'group')
      return scatter(pages, ids, values[0]), ids[0]

    local = jax.shard_map(
      join,
      mesh=self._target.mesh,
      in_specs=(LAYER_SPEC, PartitionSpec(), _LANDED_SPEC),
      out_specs=(LAYER_SPEC, PartitionSpec()),
      check_vma=False,
    )
    landed = (self._landed(size),) * self.cut.target_pieces
    return jax.jit(local, donate_argnums=0).lower(self._target.page_shapes, self._ids(self._target, size), landed)

  def _ids(self, pool: PagePool, size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), jnp.int32, sharding=replicated(pool.mesh))

  def _landed_shape(self, size: int, copies: int, shards: int) -> tuple[int, ...]:
    """The shape of so many pieces side by side."""
    return copies, *gathered_shape(self._source.page_shapes, size, shards * self.cut.piece_heads)

  def _landed(self, size: int) -> jax.ShapeDtypeStruct:
    mesh = self._target.mesh
    shape = self._landed_shape(size, mesh.shape['group'], mesh.shape['kv'])
    return jax.ShapeDtypeStruct(shape, self._source.page_shapes.dtype, sharding=NamedSharding(mesh, _LANDED_SPEC))

  def _make_fillers(self, size: int) -> list[jax.Array]:
    """Zeros on every target device that no piece is put on, row by row of the mesh; they stay there."""
    zeros = np.zeros(self._landed_shape(size, 1, 1), self._source.page_shapes.dtype)
    return [jax.device_put(zeros, device) for device in self._target.mesh.devices[:, 1:].flat]

  # -------------------------------------------------------------------------- moving

  def send(self, source_pages: Sequence[int], target_pages: Sequence[int]) -> Parcel:
    """Put pages on their way and return at once, even if passes that compute them are still under way."""
    batches = []
    wire_bytes = 0
    first = 0
    for size in batch_sizes(len(source_pages), self._sizes):
      ids = np.asarray(source_pages[first : first + size], np.int32)
      gathered = self._gathers[size](self._source.pages, ids)
      pieces, put_bytes = self._put(gathered, size)
      batches.append((tuple(target_pages[first : first + size]), pieces))
      wire_bytes += put_bytes
      first += size
    return Parcel(tuple(batches), wire_bytes)

  def _put(self, gathered: Sequence[jax.Array], size: int) -> tuple[tuple[jax.Array, ...], int]:
    """Send every piece to its device; the pieces as arrays on the target's mesh, and the bytes that were put."""
    source, target = self._source.mesh.devices, self._target.mesh.devices
    shards = [{shard.device: shard.data for shard in piece.addressable_shards} for piece in gathered]
    shape = self._landed(size)
    landed = []
    put_bytes = 0
    for piece in range(self.cut.target_pieces):
      arrays = []
      for target_shard in range(target.shape[0]):
        source_shard, source_piece = self.cut.source_of(target_shard, piece)
        data = shards[source_piece][source[source_shard, 0]]
        arrays.append(jax.device_put(data, target[target_shard, 0]))
        put_bytes += arrays[-1].nbytes
      arrays += self._fillers[size]
      landed.append(jax.make_array_from_single_device_arrays(shape.shape, shape.sharding, arrays))
    return tuple(landed), put_bytes

  def receive(self, parcel: Parcel) -> jax.Array:
    """Write a parcel whose pieces are there into the target's pool; an array that is ready when it is written."""
    for target_pages, pieces in parcel.batches:
      ids = np.asarray(target_pages, np.int32)
      self._target.pages, written = self._scatters[len(ids)](self._target.pages, ids, pieces)
    return written
