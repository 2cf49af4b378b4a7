"""A deployment: a config's cluster, on devices or simulated, that serves one set of requests after another."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from pdjax.config import ServingConfig
from pdjax.cost import Roofline, as_cost, size_by_chip
from pdjax.cost.granularity import choose_granularity
from pdjax.cost.memory import ACCELERATOR_SHARE
from pdjax.metrics import EventLog, Report, RunLog, Timeline
from pdjax.opened_model import OpenedModel
from pdjax.reporting import make_report
from pdjax.serving import invariants
from pdjax.serving.built import Built
from pdjax.serving.events import Event, Turn
from pdjax.serving.loop import Arrivals, serve
from pdjax.serving.state import ClusterState
from pdjax.simulator import Simulator
from pdjax.types.checked import checks_arguments
from pdjax.types.cluster import DeviceError, carve_needed, decode_pool, prefill_pool
from pdjax.types.hardware import ChipSpec, DeviceKind
from pdjax.types.model import ModelSpec
from pdjax.types.request import Completion
from pdjax.types.worker import WorkerSpec

BackendName = Literal['engine', 'simulator']
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Deployment:
  """A cluster that is ready to serve, once and again.

      with contextlib.closing(deploy(config, opened)) as deployment:
        events = tuple(deployment.serve(opened.arrivals(config)))
        print(deployment.report(events))

  A copy with another config, of the same cluster, serves with the same backend: one of them at a time.

  Attributes:
    config: The run.
    opened: The model that is served.
    built: The backend, with the cluster as it was built.
  """

  config: ServingConfig
  opened: OpenedModel
  built: Built

  @property
  def is_simulated(self) -> bool:
    """Whether time is virtual, and tokens are placeholders."""
    return self.built.warm_up is None

  def serve(self, arrivals: Arrivals, log: EventLog | RunLog | None = None) -> Iterator[Event]:
    """Start the clock, and serve requests with nothing left of earlier ones.

    An earlier service must have ended, or be closed (`Generator.close`); nothing that it left under way is heard or
    written. The clock starts with this call, the first turn with the first event that is asked for.

    Args:
      arrivals: The requests.
      log: Has each event by the time that it is yielded.

    Returns:
      All that happens, in order; it raises as `pdjax.serving.serve` does.
    """
    self.built.backend.start_clock()
    policy, backend = self.config.policy, self.built.backend
    state = self.empty_state()
    events = serve(arrivals, policy, backend, state, waits=not self.is_simulated)
    if self.config.check_invariants:
      events = _checked(events, state)
    return events if log is None else _logged(events, log)

  def empty_state(self) -> ClusterState:
    """The state of the cluster before anything arrives."""
    config, built, cache = self.config, self.built, self.config.cache_of(self.opened.model)
    state = ClusterState(
      self.opened.model,
      built.workers,
      config.page_size,
      built.transfer,
      finds_stops=self.is_simulated or self.opened.tokenizer is not None,
      faults=config.faults,
      pages_ahead=config.pages_ahead,
      max_preemptions=config.max_preemptions,
      prefix_cache=cache and dataclasses.replace(cache, trusts_block_hashes=self.is_simulated),
      places=built.places,
      between=[(source.name, target.name) for source, target in config.ways((*built.workers, *built.places))],
      cost=config.cost,
    )
    for name, place in built.backend.places.items():
      state.books.places[name].incarnation = place.incarnation
    return state

  def report(
    self, events: Iterable[Event] | Timeline, completions: Sequence[Completion] = (), notes: Sequence[str] = ()
  ) -> Report:
    """The report of what was served here, with the texts of its completions and these notes among its own."""
    return make_report(events, completions, self.config, self.opened, self.built, notes)

  def close(self) -> None:
    """Wait for what is under way, and end what serves."""
    self.built.backend.close()


def _checked(events: Iterator[Event], state: ClusterState) -> Iterator[Event]:
  for event in events:
    if isinstance(event, Turn):  # the one before is over
      invariants.check(state.books)
    yield event
  invariants.check(state.books)


def _logged(events: Iterator[Event], log: EventLog | RunLog) -> Iterator[Event]:
  for event in events:
    log.append(event)
    yield event


# ---------------------------------------------------------------------------- building


@checks_arguments()
def deploy(
  config: ServingConfig, opened: OpenedModel, backend: BackendName = 'engine', say: Say = lambda line: None
) -> Deployment:
  """Build all that a config needs to serve a model: on devices, loaded and compiled, or in virtual time.

  Args:
    config: The run.
    opened: The answer of `open_model`.
    backend: Devices, or the simulator with the config's cost model.
    say: Told in a line what is being done.

  Raises:
    ValueError: if there are no weights, the engine does not compute the model, or the config does not fit the devices
      or their memory.
    DeviceError: if there are no devices of the platform, or JAX has already started with too few on CPU.
  """
  if backend == 'simulator':
    built = _build_simulator(config, opened.model)
    return Deployment(config, opened, built)
  opened.model.check_computed()
  if opened.checkpoint is None and config.checkpoint != 'random':
    raise ValueError("the engine needs weights: set checkpoint to a file, a folder, 'smollm2' or 'random'.")
  elif config.processes is not None:
    pinned = config if opened.source is None else dataclasses.replace(config, checkpoint=opened.source)
    built = _build_processes(pinned, opened.model, say)
  else:
    built = _build_engine(config, opened, say)
  return Deployment(config, opened, built)


def _build_engine(config: ServingConfig, opened: OpenedModel, say: Say) -> Built:
  """All workers in this process."""
  from pdjax.engine.build import build_engine  # JAX begins here
  from pdjax.model.checkpoint import RandomCheckpoint

  model = opened.model
  checkpoint = RandomCheckpoint(model) if opened.checkpoint is None else opened.checkpoint
  return build_engine(config, model, checkpoint, say, opened.tokenizer)


def _build_processes(config: ServingConfig, model: ModelSpec, say: Say) -> Built:
  """Each worker in a process of its own; this one holds no devices."""
  from pdjax.controller import RayProcesses, build_processes
  from pdjax.engine.ray_worker import RayWorker

  assert config.processes is not None
  with _sigterm_kept():
    processes = RayProcesses(config.processes, config.workers, config.platform, RayWorker, say, config.places)

  def close() -> None:
    with _sigterm_kept():
      processes.close()

  try:
    return build_processes(config, model, processes.peers, say, closed=close, when_lost=processes.when_lost)
  except BaseException:
    close()
    raise


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
  """Keep the handler of SIGTERM: Ray puts its own there as it begins, and none as it ends."""
  handler = signal.getsignal(signal.SIGTERM)
  try:
    yield
  finally:
    if callable(handler) and threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGTERM, handler)


def _build_simulator(config: ServingConfig, model: ModelSpec) -> Built:
  """No devices, and a virtual clock."""
  cost = as_cost(config.cost)
  carved = carve_needed(config.cluster)
  places = config.holders(model)
  workers = size_by_chip(
    config.cluster,
    carved,
    model,
    cost,
    staging_bytes=config.staging_bytes,
    pairs=config.ways((*config.cluster, *places)),
  )
  if isinstance(cost, Roofline):
    cost = dataclasses.replace(cost, dtype_bytes=config.dtype_bytes)
  transfer = choose_granularity(config.transfer, model, workers, cost)
  simulator = Simulator(model, (*workers, *places), cost)
  return Built(simulator, workers, transfer, config.definite_dtype, carved, warm_up=None, places=places)


# ---------------------------------------------------------------------------- configs of this machine


def choose_config(
  config: ServingConfig | None, checkpoint: str | None = None, seed: int | None = None
) -> ServingConfig:
  """The config, or else the default one for a checkpoint, with this seed if there is one.

  Raises:
    ValueError: if config and checkpoint are both given, or the seed is out of range.
  """
  if config is not None and checkpoint is not None:
    raise ValueError(
      f'a config and the checkpoint {checkpoint!r} are both given; set the checkpoint in the config '
      '(dataclasses.replace(config, checkpoint=...)) or leave the config out.'
    )
  config = default_config(checkpoint or 'smollm2') if config is None else config
  return config if seed is None else dataclasses.replace(config, seed=seed)


def default_config(checkpoint: str = 'smollm2') -> ServingConfig:
  """One prefill worker and one decode worker, in float32: a device for each, or the one device there is for both.

  On CPU two virtual devices are made, unless JAX has started with one. Each worker has pages for 16,384 tokens.
  """
  from pdjax.engine.build import prepare_devices

  try:
    devices = prepare_devices(None, 2)
  except DeviceError:
    devices = prepare_devices(None, 1)
  options = {'num_pages': 1024, 'devices': (0,) if len(devices) == 1 else None}
  return ServingConfig(checkpoint=checkpoint, workers=prefill_pool(1, **options) + decode_pool(1, **options))


def calibrated(config: ServingConfig) -> ServingConfig:
  """The config with a roofline measured on this machine's first device, and with the dtype that it takes for 'auto'.

  Workers on another platform get a chip of their own, measured there; prices and watts of chips stay.
  """
  import jax.numpy as jnp

  from pdjax.dtypes import settle_dtype
  from pdjax.engine.build import device_memory_bytes, pick_devices
  from pdjax.engine.calibration import measure_chip, measure_link

  devices, carved = pick_devices(config)
  config = settle_dtype(config, {name: [DeviceKind.of(devices[mesh[0]])] for name, mesh in carved.items()})
  chips = {}
  for device in devices:
    if device.platform not in chips:
      chip = measure_chip(device, jnp.dtype(config.dtype), config.precision)
      chips[device.platform] = dataclasses.replace(chip, memory_bytes=device_memory_bytes(device) / ACCELERATOR_SHARE)
  first, said = devices[0].platform, as_cost(config.cost).chip

  def measured(platform: str, like: ChipSpec | None) -> ChipSpec:
    chip = chips[platform]
    return chip if like is None else dataclasses.replace(chip, dollars_per_hour=like.dollars_per_hour, watts=like.watts)

  def with_chip(worker: WorkerSpec) -> WorkerSpec:
    platform = devices[carved[worker.name][0]].platform
    if worker.chip is None and platform == first:
      return worker
    return dataclasses.replace(worker, chip=measured(platform, worker.chip))

  other = next((one for one in devices if one.platform != first), devices[min(1, len(devices) - 1)])
  cost = Roofline(measured(first, said), measure_link(devices[0], other), shared_host=list(chips) == ['cpu'])
  return dataclasses.replace(config, workers=tuple(map(with_chip, config.workers)), cost=cost)
