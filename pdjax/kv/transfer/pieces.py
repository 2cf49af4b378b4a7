"""KV from mesh to mesh as pieces that fit both cuts of the heads: what both ends of a way work out alike.

Each source device gathers the pages asked for and cuts its heads into pieces of gcd(heads per source shard, heads per
target shard). Every piece goes from one device to one device, by which way is a transport's business, and each target
device joins its pieces and writes them.

What is gathered are units, tokens of the greatest common divisor of both page sizes, so that no token too many moves
between pools of unlike pages. Units travel in batches of a few sizes, each about four times the one before it, so that
few programs serve every count. Between unlike dtypes they are converted once: on the source if they are smaller then,
else on the target. Where the target copies its heads over several devices, a piece crosses once and is spread inside
the target's mesh.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import get_args

import jax.numpy as jnp
import numpy as np

from pdjax.kv.pages import KVPages
from pdjax.kv.transfer.base import PoolShapes, places
from pdjax.types.cache import KVDtypeName, wire_dtype
from pdjax.types.span import Span
from pdjax.types.transfer import TransferSpec
from pdjax.types.worker import Role

Shape = tuple[int, int]  # of a batch: its layers and units


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


class Pieces:
  """The pieces that travel between two pools, and their batches.

  Attributes:
    source: Shapes of the source's pages.
    target: Shapes of the target's pages.
    source_shards: The number of shards of heads that the source has.
    target_shards: The same of the target.
    has_checksums: Whether what arrives is compared with what left.
    cut: The cut of the heads.
    dtype: In which they travel.
    unit: Tokens of a unit.
    num_layers: Of the model.
  """

  def __init__(self, source: PoolShapes, target: PoolShapes, spec: TransferSpec):
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
    self.source = ours
    self.target = theirs
    self.source_shards, self.target_shards = source.mesh.shape['kv'], target.mesh.shape['kv']
    self.has_checksums = spec.checksums
    self.cut = Cut.between(ours.kv_heads, self.source_shards, self.target_shards)
    self.dtype = jnp.dtype(wire_dtype(*dtypes))
    self.unit = math.gcd(ours.page_size, theirs.page_size)  # tokens
    self.num_layers = len(ours.layers)
    groups = spec.step_groups(Role.PREFILL, self.num_layers)
    most = min(pool.num_pages * pool.page_size // self.unit for pool in (ours, theirs))
    shapes = {stop - first for first, stop in ((0, self.num_layers), *groups)}
    self._sizes = {layers: batch_bounds(spec.piece_bytes // self.unit_bytes(layers), most) for layers in shapes}

  @property
  def shapes(self) -> list[Shape]:
    """Every size that a batch may have."""
    return [(layers, size) for layers, sizes in self._sizes.items() for size in sizes]

  def name_of(self, shape: Shape) -> str:
    """A size of batch in words."""
    layers, size = shape
    return f'{size} units' if layers == self.num_layers else f'{size} units of {layers} layers'

  def first_span(self, shape: Shape) -> Span:
    """As much as one batch holds, at the begin of both pools."""
    layers, size = shape
    tokens = size * self.unit
    ours, theirs = (tuple(range(-(-tokens // pool.page_size))) for pool in (self.source, self.target))
    return Span(ours, theirs, 0, tokens, (0, layers))

  def unit_bytes(self, layers: int) -> int:
    """Bytes of one unit of the largest array that travels: the values of a piece."""
    return layers * 2 * self.cut.piece_heads * self.unit * self.source.head_dim * self.dtype.itemsize

  def layers_of(self, span: Span) -> tuple[int, int]:
    """The first layer of a span and the one after the last."""
    return span.bounds(self.num_layers)

  def batches(self, span: Span) -> list[tuple[slice, Shape]]:
    """The units of a span, in batches; each with its shape."""
    first, stop = self.layers_of(span)
    sizes = batch_sizes(span.tokens // self.unit, self._sizes[stop - first])
    ends = itertools.accumulate(sizes)
    return [(slice(end - size, end), (stop - first, size)) for size, end in zip(sizes, ends, strict=True)]

  def sources(self, span: Span) -> np.ndarray:
    """The units' places in the source's pool, `[n, 2]`."""
    return places(span, span.source_pages, self.source.page_size, self.unit)

  def targets(self, span: Span) -> np.ndarray:
    """The units' places in the target's pool, `[n, 2]`."""
    return places(span, span.target_pages, self.target.page_size, self.unit)


def _model(pages: KVPages) -> tuple[int, int, int]:
  """Layers, key/value heads and head size."""
  return len(pages.layers), pages.kv_heads, pages.head_dim
