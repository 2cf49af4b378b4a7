"""Makes an engine out of a config: devices, meshes, weights, pools, and every program compiled."""

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import psutil

from pdjax.config import ServingConfig
from pdjax.cost.granularity import choose_granularity
from pdjax.cost.memory import ACCELERATOR_SHARE, HOST_SHARE, size_pools
from pdjax.cost.roofline import Roofline
from pdjax.dtypes import settle_dtype
from pdjax.engine.calibration import measure_chip, measure_link
from pdjax.engine.engine import Engine
from pdjax.engine.host_memory import keep_freed_memory
from pdjax.engine.kept_programs import keep_programs
from pdjax.engine.place import Place, host_device
from pdjax.engine.runner import describe
from pdjax.engine.worker import Worker
from pdjax.kv.pages import choose_layout
from pdjax.kv.transfer import TRANSPORTS, Transport
from pdjax.model.checkpoint import Checkpoint
from pdjax.model.tokenizer import Tokenizer
from pdjax.model.weights import load_weights
from pdjax.serving.built import Built, WarmUp
from pdjax.sharding import make_mesh
from pdjax.types.cluster import DeviceError, by_platform, carve_devices, devices_needed
from pdjax.types.hardware import DeviceKind
from pdjax.types.model import ModelSpec
from pdjax.types.transfer import TransferSpec
from pdjax.types.worker import PlatformName, WorkerSpec

# JAX has a thread for each CPU device or each core, whichever are more. Where steps keep all of them busy, a copy
# waits until a worker has nothing more to do: half a second was seen, instead of a fraction of a millisecond.
SPARE_CPU_DEVICES = 2


def prepare_devices(platform: str | None, needed: int, *, alone: bool = True) -> list[jax.Device]:
  """The devices to carve meshes from; on CPU, as many virtual ones as are needed, and some to spare.

  Args:
    platform: Their kind; None is what JAX finds.
    needed: The number of them.
    alone: Whether JAX is to look for no others, where the platform is 'cpu'.

  Raises:
    DeviceError: if there are none of the platform, or JAX has already started with fewer CPU devices than are needed.
  """
  try:
    asked_for = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    jax.config.update('jax_num_cpu_devices', max(needed + SPARE_CPU_DEVICES, asked_for))
    if platform == 'cpu' and alone:
      jax.config.update('jax_platforms', 'cpu')
  except RuntimeError:
    pass  # JAX has started; what it has may be enough
  try:
    devices = jax.devices(platform) if platform else jax.devices()
  except RuntimeError as error:
    raise DeviceError(
      f"there are no devices of platform {platform!r} ({describe(error)}); set platform to 'cpu', 'gpu' or 'tpu', or "
      'to None for what JAX finds.'
    ) from error
  if devices[0].platform == 'cpu' and len(devices) < needed:
    raise DeviceError(
      f'the workers need {needed} CPU devices, but JAX has already started with {len(devices)}; make them before JAX '
      f"is first used, with jax.config.update('jax_num_cpu_devices', {needed}), or start the run in a fresh process."
    )
  return devices


def pick_devices(config: ServingConfig) -> tuple[list[jax.Device], dict[str, tuple[int, ...]]]:
  """The devices of all platforms in one list, and the indices in it that each worker takes.

  Raises:
    ValueError: if there are too few of a platform.
    DeviceError: if there are none of it, or JAX has already started with too few on CPU; workers that name it are in
      the message.
  """
  groups = by_platform(config.cluster)
  if list(groups) == [None]:
    found = prepare_devices(config.platform, devices_needed(config.workers))
    return found, carve_devices(config.workers, len(found))
  if 'cpu' in groups and len(groups) > 1:  # before JAX starts, as whoever asks for others starts it
    on_cpu = [*groups['cpu'], *groups.get(None, ())]  # those that name none may turn out to be on CPUs too
    prepare_devices('cpu', devices_needed(on_cpu), alone=False)
  if None in groups:
    default = cast(PlatformName, jax.devices()[0].platform)
    groups = by_platform([dataclasses.replace(one, platform=one.platform or default) for one in config.cluster])
  devices: list[jax.Device] = []
  carved: dict[str, tuple[int, ...]] = {}
  for platform, group in groups.items():
    names = ', '.join(worker.name for worker in group)
    try:
      found = prepare_devices(platform, devices_needed(group), alone=len(groups) == 1)
      meshes = carve_devices(group, len(found))
    except DeviceError as error:
      raise DeviceError(f'{names} on platform {platform!r} ({_whats_there()}): {error}') from error
    except ValueError as error:
      raise ValueError(f'{names} on platform {platform!r} ({_whats_there()}): {error}') from error
    carved |= {name: tuple(len(devices) + index for index in mesh) for name, mesh in meshes.items()}
    devices += found
  return devices, {worker.name: carved[worker.name] for worker in config.workers}


def _whats_there() -> str:
  """The devices that JAX finds, in words."""
  try:
    found = collections.Counter(device.platform for device in jax.devices())
  except RuntimeError as error:
    return f'JAX finds no devices: {describe(error)}'
  return f'JAX finds {", ".join(f"{count} of {platform}" for platform, count in found.items())}'


def device_memory_bytes(device: jax.Device) -> float:
  """Bytes that weights and pages may fill: on an accelerator, infinity if it does not say; on CPU, on all together."""
  if device.platform == 'cpu':
    return psutil.virtual_memory().available * HOST_SHARE
  stats = device.memory_stats() or {}
  return stats.get('bytes_limit', math.inf) * ACCELERATOR_SHARE


def check_host_memory(config: ServingConfig, memory_bytes: float) -> None:
  """See that the places of a config fit into the memory of this host.

  Args:
    config: The run.
    memory_bytes: Bytes that they may fill, if workers take of the same memory; else what is free counts.

  Raises:
    ValueError: if they do not; both figures are in the message.
  """
  wanted, free = sum(place.bytes for place in config.places), min(memory_bytes, psutil.virtual_memory().available)
  if wanted > free:
    named = ', '.join(f'{place.name} {place.bytes:,}' for place in config.places)
    raise ValueError(
      f'the places take {wanted:,} bytes ({named}), but {free:,.0f} of the memory of this host may be filled; lower '
      'bytes, or free memory.'
    )


def build_engine(
  config: ServingConfig,
  model: ModelSpec,
  checkpoint: Checkpoint,
  say: Callable[[str], None] = lambda line: None,
  tokenizer: Tokenizer | None = None,
) -> Built:
  """Load and compile everything a config needs.

  Args:
    config: The run.
    model: The model's shape, as it is to be served.
    checkpoint: Its weights.
    say: Told in a line what is being done.
    tokenizer: Turns tokens into text and finds stop strings; None leaves both out.

  Raises:
    ValueError: if the workers or their page layouts do not fit the devices, the model's heads or the memory, or the
      devices have no units for a dtype.
    DeviceError: if there are no devices of the platform, or JAX has already started with too few on CPU.
  """
  if reason := keep_programs(config.compilation_cache):
    say(
      f'compilation_cache {config.compilation_cache!r} takes no programs ({reason}); the next run compiles them again'
    )
  devices, carved = pick_devices(config)
  platforms = {name: devices[mesh[0]].platform for name, mesh in carved.items()}
  if 'cpu' in platforms.values() or config.places:
    keep_freed_memory()
  config = settle_dtype(config, {name: [DeviceKind.of(devices[i]) for i in mesh] for name, mesh in carved.items()})
  holders = config.holders(model)
  specs = _size_pools(config, model, devices, carved, holders)
  names = {name: [str(devices[index]) for index in mesh] for name, mesh in carved.items()}

  begin = time.perf_counter()
  meshes = {mesh: make_mesh(model, [devices[index] for index in mesh]) for mesh in set(carved.values())}
  for spec in specs:  # what cannot be is refused before anything is loaded
    for kind in model.cache:
      page_size = kind.entries_per_page(spec.page_size or config.page_size)
      choose_layout(kind, page_size, meshes[carved[spec.name]], spec.page_layout)
  copies = {(carved[spec.name], spec.weights) for spec in specs}
  wanted = {copy: meshes[copy[0]] for copy in copies}
  weights = load_weights(checkpoint, model, wanted, {copy: jnp.dtype(copy[1]) for copy in copies})
  loaded = time.perf_counter()
  say(f'weights loaded in {loaded - begin:.1f} s')
  used = sorted({index for mesh in carved.values() for index in mesh})
  first = next(spec for spec in specs if used[0] in carved[spec.name])
  chip = measure_chip(devices[used[0]], jnp.dtype(first.weights), first.precision)
  link = measure_link(devices[used[0]], devices[used[-1]])
  measured = time.perf_counter()
  cost = Roofline(chip, link, config.dtype_bytes, shared_host={*platforms.values()} == {'cpu'})
  transfer = choose_granularity(config.transfer, model, specs, cost)
  workers = []
  for spec in specs:
    mesh = carved[spec.name]
    workers.append(Worker(spec, model, meshes[mesh], weights[mesh, spec.weights], tokenizer, transfer))
    say(f'{spec.name}: {spec.phases}, tp={spec.tp} on {", ".join(names[spec.name])}, {spec.holds}')

  places = []
  for number, spec in enumerate(holders):
    own_cpus = [devices[index].id for name, mesh in carved.items() if platforms[name] == 'cpu' for index in mesh]
    device = host_device('cpu' if own_cpus else devices[0].platform, 1 + max(own_cpus, default=-1) + number)
    names[spec.name] = [str(device)]
    place = Place(spec, model, make_mesh(model, [device]))
    place.reset()
    place.make_ready()
    places.append(place)
    say(f'{spec.name}: holds pages, in memory of this host ({device}), {spec.num_pages} of {spec.page_size} tokens')

  program_s: dict[str, float] = {}
  transports: dict[tuple[str, str, str], Transport] = {}

  def compile_programs(what: str, compile: Callable[[], dict[str, float]]) -> None:
    started = time.perf_counter()
    seconds = compile()
    program_s.update({f'{what}/{name}': value for name, value in seconds.items()})
    say(f'{what}: {len(seconds)} programs compiled in {time.perf_counter() - started:.1f} s')

  for worker in workers:
    compile_programs(worker.spec.name, functools.partial(worker.compile, worker.spec.precision))
  by_name: dict[str, Place] = {one.spec.name: one for one in (*workers, *places)}
  for source_spec, target_spec in config.ways((*specs, *holders)):
    source, target = by_name[source_spec.name], by_name[target_spec.name]
    for kind in model.cache:
      ends = source.pools[kind.name], target.pools[kind.name]
      transport = TRANSPORTS[_transport_name(transfer, source, target)](*ends, transfer)
      transports[source_spec.name, target_spec.name, kind.name] = transport
      of_kind = '' if len(model.cache) == 1 else f' {kind.name}'
      compile_programs(f'{source_spec.name}→{target_spec.name}{of_kind}', transport.compile)
  compiled = time.perf_counter()
  say(f'warm-up took {compiled - begin:.1f} s, of which compiling {compiled - measured:.1f} s')
  warm_up = WarmUp(loaded - begin, compiled - measured, measured - loaded, program_s, chip, link)
  engine = Engine(workers, transports, places)
  return Built(engine, specs, transfer, config.definite_dtype, names, warm_up, holders)


def _size_pools(
  config: ServingConfig,
  model: ModelSpec,
  devices: Sequence[jax.Device],
  carved: Mapping[str, tuple[int, ...]],
  holders: Sequence[WorkerSpec],
) -> tuple[WorkerSpec, ...]:
  """The workers with all counts filled in, by the memory of their devices: CPU devices have one in common."""
  sized: dict[str, WorkerSpec] = {}
  groups: dict[str, list[WorkerSpec]] = {}
  for worker in config.cluster:
    groups.setdefault(devices[carved[worker.name][0]].platform, []).append(worker)
  if 'cpu' not in groups:
    check_host_memory(config, math.inf)
  for platform, group in groups.items():
    on_cpu = platform == 'cpu'
    memory_bytes = device_memory_bytes(devices[carved[group[0].name][0]])
    if on_cpu:
      check_host_memory(config, memory_bytes)
      memory_bytes -= sum(place.bytes for place in config.places)
    for spec in size_pools(
      group, carved, model, memory_bytes, one_memory=on_cpu, staging_bytes=config.staging_bytes,
      pairs=config.ways((*config.cluster, *holders)),
    ):  # fmt: skip
      sized[spec.name] = spec
  return tuple(sized[worker.name] for worker in config.workers)


def _transport_name(spec: TransferSpec, source: Place, target: Place) -> str:
  """Device to device, if it is left open and both places have devices of one kind."""
  if spec.transport != 'auto':
    return spec.transport
  ours, theirs = (place.mesh.devices.flat[0].platform for place in (source, target))
  return 'device_put' if ours == theirs else 'host_staged'
