"""Pieces from device to device of one process.

A `device_put` between unlike shardings waits for its source and goes through the host; from one device to one device it
returns at once.
"""

from collections.abc import Sequence

import jax

from pdjax.kv.transfer.base import Parcel
from pdjax.kv.transfer.by_pieces import ByPieces
from pdjax.kv.transfer.checksums import Checked, checksums
from pdjax.kv.transfer.ends import Gathered, device_of
from pdjax.types.span import Span


class DevicePut(ByPieces):
  """The way from one worker's pool to another's in the same process."""

  def send(self, span: Span) -> Parcel:
    """Put cached tokens on their way and return at once, even if steps that compute them are still under way."""
    gathered = self.source.gather(span)
    leaving = [piece for batch in gathered for piece in self.source.leaving(batch)]
    arrived = self.put(leaving, self.devices_of(gathered))
    checked = Checked(zip(map(checksums, leaving), arrived, strict=True)) if self.pieces.has_checksums else None
    rest = iter(arrived)
    batches = tuple((batch.targets, self.target.assemble(batch.shape, rest)) for batch in gathered)
    put_bytes = sum(piece.nbytes for piece in arrived)
    return Parcel(batches, self.pieces.layers_of(span), put_bytes, len(arrived), leaving, checked=checked)

  def devices_of(self, gathered: Sequence[Gathered]) -> list[jax.Device]:
    """The target device of every piece of some batches, in their order."""
    return [device_of(piece) for batch in gathered for piece in self.target.arriving(batch.shape)]

  def put(self, pieces: Sequence[jax.Array], devices: Sequence[jax.Device]) -> list[jax.Array]:
    """Carry pieces over, each to its device; they need not be computed yet."""
    return jax.device_put(list(pieces), list(devices))
