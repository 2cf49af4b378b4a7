"""Pieces from one process to another, over the transfer server that comes with JAX.

A way has two halves, each of which knows of the other side only what `RemotePool` says: the source gathers and offers
its pieces under numbers that somebody gave the transfer, the target pulls them, piece by piece, each onto the device
where it belongs. Both work out the same pieces. A pull must not begin before its pieces were offered: one of a number
that nobody offered never ends. A piece of another dtype is reinterpreted silently, so both sides compare what they cut
before anything is pulled.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from pdjax.kv.pages import KVPages
from pdjax.kv.transfer.base import PagePool, Parcel, PoolShapes
from pdjax.kv.transfer.by_pieces import Prepared, WholeWay
from pdjax.kv.transfer.checksums import Checked, checksums
from pdjax.kv.transfer.ends import SourceEnd, TargetEnd
from pdjax.kv.transfer.pieces import Pieces, Shape
from pdjax.sharding import MESH_AXES
from pdjax.types.cache import CacheKind, KVDtypeName
from pdjax.types.cluster import DeviceError
from pdjax.types.handshake import Manifest, PoolShape, WayPlan
from pdjax.types.span import Span
from pdjax.types.transfer import TransferSpec
from pdjax.types.worker import PageLayoutName

LOOPBACK = '127.0.0.1'


@dataclasses.dataclass(frozen=True)
class RemotePool:
  """The pool of a cache kind of a worker in another process: its shapes, and no bytes."""

  mesh: AbstractMesh
  page_shapes: KVPages

  @classmethod
  def of(cls, shape: PoolShape) -> 'RemotePool':
    """The pool that another process described."""
    mesh = AbstractMesh(shape.mesh, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    dtype, layout = jnp.dtype(shape.dtype), cast(PageLayoutName, shape.layout)
    return cls(mesh, KVPages.shapes(shape.kind, shape.num_pages, shape.page_size, dtype, mesh, layout))


def describe_pool(kind: CacheKind, pool: PoolShapes) -> PoolShape:
  """The shape of a cache kind's pool, as another process must know it."""
  shapes = pool.page_shapes
  mesh = pool.mesh.shape['kv'], pool.mesh.shape['group']
  dtype = cast(KVDtypeName, shapes.dtype.name)
  return PoolShape(kind, shapes.num_pages, shapes.page_size, dtype, shapes.layout.name, mesh)


# ---------------------------------------------------------------------------- where pieces are pulled from


class Server:
  """Offers arrays of this process to others, and pulls theirs; anyone who can connect may pull what is offered.

  Args:
    device: Any of the devices whose arrays travel.
    host: The address to listen at; on others it cannot be reached.

  Raises:
    DeviceError: if JAX has no transfer server for such devices; the message says why.
  """

  def __init__(self, device: jax.Device, host: str = LOOPBACK):
    listen = f'[{host}]:0' if ':' in host else f'{host}:0'
    try:
      from jax.experimental import transfer

      self._server = transfer.start_transfer_server(device.client, listen, [listen], transfer_size=_CHUNK_BYTES)
    except Exception as error:
      reason = f'{type(error).__name__}: {error}'.splitlines()[0]
      raise DeviceError(
        f"transport 'cross_process' is not available: JAX {jax.__version__} starts no transfer server for "
        f'{device.platform} devices at {host} ({reason}); use another version of JAX, or keep all workers in one '
        'process.'
      ) from error
    self._connections: dict[str, Any] = {}

  @property
  def address(self) -> str:
    """The address that others connect to, host and port."""
    return self._server.address()

  def offer(self, number: int, arrays: Sequence[jax.Array]) -> None:
    """Let someone pull these arrays, once; they need not be ready yet, and stay in memory until then."""
    self._server.await_pull(number, list(arrays))

  def pull(self, address: str, number: int, shapes: Sequence[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    """Begin to pull what is offered at an address; return at once."""
    if address not in self._connections:
      self._connections[address] = self._server.connect(address)
    return self._connections[address].pull(number, list(shapes))

  def withdraw(self, number: int, shapes: Sequence[jax.ShapeDtypeStruct]) -> None:
    """Let go of arrays that nobody will pull any more, by pulling them here."""
    self.pull(self.address, number, shapes)


_CHUNK_BYTES = 16 * 2**20  # that the server copies at once; it keeps eight of them


# ---------------------------------------------------------------------------- both halves


class Half(Prepared):
  """One end of a way between processes.

  With `TransferSpec.checksums`, those of every piece travel behind all pieces.
  """

  def plan(self, kind: str) -> WayPlan:
    """The plan of the way of a cache kind, which both ends must have worked out alike."""
    plan, cut = self.pieces, self.pieces.cut
    pieces = cut.source_pieces, cut.target_pieces
    return WayPlan(kind, plan.unit, plan.dtype.name, cut.piece_heads, pieces, tuple(sorted(plan.shapes)))


@dataclasses.dataclass(frozen=True)
class Offer:
  """Pieces of one transfer that lie ready for the target.

  Attributes:
    number: Of the transfer.
    pieces: The pieces of all its batches, or their shapes.
  """

  number: int
  pieces: tuple[Any, ...]

  def without_arrays(self) -> 'Offer':
    """The same, so that whoever keeps it keeps no device memory."""
    return Offer(self.number, tuple(map(_shape_of, self.pieces)))

  @property
  def manifest(self) -> Manifest:
    """Shape and dtype of each piece, for the target to compare with what it expects."""
    return tuple((tuple(piece.shape), piece.dtype.name) for piece in self.pieces)

  def wait(self) -> None:
    """Block until every piece can leave its device."""
    jax.block_until_ready(self.pieces)


class Sender(Half):
  """The source's half: gathers pages of this process and offers them to another."""

  def __init__(self, source: PagePool, target: PoolShapes, spec: TransferSpec, server: Server):
    super().__init__(Pieces(source, target, spec))
    self._server = server
    self._end = SourceEnd(self.pieces, source)

  def prepare(self, shape: Shape) -> None:
    """Compile the programs of the source."""
    self._end.prepare(shape)

  def rehearse(self, shape: Shape) -> None:
    """Gather once."""
    for batch in self._end.gather(self.pieces.first_span(shape)):
      pieces = self._end.leaving(batch)
      jax.block_until_ready((pieces, [checksums(piece) for piece in pieces] if self.pieces.has_checksums else ()))

  def offer(self, number: int, span: Span) -> Offer:
    """Gather cached tokens and offer them; return at once, even if steps that compute them are under way.

    Args:
      number: The number of the transfer; no other transfer that this process offers may ever have it.
      span: The tokens.
    """
    pieces = tuple(piece for batch in self._end.gather(span) for piece in self._end.leaving(batch))
    sums = map(checksums, pieces) if self.pieces.has_checksums else ()
    offer = Offer(number, (*pieces, *sums))
    self._server.offer(number, offer.pieces)
    return offer

  def withdraw(self, offer: Offer) -> None:
    """Let go of what was offered and will not be pulled."""
    self._server.withdraw(offer.number, offer.without_arrays().pieces)


class Receiver(Half):
  """The target's half: pulls pieces that another process offers, and writes them into pages of this one."""

  def __init__(self, source: PoolShapes, target: PagePool, spec: TransferSpec, server: Server, address: str):
    super().__init__(Pieces(source, target, spec))
    self._server = server
    self._end = TargetEnd(self.pieces, target)
    self.address = address  # the source's, which changes when its process is another

  def prepare(self, shape: Shape) -> None:
    """Compile the programs of the target."""
    self._end.prepare(shape)

  def rehearse(self, shape: Shape) -> None:
    """Write zeros into pages that are empty still."""
    plan, span = self.pieces, self.pieces.first_span(shape)
    zeros = [jax.device_put(np.zeros(piece.shape, piece.dtype), piece.sharding) for piece in self._end.arriving(shape)]
    checked = Checked((checksums(piece), piece) for piece in zeros) if plan.has_checksums else None
    batches = ((plan.targets(span), self._end.assemble(shape, zeros)),)
    parcel = Parcel(batches, plan.layers_of(span), 0, len(zeros), (), checked=checked)
    parcel.wait()
    self.receive(parcel).block_until_ready()

  def pull(self, number: int, manifest: Manifest, span: Span) -> Parcel:
    """Begin to pull what was offered under a number; return at once.

    Args:
      number: The number of the transfer, whose offer somebody has heard of.
      manifest: The shapes and dtypes that were offered.
      span: The tokens.

    Raises:
      ValueError: if something else was offered than these tokens.
    """
    plan, shapes = self.pieces, self.expected(span)
    wanted = tuple((tuple(shape.shape), shape.dtype.name) for shape in shapes)
    if wanted != manifest:
      raise ValueError(f'transfer {number} offers pieces of {_brief(manifest)}, expected {_brief(wanted)}.')
    pulled = self._server.pull(self.address, number, shapes)
    pieces, checked = pulled, None
    if plan.has_checksums:
      pieces, sums = pulled[: len(pulled) // 2], pulled[len(pulled) // 2 :]
      checked = Checked(zip(sums, pieces, strict=True))
    targets, rest = plan.targets(span), iter(pieces)
    batches = tuple((targets[batch], self._end.assemble(shape, rest)) for batch, shape in plan.batches(span))
    wire_bytes = sum(piece.nbytes for piece in pieces)
    return Parcel(batches, plan.layers_of(span), wire_bytes, len(pieces), (), checked=checked)

  def receive(self, parcel: Parcel) -> jax.Array:
    """Write a parcel whose pieces are there into the target's pool; an array that is ready when it is written."""
    return self._end.receive(parcel)

  def expected(self, span: Span) -> list[jax.ShapeDtypeStruct]:
    """Shape, dtype and device of all that is offered for a span: the pieces, then their checksums, if any."""
    pieces = [piece for _, shape in self.pieces.batches(span) for piece in self._end.arriving(shape)]
    if not self.pieces.has_checksums:
      return pieces
    sums = [jax.ShapeDtypeStruct((piece.shape[1], 2), np.dtype(np.uint32), sharding=piece.sharding) for piece in pieces]
    return [*pieces, *sums]


def _shape_of(piece: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(piece.shape, piece.dtype, sharding=piece.sharding)


def _brief(manifest: Manifest) -> str:
  """Pieces in words, those alike counted."""
  kinds = dict.fromkeys(manifest, 0)
  for kind in manifest:
    kinds[kind] += 1
  return ', '.join(f'{count}×{dtype}{list(shape)}' for (shape, dtype), count in kinds.items()) or 'nothing'


# ---------------------------------------------------------------------------- both in one process


class CrossProcess(WholeWay):
  """Both halves of a way in one process, with a server for each: everything but the other process."""

  def __init__(self, source: PagePool, target: PagePool, spec: TransferSpec):
    ours, theirs = (
      _server_of(side, pool.mesh.devices.flat[0]) for side, pool in (('source', source), ('target', target))
    )
    self.sender = Sender(source, target, spec, ours)
    super().__init__(self.sender.pieces)
    self.receiver = Receiver(source, target, spec, theirs, ours.address)

  def prepare(self, shape: Shape) -> None:
    """Compile the programs of either half."""
    self.sender.prepare(shape)
    self.receiver.prepare(shape)

  def send(self, span: Span) -> Parcel:
    """Put cached tokens on their way and return at once, even if steps that compute them are still under way."""
    offer = self.sender.offer(next(_numbers), span)
    parcel = self.receiver.pull(offer.number, offer.manifest, span)
    return dataclasses.replace(parcel, gathered=offer.pieces)

  def receive(self, parcel: Parcel) -> jax.Array:
    """Write a parcel whose pieces are there into the target's pool; an array that is ready when it is written."""
    return self.receiver.receive(parcel)


_numbers = itertools.count(1)  # of transfers within this process


@functools.cache
def _server_of(side: str, device: jax.Device) -> Server:
  """A server of a device for what it sends, and one for what it gets; they last as long as the process."""
  return Server(device)
