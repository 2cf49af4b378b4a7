"""A cluster: its workers by role, the ways between them, and the devices that each takes."""

import itertools
import re
from collections.abc import Sequence
from typing import Annotated

from pdjax.types.checked import checks_arguments
from pdjax.types.fitting import Fits, Must, fit_of
from pdjax.types.worker import MAX_DEVICES, PlatformName, Role, WorkerSpec

Workers = Annotated[int, Must(lambda count: 0 <= count <= MAX_DEVICES, f'from 0 to {MAX_DEVICES} workers')]


class DeviceError(RuntimeError):
  """The devices that a run wants are not there."""


@checks_arguments()
def worker_pool(role: Annotated[Role | str, Fits(fit_of(Role))], count: Workers, **fields) -> tuple[WorkerSpec, ...]:
  """`count` equal workers named `prefill0`, `prefill1`, ... after their role."""
  return tuple(WorkerSpec(name=f'{Role(role).value}{i}', role=Role(role), **fields) for i in range(count))


@checks_arguments()
def prefill_pool(count: Workers, **fields) -> tuple[WorkerSpec, ...]:
  """`count` prefill workers; keyword arguments are those of `WorkerSpec`."""
  return worker_pool(Role.PREFILL, count, **fields)


@checks_arguments()
def decode_pool(count: Workers, **fields) -> tuple[WorkerSpec, ...]:
  """`count` decode workers; keyword arguments are those of `WorkerSpec`."""
  return worker_pool(Role.DECODE, count, **fields)


@checks_arguments()
def colocated_pool(count: Workers, **fields) -> tuple[WorkerSpec, ...]:
  """`count` workers that do both; keyword arguments are those of `WorkerSpec`."""
  return worker_pool(Role.BOTH, count, **fields)


def ways(
  places: Sequence[WorkerSpec], *, forward: bool = True, anywhere: bool = False
) -> list[tuple[WorkerSpec, WorkerSpec]]:
  """The pairs of places between which KV may ever travel.

  A place that only holds pages has a way to each worker and one from each. Workers count in every role that they may
  take.

  Args:
    places: The workers, and places that only hold pages.
    forward: Whether it may travel from each worker that prefills to each other that decodes.
    anywhere: Whether it may travel from each place to each other.
  """

  def is_way(source: WorkerSpec, target: WorkerSpec) -> bool:
    if (source.role is Role.HOLD) != (target.role is Role.HOLD):
      return True
    return anywhere or (forward and source.ever_prefills and target.ever_decodes)

  return [(source, target) for source, target in itertools.permutations(places, 2) if is_way(source, target)]


@checks_arguments()
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
  """A cluster in the field's shorthand, such as '2P1D', by the roles that its workers begin with.

  Workers of both roles count as C (colocated).
  """
  letters = {Role.PREFILL: 'P', Role.DECODE: 'D', Role.BOTH: 'C'}
  counts = [(role, sum(worker.role is role for worker in workers)) for role in letters]
  return ''.join(f'{count}{letters[role]}' for role, count in counts if count)


def devices_needed(workers: Sequence[WorkerSpec]) -> int:
  """The number of devices the workers take, shared ones counted once."""
  named = {device for worker in workers for device in worker.devices or ()}
  needed = sum(worker.tp for worker in workers if worker.devices is None)
  return max([len(named) + needed, *(device + 1 for device in named)])


def by_platform(workers: Sequence[WorkerSpec]) -> dict[PlatformName | None, list[WorkerSpec]]:
  """The workers on each platform; None has those that name none."""
  groups: dict[PlatformName | None, list[WorkerSpec]] = {}
  for worker in workers:
    groups.setdefault(worker.platform, []).append(worker)
  return groups


def carve_needed(workers: Sequence[WorkerSpec]) -> dict[str, tuple[int, ...]]:
  """Give each worker its devices where there are as many of each platform as are needed, numbered through them all."""
  carved: dict[str, tuple[int, ...]] = {}
  first = 0
  for group in by_platform(workers).values():
    needed = devices_needed(group)
    carved |= {name: tuple(first + index for index in mesh) for name, mesh in carve_devices(group, needed).items()}
    first += needed
  return {worker.name: carved[worker.name] for worker in workers}


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
