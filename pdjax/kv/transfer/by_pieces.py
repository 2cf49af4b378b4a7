"""Transports that carry pieces from the source's devices to the target's: what they have in common."""

import abc
import time
from concurrent.futures import ThreadPoolExecutor

import jax

from pdjax.kv.transfer.base import PagePool, Parcel
from pdjax.kv.transfer.ends import SourceEnd, TargetEnd
from pdjax.kv.transfer.pieces import Pieces, Shape
from pdjax.types.span import Span
from pdjax.types.transfer import TransferSpec


class Prepared(abc.ABC):
  """Something that has programs for every size of batch that may travel.

  Attributes:
    pieces: The pieces that travel.
  """

  def __init__(self, pieces: Pieces):
    self.pieces = pieces

  def compile(self) -> dict[str, float]:
    """Compile what every size of batch needs, and run each once; seconds of compiling by program.

    Pools are empty still, so it moves nothing that counts.
    """
    seconds = self.compile_programs()
    self.rehearse_all()
    return seconds

  def compile_programs(self) -> dict[str, float]:
    """Compile what every size of batch needs; seconds by program."""
    shapes = self.pieces.shapes

    def timed(shape: Shape) -> float:
      begin = time.perf_counter()
      self.prepare(shape)
      return time.perf_counter() - begin

    with ThreadPoolExecutor(2) as pool:
      return dict(zip(map(self.pieces.name_of, shapes), pool.map(timed, shapes), strict=True))

  def rehearse_all(self) -> None:
    """Run every program once, while pools are empty still."""
    for shape in self.pieces.shapes:
      self.rehearse(shape)

  @abc.abstractmethod
  def prepare(self, shape: Shape) -> None:
    """Compile what one size of batch needs."""

  @abc.abstractmethod
  def rehearse(self, shape: Shape) -> None:
    """Run the programs of one size of batch once."""


class WholeWay(Prepared):
  """A transport, from one end to the other."""

  def rehearse(self, shape: Shape) -> None:
    """Send one batch and write it."""
    parcel = self.send(self.pieces.first_span(shape))
    parcel.wait()
    self.receive(parcel).block_until_ready()

  @abc.abstractmethod
  def send(self, span: Span) -> Parcel:
    """Put cached tokens on their way; see `Transport`."""

  @abc.abstractmethod
  def receive(self, parcel: Parcel) -> jax.Array:
    """Write a parcel whose pieces are there; see `Transport`."""


class ByPieces(WholeWay):
  """A transport between pools of one process, all but the way that pieces take.

  Attributes:
    source: The source's end.
    target: The target's.
  """

  def __init__(self, source: PagePool, target: PagePool, spec: TransferSpec):
    """Plan the pieces.

    Raises:
      ValueError: as `Pieces` does.
    """
    super().__init__(Pieces(source, target, spec))
    self.source = SourceEnd(self.pieces, source)
    self.target = TargetEnd(self.pieces, target)

  def prepare(self, shape: Shape) -> None:
    """Compile what one size of batch needs, at both ends."""
    self.source.prepare(shape)
    self.target.prepare(shape)

  def receive(self, parcel: Parcel) -> jax.Array:
    """Write a parcel whose pieces are there into the target's pool; an array that is ready when it is written."""
    return self.target.receive(parcel)
