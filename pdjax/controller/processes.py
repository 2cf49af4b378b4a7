"""Makes a backend out of a config whose workers are in processes of their own: load, compile, handshake."""

import contextlib
import itertools
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from pdjax.config import ServingConfig
from pdjax.controller.calls import begin_call
from pdjax.controller.peer import Peer
from pdjax.controller.process_engine import ProcessEngine, Revived
from pdjax.controller.program_folders import ProgramFolders
from pdjax.cost.granularity import choose_granularity
from pdjax.cost.memory import size_pools
from pdjax.cost.roofline import Roofline
from pdjax.dtypes import settle_dtype
from pdjax.host import node_name
from pdjax.serving.built import Built, WarmUp
from pdjax.serving.events import Comeback
from pdjax.serving.peers import Assignment, Loaded, PeerLost
from pdjax.types.cluster import DeviceError
from pdjax.types.handshake import HandshakeError, Hello, Machine, check_plans, check_together, check_worker
from pdjax.types.hardware import LinkSpec
from pdjax.types.model import ModelSpec
from pdjax.types.worker import Role, WorkerSpec

_LINK_BYTES = 8 * 2**20
_PINGS = 16  # of which the quickest tells how two clocks differ
_LOOK_S = 1.0  # from one look at whether a process lives to the next, while another waits for it
_PULL_S = 60.0  # until a pull of a few MB that measures the way has ended


def build_processes(
  config: ServingConfig,
  model: ModelSpec,
  peers: Mapping[str, Peer],
  say: Callable[[str], None] = lambda line: None,
  closed: Callable[[], None] = lambda: None,
  when_lost: Callable[[Callable[[DeviceError], None]], None] = lambda fail: None,
) -> Built:
  """Load and compile everything a config needs, each worker in its process, and have them know one another.

  Args:
    config: The run.
    model: The model's shape, as it is to be served.
    peers: An empty process for each worker, and for each place that only holds pages.
    say: Told in a line what is being done.
    closed: Called when the backend is closed, after its processes; also if none comes of it.
    when_lost: Called with the function that is to be told why, once all processes are lost: it ends the run.

  Raises:
    ValueError: if the workers do not fit their devices, the model's heads or the memory, or the devices have no units
      for a dtype.
    HandshakeError: if the processes do not fit together.
    DeviceError: if a process has no such devices, or no way to send KV to another.
    PeerLost: if a process ends meanwhile, or gives no sign of life for too long.
  """
  handshake = Handshake(config, model, peers, say)

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
      open_answers, is_over = set(peers), threading.Event()

      def ask_and_look(name: str) -> Any:
        with _if_it_fails(is_over.set):
          answer = ask(name)
          open_answers.remove(name)
          while open_answers and not is_over.wait(_LOOK_S):  # nobody else asks whether one that is done still lives
            peers[name].ask('clock')
        is_over.set()
        return answer

      asked = {name: pool.submit(ask_and_look, name) for name in peers}
      for answer in wait(asked.values(), return_when=FIRST_EXCEPTION).done:
        answer.result()  # what went wrong in one is told at once, whatever the others still do
      return {name: answer.result() for name, answer in asked.items()}

    begin = time.perf_counter()
    machines: dict[str, Machine] = everywhere(handshake.begin)
    config = handshake.count_on(machines)
    workers = _size_pools(config, model, machines)
    places = {place.name: place for place in config.holders(model)}
    specs = handshake.specs = {**workers, **places}
    first, last = (handshake.ways or [(config.workers[0].name, config.workers[-1].name)])[0]
    chip = peers[first].ask('measure', specs[first].weights, specs[first].precision)
    link = handshake.measure_link(first, last)
    measured = time.perf_counter()
    on_cpu = machines[first].platform == 'cpu'
    cost = Roofline(chip, link, config.dtype_bytes, shared_host=on_cpu)
    handshake.transfer = choose_granularity(config.transfer, model, tuple(workers.values()), cost)
    loaded: dict[str, Loaded] = everywhere(lambda name: handshake.load(name, 1))
    for name, spec in specs.items():
      where = f'{", ".join(machines[name].devices)} of process {machines[name].pid}'
      said = f'holds pages, on {where},' if name in places else f'{spec.phases}, tp={spec.tp} on {where},'
      say(f'{name}: {said} {spec.holds}')
    handshake.admit([one.hello for one in loaded.values()])
    program_s = {f'{name}/{key}': s for name, one in loaded.items() for key, s in one.program_s.items()}
    load_s = max(one.load_s for one in loaded.values())
    say(f'weights loaded and {len(program_s)} programs compiled in {time.perf_counter() - measured:.1f} s')
    for source, target in handshake.ways:
      program_s.update(handshake.connect(source, target))
    clocks = everywhere(lambda name: clock_offset(peers[name], machines[name].node))
  compiled = time.perf_counter()
  say(f'warm-up took {compiled - begin:.1f} s, in {len(peers)} processes')
  warm_up = WarmUp(load_s, compiled - measured - load_s, measured - begin, program_s, chip, link)
  engine = ProcessEngine(peers, dict.fromkeys(peers, 1), clocks, handshake.revive, close_all)
  when_lost(engine.fail)
  devices = {name: [f'{device} of process {one.pid}' for device in one.devices] for name, one in machines.items()}
  return Built(
    engine, tuple(workers.values()), handshake.transfer, config.definite_dtype, devices, warm_up, tuple(places.values())
  )


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

  def memory_of(worker: WorkerSpec) -> tuple[bool, str]:
    machine = machines[worker.name]
    return (True, machine.node) if machine.platform == 'cpu' else (False, worker.name)

  for (on_cpu, _), group in itertools.groupby(sorted(config.cluster, key=memory_of), key=memory_of):
    workers = tuple(group)
    counter = itertools.count()
    devices = {one.name: tuple(itertools.islice(counter, one.tp)) for one in workers}
    memory = min(machines[one.name].memory_bytes for one in workers)
    if on_cpu:
      node = machines[workers[0].name].node
      memory -= sum(place.bytes for place in config.places if machines[place.name].node == node)
    for spec in size_pools(
      workers, devices, model, memory, one_memory=on_cpu, staging_bytes=config.staging_bytes,
      pairs=config.ways((*config.cluster, *config.holders(model))),
    ):  # fmt: skip
      sized[spec.name] = spec
  return {worker.name: sized[worker.name] for worker in config.workers}


def clock_offset(peer: Peer, node: str) -> float:
  """The time on a process's clock when the controller's shows 0; processes of one host have one clock.

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
    transfer: The settings of transfers; their `layers_from` is to be filled in as well.
    ways: The pairs of source and target.
  """

  def __init__(
    self,
    config: ServingConfig,
    model: ModelSpec,
    peers: Mapping[str, Peer],
    say: Callable[[str], None] = lambda line: None,
  ):
    self._config = config
    self._model = model
    self._peers = peers
    self._say = say
    holders = config.holders(model)
    self.specs = {spec.name: spec for spec in (*config.workers, *holders)}
    self.transfer = config.transfer
    pairs = config.ways((*config.workers, *holders))
    self.ways: Sequence[tuple[str, str]] = [(source.name, target.name) for source, target in pairs]
    self._lock = threading.Lock()
    self._machines: dict[str, Machine] = {}  # of workers that are there
    self._hellos: dict[str, Hello] = {}  # the same
    self._began_with: tuple[Hello, ...] = ()
    self._folders = ProgramFolders(config.compilation_cache, peers, say)
    self._one_at_a_time: dict[tuple[str, str], threading.Lock] = defaultdict(threading.Lock)  # by way
    self._number = itertools.count(1 << 46)  # of what is lent to measure, beyond those of transfers

  def begin(self, name: str) -> Machine:
    """Have an empty process make its devices ready."""
    config = self._config
    host = '127.0.0.1' if config.processes is None else config.processes.host
    spec = self.specs[name]
    return self._peers[name].ask(
      'machine', 'cpu' if spec.role is Role.HOLD else spec.platform or config.platform, spec.tp, host
    )

  def count_on(self, machines: Mapping[str, Machine]) -> ServingConfig:
    """Have processes count among those that are there, if they fit them; before anything is loaded or pulled.

    Returns:
      The config with a definite dtype, in which all of their devices can compute; kept from now on.

    Raises:
      ValueError: if there is no such dtype, see `pdjax.dtypes.settle_dtype`.
      HandshakeError: if a target cannot reach its source.
    """
    with self._lock:
      known = {**self._machines, **machines}
      config = settle_dtype(self._config, {name: machine.kinds for name, machine in known.items()})
      for source, target in self.ways:
        if source in known and target in known and (source in machines or target in machines):
          _check_reach(source, known[source], target, known[target])
      self._config, self._machines = config, known
    return config

  def remove_folders(self) -> None:
    """See that no temporary folder of compiled programs is left on this host, where all processes were ended."""
    self._folders.close()

  def load(self, name: str, incarnation: int) -> Loaded:
    """Have a process become a worker, and see that it is the one that was asked for."""
    config, spec = self._config, self.specs[name]
    assert config.checkpoint is not None
    folder = self._folders.of(name, self._machines[name].node)
    assignment = Assignment(
      spec, incarnation, self._model, absolute_checkpoint(config.checkpoint), self.transfer, config.moves_kv, folder,
    )  # fmt: skip
    loaded = self._peers[name].ask('load', assignment)
    check_worker(loaded.hello, spec, self._model)
    return loaded

  def admit(self, hellos: Sequence[Hello]) -> None:
    """Have workers count among those that are there, if they are as those with which the run began.

    Raises:
      HandshakeError: if they serve another model, or with other weights or software.
    """
    with self._lock:
      new = {hello.worker for hello in hellos}
      began = sorted(self._began_with, key=lambda hello: hello.worker in new)  # a worker is compared with itself last
      check_together([*hellos, *began])
      self._began_with = self._began_with or tuple(hellos)
      self._hellos.update({hello.worker: hello for hello in hellos})

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
    """Measure the rate and the latency of pulls between two processes.

    Raises:
      DeviceError: if nothing comes of a pull though both processes live.
    """
    address = self._machines[source].address

    def fetch(size: int) -> float:
      number = next(self._number)
      self._peers[source].ask('lend', number, size)
      fetched = begin_call(lambda: self._peers[target].ask('fetch', address, number, size))
      until_s = time.perf_counter() + _PULL_S
      while not wait([fetched], _LOOK_S).done:  # a pull from one that hangs, or cannot be reached, has no end
        self._peers[source].ask('clock')
        if time.perf_counter() > until_s:
          raise DeviceError(
            f'worker {target!r} pulled nothing from {source!r} at {address} for {_PULL_S:g} s, though both answer; is '
            'the way open, for any port? docs/security.md says what listens where.'
          )
      return fetched.result()

    def seconds(size: int) -> float:
      return min(fetch(size) for _ in range(3))

    small_s, large_s = seconds(4), seconds(_LINK_BYTES)
    return LinkSpec(_LINK_BYTES / max(large_s - small_s, 1e-6), small_s, source='measured at warm-up')

  def revive(self, name: str, incarnation: int) -> Revived:
    """Have a new process of a lost worker take its place. It counts for others only once it fits them.

    Raises:
      HandshakeError: if it does not fit the others, and the next would not either.
      PeerLost: if the new process is gone or silent before it has come as far as that. Whatever else goes wrong there
        is raised as it is, such as a device's memory that the process before has not given back yet.
    """
    self._forget(name)
    with _if_it_fails(lambda: self._forget(name)):
      peer = self._peers[name]
      begin = time.perf_counter()
      peer.restart()
      machine = self.begin(name)
      try:
        self.count_on({name: machine})  # its devices may be others now
      except ValueError as error:
        raise HandshakeError(str(error)) from error
      started = time.perf_counter()
      loaded = self.load(name, incarnation)
      self.admit([loaded.hello])
      compiled = time.perf_counter()
      self._connect_again(name)
      clock_s = clock_offset(peer, machine.node)
      connected = time.perf_counter()
    compile_s = max(compiled - started - loaded.load_s, 0.0)
    comeback = Comeback(1, 0.0, started - begin, loaded.load_s, compile_s, connected - compiled)
    return Revived(incarnation, clock_s, comeback)

  def _forget(self, name: str) -> None:
    """A worker is not there, and no other has to fit it."""
    with self._lock:
      self._machines.pop(name, None)
      self._hellos.pop(name, None)

  def _connect_again(self, name: str) -> None:
    """Every way from and to a worker; those that are lost themselves connect when they come back."""
    for source, target in self.ways:
      if name not in (source, target):
        continue
      other = target if name == source else source
      hello = self._hellos.get(other)
      try:
        self.connect(source, target)
      except PeerLost:
        if self._is_lost(name):
          raise
        if self._hellos.get(other) is hello and not self._is_lost(other):  # nobody else would make the way
          self.connect(source, target)

  def _is_lost(self, name: str) -> bool:
    try:
      self._peers[name].ask('clock')
    except PeerLost:
      return True
    return False


def absolute_checkpoint(checkpoint: str) -> str:
  """A checkpoint by a name that means the same in every folder: where there is such a path, all of it."""
  is_path = checkpoint not in ('random', 'smollm2') and os.path.exists(checkpoint)
  return os.path.abspath(checkpoint) if is_path else checkpoint


def _check_reach(source: str, ours: Machine, target: str, theirs: Machine) -> None:
  if ours.node != theirs.node and ours.address.startswith(('127.', '[::1]')):
    raise HandshakeError(
      f'worker {source!r} on {ours.node} lets KV be pulled at {ours.address} only, which {target!r} on '
      f"{theirs.node} cannot reach; set processes.host='node', and read docs/security.md before."
    )
