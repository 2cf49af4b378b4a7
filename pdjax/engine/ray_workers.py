"""The same worker in a Ray actor: another process, another host.

Ray places the processes, watches them and says at once when one is gone; orders and news travel as Ray calls. KV never
does.
"""

import contextlib
import functools
import itertools
import math
import os
import pathlib
import secrets
import threading
import time
import types
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pdjax.engine.addresses import check_cluster, check_own, own_addresses
from pdjax.engine.peers import Message, News, PeerLost
from pdjax.types.cluster import DeviceError, WorkerSpec
from pdjax.types.processes import RayCluster

Taken = Mapping[str, Mapping[str, float]]  # of what Ray counts, by worker

_LISTEN_S = 5.0  # of one call that waits for news
_PULSE_S = 1.0  # from one look at whether a process lives to the next, while an answer is waited for
_PLACE_S = 6.0  # until Ray has set aside what the workers take: it begins nothing for that
_SLOW_PLACE_S = 60.0  # the same where nobody else holds it, so that only the machine is slow
_START_S = 60.0  # until a process is there, or longer if its silence may be
_CLOSE_S = 10.0  # until a process has ended its threads
_GROUPS = {'orders': 1, 'news': 1, 'control': 4, 'pulse': 1}  # threads for each kind of call
_STORE_BYTES = 80 * 2**20  # the least that Ray takes: no KV goes through its object store


def import_ray() -> types.ModuleType:
  """Ray, with nothing sent about its use, unless the environment says otherwise.

  Raises:
    DeviceError: if it is not installed.
  """
  os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
  try:
    import ray
  except ImportError as error:
    raise DeviceError(
      f'workers in processes of their own need Ray, which is not there ({error}); run `pip install pdjax[cluster]`, or '
      'leave processes out of the config.'
    ) from error
  return ray


def make_token() -> None:
  """Have a token that nobody else knows guard the cluster which is started next, if there is none yet.

  That Ray wants one is its own default. By itself it would leave the token in a file that others may read.
  """
  written = pathlib.Path('~/.ray/auth_token').expanduser()
  if 'RAY_AUTH_TOKEN' not in os.environ and 'RAY_AUTH_TOKEN_PATH' not in os.environ and not written.exists():
    os.environ['RAY_AUTH_TOKEN'] = secrets.token_hex(32)


class RayWorker:
  """What Ray runs in a worker's process: a `WorkerProcess`, and the order of what it is told."""

  def __init__(self):
    self._lock = threading.Lock()
    self._process: Any = None
    self._held: dict[int, Message] = {}
    self._next = 0

  def call(self, method: str, *args: Any) -> Any:
    """Call a method of the worker's process."""
    with self._lock:
      if self._process is None:
        from pdjax.engine.worker_process import WorkerProcess  # JAX begins here

        self._process = WorkerProcess(node_host=import_ray().util.get_node_ip_address())
    return getattr(self._process, method)(*args)

  def pulse(self) -> None:
    """Answer at once, whatever else goes on here: a sign of life."""

  def take(self, count: int, message: Message) -> None:
    """Hand on messages in the order in which they are counted: Ray may bring two that overtook each other."""
    self._held[count] = message
    while self._next in self._held:
      due = self._held.pop(self._next)
      self._next += 1
      if self._process is not None:  # else it was meant for a process before this one
        self._process.take(due)


class RayPeer:
  """A worker's actor, as its controller sees it.

  Args:
    name: The worker's name.
    start: Starts an actor by a name that none had before.
    ray: Ray.
    silence_s: Seconds without a sign of life after which it counts as lost.
  """

  def __init__(self, name: str, start: Callable[[str], Any], ray: types.ModuleType, silence_s: float):
    self.name = name
    self._start = start
    self._ray = ray
    self._silence_s = silence_s
    self._lock = threading.Lock()
    self._lives = itertools.count(1)
    self._closed = False
    self._begin()

  def _begin(self) -> None:
    if self._closed:
      raise PeerLost(f'worker {self.name!r} gets no new process: all is being closed.')
    actor = self._start(f'{self.name}-{next(self._lives)}')
    with self._lock:
      self._actor, self._counts = actor, itertools.count()
      self._is_there = self._is_silent = False

  def _await_start(self) -> None:
    """Wait until the process is there: before that it cannot tell that it lives."""
    if self._is_there:
      return
    ray, actor = self._ray, self._actor
    start_s = max(_START_S, self._silence_s)
    try:
      ray.get(actor.__ray_ready__.remote(), timeout=None if math.isinf(start_s) else start_s)
    except ray.exceptions.GetTimeoutError:
      self._is_silent = True
      raise PeerLost(f'the process of worker {self.name!r} was not there after {start_s:g} s') from None
    except (ray.exceptions.RayError, ValueError) as error:
      raise PeerLost(f'there is no process for worker {self.name!r}: {_first_line(error)}') from error
    self._is_there = actor is self._actor

  def ask(self, method: str, *args: Any) -> Any:
    """Call a method of its `WorkerProcess` and wait for the answer, however long that takes while it lives."""
    self._await_start()
    return self._answer('control', method, *args)

  def tell(self, message: Message) -> None:
    """Send a message; a process that is gone shows in `listen`."""
    with self._lock, contextlib.suppress(self._ray.exceptions.RayError):
      _method(self._actor, 'take', 'orders', num_returns=0).remote(next(self._counts), message)

  def listen(self) -> tuple[News, ...]:
    """Wait until something happened there, or a while."""
    return self._answer('news', 'listen', _LISTEN_S)

  def restart(self) -> None:
    """Have Ray start another process in the place of the lost one."""
    with contextlib.suppress(Exception):  # one that lives still, but can do nothing, has the devices
      self._ray.kill(self._actor)
    try:
      self._begin()
    except (self._ray.exceptions.RayError, ValueError) as error:
      raise PeerLost(f'there is no new process for worker {self.name!r}: {_first_line(error)}') from error
    self._await_start()

  def close(self) -> None:
    """End the process, for good."""
    self._closed = True
    if not self._is_silent:
      with contextlib.suppress(Exception):
        self._ray.get(_method(self._actor, 'call', 'control').remote('close'), timeout=_CLOSE_S)
    with contextlib.suppress(Exception):
      self._ray.kill(self._actor)

  def _answer(self, group: str, method: str, *args: Any) -> Any:
    """Call a method and wait for its answer; while there is none, for signs of life."""
    ray, actor = self._ray, self._actor
    answer = _method(actor, 'call', group).remote(method, *args)
    while not ray.wait([answer], timeout=_PULSE_S)[0] and not math.isinf(self._silence_s):
      pulse = _method(actor, 'pulse', 'pulse').remote()
      found, _ = ray.wait([answer, pulse], timeout=self._silence_s)
      if not found:
        self._is_silent = actor is self._actor
        raise PeerLost(f'the process of worker {self.name!r} has not answered for {self._silence_s:g} s')
      if pulse in found:
        self._get(pulse)  # of a process that is gone it raises
    return self._get(answer)

  def _get(self, answer: Any) -> Any:
    try:
      return self._ray.get(answer)
    except self._ray.exceptions.RayTaskError as error:
      raise error.cause from None
    except self._ray.exceptions.RayError as error:
      raise PeerLost(f'the process of worker {self.name!r} is gone ({_first_line(error)})') from error


def _method(actor: Any, name: str, group: str, **options: Any) -> Any:
  return getattr(actor, name).options(concurrency_group=group, **options)


class RayProcesses:
  """An empty process for each worker, on a Ray cluster that is there or on one that is started here for them.

  Args:
    cluster: Which.
    workers: The workers.
    platform: Of the config.
    say: Told in a line what is being done.

  Raises:
    DeviceError: if Ray is not installed, cannot be reached or has no room for the workers, or if two workers could
      take one accelerator.
  """

  def __init__(
    self,
    cluster: RayCluster,
    workers: Sequence[WorkerSpec],
    platform: str | None,
    say: Callable[[str], None] = lambda line: None,
  ):
    ray = self._ray = import_ray()
    self._close_calls: list[Callable[[], object]] = []
    try:
      begin = time.perf_counter()
      taken = {worker.name: cluster.resources(worker.tp, platform) for worker in workers}
      self._connect(cluster, taken)
      done = 'started' if cluster.address is None else 'reached'
      say(f'Ray {ray.__version__} {done} in {time.perf_counter() - begin:.1f} s')
      if refusal := cluster.refusal(platform, ray.cluster_resources()):
        raise DeviceError(refusal)
      alive = [node for node in ray.nodes() if node['Alive']]
      nodes = {f'{node["NodeManagerAddress"]}:{node["NodeManagerPort"]}': node['Resources'] for node in alive}
      if shortage := cluster.shortage(taken, nodes):
        raise DeviceError(shortage)
      if cluster.host != 'node' and {node['NodeManagerAddress'] for node in alive} <= set(own_addresses()):
        check_own(cluster.host)  # on other hosts, workers say so
      group = ray.util.placement_group(list(taken.values()), strategy=cluster.strategy)
      self._close_calls.append(lambda: ray.util.remove_placement_group(group))
      if not self._is_placed(group, taken):
        free = ray.available_resources()
        left = ' and '.join(f'{free.get(kind, 0.0):g} {kind}' for kind in sorted(_kinds(taken)))
        each = ', '.join(f'{name} {dict(bundle)}' for name, bundle in taken.items())
        raise DeviceError(
          f'others leave {left} of the Ray cluster free, where the workers find no places with strategy '
          f'{cluster.strategy!r} ({each}); wait until the others have ended, lower the number of workers, tp or '
          'processes.cpus, or use a larger cluster.'
        )
      self.peers = {
        name: RayPeer(name, functools.partial(self._start, group, index, bundle), ray, cluster.silence_s)
        for index, (name, bundle) in enumerate(taken.items())
      }
    except BaseException:
      self.close()
      raise

  def _is_placed(self, group: Any, taken: Taken) -> bool:
    """Whether Ray sets aside what the workers take before long, or later if there is as much that nobody has."""
    if group.wait(_PLACE_S):
      return True
    free = self._ray.available_resources()
    has_room = all(
      free.get(kind, 0.0) >= sum(bundle.get(kind, 0.0) for bundle in taken.values()) for kind in _kinds(taken)
    )
    return group.wait(_SLOW_PLACE_S if has_room else 0.1)

  def _connect(self, cluster: RayCluster, taken: Taken) -> None:
    ray = self._ray
    if ray.is_initialized():
      raise DeviceError('Ray is in use in this process already; end the other run, or call ray.shutdown().')
    options: dict[str, Any] = {'namespace': f'pdjax-{uuid.uuid4().hex[:8]}', 'log_to_driver': False}
    if cluster.address is None:
      if cluster.host != 'node':
        check_own(cluster.host)
      cpus = max(os.cpu_count() or 1, math.ceil(cluster.cpus * len(taken)))
      if shortage := cluster.shortage(taken, {'this machine': _at_most_here(taken, cpus)}):
        raise DeviceError(shortage)  # before seconds are spent to start it
      make_token()
      options |= {
        'address': 'local', 'num_cpus': cpus, 'object_store_memory': _STORE_BYTES, 'include_dashboard': False,
        '_node_ip_address': '127.0.0.1',
      }  # fmt: skip
    else:
      options |= {'address': cluster.address}
      if (address := _definite(cluster.address)) is not None:
        check_cluster(address)
    try:
      ray.init(configure_logging=False, **options)
    except Exception as error:
      where = 'started here' if cluster.address is None else f'reached at {cluster.address!r}'
      raise DeviceError(
        f'Ray cannot be {where} ({_first_line(error)}); docs/security.md says what a client needs.'
      ) from error
    self._close_calls.append(ray.shutdown)

  def _start(self, group: Any, index: int, bundle: dict[str, float], name: str) -> Any:
    """An actor in one of the places that were set aside; when it is lost, its controller decides what then."""
    ray = self._ray
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, index)
    others = {name: amount for name, amount in bundle.items() if name not in ('CPU', 'GPU')}
    actor = ray.remote(concurrency_groups=_GROUPS)(RayWorker).options(
      name=name,
      num_cpus=bundle['CPU'],
      num_gpus=bundle.get('GPU', 0),
      resources=others,
      scheduling_strategy=strategy,
      max_restarts=0,  # by itself Ray tells a second later that an actor is lost which it starts anew
      max_task_retries=0,
    )
    return actor.remote()

  def close(self) -> None:
    """Give everything back, and end Ray if it was started here."""
    calls, self._close_calls = self._close_calls, []
    for call in reversed(calls):
      with contextlib.suppress(Exception):
        call()


def _kinds(taken: Taken) -> set[str]:
  return {kind for bundle in taken.values() for kind in bundle}


def _at_most_here(taken: Taken, cpus: int) -> dict[str, float]:
  """What a cluster that is started here has at most of what the workers take, as far as that is known before."""
  return {kind: float(cpus) if kind == 'CPU' else _found_here(kind) for kind in _kinds(taken)}


def _found_here(kind: str) -> float:
  """As many of an accelerator as Ray will find; infinity if it does not say so before it is started."""
  try:
    from ray._private import accelerators

    manager = accelerators.get_accelerator_manager_for_resource(kind)
    if manager is not None:
      return float(manager.get_current_node_num_accelerators())
  except Exception:  # of another Ray
    return math.inf
  made_up = kind.startswith(('TPU-', 'accelerator_type:')) or 'RAY_OVERRIDE_RESOURCES' in os.environ
  return math.inf if made_up else 0.0


def _definite(address: str) -> str | None:
  """Host and port of a cluster, where 'auto' stands for them the one that Ray would take; None if it knows of none."""
  if address != 'auto':
    return address
  try:
    from ray._private import services

    return services.canonicalize_bootstrap_address(address)
  except Exception:  # of a Ray that has no such thing, or that tells in better words what it does not find
    return None


def _first_line(error: BaseException) -> str:
  text = str(error).strip()
  return text.splitlines()[0] if text else type(error).__name__
