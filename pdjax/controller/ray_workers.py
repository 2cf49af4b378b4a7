"""Workers in Ray actors: other processes, other hosts.

Ray places the processes, watches them and says at once when one is gone; orders and news travel as Ray calls. KV never
does.
"""

import atexit
import contextlib
import functools
import math
import os
import pathlib
import secrets
import time
import types
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any

from pdjax.controller.addresses import check_cluster
from pdjax.controller.calls import begin_call
from pdjax.controller.control_service import ControlService
from pdjax.controller.ray_peer import GROUPS, RayPeer
from pdjax.host import check_own, own_addresses
from pdjax.types.cluster import DeviceError
from pdjax.types.places import HostPlace
from pdjax.types.processes import RayCluster
from pdjax.types.worker import WorkerSpec

if TYPE_CHECKING:
  import psutil

Taken = Mapping[str, Mapping[str, float]]  # of what Ray counts, by worker

_ROOM_S = 6.0  # until Ray has set aside what the workers take: it begins nothing for that
_SLOW_ROOM_S = 60.0  # the same where nobody else holds it, so that only the machine is slow
_GIVE_BACK_S = 5.0  # until Ray has taken back what was set aside
_SHUTDOWN_S = 15.0  # until Ray has ended here, which takes half as long where its control service is lost
_MOST_NODES = 8  # that a message names
_MOST_LETTERS = 300  # of an error of Ray's
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


class RayProcesses:
  """An empty process for each worker, on a Ray cluster that is there or on one that is started here for them.

  Args:
    cluster: The cluster.
    workers: The workers.
    platform: Of the config, for workers that have none of their own.
    actor: The class that Ray runs in each process, which has the methods that a `RayPeer` calls. It is made there with
      the address that a host of 'node' stands for, or None for that of its node in the Ray cluster.
    say: Told in a line what is being done.
    places: Places that only hold pages, each of which has a process too.

  Raises:
    DeviceError: if Ray is not installed, cannot be reached or has no room for the workers, or if two workers could
      take one accelerator.
  """

  def __init__(
    self,
    cluster: RayCluster,
    workers: Sequence[WorkerSpec],
    platform: str | None,
    actor: type,
    say: Callable[[str], None] = lambda line: None,
    places: Sequence[HostPlace] = (),
  ):
    ray = self._ray = import_ray()
    self._actor = actor
    self._close_calls: list[Callable[[], object]] = []
    self._service: ControlService | None = None
    self._family: set[psutil.Process] = set()  # of the cluster, as far as they are known, if it was started here
    try:
      begin = time.perf_counter()
      taken = {worker.name: cluster.resources(worker.tp, worker.platform or platform) for worker in workers}
      held = {place.name: cluster.resources(1, platform, accelerates=False) for place in places}
      self._connect(cluster, taken | held)
      service = self._service = ControlService(ray.get_runtime_context().gcs_address)
      self._close_calls.append(service.close)
      done = 'started' if cluster.address is None else 'reached'
      say(f'Ray {ray.__version__} {done} in {time.perf_counter() - begin:.1f} s')
      # Without its control service Ray does not return from any of these.
      platforms = dict.fromkeys(worker.platform or platform for worker in workers)
      self.peers = service.call(lambda: self._begin(cluster, taken, held, platforms, service), math.inf)
      self._note_family()
    except BaseException:
      self.close()
      raise

  def when_lost(self, tell: Callable[[DeviceError], None]) -> None:
    """Call `tell`, from any thread, if Ray's control service is lost: a run cannot go on, and Ray ends it soon."""
    assert self._service is not None
    self._service.when_lost(tell)

  def _begin(
    self, cluster: RayCluster, workers: Taken, places: Taken, platforms: Iterable[str | None], service: ControlService
  ) -> dict[str, RayPeer]:
    """Have Ray set aside what workers and places take, if it is there, and begin a process for each."""
    ray, taken = self._ray, {**workers, **places}
    for platform in platforms:
      if refusal := cluster.refusal(platform, ray.cluster_resources()):
        raise DeviceError(refusal)
    alive = [node for node in ray.nodes() if node['Alive']]
    nodes = {f'{node["NodeManagerAddress"]}:{node["NodeManagerPort"]}': node['Resources'] for node in alive}
    if shortage := cluster.shortage(taken, nodes):
      raise DeviceError(shortage)
    if cluster.host != 'node' and {node['NodeManagerAddress'] for node in alive} <= set(own_addresses()):
      check_own(cluster.host)  # on other hosts, workers say so
    node_host = '127.0.0.1' if cluster.address is None else None  # nobody but this machine is on it
    shares: list[tuple[Taken, str]] = [(taken, cluster.strategy)]
    if places and not cluster.strategy.startswith('STRICT'):  # on as many hosts as there are, wherever the workers are
      shares = [(workers, cluster.strategy), (places, 'SPREAD')]
    groups = [self._set_aside(some, strategy, cluster, service) for some, strategy in shares]
    peers: dict[str, RayPeer] = {}
    for group, (some, _) in zip(groups, shares, strict=True):
      for index, (name, bundle) in enumerate(some.items()):
        start = functools.partial(self._start, group, index, dict(bundle), node_host)
        peers[name] = RayPeer(name, start, ray, service, cluster.silence_s, cluster.start_s)
    return peers

  def _set_aside(self, taken: Taken, strategy: str, cluster: RayCluster, service: ControlService) -> Any:
    """A share of the cluster for each, which Ray takes back in the end.

    It is waited for, and longer if the nodes have as much that nobody holds.

    Raises:
      DeviceError: if it does not come to that.
    """
    ray = self._ray
    group = ray.util.placement_group(list(taken.values()), strategy=strategy)
    self._close_calls.append(lambda: service.call(lambda: ray.util.remove_placement_group(group), _GIVE_BACK_S))
    if group.wait(_ROOM_S):
      return group
    free = self._free()
    has_room = cluster.shortage(taken, free) is None
    if group.wait(_SLOW_ROOM_S if has_room else 0.1):
      return group
    kinds = sorted(_kinds(taken))
    shown = [
      f'{node} {" and ".join(f"{amounts.get(kind, 0.0):g} {kind}" for kind in kinds)}'
      for node, amounts in [*free.items()][:_MOST_NODES]
    ]
    shown += [f'{len(free) - _MOST_NODES} more nodes'] if len(free) > _MOST_NODES else []
    each = ', '.join(f'{name} {dict(bundle)}' for name, bundle in taken.items())
    raise DeviceError(
      f'others leave this of the Ray cluster free: {", ".join(shown)}, where the workers find no room with strategy '
      f'{strategy!r} ({each}); wait until the others have ended, lower the number of workers, tp or '
      'processes.cpus, or use a larger cluster.'
    )

  def _free(self) -> dict[str, Mapping[str, float]]:
    """The amounts that nobody holds now, by node."""
    try:
      by_id = self._ray._private.state.available_resources_per_node()
    except AttributeError:  # of another Ray
      return {'all nodes': self._ray.available_resources()}
    return {
      f'{node["NodeManagerAddress"]}:{node["NodeManagerPort"]}': by_id.get(node['NodeID'], {})
      for node in self._ray.nodes()
      if node['Alive']
    }

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
      }  # fmt: skip
    else:
      options |= {'address': cluster.address}
      if (address := _definite(cluster.address)) is not None:
        check_cluster(address)
    try:
      ray.init(configure_logging=False, **options)
    except Exception as error:
      where = 'started here' if cluster.address is None else f'used at {cluster.address!r}'
      raise DeviceError(
        f'Ray cannot be {where} ({_in_a_line(error)}); docs/security.md says what a client needs.'
      ) from error
    self._close_calls.append(self._shut_down)
    if cluster.address is None:
      self._family |= _processes_of(ray)
      self._note_family()

  def _start(self, group: Any, index: int, bundle: dict[str, float], node_host: str | None, name: str) -> Any:
    """An actor in one of the shares that were set aside; when it is lost, its controller decides what then."""
    ray = self._ray
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, index)
    others = {name: amount for name, amount in bundle.items() if name not in ('CPU', 'GPU')}
    actor = ray.remote(concurrency_groups=GROUPS)(self._actor).options(
      name=name,
      num_cpus=bundle['CPU'],
      num_gpus=bundle.get('GPU', 0),
      resources=others,
      scheduling_strategy=strategy,
      max_restarts=0,  # by itself Ray tells a second later that an actor is lost which it starts anew
      max_task_retries=0,
    )
    return actor.remote(node_host)

  def close(self) -> None:
    """Give everything back, and end Ray if it was started here."""
    calls, self._close_calls = self._close_calls, []
    for call in reversed(calls):
      with contextlib.suppress(Exception):
        call()

  def _shut_down(self) -> None:
    """End Ray in this process, and what of it was started here, whether its control service answers or not."""
    import psutil

    self._note_family()
    ended = begin_call(self._ray.shutdown)
    wait([ended], _SHUTDOWN_S)
    if ended.done() and (self._service is None or not self._service.is_lost):
      return
    for process in self._family:
      with contextlib.suppress(psutil.Error):
        process.kill()
    if not wait([ended], _SHUTDOWN_S).done:  # it may have waited for one of them
      atexit.unregister(self._ray.shutdown)  # it would wait for ever

  def _note_family(self) -> None:
    """Learn which processes run for the cluster; those whose parent has ended are told by nobody later."""
    import psutil

    for process in [*self._family]:
      with contextlib.suppress(psutil.Error):
        self._family |= {*process.children(recursive=True)}


def _processes_of(ray: types.ModuleType) -> 'set[psutil.Process]':
  """The processes that Ray has started here for a cluster: its control service, its node and what belongs to it."""
  import psutil

  try:
    started = ray._private.worker._global_node.all_processes.values()
    pids = [one.process.pid for some in started for one in some]
  except Exception:  # of another Ray
    return set()
  found = set()
  for pid in pids:
    with contextlib.suppress(psutil.Error):
      found.add(psutil.Process(pid))
  return found


def _kinds(taken: Taken) -> set[str]:
  return {kind for bundle in taken.values() for kind in bundle}


def _at_most_here(taken: Taken, cpus: int) -> dict[str, float]:
  """The most of all that the workers take which a cluster started here can have, as far as that is known before."""
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
  """Host and port of a cluster, where 'auto' stands for them the one that Ray would take; None if it knows of none.

  Raises:
    DeviceError: if Ray would take one from the environment that is no such address.
  """
  if address != 'auto':
    return address
  if named := os.environ.get('RAY_ADDRESS'):
    try:
      RayCluster(address=named)
    except ValueError as error:
      raise DeviceError(f"'auto' takes what the environment says in RAY_ADDRESS, whose {error}") from None
    if named != 'auto':
      return named
  try:
    from ray._private import services

    return services.canonicalize_bootstrap_address(address)
  except Exception:  # of a Ray that has no such thing, or that tells in better words what it does not find
    return None


def _in_a_line(error: BaseException) -> str:
  return ' '.join(str(error).split())[:_MOST_LETTERS] or type(error).__name__
