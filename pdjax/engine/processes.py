"""Makes a backend out of a config whose workers are in processes of their own: load, compile, handshake."""

import contextlib
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

from pdjax.config import ServingConfig
from pdjax.cost.granularity import choose_granularity
from pdjax.cost.memory import size_pools
from pdjax.cost.roofline import Roofline
from pdjax.engine.built import Built, WarmUp
from pdjax.engine.dtypes import settle_dtype
from pdjax.engine.peers import Assignment, Loaded, Peer, PeerLost, node_name
from pdjax.engine.process_engine import ProcessEngine, Revived
from pdjax.engine.program_folder import remove_when_unused
from pdjax.serving.messages import Comeback
from pdjax.types.cluster import WorkerSpec, ways
from pdjax.types.handshake import HandshakeError, Hello, Machine, check_plans, check_together, check_worker
from pdjax.types.hardware import LinkSpec
from pdjax.types.model import ModelSpec
from pdjax.types.request import Request

_LINK_BYTES = 8 * 2**20
_PINGS = 16  # of which the quickest tells how two clocks differ
_MAX_REVIVALS = 3  # in a row that fail before a worker is given up
_PAUSE_S = 1.0  # before the next, where something else was wrong than that the process ended
_REMOVE_S = 3.0  # until processes that were killed are gone
_LOOK_S = 1.0  # from one look at whether a process lives to the next, while another waits for it


def build_processes(
  config: ServingConfig,
  model: ModelSpec,
  peers: Mapping[str, Peer],
  output_len: Callable[[str], int | None] = lambda request: None,
  say: Callable[[str], None] = lambda line: None,
  closed: Callable[[], None] = lambda: None,
) -> Built:
  """Load and compile everything a config needs, each worker in its process, and have them know one another.

  Args:
    config: The run.
    model: The model's shape, as it is to be served.
    peers: An empty process for each worker.
    output_len: How many tokens a request really generates, where that is known, by its id.
    say: Told in a line what is being done.
    closed: Called when the backend is closed, after its processes; also if none comes of it.

  Raises:
    ValueError: if the workers do not fit their devices, the model's heads or the memory, or the devices have no units
      for a dtype.
    HandshakeError: if the processes do not fit together.
    DeviceError: if a process has no such devices, or no way to send KV to another.
    PeerLost: if a process ends meanwhile, or gives no sign of life for too long.
  """
  handshake = Handshake(config, model, peers)

  def close_peers() -> None:  # so that nobody waits for what they still load and compile
    for peer in peers.values():
      with contextlib.suppress(Exception):
        peer.close()

  def close_all() -> None:
    try:
      closed()
    finally:
      handshake.remove_folders()

  with _if_it_fails(close_all), ThreadPoolExecutor(max(1, len(peers))) as pool, _if_it_fails(close_peers):

    def everywhere(ask: Callable[[str], Any]) -> dict[str, Any]:
      asked = {name: pool.submit(ask, name) for name in peers}
      for answer in wait(asked.values(), return_when=FIRST_EXCEPTION).done:
        answer.result()  # what went wrong in one is told at once, whatever the others still do
      return {name: answer.result() for name, answer in asked.items()}

    begin = time.perf_counter()
    machines: dict[str, Machine] = everywhere(handshake.begin)
    config = handshake.settle_dtype()
    specs = handshake.specs = _size_pools(config, model, machines)
    handshake.check_reach()
    first, last = (handshake.ways or [(config.workers[0].name, config.workers[-1].name)])[0]
    chip = peers[first].ask('measure', config.dtype, config.precision)
    link = handshake.measure_link(first, last)
    measured = time.perf_counter()
    on_cpu = machines[first].platform == 'cpu'
    cost = Roofline(chip, link, config.dtype_bytes, shared_host=on_cpu)
    handshake.transfer = choose_granularity(config.transfer, model, tuple(specs.values()), cost)
    loaded: dict[str, Loaded] = everywhere(lambda name: handshake.load(name, 1))
    for name, spec in specs.items():
      pages = f'{spec.num_pages} pages of {spec.page_size} tokens in {spec.kv_dtype}'
      where = f'{", ".join(machines[name].devices)} of process {machines[name].pid}'
      say(f'{name}: {spec.role.value}, tp={spec.tp} on {where}, {pages}')
    check_together([one.hello for one in loaded.values()])
    program_s = {f'{name}/{key}': s for name, one in loaded.items() for key, s in one.program_s.items()}
    load_s = max(one.load_s for one in loaded.values())
    say(f'weights loaded and {len(program_s)} programs compiled in {time.perf_counter() - measured:.1f} s')
    for source, target in handshake.ways:
      program_s.update(handshake.connect(source, target))
    clocks = everywhere(lambda name: clock_offset(peers[name], machines[name].node))
  compiled = time.perf_counter()
  say(f'warm-up took {compiled - begin:.1f} s, in {len(peers)} processes')
  warm_up = WarmUp(load_s, compiled - measured - load_s, measured - begin, program_s, chip, link)
  limit = limit_of(model, output_len)
  engine = ProcessEngine(peers, dict.fromkeys(peers, 1), clocks, limit, handshake.revive, close_all)
  devices = {name: [f'{device} of process {one.pid}' for device in one.devices] for name, one in machines.items()}
  return Built(engine, tuple(specs.values()), handshake.transfer, config.definite_dtype, devices, warm_up)


@contextlib.contextmanager
def _if_it_fails(undo: Callable[[], None]) -> Iterator[None]:
  try:
    yield
  except BaseException:
    undo()
    raise


def _size_pools(config: ServingConfig, model: ModelSpec, machines: Mapping[str, Machine]) -> dict[str, WorkerSpec]:
  """The workers with all counts filled in, by what there is where they run."""
  sized: dict[str, WorkerSpec] = {}
  on_cpu = any(machine.platform == 'cpu' for machine in machines.values())
  groups = itertools.groupby(
    sorted(config.cluster, key=lambda one: machines[one.name].node if on_cpu else one.name),
    key=lambda one: machines[one.name].node if on_cpu else one.name,
  )
  for _, group in groups:
    workers = tuple(group)
    counter = itertools.count()
    devices = {one.name: tuple(itertools.islice(counter, one.tp)) for one in workers}
    memory = min(machines[one.name].memory_bytes for one in workers)
    for spec in size_pools(
      workers, devices, model, config.dtype_bytes, memory, one_memory=on_cpu, staging_bytes=config.staging_bytes,
      cluster=config.cluster,
    ):  # fmt: skip
      sized[spec.name] = spec
  return {worker.name: sized[worker.name] for worker in config.workers}


def limit_of(model: ModelSpec, output_len: Callable[[str], int | None]) -> Callable[[Request], int | None]:
  """Tells most tokens of a request that a trace cuts short, and None of others."""

  def limit(request: Request) -> int | None:
    least = request.token_limit(model.context_len, output_len)
    return None if least == request.token_limit(model.context_len) else least

  return limit


def clock_offset(peer: Peer, node: str) -> float:
  """What a process's clock shows when the controller's shows 0; processes of one host have one clock.

  Otherwise it is known to half of the quickest answer's time.
  """
  if node == node_name():
    return 0.0
  answers = []
  for _ in range(_PINGS):
    asked_s = time.perf_counter()
    shown_s = peer.ask('clock')
    answered_s = time.perf_counter()
    answers.append((answered_s - asked_s, shown_s - (asked_s + answered_s) / 2))
  return min(answers)[1]


class Handshake:
  """Has processes become workers that know one another, at the start and whenever one was lost.

  Attributes:
    specs: The workers; their counts are to be filled in before any of them is loaded.
    transfer: How KV travels; the same goes for `layers_from`.
    ways: From which worker to which.
  """

  def __init__(self, config: ServingConfig, model: ModelSpec, peers: Mapping[str, Peer]):
    self._config = config
    self._model = model
    self._peers = peers
    self.specs = {spec.name: spec for spec in config.workers}
    self.transfer = config.transfer
    pairs = ways(config.workers) if config.moves_kv else []
    self.ways: Sequence[tuple[str, str]] = [(source.name, target.name) for source, target in pairs]
    self._lock = threading.Lock()
    self._machines: dict[str, Machine] = {}
    self._hellos: dict[str, Hello] = {}
    self._folders: dict[str, str] = {}  # of compiled programs, by node
    self._one_folder = threading.Lock()
    self._one_at_a_time: dict[tuple[str, str], threading.Lock] = defaultdict(threading.Lock)  # by way
    self._number = itertools.count(1 << 46)  # of what is lent to measure, beyond those of transfers

  def begin(self, name: str) -> Machine:
    """Have an empty process make its devices ready."""
    config = self._config
    host = '127.0.0.1' if config.processes is None else config.processes.host
    machine = self._peers[name].ask('machine', config.platform, self.specs[name].tp, host)
    with self._lock:
      self._machines[name] = machine
    return machine

  def settle_dtype(self) -> ServingConfig:
    """The config with a definite dtype, in which all devices that were made ready can compute; kept from now on.

    Raises:
      ValueError: if there is none, see `pdjax.engine.dtypes.settle_dtype`.
    """
    with self._lock:
      kinds = {name: machine.kinds for name, machine in self._machines.items()}
    self._config = settle_dtype(self._config, kinds)
    return self._config

  def _program_folder(self, name: str) -> str | None:
    """Where a process keeps compiled programs: as the config says, or else with the others of its node."""
    if self._config.compilation_cache is not None:
      return self._config.compilation_cache
    node = self._machines[name].node
    with self._one_folder:
      folder: str | None = self._peers[name].ask('share_programs', self._folders.get(node))
      if folder is not None:
        self._folders[node] = folder
    return folder

  def remove_folders(self) -> None:
    """See that no temporary folder of compiled programs is left on this host, where all processes were ended."""
    folder = self._folders.get(node_name())
    if folder is not None:
      remove_when_unused(folder, _REMOVE_S)

  def load(self, name: str, incarnation: int) -> Loaded:
    """Have a process become a worker, and see that it is the one that was asked for."""
    config, spec = self._config, self.specs[name]
    assert config.checkpoint is not None
    folder = self._program_folder(name)
    assignment = Assignment(
      spec, incarnation, self._model, config.checkpoint, config.dtype, config.precision, self.transfer,
      config.moves_kv, folder,
    )  # fmt: skip
    loaded = self._peers[name].ask('load', assignment)
    check_worker(loaded.hello, spec)
    with self._lock:
      self._hellos[name] = loaded.hello
    return loaded

  def check_reach(self) -> None:
    """See that every target can reach its sources, before anything is pulled.

    Raises:
      HandshakeError: if one cannot.
    """
    with self._lock:
      machines = dict(self._machines)
    for source, target in self.ways:
      ours, theirs = machines[source], machines[target]
      if ours.node != theirs.node and ours.address.startswith(('127.', '[::1]')):
        raise HandshakeError(
          f'worker {source!r} on {ours.node} lets KV be pulled at {ours.address} only, which {target!r} on '
          f"{theirs.node} cannot reach; set processes.host='node', and read docs/security.md before."
        )

  def connect(self, source: str, target: str) -> dict[str, float]:
    """Make a way ready at both ends; seconds of each program.

    Raises:
      HandshakeError: if the two do not cut what travels alike.
    """
    with self._lock:
      alone = self._one_at_a_time[source, target]
    with alone:  # of two that come back at once, the other finds the way ready
      with self._lock:
        ours, theirs = self._hellos.get(source), self._hellos.get(target)
      if ours is None or theirs is None:  # it connects when it is back
        return {}
      with ThreadPoolExecutor(2) as pool:  # either compiles for itself
        ends = [pool.submit(self._peers[source].ask, 'send_to', theirs)]
        ends.append(pool.submit(self._peers[target].ask, 'receive_from', ours))
        (sent, send_s), (received, receive_s) = (end.result() for end in ends)
    check_plans(source, target, sent, received)
    return {f'{source}→{target}/{name}': s for seconds in (send_s, receive_s) for name, s in seconds.items()}

  def measure_link(self, source: str, target: str) -> LinkSpec:
    """What a pull between two processes carries."""

    def fetch(size: int) -> float:
      number = next(self._number)
      self._peers[source].ask('lend', number, size)
      fetched = _begin(lambda: self._peers[target].ask('fetch', self._machines[source].address, number, size))
      while not wait([fetched], _LOOK_S).done:  # a pull from one that hangs has no end
        self._peers[source].ask('clock')
      return fetched.result()

    def seconds(size: int) -> float:
      return min(fetch(size) for _ in range(3))

    small_s, large_s = seconds(4), seconds(_LINK_BYTES)
    return LinkSpec(_LINK_BYTES / max(large_s - small_s, 1e-6), small_s, source='measured at warm-up')

  def revive(self, name: str, incarnation: int) -> Revived:
    """Have the new process of a lost worker take its place.

    Raises:
      PeerLost: if no new process comes as far as that.
      HandshakeError: if it does not fit the others.
      ValueError: if its devices have no units for a dtype.
    """
    begin = time.perf_counter()
    for tries in range(1, _MAX_REVIVALS + 1):
      with self._lock:
        self._hellos.pop(name, None)
      try:
        return self._try_to_revive(name, incarnation, tries, time.perf_counter() - begin)
      except ValueError:  # the next would not fit either
        raise
      except Exception as error:
        last = error
        if not isinstance(error, PeerLost):
          time.sleep(_PAUSE_S)  # such as memory of a device that the process before has not given back yet
    raise PeerLost(f'worker {name!r} did not come back in {_MAX_REVIVALS} tries, of which the last: {last}') from last

  def _try_to_revive(self, name: str, incarnation: int, tries: int, failed_s: float) -> Revived:
    peer = self._peers[name]
    begin = time.perf_counter()
    peer.restart()
    machine = self.begin(name)
    self.settle_dtype()  # its devices may be others now
    self.check_reach()
    started = time.perf_counter()
    loaded = self.load(name, incarnation)
    with self._lock:
      others = [hello for other, hello in self._hellos.items() if other != name]
    check_together([loaded.hello, *others])
    compiled = time.perf_counter()
    self._connect_again(name)
    clock_s = clock_offset(peer, machine.node)
    connected = time.perf_counter()
    compile_s = max(compiled - started - loaded.load_s, 0.0)
    comeback = Comeback(tries, failed_s, started - begin, loaded.load_s, compile_s, connected - compiled)
    return Revived(incarnation, clock_s, comeback)

  def _connect_again(self, name: str) -> None:
    """Every way from and to a worker; those that are lost themselves connect when they come back."""
    for source, target in self.ways:
      if name in (source, target):
        try:
          self.connect(source, target)
        except PeerLost:
          if self._is_lost(name):
            raise

  def _is_lost(self, name: str) -> bool:
    try:
      self._peers[name].ask('clock')
    except PeerLost:
      return True
    return False


def _begin(do: Callable[[], float]) -> Future[float]:
  """Do something on a thread that nobody waits for when the process ends."""
  future: Future[float] = Future()

  def run() -> None:
    try:
      future.set_result(do())
    except BaseException as error:
      future.set_exception(error)

  threading.Thread(target=run, name='pdjax-fetch', daemon=True).start()
  return future
