"""Pieces from device to device of one process.

A `device_put` between unlike shardings waits for its source and goes through the host; from one device to one device it
returns at once.
"""

from collections.abc import Sequence

import jax

from pdjax.kv.transfer.base import Parcel
from pdjax.kv.transfer.checksums import Checked
from pdjax.kv.transfer.pieces import ByPieces


class DevicePut(ByPieces):
  """The way from one worker's pool to another's in the same process."""

  def send(
    self,
    source_pages: Sequence[int],
    target_pages: Sequence[int],
    start: int,
    tokens: int,
    layers: tuple[int, int] | None = None,
  ) -> Parcel:
    """Put cached tokens on their way and return at once, even if passes that compute them are still under way."""
    put_bytes = 0
    way = self.checked(self.put)

    def put(piece: jax.Array, device: jax.Device) -> jax.Array:
      nonlocal put_bytes
      array = way(piece, device)
      put_bytes += array.nbytes
      return array

    layers = layers or self.all_layers
    gathered = self.gather(source_pages, target_pages, start, tokens, layers)
    batches = tuple((batch.targets, self.land(batch, put)) for batch in gathered)
    checked = way if isinstance(way, Checked) else None
    pieces = [batch.pieces for batch in gathered]
    return Parcel(batches, layers, put_bytes, self.num_pieces(gathered), pieces, checked=checked)

  def put(self, piece: jax.Array, device: jax.Device) -> jax.Array:
    """Carry one piece over; it need not be computed yet."""
    return jax.device_put(piece, device)
