"""The process of one worker: the worker, its part of the engine, and its ends of the ways to others."""

import dataclasses
import functools
import importlib.metadata
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pdjax.engine.build import device_memory_bytes, prepare_devices
from pdjax.engine.calibration import measure_chip
from pdjax.engine.fingerprint import fingerprint
from pdjax.engine.kept_programs import keep_programs, keep_quick_programs, kept_programs, link_programs, why_not_kept
from pdjax.engine.place import Place
from pdjax.engine.runner import describe
from pdjax.engine.worker import Worker
from pdjax.engine.worker_engine import WorkerEngine
from pdjax.host import check_own, node_name
from pdjax.kv.pool import Pool
from pdjax.kv.transfer.cross_process import LOOPBACK, Half, Receiver, RemotePool, Sender, Server, describe_pool
from pdjax.model.checkpoint import Checkpoint, RandomCheckpoint, open_checkpoint
from pdjax.model.weights import load_weights
from pdjax.program_folder import ProgramFolder, remove_left_over
from pdjax.serving.peers import (
  Assignment,
  Loaded,
  Message,
  News,
  PeerLost,
  Pull,
  Settle,
  StartClock,
  Submit,
)
from pdjax.sharding import make_mesh
from pdjax.types.cluster import DeviceError
from pdjax.types.handshake import HandshakeError, Hello, Machine, WayPlan
from pdjax.types.hardware import ChipSpec, DeviceKind
from pdjax.types.worker import Role

H = TypeVar('H', bound=Half)

_VERSIONED = ('pdjax', 'jax', 'jaxlib')  # what must be alike where KV is exchanged


class WorkerProcess:
  """Serves one controller, whose calls may come from several threads; `take` is called by one at a time.

  Args:
    devices: The worker's devices; None makes them, as `prepare_devices` does.
    node_host: This host's address in its network.
  """

  def __init__(self, devices: Sequence[jax.Device] | None = None, node_host: str = LOOPBACK):
    self._devices = list(devices or ())
    self._node_host = node_host
    self._news: list[News] = []
    self._changed = threading.Condition()
    self._error: BaseException | None = None
    self._closed = False
    self._serving = False
    self._programs: ProgramFolder | None = None

  # -------------------------------------------------------------------------- beginning

  def machine(self, platform: str | None, num_devices: int, host: str) -> Machine:
    """Make the devices ready, and offer at that address what others pull; a description of this process.

    Raises:
      DeviceError: if the address is not this host's, there are not so many devices of the platform, or they have no
        transfer server.
    """
    host = self._node_host if host == 'node' else host
    check_own(host)
    if not self._devices:
      found = prepare_devices(platform, num_devices)
      if len(found) < num_devices:
        raise DeviceError(f'the worker needs {num_devices} devices, but its process has {len(found)}; lower tp.')
      self._devices = list(found[:num_devices])
    names = tuple(map(str, self._devices))
    first = self._devices[0]
    self._server = Server(first, host)
    memory = device_memory_bytes(first)
    kinds = tuple(map(DeviceKind.of, self._devices))
    self._machine = Machine(node_name(), os.getpid(), kinds, names, memory, self._server.address)
    return self._machine

  def why_not_kept(self, folder: str) -> str | None:
    """The reason why programs cannot be written to a folder here; None if they can."""
    return why_not_kept(folder)

  def share_programs(self, folder: str | None, readable: str | None = None) -> str | None:
    """The temporary folder where this process keeps compiled programs if the config names none that takes them.

    Args:
      folder: One that another process of the run made on this host; None makes one.
      readable: A folder that may have programs but takes none; they are found in the temporary one.

    Returns:
      Its path; None if JAX was told by others where to keep them.

    Raises:
      OSError: if there can be no such folder.
    """
    if kept_programs() is not None:
      keep_quick_programs()
      return None
    self._programs = ProgramFolder.share(folder)
    if readable is not None and self._programs.path != folder:
      link_programs(readable, self._programs.path)
    return self._programs.path

  def load(self, assignment: Assignment) -> Loaded:
    """Load the weights and compile every program, or make the pages of a place that only holds some.

    Raises:
      HandshakeError: if the checkpoint here is of another model.
    """
    self._assignment = assignment
    spec, model = assignment.spec, assignment.model
    keep_programs(assignment.compilation_cache)
    remove_left_over()
    begin = time.perf_counter()
    mesh, summed = make_mesh(model, self._devices), ''
    place: Worker | Place
    if spec.role is Role.HOLD:
      place = Place(spec, model, mesh)
      place.reset()
      place.make_ready()
    else:
      checkpoint = self._open_checkpoint(assignment)
      weights = load_weights(checkpoint, model, {None: mesh}, jnp.dtype(spec.weights))[None]
      summed = fingerprint(weights)
      place = Worker(spec, model, mesh, weights, checkpoint.tokenizer(), assignment.transfer)
    place.incarnation = assignment.incarnation
    loaded = time.perf_counter()
    program_s = self.compile_worker(place) if isinstance(place, Worker) else {}
    compile_s = time.perf_counter() - loaded
    self.engine = WorkerEngine(place, assignment.transfer.staging_bytes)
    self._thread = threading.Thread(target=self._run, name='pdjax-worker', daemon=True)
    self._thread.start()
    versions = tuple((name, _version(name)) for name in _VERSIONED)
    hello = Hello(
      spec.name, place.incarnation, self._machine, versions, model, summed, spec.weights or '',
      tuple(describe_pool(pool.kind, pool) for pool in place.pools.values()),
    )  # fmt: skip
    return Loaded(hello, loaded - begin, compile_s, program_s)

  def compile_worker(self, worker: Worker) -> dict[str, float]:
    """Compile every program of a worker; seconds by program."""
    return worker.compile(worker.spec.precision)

  def compile_half(self, half: Half) -> dict[str, float]:
    """Compile what one end of a way needs; seconds by program."""
    return half.compile_programs()

  def _open_checkpoint(self, assignment: Assignment) -> Checkpoint:
    model = assignment.model
    if assignment.checkpoint == 'random':
      return RandomCheckpoint(model)
    checkpoint = open_checkpoint(assignment.checkpoint)
    found = dataclasses.replace(checkpoint.spec, name=model.name, context_len=model.context_len)
    if found != model:
      raise HandshakeError(
        f'checkpoint {assignment.checkpoint!r} at worker {assignment.spec.name!r} holds {found}, but the controller '
        f'serves {model}; give every host the same checkpoint.'
      )
    return checkpoint

  def send_to(self, other: Hello) -> tuple[tuple[WayPlan, ...], dict[str, float]]:
    """Be ready to send KV to another worker; how each cache kind is cut, and the seconds of each program.

    Raises:
      PeerLost: if nothing is loaded here, as when the process that was meant is lost and this is the next.
    """

    def sender(pool: Pool, remote: RemotePool) -> Sender:
      return Sender(pool, remote, self._assignment.transfer, self._server)

    return self._be_ready(other, self._loaded_engine().senders, sender)

  def receive_from(self, other: Hello) -> tuple[tuple[WayPlan, ...], dict[str, float]]:
    """Be ready to pull KV from another worker, or its new incarnation; as `send_to`.

    Raises:
      PeerLost: as `send_to`.
    """

    def receiver(pool: Pool, remote: RemotePool) -> Receiver:
      return Receiver(remote, pool, self._assignment.transfer, self._server, other.machine.address)

    receivers = self._loaded_engine().receivers
    ready = self._be_ready(other, receivers, receiver)
    for shape in other.pools:
      receivers[other.worker, shape.kind.name].address = other.machine.address
    return ready

  def _loaded_engine(self) -> WorkerEngine:
    if not hasattr(self, 'engine'):
      raise PeerLost(f'process {os.getpid()} has not loaded a worker yet')
    return self.engine

  def _be_ready(
    self, other: Hello, halves: dict[tuple[str, str], H], make: Callable[[Pool, RemotePool], H]
  ) -> tuple[tuple[WayPlan, ...], dict[str, float]]:
    """Have half a way to or from another worker for each cache kind, made where there is none; as `send_to`."""
    plans: list[WayPlan] = []
    seconds: dict[str, float] = {}
    for shape in other.pools:
      kind = shape.kind.name
      if (other.worker, kind) not in halves:
        half = make(self.engine.worker.pools[kind], RemotePool.of(shape))
        seconds |= self._prepare(half, halves, other.worker, kind)
      plans.append(halves[other.worker, kind].plan(kind))
    return tuple(plans), seconds

  def _prepare(self, half: Half, halves: dict, name: str, kind: str) -> dict[str, float]:
    """Compile half a way of a cache kind; seconds by program.

    Its programs run once between orders, for they replace the worker's pages; not where the worker serves already, for
    pages that were empty may be in use.
    """
    seconds = self.compile_half(half)
    if not self._serving:
      self._between_orders(half.rehearse_all)
    halves[name, kind] = half
    return seconds if len(self.engine.worker.pools) == 1 else {f'{kind} {one}': took for one, took in seconds.items()}

  def _between_orders(self, do) -> None:
    done = threading.Event()
    errors: list[BaseException] = []

    def call() -> None:
      try:
        do()
      except BaseException as error:
        errors.append(error)
      done.set()

    self.engine.call(call)
    done.wait()
    if errors:
      raise errors[0]

  # -------------------------------------------------------------------------- measuring

  def pid(self) -> int:
    """This process."""
    return os.getpid()

  def clock(self) -> float:
    """The time on this process's clock, in seconds."""
    return time.perf_counter()

  def measure(self, dtype: str, precision: str) -> ChipSpec:
    """The rates of the worker's first device, measured."""
    return measure_chip(self._devices[0], jnp.dtype(dtype), precision)

  def lend(self, number: int, num_bytes: int) -> None:
    """Offer so many bytes, to measure how long they travel."""
    array = jax.device_put(np.zeros(num_bytes, np.uint8), self._devices[0]).block_until_ready()
    self._server.offer(number, [array])

  def fetch(self, address: str, number: int, num_bytes: int) -> float:
    """Seconds to pull bytes that another process lends."""
    sharding = jax.sharding.SingleDeviceSharding(self._devices[0])
    begin = time.perf_counter()
    jax.block_until_ready(
      self._server.pull(address, number, [jax.ShapeDtypeStruct((num_bytes,), np.uint8, sharding=sharding)])
    )
    return time.perf_counter() - begin

  # -------------------------------------------------------------------------- serving

  def take(self, message: Message) -> None:
    """Do what the controller says, after all it said before; returns at once.

    A message that comes before the weights are loaded was meant for a process before this one.
    """
    if not hasattr(self, 'engine'):
      return
    engine = self.engine
    match message:
      case StartClock(start_s):
        self._serving = True
        engine.call(functools.partial(engine.start_clock, start_s))
      case Submit(orders, first_number):
        engine.call(functools.partial(engine.submit, orders, first_number))
      case Pull(number, order, manifest):
        engine.call(functools.partial(engine.pull, number, order, manifest))
      case Settle(number, pulled):
        engine.call(functools.partial(engine.settle, number, pulled))

  def listen(self, timeout_s: float) -> tuple[News, ...]:
    """Wait for news, at most so long.

    Raises:
      RuntimeError: if the process can do nothing any more.
    """
    with self._changed:
      self._changed.wait_for(lambda: self._news or self._error or self._closed, timeout_s)
      if self._error is not None and not self._news:
        raise RuntimeError(describe(self._error)) from self._error
      news, self._news = tuple(self._news), []
      return news

  def close(self) -> None:
    """End the threads; steps under way are waited for, and a temporary folder of programs is let go of."""
    self._closed = True
    with self._changed:
      self._changed.notify_all()
    if hasattr(self, 'engine'):
      self.engine.stop()
      self._thread.join()
      self.engine.close()
    if self._programs is not None:
      self._programs.close()

  def _run(self) -> None:
    """The thread that dispatches: whatever happens, goes to whoever listens."""
    try:
      while not self._closed:
        _, news = self.engine.wait(math.inf)
        with self._changed:
          self._news += news
          self._changed.notify_all()
    except BaseException as error:
      with self._changed:
        self._error = error
        self._changed.notify_all()


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return 'not installed'
