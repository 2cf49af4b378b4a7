"""Makes an engine out of a config: devices, meshes, weights, pools, and every program compiled."""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pdjax.config import ServingConfig
from pdjax.cost.memory import size_pools
from pdjax.engine.calibration import measure_chip, measure_link
from pdjax.engine.engine import Engine
from pdjax.engine.worker import LimitOf, Worker
from pdjax.kv.transfer import DevicePut, Transport
from pdjax.model.checkpoint import Checkpoint
from pdjax.model.weights import load_weights
from pdjax.sharding import make_mesh
from pdjax.types.cluster import WorkerSpec, carve_devices, devices_needed
from pdjax.types.hardware import ChipSpec, LinkSpec
from pdjax.types.model import ModelSpec, mesh_shape

ACCELERATOR_SHARE = 0.9  # of an accelerator's memory that weights and pages may fill; the rest is for the passes
HOST_SHARE = 0.5  # of a CPU's free memory


@dataclasses.dataclass(frozen=True)
class WarmUp:
  """What was done before the clock ran.

  Attributes:
    load_s: Seconds to load the weights.
    compile_s: Seconds until every program was compiled.
    program_s: Seconds of each program; they compile side by side.
    chip: What the first device was measured to do.
    link: What lies between the first two devices.
  """

  load_s: float
  compile_s: float
  program_s: dict[str, float]
  chip: ChipSpec
  link: LinkSpec


def prepare_devices(platform: str | None, needed: int) -> list[jax.Device]:
  """The devices to carve meshes from; on CPU, as many virtual ones as are needed.

  Raises:
    RuntimeError: if JAX has already started with fewer CPU devices than are needed.
  """
  try:
    asked_for = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    jax.config.update('jax_num_cpu_devices', max(needed, asked_for))
    if platform == 'cpu':
      jax.config.update('jax_platforms', 'cpu')
  except RuntimeError:
    pass  # JAX has started; what it has may be enough
  devices = jax.devices(platform) if platform else jax.devices()
  if devices[0].platform == 'cpu' and len(devices) < needed:
    raise RuntimeError(
      f'the workers need {needed} CPU devices, but JAX has already started with {len(devices)}; make them before JAX '
      f"is first used, with jax.config.update('jax_num_cpu_devices', {needed}), or start the run in a fresh process."
    )
  return devices


def device_memory_bytes(device: jax.Device, devices_used: int) -> float:
  """Bytes that weights and pages may fill on one device; CPU devices divide the host's free memory."""
  stats = None if device.platform == 'cpu' else device.memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit'] * ACCELERATOR_SHARE
  import psutil  # only where a device does not say

  return psutil.virtual_memory().available * HOST_SHARE / devices_used


def build_engine(
  config: ServingConfig,
  model: ModelSpec,
  checkpoint: Checkpoint,
  limit_of: LimitOf,
  say: Callable[[str], None] = lambda line: None,
) -> tuple[Engine, tuple[WorkerSpec, ...], WarmUp]:
  """Load and compile everything a config needs.

  Args:
    config: The run.
    model: The model's shape, as it is to be served.
    checkpoint: Its weights.
    limit_of: How many tokens a request generates at most.
    say: Told in a line what is being done.

  Returns:
    The engine, its workers with `num_pages` filled in, and what it took.

  Raises:
    ValueError: if the workers do not fit the devices, the model's heads or the memory.
    RuntimeError: if JAX has already started with too few CPU devices.
  """
  for spec in config.workers:
    mesh_shape(model, spec.tp)
  if config.compilation_cache:
    jax.config.update('jax_compilation_cache_dir', config.compilation_cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  devices = prepare_devices(config.platform, devices_needed(config.workers))
  carved = carve_devices(config.workers, len(devices))
  used = {device for mesh in carved.values() for device in mesh}
  memory = device_memory_bytes(devices[0], len(used))
  specs = size_pools(config.workers, carved, model, config.page_size, config.dtype_bytes, memory)

  begin = time.perf_counter()
  dtype = jnp.dtype(config.dtype)
  precision = 'highest' if config.dtype == 'float32' else 'default'
  meshes = {key: make_mesh(model, [devices[index] for index in key]) for key in set(carved.values())}
  weights = load_weights(checkpoint, model, meshes, dtype)
  workers = []
  for spec in specs:
    key = carved[spec.name]
    workers.append(Worker(spec, model, meshes[key], weights[key], config.page_size, dtype, limit_of))
    where = ', '.join(str(devices[index]) for index in key)
    say(f'{spec.name}: {spec.role.value}, tp={spec.tp} on {where}, {spec.num_pages} pages of {config.page_size} tokens')
  load_s = time.perf_counter() - begin
  say(f'weights loaded in {load_s:.1f} s')

  begin = time.perf_counter()
  program_s: dict[str, float] = {}
  transports: dict[tuple[str, str], Transport] = {}
  for worker in workers:
    seconds = worker.compile(precision)
    program_s |= seconds
    say(f'{worker.spec.name}: {len(seconds)} programs compiled, {sum(seconds.values()):.1f} s')
  for source in workers:
    for target in workers:
      if source is not target and source.spec.role.prefills and target.spec.role.decodes and not _colocated(specs):
        way = f'{source.spec.name}→{target.spec.name}'
        transport = DevicePut(source, target, config.transfer)
        seconds = transport.compile()
        transports[source.spec.name, target.spec.name] = transport
        program_s |= {f'{way}/{name}': value for name, value in seconds.items()}
        say(f'{way}: {len(seconds)} batch sizes compiled, {sum(seconds.values()):.1f} s')
  chip = measure_chip(devices[carved[specs[0].name][0]], dtype, precision)
  link = measure_link(devices[min(used)], devices[max(used)])
  compile_s = time.perf_counter() - begin
  say(f'warm-up took {load_s + compile_s:.1f} s, of which compiling {compile_s:.1f} s')
  return Engine(workers, transports), specs, WarmUp(load_s, compile_s, program_s, chip, link)


def _colocated(workers: tuple[WorkerSpec, ...]) -> bool:
  """Whether nothing is ever sent, because every worker does both."""
  return all(worker.role.prefills and worker.role.decodes for worker in workers)
