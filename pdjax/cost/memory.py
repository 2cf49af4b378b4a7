"""How much fits: a device's memory against weights and pages, worked out before anything is loaded."""

import dataclasses
from collections.abc import Mapping, Sequence

from pdjax.types.cluster import WorkerSpec
from pdjax.types.model import ModelSpec, mesh_shape


def size_pools(
  workers: Sequence[WorkerSpec],
  devices: Mapping[str, tuple[int, ...]],
  model: ModelSpec,
  page_size: int,
  dtype_bytes: int,
  memory_bytes: float,
) -> tuple[WorkerSpec, ...]:
  """Replace `num_pages='auto'` by what fits, and make sure that all the rest does.

  Workers with the same devices share one copy of the weights. A pool is never larger than all its sequences could use
  at full length.

  Args:
    workers: The workers.
    devices: The devices of each by name.
    model: The model.
    page_size: Tokens per page.
    dtype_bytes: Bytes of a weight and of a cached element.
    memory_bytes: Bytes that weights and pages may fill on each device.

  Raises:
    ValueError: if weights and pages do not fit; both figures are in the message.
  """
  weights: dict[int, float] = {}
  pools: dict[int, float] = {}
  automatic: dict[int, int] = {}
  for mesh in set(devices.values()):
    for device in mesh:
      weights[device] = weights.get(device, 0) + model.weight_bytes(dtype_bytes) / len(mesh)
  page_bytes = {
    worker.name: page_size * model.kv_bytes_per_token(dtype_bytes) / mesh_shape(model, worker.tp)[0]
    for worker in workers
  }
  for worker in workers:
    for device in devices[worker.name]:
      if isinstance(worker.num_pages, int):
        pools[device] = pools.get(device, 0) + worker.num_pages * page_bytes[worker.name]
      else:
        automatic[device] = automatic.get(device, 0) + 1
  for device, used in weights.items():
    if used > memory_bytes:
      raise ValueError(
        f'{model.name} needs {_gb(used)} of weights on device {device}, but {_gb(memory_bytes)} may be filled there; '
        'raise tp, take a smaller dtype or model, or use a larger device.'
      )
    if used + pools.get(device, 0) > memory_bytes:
      raise ValueError(
        f'weights ({_gb(used)}) and pages ({_gb(pools[device])}) do not fit on device {device}, where '
        f"{_gb(memory_bytes)} may be filled; lower num_pages or set it to 'auto', or raise tp."
      )

  def sized(worker: WorkerSpec) -> WorkerSpec:
    if worker.num_pages != 'auto':
      return worker
    free = min((memory_bytes - weights[d] - pools.get(d, 0)) / automatic[d] for d in devices[worker.name])
    fits = int(free / page_bytes[worker.name])
    if fits < 1:
      raise ValueError(
        f'worker {worker.name!r} has {_gb(free)} left for pages beside the weights, but one page of {page_size} tokens '
        f'takes {_gb(page_bytes[worker.name])}; raise tp, lower page_size or use a larger device.'
      )
    useful = max(worker.max_sequences, worker.max_chunks) * -(-model.context_len // page_size)
    return dataclasses.replace(worker, num_pages=min(fits, useful))

  return tuple(sized(worker) for worker in workers)


def _gb(size: float) -> str:
  return f'{size / 1e9:.3g} GB'
