"""Pieces through host buffers, for meshes whose devices cannot address each other.

The thread that waits for a parcel copies piece after piece out of its device into one of two buffers of the way, and
from there to the target's device. So the host holds no more than these and one batch, whatever travels.
"""

import dataclasses
import math
import threading
from collections.abc import Callable

import jax
import numpy as np

from pdjax.kv.pages import Units
from pdjax.kv.transfer.base import PagePool, Parcel
from pdjax.kv.transfer.by_pieces import ByPieces
from pdjax.kv.transfer.checksums import Checked, checksums
from pdjax.kv.transfer.ends import Gathered, device_of
from pdjax.types.span import Span
from pdjax.types.transfer import TransferSpec

_ALIGNMENT = 64  # bytes: host memory that begins at a multiple of them a CPU device shares instead of copying it
_OFFSET = 16  # where the buffer begins, past such a multiple; any dtype may begin there


class HostStaged(ByPieces):
  """The way from one worker's pool to another's over this host's memory."""

  def __init__(self, source: PagePool, target: PagePool, spec: TransferSpec):
    super().__init__(source, target, spec)
    self._buffers = [_Buffer(), _Buffer()]
    self._lock = threading.Lock()

  def send(self, span: Span) -> 'StagedParcel':
    """Dispatch what gathers cached tokens and return at once; they travel while someone waits for the parcel."""
    gathered = self.source.gather(span)
    pieces = [batch.pieces for batch in gathered]
    expected = [piece for batch in gathered for piece in self.target.arriving(batch.shape)]
    wire_bytes = sum(math.prod(piece.shape) * piece.dtype.itemsize for piece in expected)
    return StagedParcel((), self.pieces.layers_of(span), wire_bytes, len(expected), pieces, gathered, self.carry)

  def carry(self, batch: Gathered) -> tuple[tuple[Units, ...], list[tuple[jax.Array, jax.Array]]]:
    """Carry the pieces of a batch over; those too with checksums of what they were, if there are to be any."""
    ways = zip(self.source.leaving(batch), self.target.arriving(batch.shape), strict=True)
    with self._lock:  # others may use the buffers before and after
      jax.block_until_ready(batch.pieces)
      moved = [(piece, self.stage(piece, device_of(expected))) for piece, expected in ways]
    pairs = [(checksums(piece), arrived) for piece, arrived in moved] if self.pieces.has_checksums else []
    return self.target.assemble(batch.shape, (arrived for _, arrived in moved)), pairs

  def stage(self, piece: jax.Array, device: jax.Device) -> jax.Array:
    """Begin to carry one piece over: while it leaves one buffer, the next is copied into the other."""
    self._buffers.reverse()
    return self._buffers[0].send(np.asarray(piece), device)


class _Buffer:
  """Host memory that one array at a time leaves by."""

  def __init__(self):
    self._memory = np.empty(0, np.uint8)
    self._leaving: jax.Array | None = None

  def send(self, here: np.ndarray, device: jax.Device) -> jax.Array:
    """Copy an array into this memory, once nothing leaves it any more, and begin to put it from there."""
    jax.block_until_ready(self._leaving)
    if self._memory.nbytes < here.nbytes:
      self._memory = unaligned(here.nbytes)
    staged = self._memory[: here.nbytes].view(here.dtype).reshape(here.shape)
    np.copyto(staged, here)
    self._leaving = jax.device_put(staged, device)
    return self._leaving


@dataclasses.dataclass(eq=False)
class StagedParcel(Parcel):
  """Gathered units that travel when they are waited for."""

  staged: list[Gathered]
  carry: Callable[[Gathered], tuple[tuple[Units, ...], list[tuple[jax.Array, jax.Array]]]]

  def wait(self) -> None:
    """Carry every piece over, and let go of each batch that is."""
    self.gathered = ()
    batches, pairs = [], []
    while self.staged and not self.abandoned:
      batch = self.staged.pop(0)
      units, checked = self.carry(batch)
      batches.append((batch.targets, units))
      pairs += checked
    self.staged.clear()
    self.batches = tuple(batches)
    self.checked = Checked(pairs)
    super().wait()


def unaligned(size: int) -> np.ndarray:
  """So many bytes of host memory that no array on a CPU device will share: such memory begins elsewhere."""
  room = np.empty(size + 2 * _ALIGNMENT, np.uint8)
  first = (_OFFSET - room.ctypes.data) % _ALIGNMENT
  return room[first : first + size]
