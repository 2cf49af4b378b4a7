"""WorkerSpec: one worker of a cluster, its roles, its mesh, and its room for pages and sequences."""

import dataclasses
import enum
from typing import Annotated, ClassVar, Literal

from pdjax.types.cache import DEFAULT_KV_DTYPE, KVDtypeName
from pdjax.types.checked import Count, check_fields
from pdjax.types.fitting import Must, at_least
from pdjax.types.hardware import ChipSpec, DtypeName, precision_of

MAX_DEVICES = 16_384  # more than any cluster of one program has: all are counted up

PageSize = Annotated[int, at_least(1, 'at least 1 token')]
DeviceIndex = Annotated[int, Must(lambda index: 0 <= index < MAX_DEVICES, f'a number from 0 to {MAX_DEVICES - 1}')]
PageLayoutName = Literal['auto', 'plain', 'paired', 'kv']
PlatformName = Literal['cpu', 'gpu', 'tpu']


class Role(enum.StrEnum):
  """The phases that a worker runs."""

  PREFILL = 'prefill'
  DECODE = 'decode'
  BOTH = 'both'
  HOLD = 'hold'  # runs none: a place such as `HostPlace`, which only holds pages

  @property
  def prefills(self) -> bool:
    return self is Role.PREFILL or self is Role.BOTH

  @property
  def decodes(self) -> bool:
    return self is Role.DECODE or self is Role.BOTH


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerSpec:
  """One worker: a mesh of its own with one copy of the weights.

  Attributes:
    name: Unique within the cluster.
    role: The phases it runs as a run begins.
    tp: Devices over which heads and feed-forward columns are cut (tensor parallelism).
    num_pages: Memory for the cache, in pages of what keeps all tokens, of which windows and states take their part (see
      `PoolSpecs`); or 'auto' to fill the device's memory.
    max_sequences: Most sequences that decode at once.
    max_step_tokens: Most prompt tokens in one step, and the largest prefill bucket.
    max_chunks: Most prompts packed into one step.
    max_fused_steps: Most decode steps that one step of the worker fuses.
    devices: Indices into all devices of its platform; None takes the next ones that no other worker has. Two workers
      that name the same devices share them.
    platform: The kind of its devices: one may prefill on CPUs and another decode on GPUs. None is that of the config,
      and without one what JAX finds first. A simulation goes by `chip` alone.
    page_layout: The layout of keys and values in a page, a name of `pallas_kernels.PageLayout`; 'auto' is the one that
      the devices read fastest. Pages travel between workers of unlike layouts.
    page_size: Tokens per page; None is the config's. Pages travel between workers of unlike sizes.
    kv_dtype: Of the cache; None is the config's, whatever `weights` are. 'int8' has a float32 scale a token and head.
      Between workers of unlike dtypes pages are converted once, where fewer bytes then travel.
    weights: The dtype of its weights, in which it computes; None is the config's `dtype`. Workers may have unlike ones;
      those with the same devices and the same dtype share one copy.
    chip: The chip that each of its devices is, to cost models and to simulations that size pools; None is that of the
      cost model. What the devices of a real run are, they say themselves.
    may_become: Other roles that it may take while a run is under way, where a policy answers `SwitchRole`. Programs,
      ways for pages and memory are prepared for all its roles.

  Raises:
    ValueError: if a field is of another type or out of range, or the devices are not `tp` distinct ones.
  """

  _said: ClassVar[str] = 'worker {name} has {field}={value}'

  name: str
  role: Role = Role.BOTH
  tp: Count = 1
  num_pages: Annotated[int, at_least(1, 'a positive count')] | Literal['auto'] = 'auto'
  max_sequences: Count = 8
  max_step_tokens: Count = 512
  max_chunks: Count = 8
  max_fused_steps: Count = 16
  devices: tuple[DeviceIndex, ...] | None = None
  platform: PlatformName | None = None
  page_layout: PageLayoutName = 'auto'
  page_size: PageSize | None = None
  kv_dtype: KVDtypeName | None = None
  weights: DtypeName | None = None
  may_become: tuple[Role, ...] = ()
  chip: ChipSpec | None = None

  def __post_init__(self):
    check_fields(self)
    if self.devices is not None and not len(self.devices) == len(set(self.devices)) == self.tp:
      raise ValueError(
        f'worker {self.name!r} names devices {self.devices}, expected {self.tp} distinct ones because tp={self.tp}, '
        'counted from 0.'
      )

  @property
  def named_devices(self) -> tuple[tuple[PlatformName | None, int], ...]:
    """The devices that it names, each with its platform: those of unlike platforms are never the same."""
    return tuple((self.platform, device) for device in self.devices or ())

  @property
  def roles(self) -> tuple[Role, ...]:
    """Every role that it may ever have, the first one first."""
    return tuple(dict.fromkeys((self.role, *self.may_become)))

  @property
  def ever_prefills(self) -> bool:
    """Whether it prefills in any of its roles."""
    return any(role.prefills for role in self.roles)

  @property
  def ever_decodes(self) -> bool:
    """Whether it decodes in any of its roles."""
    return any(role.decodes for role in self.roles)

  @property
  def phases(self) -> str:
    """Its roles in words."""
    others = ' or '.join(role.value for role in self.roles[1:])
    return f'{self.role.value} (may become {others})' if others else self.role.value

  @property
  def cached_dtype(self) -> KVDtypeName:
    """The dtype of its cache: `kv_dtype`, or the default."""
    return self.kv_dtype or DEFAULT_KV_DTYPE

  @property
  def holds(self) -> str:
    """Its pages in words, and its weights if they are of another dtype; all of it filled in."""
    pages = f'{self.num_pages} pages of {self.page_size} tokens in {self.kv_dtype}'
    return pages if self.weights == self.kv_dtype else f'{pages}, weights in {self.weights}'

  @property
  def precision(self) -> str:
    """Precision of its matrix products, as `jax.default_matmul_precision` takes it."""
    return precision_of(self.weights)

  @property
  def token_buckets(self) -> tuple[int, ...]:
    """Prompt tokens that a step is padded to, ascending."""
    return buckets(self.max_step_tokens, smallest=32)

  @property
  def batch_buckets(self) -> tuple[int, ...]:
    """Decoding sequences that a step is padded to, ascending.

    One by itself has a bucket: products with a vector take half as long on a CPU as with two. From two to eight it
    makes little difference anywhere; above, twice the rows take up to twice the time.
    """
    return tuple(sorted({1, *buckets(self.max_sequences, smallest=8)}))


def buckets(largest: int, smallest: int = 1, factor: int = 2) -> tuple[int, ...]:
  """Sizes `smallest, smallest·factor, ...` up to and with `largest`."""
  sizes = []
  size = min(smallest, largest)
  while size < largest:
    sizes.append(size)
    size *= factor
  return (*sizes, largest)


def bucket_for(size: int, sizes: tuple[int, ...]) -> int:
  """The smallest of the ascending `sizes` that holds `size`.

  Raises:
    ValueError: if none does.
  """
  for bucket in sizes:
    if size <= bucket:
      return bucket
  raise ValueError(f'{size} does not fit the largest bucket, {sizes[-1]}.')
