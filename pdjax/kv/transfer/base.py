"""The protocol of a transport, which moves KV pages from one worker's pool to another's."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from pdjax.kv.pages import KVPages, Units
from pdjax.kv.transfer.checksums import Checked
from pdjax.types.span import Span


class PoolShapes(Protocol):
  """The pool of a cache kind as far as one end of a way must know the other: its shapes, and no bytes."""

  @property
  def mesh(self) -> Mesh | AbstractMesh:
    """Its devices, or how heads are cut over them."""

  @property
  def page_shapes(self) -> KVPages:
    """Shape, dtype and layout of its pages."""


class PagePool(Protocol):
  """A `pdjax.kv.Pool`, as far as a transfer sees it. `pages` is replaced by every program that updates it."""

  mesh: Mesh
  pages: KVPages
  page_shapes: KVPages


@dataclasses.dataclass(eq=False)
class Parcel:
  """Cached tokens on their way, in batches of units.

  Attributes:
    batches: Of each batch, the units' places `[n, 2]` in the target's pool (page, first token there) and its pieces on
      the target's devices; at the latest when `wait` has returned.
    layers: The first layer of these and the one after the last.
    wire_bytes: Bytes of the arrays that were put onto target devices.
    num_pieces: The number of those arrays.
    gathered: The pieces on the source's devices.
    checked: Tells whether what arrived is what was sent; None if nobody looks.
    abandoned: Whether nobody wants it any more; what has not left then need not leave.
  """

  batches: tuple[tuple[np.ndarray, tuple[Units, ...]], ...]
  layers: tuple[int, int]
  wire_bytes: int
  num_pieces: int
  gathered: Any
  checked: Checked | None = dataclasses.field(default=None, kw_only=True)
  abandoned: bool = dataclasses.field(default=False, kw_only=True)

  def is_there(self) -> bool:
    """Whether every piece is there, or never will be because it failed."""
    return all(leaf.is_ready() for leaf in jax.tree.leaves([pieces for _, pieces in self.batches]))

  def wait_gathered(self) -> None:
    """Block until every piece can leave its device."""
    jax.block_until_ready(self.gathered)

  def wait(self) -> None:
    """Block until every piece is there.

    Raises:
      CorruptError: if they are not those that were sent.
    """
    jax.block_until_ready([pieces for _, pieces in self.batches])
    if self.checked is not None:
      self.checked.compare()


class Transport(Protocol):
  """The way from one pool to another."""

  def compile(self) -> dict[str, float]:
    """Compile every size of batch and run each once between pools that are empty still; seconds by program."""

  def send(self, span: Span) -> Parcel:
    """Put cached tokens on their way and return at once, even if steps that compute them are still under way."""

  def receive(self, parcel: Parcel) -> jax.Array:
    """Write a parcel whose pieces are there into the target's pool; an array that is ready when it is written."""


def places(span: Span, pages: Sequence[int], page_size: int, unit: int) -> np.ndarray:
  """The place of each unit of a span in a pool: its page, and its first token there, `[n, 2]` int32.

  Args:
    span: Some tokens of a sequence.
    pages: Those of the span on this side.
    page_size: Tokens per page.
    unit: Tokens of a unit, which divides the page size and both bounds of the span.
  """
  position = np.arange(span.start, span.start + span.tokens, unit)
  numbers = np.asarray(pages, np.int32)[position // page_size - span.start // page_size]
  return np.stack([numbers, position % page_size], axis=1).astype(np.int32)
