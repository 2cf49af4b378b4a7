"""The parts of a cluster: workers with a role, a mesh and room for pages and sequences."""

import dataclasses
import enum
import itertools
import re
from collections.abc import Sequence
from typing import Literal, get_args

from pdjax.types.model import KV_DTYPE_BYTES

PageLayoutName = Literal['auto', 'plain', 'paired', 'kv']
KVDtypeName = Literal['float32', 'bfloat16', 'float16', 'int8']
TransportName = Literal['auto', 'device_put', 'host_staged', 'cross_process']
GranularityName = Literal['auto', 'request', 'chunk', 'layers']


class DeviceError(RuntimeError):
  """The devices that a run wants are not there."""


class Role(enum.StrEnum):
  """The phases that a worker runs."""

  PREFILL = 'prefill'
  DECODE = 'decode'
  BOTH = 'both'

  @property
  def prefills(self) -> bool:
    return self is not Role.DECODE

  @property
  def decodes(self) -> bool:
    return self is not Role.PREFILL


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerSpec:
  """One worker: a mesh of its own with one copy of the weights.

  Attributes:
    name: Unique within the cluster.
    role: The phases it runs.
    tp: Devices over which heads and feed-forward columns are cut (tensor parallelism).
    num_pages: KV pages it holds, or 'auto' to fill the device's memory.
    max_sequences: Most sequences that decode at once.
    max_step_tokens: Most prompt tokens in one step, and the largest prefill bucket.
    max_chunks: Most prompts packed into one step.
    max_fused_steps: Most decode steps that one step of the worker fuses.
    devices: Indices into all devices; None takes the next ones that no other worker has. Two workers that
      name the same devices share them and their weights.
    page_layout: The layout of keys and values in a page, a name of `pallas_kernels.PageLayout`; 'auto' is the one that
      the devices read fastest. Pages travel between workers of unlike layouts.
    page_size: Tokens per page; None is the config's. Pages travel between workers of unlike sizes.
    kv_dtype: Of cached keys and values; None is the config's. 'int8' has a float32 scale a token and head. Between
      workers of unlike dtypes pages are converted once, where fewer bytes then travel.

  Raises:
    ValueError: if a size is not positive, a layout or dtype is unknown, or the devices are not `tp` distinct ones.
  """

  name: str
  role: Role = Role.BOTH
  tp: int = 1
  num_pages: int | Literal['auto'] = 'auto'
  max_sequences: int = 8
  max_step_tokens: int = 512
  max_chunks: int = 8
  max_fused_steps: int = 16
  devices: tuple[int, ...] | None = None
  page_layout: PageLayoutName = 'auto'
  page_size: int | None = None
  kv_dtype: KVDtypeName | None = None

  def __post_init__(self):
    object.__setattr__(self, 'role', Role(self.role))
    for size in ('tp', 'max_sequences', 'max_step_tokens', 'max_chunks', 'max_fused_steps'):
      if getattr(self, size) < 1:
        raise ValueError(f'worker {self.name!r} has {size}={getattr(self, size)}, expected at least 1.')
    if self.num_pages != 'auto' and (not isinstance(self.num_pages, int) or self.num_pages < 1):
      raise ValueError(f"worker {self.name!r} has num_pages={self.num_pages!r}, expected a positive count or 'auto'.")
    if self.page_layout not in get_args(PageLayoutName):
      names = ', '.join(map(repr, get_args(PageLayoutName)))
      raise ValueError(f'worker {self.name!r} has page_layout={self.page_layout!r}, expected one of {names}.')
    if self.page_size is not None and self.page_size < 1:
      raise ValueError(f'worker {self.name!r} has page_size={self.page_size}, expected at least 1 token.')
    if self.kv_dtype not in (None, *get_args(KVDtypeName)):
      names = ', '.join(map(repr, get_args(KVDtypeName)))
      raise ValueError(f'worker {self.name!r} has kv_dtype={self.kv_dtype!r}, expected one of {names}, or None.')
    if self.devices is not None:
      object.__setattr__(self, 'devices', tuple(self.devices))
      if not len(self.devices) == len(set(self.devices)) == self.tp or min(self.devices) < 0:
        raise ValueError(
          f'worker {self.name!r} names devices {self.devices}, expected {self.tp} distinct ones because tp={self.tp}, '
          'counted from 0.'
        )

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


def wire_dtype(source: KVDtypeName, target: KVDtypeName) -> KVDtypeName:
  """The dtype in which pages travel: the smaller one, converted on the other's side; of equal ones as they are."""
  return target if KV_DTYPE_BYTES[target] < KV_DTYPE_BYTES[source] else source


@dataclasses.dataclass(frozen=True, slots=True)
class TransferSpec:
  """The settings of transfers of KV pages.

  The granularity says in what parts a prompt travels. It matters for prompts that have a place to decode when they
  begin; others travel whole once they have one.

  Attributes:
    transport: 'device_put' from device to device of one process; 'host_staged' over the host's memory, for devices that
      cannot address each other; 'cross_process' over sockets, for workers in processes of their own, where it is the
      only one. 'auto' takes that between processes, and else the first where both workers have devices of one kind.
    granularity: 'request' sends a prompt when all of it is computed; 'chunk' sends each chunk while the next is
      computed; 'layers' sends each chunk in groups of layers, one while the next is computed (Patel et al. 2024), for
      which prefill workers run their steps in such groups. 'auto' sends chunk by chunk, and the last chunk of a prompt
      layer by layer if it is long enough: nothing hides the end of it, and short ones lose more by many small programs.
    layer_groups: Groups of layers to send a chunk in; None takes about four, as many as divide the layers evenly:
      groups of one length are one program.
    layers_from: With 'auto', tokens of a last chunk that is long enough; None asks the cost model.
    piece_bytes: Most bytes of an array that travels, if a unit of one page fits.
    staging_bytes: Most bytes on their way out of a worker, and most on their way into one, at any time. A
      transfer that does not fit waits for its turn. Bytes that are there give way to the next once their writing is
      dispatched.
    deadline_s: Seconds for a transfer to end once its tokens are computed; then it is given up, and `FaultSpec` says
      what follows.
    checksums: Compare what arrives with what was sent, page by page, before it is written: 64 bits for each page, so
      that random damage stays unseen with odds of 2^-64. Costs a read of the pages on either side.

  Raises:
    ValueError: if a size is not positive or a name is unknown.
  """

  transport: TransportName = 'auto'
  granularity: GranularityName = 'auto'
  layer_groups: int | None = None
  layers_from: int | None = None
  piece_bytes: int = 4 * 2**20
  staging_bytes: int = 256 * 2**20
  deadline_s: float = 60.0
  checksums: bool = False

  def __post_init__(self):
    if not self.deadline_s > 0:
      raise ValueError(f'deadline_s is {self.deadline_s}, expected more than 0 seconds; inf waits for ever.')
    for name, names in (('transport', TransportName), ('granularity', GranularityName)):
      if getattr(self, name) not in get_args(names):
        expected = ', '.join(map(repr, get_args(names)))
        raise ValueError(f'{name} is {getattr(self, name)!r}, expected one of {expected}.')
    for size in ('layer_groups', 'layers_from', 'piece_bytes', 'staging_bytes'):
      if getattr(self, size) is not None and getattr(self, size) < 1:
        raise ValueError(f'{size} is {getattr(self, size)}, expected at least 1.')

  def groups(self, num_layers: int) -> tuple[tuple[int, int], ...]:
    """The groups of layers as (first, one after the last), in order; some are a layer longer if they must be."""
    count = min(self.layer_groups or _even_groups(num_layers), num_layers)
    bounds = [num_layers * group // count for group in range(count + 1)]
    return tuple(itertools.pairwise(bounds))

  def step_groups(self, role: Role, num_layers: int) -> tuple[tuple[int, int], ...]:
    """The groups of layers that the steps of a role's workers run in, between which KV may leave by layers.

    There are none where steps run whole, as on all workers that decode. Nothing else says so: programs are compiled for
    these groups, orders name them, and what travels by layers travels in them.
    """
    return () if self.layered_from is None or role.decodes else self.groups(num_layers)

  @property
  def layered_from(self) -> int | None:
    """Tokens of a chunk from which it may travel layer by layer; None if none does."""
    match self.granularity:
      case 'layers':
        return 1
      case 'auto':
        return self.layers_from
    return None


def _even_groups(num_layers: int) -> int:
  """Two to eight groups of one length, the next to four; four if there are none."""
  return min((count for count in range(8, 1, -1) if num_layers % count == 0), key=lambda n: abs(n - 4), default=4)


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


def worker_pool(role: Role | str, count: int, **fields) -> tuple[WorkerSpec, ...]:
  """`count` equal workers named `prefill0`, `prefill1`, ... after their role."""
  return tuple(WorkerSpec(name=f'{Role(role).value}{i}', role=Role(role), **fields) for i in range(count))


def prefill_pool(count: int, **fields) -> tuple[WorkerSpec, ...]:
  """`count` prefill workers; keyword arguments are those of `WorkerSpec`."""
  return worker_pool(Role.PREFILL, count, **fields)


def decode_pool(count: int, **fields) -> tuple[WorkerSpec, ...]:
  """`count` decode workers; keyword arguments are those of `WorkerSpec`."""
  return worker_pool(Role.DECODE, count, **fields)


def colocated_pool(count: int, **fields) -> tuple[WorkerSpec, ...]:
  """`count` workers that do both; keyword arguments are those of `WorkerSpec`."""
  return worker_pool(Role.BOTH, count, **fields)


def ways(workers: Sequence[WorkerSpec]) -> list[tuple[WorkerSpec, WorkerSpec]]:
  """The pairs of workers between which KV may travel: from each that prefills to each other that decodes."""
  pairs = itertools.permutations(workers, 2)
  return [(source, target) for source, target in pairs if source.role.prefills and target.role.decodes]


def parse_split(split: str) -> tuple[int, int]:
  """Read a split such as `'2P1D'` into (prefill workers, decode workers).

  Raises:
    ValueError: if it is not of that form, or a side has no worker.
  """
  match = re.fullmatch(r'(\d+)[pP](\d+)[dD]', split.strip())
  if not match or int(match[1]) < 1 or int(match[2]) < 1:
    raise ValueError(f'split {split!r} is not of the form 2P1D with at least one worker on either side.')
  return int(match[1]), int(match[2])


def split_name(workers: Sequence[WorkerSpec]) -> str:
  """A cluster in the field's shorthand, such as '2P1D'; workers of both roles count as C (colocated)."""
  counts = [(role, sum(worker.role is role for worker in workers)) for role in Role]
  letters = {Role.PREFILL: 'P', Role.DECODE: 'D', Role.BOTH: 'C'}
  return ''.join(f'{count}{letters[role]}' for role, count in counts if count)


def devices_needed(workers: Sequence[WorkerSpec]) -> int:
  """The number of devices the workers take, shared ones counted once."""
  named = {device for worker in workers for device in worker.devices or ()}
  needed = sum(worker.tp for worker in workers if worker.devices is None)
  return max([len(named) + needed, *(device + 1 for device in named)])


def carve_devices(workers: Sequence[WorkerSpec], num_devices: int) -> dict[str, tuple[int, ...]]:
  """Give each worker its devices: those it names, else the next that nobody names.

  Raises:
    ValueError: if there are too few devices.
  """
  named = {device for worker in workers for device in worker.devices or ()}
  free = [device for device in range(num_devices) if device not in named]
  if devices_needed(workers) > num_devices:
    wants = ', '.join(f'{worker.name} {worker.devices or worker.tp}' for worker in workers)
    raise ValueError(
      f'the workers need {devices_needed(workers)} devices ({wants}), but there are {num_devices}; lower tp or the '
      'number of workers, let workers share devices (WorkerSpec.devices), or on CPU ask for more virtual devices.'
    )
  carved = {}
  for worker in workers:
    if worker.devices is None:
      carved[worker.name], free = tuple(free[: worker.tp]), free[worker.tp :]
    else:
      carved[worker.name] = worker.devices
  return carved
