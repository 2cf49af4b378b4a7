"""Settles the dtype that a run computes in on its devices: 'auto' becomes one, and one that they lack is refused."""

import dataclasses
from collections.abc import Mapping, Sequence

from pdjax.config import ServingConfig
from pdjax.types.hardware import DeviceKind, DtypeName


def settle_dtype(config: ServingConfig, kinds: Mapping[str, Sequence[DeviceKind]]) -> ServingConfig:
  """The config with a definite dtype, in which all its workers can compute.

  Args:
    config: The run.
    kinds: The kinds of the devices of each worker that is there, by its name.

  Raises:
    ValueError: if dtype is 'auto' and workers' devices are fastest in different ones, or weights or cached keys and
      values would be bfloat16 on a GPU without units for it.
  """
  if config.dtype == 'auto':
    named = {worker.name for worker in config.workers if worker.weights is not None}
    workers = {worker.name for worker in config.workers}  # a place that only holds pages computes nothing
    left = {name: of_worker for name, of_worker in kinds.items() if name in workers - named}
    (first, *_) = config.workers  # whose weights the run counts as its own where every worker names some
    dtype = _fastest(left) if left or first.weights is None else first.weights
    config = dataclasses.replace(config, dtype=dtype)
  for worker in config.cluster:
    for kind in kinds.get(worker.name, ()):
      if kind.lacks_bfloat16 and 'bfloat16' in (worker.weights, worker.kv_dtype):
        what, remedy = 'dtype', "set dtype='float16', or dtype='auto' for what the devices are fastest in"
        if config.dtype != 'bfloat16':
          what = 'weights' if worker.weights == 'bfloat16' else 'kv_dtype'
          remedy = f"set {what}='float16', or leave it out"
        raise ValueError(
          f"{what} is 'bfloat16', but worker {worker.name!r} runs on {kind}, which has no units for it, as GPUs have "
          f'from 8.0 on; {remedy}.'
        )
  return config


def _fastest(kinds: Mapping[str, Sequence[DeviceKind]]) -> DtypeName:
  """The dtype that all devices are fastest in."""
  found: dict[DtypeName, str] = {}
  for worker, of_worker in kinds.items():
    for kind in of_worker:
      dtype = kind.fastest_dtype
      found.setdefault(dtype, f'worker {worker!r} runs on {kind}, which is fastest in {dtype}')
  if len(found) > 1:
    raise ValueError(
      f"dtype is 'auto', but {', and '.join(found.values())}; set dtype='float16' or dtype='float32', or give workers "
      'weights of their own (WorkerSpec.weights).'
    )
  return next(iter(found))
