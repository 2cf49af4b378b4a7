"""Cache kinds: what the tokens of a sequence leave behind in which layers, and how much of that is kept.

A model lists its kinds (`ModelSpec.cache`); pools, allocator, transfers, sizes and costs know nothing else of a cache.
"""

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

from pdjax.types.checked import SOME, Index, Size, check_fields
from pdjax.types.fitting import at_least

KVDtypeName = Literal['float32', 'bfloat16', 'float16', 'int8']
KV_DTYPE_BYTES: dict[KVDtypeName, int] = {'float32': 4, 'bfloat16': 2, 'float16': 2, 'int8': 1}  # of an element
DEFAULT_KV_DTYPE: KVDtypeName = 'float32'  # of a worker that names none

KV = 'kv'  # the kind of keys and values of all tokens, which the engine holds
Reach = Literal['all', 'request'] | Annotated[int, at_least(1, 'a window of at least 1 token')]


@dataclasses.dataclass(frozen=True, slots=True)
class CacheArray:
  """One array of a cache kind.

  Attributes:
    name: Its name.
    shape: The shape of one entry in one layer: of a token, or of the one state of a request.
    cut: The axis of `shape` along which the devices of a worker cut it as they cut key/value heads; None: each has all.
    dtype: Of its elements; None is the worker's `kv_dtype`, of int8 with a float32 scale for each row of the last axis.

  Raises:
    ValueError: if a field is of another type or out of range.
  """

  _said: ClassVar[str] = 'cache array {name} has {field}={value}'

  name: Annotated[str, SOME]
  shape: Annotated[tuple[Size, ...], SOME]
  cut: Index | None = None
  dtype: KVDtypeName | None = None

  def __post_init__(self):
    check_fields(self)
    if self.cut is not None and self.cut >= len(self.shape):
      raise ValueError(f'cache array {self.name!r} has cut={self.cut!r}, expected an axis of {self.shape} or None.')

  def num_bytes(self, kv_dtype: KVDtypeName, shards: int = 1) -> int:
    """Bytes of one entry in one layer on each of so many devices that cut it.

    Raises:
      ValueError: if they do not divide the axis that is cut.
    """
    size = math.prod(self.shape)
    if self.cut is not None:
      if self.shape[self.cut] % shards:
        raise ValueError(
          f'cache array {self.name!r} has {self.shape[self.cut]} in the axis that is cut, which {shards} devices do '
          'not divide; change tp, or let it be whole on each (cut=None).'
        )
      size //= shards
    scales = size // self.shape[-1] * 4 if self.dtype is None and kv_dtype == 'int8' else 0
    return size * KV_DTYPE_BYTES[self.dtype or kv_dtype] + scales


@dataclasses.dataclass(frozen=True, slots=True)
class CacheKind:
  """One kind of cached numbers: those that a sequence leaves behind in some layers of a model.

  Its entries are tokens, or one state for the whole request. Of a window a token takes the place of the one that falls
  out, so that its pages hold no more than the window.

  Attributes:
    name: Its name, such as 'kv'.
    layers: The layers that it belongs to.
    arrays: The arrays of each of them.
    reach: The part that is kept: 'all' tokens, the last so many (a window), or one state a 'request' (recurrence).
    page_size: Entries per page; None is the worker's `page_size`. A state is a page by itself.

  Raises:
    ValueError: if it has no layers or no arrays, or its reach or page size is none.
  """

  _said: ClassVar[str] = 'cache kind {name} has {field}={value}'

  name: Annotated[str, SOME]
  layers: Annotated[tuple[Index, ...], SOME]
  arrays: Annotated[tuple[CacheArray, ...], SOME]
  reach: Reach = 'all'
  page_size: Annotated[int, at_least(1, '1 entry or more')] | None = None

  def __post_init__(self):
    check_fields(self)
    for what, names in (('layer', self.layers), ('array', tuple(array.name for array in self.arrays))):
      if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise ValueError(f'cache kind {self.name!r} has {what} {twice!r} twice; name each once.')
    if self.has_state and self.page_size is not None:
      raise ValueError(
        f'cache kind {self.name!r} has page_size={self.page_size!r}, but a state is a page; leave it out.'
      )

  @property
  def grows(self) -> bool:
    """Whether every token adds to it."""
    return self.reach == 'all'

  @property
  def has_state(self) -> bool:
    """Whether it is one state for a whole request, and not an entry for each token."""
    return self.reach == 'request'

  def entries_per_page(self, page_size: int) -> int:
    """Entries of a page of it on a worker whose own pages have `page_size` tokens; a state is a page."""
    return 1 if self.has_state else self.page_size or page_size

  def kept(self, tokens: int) -> int:
    """Entries kept of a sequence of so many tokens."""
    if self.has_state:
      return min(tokens, 1)
    return tokens if self.grows else min(tokens, int(self.reach))

  def sendable(self, tokens: int, total: int) -> int:
    """Entries that may leave once so many of the `total` tokens of a prompt are computed.

    Of a window, those of its last tokens; a state only when it is that of the whole prompt.
    """
    if self.has_state:
      return int(tokens >= total)
    return tokens if self.grows else max(tokens - max(total - int(self.reach), 0), 0)

  def num_layers(self, bounds: tuple[int, int] | None = None) -> int:
    """The number of its layers; with `bounds`, of those from the first of them up to the second."""
    return len(self.layers) if bounds is None else sum(bounds[0] <= layer < bounds[1] for layer in self.layers)

  def layer_bytes(self, kv_dtype: KVDtypeName, shards: int = 1) -> int:
    """Bytes of one entry in one layer, on each of so many devices that cut it."""
    return sum(array.num_bytes(kv_dtype, shards) for array in self.arrays)

  def num_bytes(self, kv_dtype: KVDtypeName, shards: int = 1) -> int:
    """Bytes of one entry over all its layers, on each of so many devices that cut it."""
    return len(self.layers) * self.layer_bytes(kv_dtype, shards)


def wire_dtype(source: KVDtypeName, target: KVDtypeName) -> KVDtypeName:
  """The dtype in which pages travel: the smaller one, converted on the other's side; of equal ones as they are."""
  return target if KV_DTYPE_BYTES[target] < KV_DTYPE_BYTES[source] else source
