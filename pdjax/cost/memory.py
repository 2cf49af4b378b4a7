"""The pages that fit: a device's memory against weights and pages, worked out before anything is loaded."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

from pdjax.cost.cost_model import CostBase
from pdjax.types.cluster import ways
from pdjax.types.hardware import DTYPE_BYTES
from pdjax.types.model import ModelSpec
from pdjax.types.pools import PoolSpecs
from pdjax.types.worker import WorkerSpec

ACCELERATOR_SHARE = 0.9  # of an accelerator's memory that weights and pages may fill; the rest is for the steps
_SPARE_BYTES = 2**30  # that steps may take of the rest
HOST_SHARE = 0.5  # of a CPU's free memory, which all its virtual devices have in common


def size_pools(
  workers: Sequence[WorkerSpec],
  devices: Mapping[str, tuple[int, ...]],
  model: ModelSpec,
  memory_bytes: float,
  *,
  one_memory: bool = False,
  staging_bytes: int = 0,
  pairs: Sequence[tuple[WorkerSpec, WorkerSpec]] | None = None,
) -> tuple[WorkerSpec, ...]:
  """Replace `num_pages='auto'` by the most that fit, and check that the pools of a given size do.

  Workers with the same devices and weights of one dtype share one copy of them. A pool is never larger than all its
  sequences could use at full length.

  Args:
    workers: The workers, page size and the dtypes of weights and cache filled in.
    devices: The devices of each by name.
    model: The model.
    memory_bytes: Bytes that weights and pages may fill on each device, or on all together with `one_memory`; infinity
      if unknown.
    one_memory: All devices have one memory in common, as the virtual devices of a CPU do.
    staging_bytes: Bytes on their way out of a worker, and as many on their way into one; kept free where pages travel.
    pairs: Those between which pages travel, of all places; None is from each worker that prefills to each that decodes.

  Raises:
    ValueError: if weights and pages do not fit, or what steps take beside them; both figures are in the message.
  """

  def memory_of(device: int) -> int:
    return 0 if one_memory else device

  weights: dict[int, float] = {}
  given: dict[int, float] = {}
  automatic: dict[int, int] = {}
  for mesh, dtype in dict.fromkeys((devices[worker.name], worker.weights) for worker in workers):
    assert dtype is not None
    for device in mesh:
      memory = memory_of(device)
      weights[memory] = weights.get(memory, 0) + model.weight_bytes_per_device(DTYPE_BYTES[dtype], len(mesh))
  pools: dict[str, PoolSpecs] = {}
  page_bytes: dict[str, int] = {}
  for worker in workers:
    pools[worker.name] = PoolSpecs.of(model, worker)
    page_bytes[worker.name] = pools[worker.name].page_bytes
  sides = zip(*(ways(workers) if pairs is None else pairs), strict=True)
  directions = collections.Counter(name for side in sides for name in {worker.name for worker in side})
  staging: dict[int, float] = {}
  for worker in workers:
    for device in devices[worker.name]:
      memory = memory_of(device)
      staging[memory] = staging.get(memory, 0) + directions[worker.name] * staging_bytes / worker.tp
      if isinstance(worker.num_pages, int):
        given[memory] = given.get(memory, 0) + worker.num_pages * page_bytes[worker.name]
      else:
        automatic[memory] = automatic.get(memory, 0) + 1
  for memory, used in weights.items():
    where = 'in the memory of this host' if one_memory else f'on device {memory}'
    if used > memory_bytes:
      raise ValueError(
        f'{model.name} needs {_gb(used)} of weights, but {_gb(memory_bytes)} may be filled {where}; use fewer workers '
        'or more devices, a smaller dtype or model, or free memory.'
      )
    for worker in workers:
      if any(memory_of(device) == memory for device in devices[worker.name]):
        _check_steps(worker, model, memory_bytes - used, where)
    if used + staging[memory] + given.get(memory, 0) > memory_bytes:
      raise ValueError(
        f'weights ({_gb(used)}), pages ({_gb(given.get(memory, 0))}) and staging ({_gb(staging[memory])}) do not fit '
        f"{where}, where {_gb(memory_bytes)} may be filled; lower num_pages or set it to 'auto', lower "
        'TransferSpec.staging_bytes, or use more devices.'
      )

  def sized(worker: WorkerSpec) -> WorkerSpec:
    if worker.num_pages != 'auto':
      return worker
    if memory_bytes == float('inf'):
      raise ValueError(
        f'nothing says how much memory the devices have (neither they nor the chip of a cost model); give worker '
        f'{worker.name!r} a num_pages.'
      )
    memories = [memory_of(device) for device in devices[worker.name]]
    free = min((memory_bytes - weights[one] - staging[one] - given.get(one, 0)) / automatic[one] for one in memories)
    fits = int(free / page_bytes[worker.name])
    if fits < 1:
      raise ValueError(
        f'worker {worker.name!r} has {_gb(free)} left for pages beside weights and staging, but one page of '
        f'{worker.page_size} tokens takes {_gb(page_bytes[worker.name])}; raise tp, lower page_size or use a larger '
        'device.'
      )
    one = pools[worker.name].whole_pages(pools[worker.name].pages_for(model.context_len))
    useful = max(worker.max_sequences, worker.max_chunks) * one
    return dataclasses.replace(worker, num_pages=min(fits, useful))

  return tuple(sized(worker) for worker in workers)


def size_by_chip(
  workers: Sequence[WorkerSpec],
  devices: Mapping[str, tuple[int, ...]],
  model: ModelSpec,
  cost: CostBase,
  *,
  staging_bytes: int = 0,
  pairs: Sequence[tuple[WorkerSpec, WorkerSpec]],
) -> tuple[WorkerSpec, ...]:
  """As `size_pools`, where there are no devices: each worker by the memory of its own chip or of the cost model's.

  Virtual devices of one CPU have the memory of the cost model's chip in common, whatever chips workers name.
  """
  groups: dict[float, list[WorkerSpec]] = {}
  for worker in workers:
    chip = cost.chip if cost.shared_host else cost.chip_of(worker)
    groups.setdefault(math.inf if chip is None else chip.memory_bytes * ACCELERATOR_SHARE, []).append(worker)
  sized = {
    worker.name: worker
    for memory_bytes, group in groups.items()
    for worker in size_pools(
      group, devices, model, memory_bytes, one_memory=cost.shared_host, staging_bytes=staging_bytes, pairs=pairs
    )
  }
  return tuple(sized[worker.name] for worker in workers)


def step_bytes(worker: WorkerSpec, model: ModelSpec) -> dict[str, int]:
  """The least bytes on each device that the steps of a worker take beside weights and pages, by the field that says.

  A slot and a chunk have a row of a table of pages, of the history of their tokens (16 bits for each of the vocabulary)
  and of logits; a prompt token has one of what goes from layer to layer, and each fused step a token for each slot.
  """
  assert worker.page_size is not None and worker.weights is not None
  rows = 2 * model.vocab_size + 4 * -(-model.vocab_size // worker.tp)
  table = 4 * -(-model.context_len // worker.page_size)
  return {
    'max_sequences': worker.max_sequences * (rows + table),
    'max_chunks': worker.max_chunks * (rows + table),
    'max_step_tokens': worker.max_step_tokens * model.embed_dim * DTYPE_BYTES[worker.weights],
    'max_fused_steps': worker.max_fused_steps * worker.max_sequences * 4,
  }


def _check_steps(worker: WorkerSpec, model: ModelSpec, memory_bytes: float, where: str) -> None:
  for field, size in step_bytes(worker, model).items():
    if size > max(memory_bytes, _SPARE_BYTES):
      raise ValueError(
        f'worker {worker.name!r} has {field}={getattr(worker, field)}, which takes at least {size / 1e9:,.1f} GB with '
        f'a vocabulary of {model.vocab_size} and a context of {model.context_len}, but {memory_bytes / 1e9:,.1f} GB '
        f'are left for it {where}; lower {field}.'
      )


def _gb(size: float) -> str:
  return f'{size / 1e9:.3g} GB'
