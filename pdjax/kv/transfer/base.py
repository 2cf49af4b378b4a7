"""What moves KV pages from one worker's pool to another's."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import jax
from jax.sharding import Mesh

from pdjax.kv.pages import KVPages


class PagePool(Protocol):
  """A worker, as far as a transfer sees it. `pages` is replaced by every program that updates it."""

  mesh: Mesh
  pages: KVPages
  page_shapes: KVPages


@dataclasses.dataclass(frozen=True)
class Parcel:
  """Pages on their way: for each batch of them, its target page numbers and its pieces on the target's devices.

  Attributes:
    batches: (target page numbers, pieces) of each batch.
    wire_bytes: Bytes of the arrays that were put onto target devices.
  """

  batches: tuple[tuple[tuple[int, ...], tuple[jax.Array, ...]], ...]
  wire_bytes: int

  def wait(self) -> None:
    """Block until every piece is there."""
    jax.block_until_ready([pieces for _, pieces in self.batches])


class Transport(Protocol):
  """The way from one pool to another."""

  def compile(self) -> dict[str, float]:
    """Compile every size of batch and run each once between pools that are empty still; seconds by program."""

  def send(self, source_pages: Sequence[int], target_pages: Sequence[int]) -> Parcel:
    """Put pages on their way and return at once, even if passes that compute them are still under way."""

  def receive(self, parcel: Parcel) -> jax.Array:
    """Write a parcel whose pieces are there into the target's pool; an array that is ready when it is written."""
