"""The systems to compare: disaggregated splits and equal colocated divisions, with several sizes of a step."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pdjax.config import ServingConfig
from pdjax.policies import Colocated, Disaggregated, as_policy
from pdjax.types.checked import checks_arguments
from pdjax.types.cluster import carve_needed, colocated_pool, decode_pool, parse_split, prefill_pool
from pdjax.types.fitting import Must
from pdjax.types.model import ModelSpec, mesh_shape
from pdjax.types.pools import PoolSpecs
from pdjax.types.worker import Role, WorkerSpec
from pdjax.workload import Workload

_PARTS = (16, 8, 4, 2, 1)  # of the largest step, to try
_RATE = Must(
  lambda rate: 0 < rate < math.inf, 'a positive number of requests per second, such as those of --rates=1,2,4'
)


@dataclasses.dataclass(frozen=True)
class System:
  """One way to use the devices.

  Attributes:
    division: The division of them, such as '2P1D' or '3C tp4'.
    pass_tokens: Most tokens of one step, which is what was tried out; None where the policy has no such field.
    config: The run.
    colocated: Whether it is one of the baseline's.
    devices: The number of devices it takes.
  """

  division: str
  pass_tokens: int | None
  config: ServingConfig = dataclasses.field(repr=False)
  colocated: bool
  devices: int

  @property
  def name(self) -> str:
    """Its name in tables."""
    return self.division if self.pass_tokens is None else f'{self.division}, {self.pass_tokens} tokens'


@checks_arguments()
def with_split(config: ServingConfig, split: str) -> ServingConfig:
  """The config with another number of workers of either role, such as '2P1D'.

  Every prefill worker is like the config's first that prefills, every decode worker like its first that decodes, so the
  split takes as many devices as their meshes add up to. Of workers with devices of their own choosing only those that
  all share the same ones can be multiplied.

  Raises:
    ValueError: if the split is malformed, or the workers name different devices.
  """
  num_prefill, num_decode = parse_split(split)
  places = {worker.devices for worker in config.workers}
  if len(places) > 1:
    raise ValueError(
      f'split {split!r} cannot be made of workers that name different devices; leave `devices` out of the workers.'
    )
  pools = []
  for make, count, has in ((prefill_pool, num_prefill, 'prefills'), (decode_pool, num_decode, 'decodes')):
    like = next(worker for worker in config.workers if getattr(worker.role, has))
    pools.append(make(count, **_sizes(like)))
  policy = Disaggregated() if isinstance(config.policy, Colocated) else config.policy
  return dataclasses.replace(config, workers=pools[0] + pools[1], policy=policy)


@checks_arguments()
def at_rate(workload: Workload, rate: Annotated[float, _RATE]) -> Workload:
  """The same requests at another rate.

  Raises:
    ValueError: if the rate is not positive, or the workload has none.
  """
  plain: Any = workload
  if not dataclasses.is_dataclass(plain) or not any(one.name == 'requests_per_s' for one in dataclasses.fields(plain)):
    raise ValueError(
      f'the requests of a {type(workload).__name__} workload come at times of their own, so no rate can be set; leave '
      'the rates out, or use Poisson, Bursty or Constant arrivals, or a Mix.'
    )
  again: Any = dataclasses.replace(plain, requests_per_s=float(rate))  # type: ignore[type-var]
  return again


def disaggregated_systems(config: ServingConfig, budgets: Sequence[int] | None = None) -> list[System]:
  """A disaggregated config with each size of a prefill step, `max_prefill_tokens` of its policy.

  A policy without that field stays as it is.

  Args:
    config: The run.
    budgets: Tokens of one step to try; see `colocated_systems`.

  Raises:
    ValueError: if a budget is not positive.
  """
  devices = len(_devices(config))
  policy: Any = config.policy
  if _own_size(config) is None:
    return [System(config.split, None, config, False, devices)]
  systems = []
  for size in _budgets([config], budgets):
    here = dataclasses.replace(config, policy=dataclasses.replace(policy, max_prefill_tokens=size))
    systems.append(System(config.split, size, here, False, devices))
  return systems


def colocated_systems(
  configs: Sequence[ServingConfig], model: ModelSpec, budgets: Sequence[int] | None = None
) -> tuple[list[System], dict[str, str]]:
  """The colocated baseline on the devices of some runs: every equal division of them, with each chunk budget.

  A division has `n / tp` workers of `tp` devices for every `tp` that divides the `n` devices and is legal for the
  model. The KV memory of the richest run is divided among them ('auto' stays 'auto'). Each takes steps as large as
  any worker of the runs does, and at least its share of the most decode slots, so that the baseline lacks nothing.
  Where the weights of the runs' workers have several dtypes, it has each of them in turn. Unlike chips or platforms
  cannot be divided equally: then each worker of the first run does both, where it is.

  Args:
    configs: Disaggregated runs on equally many devices, of one workload.
    model: The model as it is served.
    budgets: Tokens of one step to try; None tries the largest step, a half, a quarter, an eighth and a sixteenth of
      it, and what the policies of the runs have for `max_prefill_tokens`.

  Returns:
    The systems, and the reason for each division that cannot be.

  Raises:
    ValueError: if a budget is not positive.
  """
  config = configs[0]
  used = sorted(_devices(config))
  workers = [worker for one in configs for worker in one.workers]
  prefills = [worker for worker in workers if worker.role.prefills]
  decodes = [worker for worker in workers if worker.role.decodes]
  slots = max(sum(worker.max_sequences for worker in one.workers if worker.role.decodes) for one in configs)
  fused = min(worker.max_fused_steps for worker in decodes)
  decode_steps = min(as_policy(config.policy).decode_steps, fused)
  sizes = _budgets(configs, budgets)
  like = decodes[0]  # whose pages the baseline has
  dtypes = list(dict.fromkeys(worker.weights for worker in (like, *workers)))  # each of which it has in turn
  systems: list[System] = []
  missing: dict[str, str] = {}
  if len({(worker.chip, worker.platform) for one in configs for worker in one.cluster}) > 1:
    both = tuple(
      dataclasses.replace(
        worker, role=Role.BOTH, may_become=(), max_step_tokens=_largest_step(configs), max_fused_steps=fused,
        max_sequences=max(worker.max_sequences, -(-slots // len(config.workers))),
        max_chunks=max(one.max_chunks for one in prefills),
      )
      for worker in config.workers
    )  # fmt: skip
    for size in sizes:
      policy = Colocated(token_budget=size, decode_steps=decode_steps, **_cache_use(config))
      here = dataclasses.replace(config, workers=both, policy=policy)
      systems.append(System(f'{len(both)}C as they are', size, here, True, len(used)))
    return systems, missing
  for count in range(1, len(used) + 1):
    if len(used) % count:
      continue
    tp = len(used) // count
    division = f'{count}C tp{tp}'
    try:
      mesh_shape(model, tp)
      num_pages = _equal_pages(configs, model, count, tp, like)
    except ValueError as error:
      missing[division] = str(error)
      continue
    pool = colocated_pool(
      count, tp=tp, num_pages=num_pages, page_size=like.page_size, kv_dtype=like.kv_dtype, chip=like.chip,
      platform=like.platform,
      max_sequences=max(-(-slots // count), *(worker.max_sequences for worker in decodes)),
      max_step_tokens=_largest_step(configs), max_chunks=max(worker.max_chunks for worker in prefills),
      max_fused_steps=fused,
    )  # fmt: skip
    if any(worker.devices is not None for worker in workers):
      pool = tuple(
        dataclasses.replace(worker, devices=tuple(used[i * tp : (i + 1) * tp])) for i, worker in enumerate(pool)
      )
    for dtype, size in itertools.product(dtypes, sizes):
      policy = Colocated(token_budget=size, decode_steps=decode_steps, **_cache_use(config))
      of_dtype = tuple(dataclasses.replace(worker, weights=dtype) for worker in pool)
      here = dataclasses.replace(config, workers=of_dtype, policy=policy)
      name = division if len(dtypes) == 1 else f'{division} {dtype or config.definite_dtype}'
      systems.append(System(name, size, here, True, len(used)))
  return systems, missing


def _cache_use(config: ServingConfig) -> dict[str, Any]:
  """The fields by which a policy uses what is cached, for a baseline that uses it alike."""
  ours, found = config.policy, dict[str, Any]()
  if (placement := getattr(ours, 'place_prefill', None)) is not None:
    found['placement'] = placement
  if (least := getattr(ours, 'min_fetch', None)) is not None:
    found['min_fetch'] = least
  if (place := getattr(ours, 'returns_to', None)) in {one.name for one in config.places}:
    found['returns_to'] = place
  return found


def baselines(
  ours: Sequence[System], model: ModelSpec, budgets: Sequence[int] | None
) -> tuple[list[System], dict[str, str]]:
  """The baseline for every number of devices that a disaggregated system takes."""
  systems: list[System] = []
  missing: dict[str, str] = {}
  for devices in dict.fromkeys(system.devices for system in ours):
    found, lacking = colocated_systems([one.config for one in ours if one.devices == devices], model, budgets)
    systems += found
    missing |= lacking
  return systems, missing


def by_cluster(systems: Iterable[System]) -> list[list[System]]:
  """Systems whose workers are the same together: they differ in the policy alone and need no other programs."""
  clusters: dict[tuple[WorkerSpec, ...], list[System]] = {}
  for system in systems:
    clusters.setdefault(system.config.workers, []).append(system)
  return list(clusters.values())


def _devices(config: ServingConfig) -> set[int]:
  """The devices that the workers take, by index."""
  carved = carve_needed(config.cluster)
  return {device for mesh in carved.values() for device in mesh}


def _sizes(worker: WorkerSpec) -> dict[str, Any]:
  return {field.name: getattr(worker, field.name) for field in dataclasses.fields(worker) if field.name not in _WHO}


_WHO = ('name', 'role')


def _largest_step(configs: Sequence[ServingConfig]) -> int:
  return max(worker.max_step_tokens for config in configs for worker in config.workers if worker.role.prefills)


def _own_size(config: ServingConfig) -> int | None:
  """Tokens of a prefill step that the policy asks for, None if it has no `max_prefill_tokens`."""
  policy: Any = config.policy
  if not dataclasses.is_dataclass(policy):
    return None
  return next(
    (getattr(policy, one.name) for one in dataclasses.fields(policy) if one.name == 'max_prefill_tokens'), None
  )


def _budgets(configs: Sequence[ServingConfig], budgets: Sequence[int] | None) -> list[int]:
  """Tokens of one step to try, for either side alike."""
  if budgets is None:
    largest = _largest_step(configs)
    own = {size for size in map(_own_size, configs) if size is not None and size < largest}
    return sorted(own | {max(largest // part, 1) for part in _PARTS})
  for budget in budgets:
    if budget < 1:
      raise ValueError(f'{budget} tokens of one step are not positive; give budgets of at least 1.')
  return sorted(set(budgets))


def _equal_pages(
  configs: Sequence[ServingConfig], model: ModelSpec, count: int, tp: int, like: WorkerSpec
) -> int | Literal['auto']:
  """Pages of each of `count` workers, so that together they have the bytes of the richest run's pools.

  They have the page size and the dtype of `like`, a worker of the first run.
  """
  if any(worker.num_pages == 'auto' for config in configs for worker in config.workers):
    return 'auto'

  def page_bytes(worker: WorkerSpec) -> int:  # on all its devices
    return PoolSpecs.of(model, worker).page_bytes * worker.tp

  whole = max(sum(int(worker.num_pages) * page_bytes(worker) for worker in config.cluster) for config in configs)
  (page,) = (page_bytes(dataclasses.replace(one, tp=tp)) for one in configs[0].cluster if one.name == like.name)
  each = int(whole / (count * page))
  if each < 1:
    raise ValueError(f'the pages of the config leave none for each of {count} workers.')
  return each
