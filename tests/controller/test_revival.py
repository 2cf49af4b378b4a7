"""A lost worker comes back: the tries of another process, what it is made of, and what the loop hears."""

import dataclasses
import os
import threading
import time

import pytest

from pdjax.controller import process_engine as process_engine_module
from pdjax.controller import processes as processes_module
from pdjax.controller import program_folders as program_folders_module
from pdjax.controller.process_engine import ProcessEngine, Revived
from pdjax.controller.processes import Handshake, absolute_checkpoint, build_processes
from pdjax.host import node_name
from pdjax.program_folder import ProgramFolder, remove_when_unused
from pdjax.serving.events import WorkerBack, WorkerLost
from pdjax.serving.peers import Loaded, PeerLost
from pdjax.types.cluster import DeviceError
from pdjax.types.handshake import HandshakeError, Hello, Machine, PoolShape, WayPlan
from pdjax.types.hardware import ChipSpec, DeviceKind
from tests.tiny import TINY, config

LONG_S = 30.0


class Canned:
  """A process that answers what a good one would, unless it is to raise or to wait for something."""

  def __init__(self, name: str, node: str = 'here'):
    self.name = name
    self.node = node
    self.asked: list[str] = []
    self.assigned: list = []
    self.told: list[Hello] = []  # of which others
    self.processes = 1
    self.raises: dict[str, list[Exception]] = {}  # by method, one a call
    self.waits: dict[str, threading.Event] = {}
    self.weights = 'sum'
    self.kind = DeviceKind('cpu', 'cpu')
    self.closed = threading.Event()
    self.lost: list[str] = []  # why it is gone, once it is to be

  def ask(self, method, *args):
    self.asked.append(method)
    if method in self.waits:
      while not self.waits[method].wait(0.01):
        if self.closed.is_set():
          raise PeerLost(f'{self.name} is closed')
    if self.raises.get(method):
      raise self.raises[method].pop(0)
    return getattr(self, f'_{method}')(*args)

  def tell(self, message):
    pass

  def listen(self):
    if self.lost:
      raise PeerLost(self.lost.pop())
    time.sleep(0.01)
    return ()

  def restart(self):
    self.ask('restart')
    self.processes += 1

  def close(self):
    self.closed.set()

  def _restart(self):
    pass

  def _machine(self, platform, num_devices, host):
    self.machine = Machine(self.node, self.processes, (self.kind,), ('cpu:0',), 1e9, f'{self.node}:1')
    return self.machine

  def _measure(self, *_):
    return ChipSpec.tpu_v5e()

  def _lend(self, *_):
    pass

  def _fetch(self, *_):
    return 0.001

  def _clock(self):
    return time.perf_counter()

  def _share_programs(self, folder, readable=None):
    return folder or f'/programs-of-{self.name}'

  def _why_not_kept(self, folder):
    return None

  def _load(self, assignment):
    self.assigned.append(assignment)
    spec = assignment.spec
    pool = PoolShape(TINY.cache[0], spec.num_pages, spec.page_size, spec.kv_dtype, 'plain', (spec.tp, 1))
    hello = Hello(spec.name, assignment.incarnation, self.machine, (), TINY, self.weights, 'float32', (pool,))
    return Loaded(hello, load_s=0.0, compile_s=0.0, program_s={})

  def _send_to(self, other):
    self.told.append(other)
    return (WayPlan('kv', 4, 'float32', 1, (1, 1), ((1, 1),)),), {}

  _receive_from = _send_to


def peers_of(*nodes: str, split: str = '1P1D') -> dict[str, Canned]:
  names = [worker.name for worker in config(split).workers]
  return {name: Canned(name, node) for name, node in zip(names, nodes or ['here'] * len(names), strict=True)}


@pytest.fixture
def peers():
  return peers_of()


@pytest.fixture
def built(peers):
  made = build_processes(config('1P1D'), TINY, peers)
  yield made
  made.backend.close()


def events_of(engine: ProcessEngine, count: int) -> list:
  """The next so many."""
  events: list = []
  until_s = time.perf_counter() + LONG_S
  while len(events) < count:
    assert time.perf_counter() < until_s, events
    events += engine.wait(engine._mailbox.now_s() + 1.0)[1]
  return events


# ---------------------------------------------------------------------------- what the loop hears


def test_the_loop_hears_that_a_worker_is_being_brought_back_and_of_what_its_return_was_made(built, peers):
  engine = built.backend
  engine.start_clock()
  peers['decode0'].lost.append('it was killed')
  lost, back = events_of(engine, 2)
  assert (lost.worker, lost.error, lost.returning) == ('decode0', 'it was killed', True)
  assert isinstance(back, WorkerBack) and (back.worker, back.incarnation) == ('decode0', 2)
  took = back.comeback
  assert (took.tries, took.load_s) == (1, 0.0)
  whole_s = took.failed_s + took.start_s + took.load_s + took.compile_s + took.connect_s
  assert 0 < whole_s <= back.ended_s - lost.ended_s


def test_a_worker_that_hangs_while_it_comes_back_is_tried_again_and_the_failed_tries_are_told(built, peers):
  silent = PeerLost("the process of worker 'decode0' has not answered for 60 s")
  peers['decode0'].raises = {'load': [silent], 'receive_from': [silent], 'clock': [silent]}
  engine = built.backend
  engine.start_clock()
  peers['decode0'].lost.append('it was stopped')
  lost, back = events_of(engine, 2)
  assert lost.returning and isinstance(back, WorkerBack) and back.comeback.tries == 3
  assert peers['decode0'].asked.count('restart') == 3
  assert 0 < back.comeback.failed_s < back.ended_s - lost.ended_s


@pytest.fixture
def hasty(monkeypatch):
  """Pauses between tries that nobody notices."""
  monkeypatch.setattr(process_engine_module, '_PAUSE_S', 1e-4)


@pytest.fixture
def lasting(monkeypatch):
  """A pause after the first tries that no test outlives."""
  monkeypatch.setattr(process_engine_module, '_PAUSE_S', 60.0)


def test_a_worker_that_does_not_come_back_in_three_tries_is_waited_for_no_longer_and_tried_again(built, peers, hasty):
  """Such as one whose disk is full for some time."""
  silent = [PeerLost(f'silence {i}') for i in range(1, 4)]
  peers['decode0'].raises = {'machine': [*silent, OSError('No space left on device'), *silent]}
  engine = built.backend
  engine.start_clock()
  peers['decode0'].lost.append('it was stopped')
  lost, late, back = events_of(engine, 3)
  assert (lost.returning, late.returning) == (True, False) and isinstance(late, WorkerLost)
  assert late.error == "worker 'decode0' did not come back in 3 tries, of which the last: silence 3"
  assert isinstance(back, WorkerBack) and back.comeback.tries == peers['decode0'].asked.count('restart') == 8
  assert 0 < back.comeback.failed_s < back.ended_s - lost.ended_s


def test_pauses_between_tries_grow(built, peers, monkeypatch):
  engine, pauses = built.backend, []

  class Noting(threading.Event):
    def wait(self, timeout=None):
      pauses.append(timeout)
      return self.is_set()

  noting = Noting()
  monkeypatch.setattr(engine, '_closing', noting)
  peers['decode0'].raises = {'load': [PeerLost('gone'), *(RuntimeError('RESOURCE_EXHAUSTED') for _ in range(10))]}
  engine.start_clock()
  peers['decode0'].lost.append('it was killed')
  *_, back = events_of(engine, 3)
  assert back.comeback.tries == 12
  assert pauses == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0]


def test_a_worker_that_nobody_waits_for_is_told_of_in_the_next_run_too(built, peers, lasting):
  peers['decode0'].raises = {'machine': [PeerLost('silence')] * 3}
  engine = built.backend
  engine.start_clock()
  peers['decode0'].lost.append('it was stopped')
  _, late = events_of(engine, 2)
  engine.start_clock()
  (again,) = events_of(engine, 1)
  assert (again.worker, again.error, again.returning) == ('decode0', late.error, False)


def test_one_that_does_not_fit_is_given_up_at_once_and_its_thread_ends(built, peers):
  peers['decode0'].weights = 'other'
  engine = built.backend
  engine.start_clock()
  peers['decode0'].lost.append('it was killed')
  lost, gone = events_of(engine, 2)
  assert lost.returning and not gone.returning
  assert "worker 'decode0' has weights that sum to other, but worker 'prefill0' has" in gone.error
  for thread in engine._threads:
    if thread.name == 'pdjax-decode0':
      thread.join(LONG_S)
      assert not thread.is_alive()
  assert peers['decode0'].asked.count('restart') == 1


def test_closing_ends_a_worker_that_is_tried_again_and_again(peers, lasting):
  built = build_processes(config('1P1D'), TINY, peers)
  engine = built.backend
  peers['decode0'].raises = {'restart': [PeerLost('nothing here')] * 1000}
  engine.start_clock()
  peers['decode0'].lost.append('it was killed')
  events_of(engine, 2)
  engine.close()
  assert not any(thread.is_alive() for thread in engine._threads)
  assert peers['decode0'].asked.count('restart') == 3


def test_a_run_that_begins_while_a_worker_is_being_brought_back_hears_both(built, peers):
  peers['decode0'].waits = {'load': threading.Event()}
  engine = built.backend
  engine.start_clock()
  peers['decode0'].lost.append('it was killed')
  assert events_of(engine, 1)[0].returning
  engine.start_clock()
  (lost,) = events_of(engine, 1)
  assert (lost.worker, lost.returning) == ('decode0', True)
  peers['decode0'].waits['load'].set()
  (back,) = events_of(engine, 1)
  assert isinstance(back, WorkerBack)


def test_a_worker_that_was_not_brought_back_between_two_runs_is_not_waited_for(built, peers, lasting):
  peers['decode0'].raises = {'machine': [PeerLost('silence')] * 3}
  engine = built.backend
  engine.start_clock()
  peers['decode0'].lost.append('it was stopped')
  until_s = time.perf_counter() + LONG_S
  while len(engine._mailbox._items) < 2:  # the loss and the end of all tries
    assert time.perf_counter() < until_s
    time.sleep(0.01)
  engine.start_clock()
  (lost,) = events_of(engine, 1)
  assert not lost.returning and 'did not come back' in lost.error


def test_without_anybody_who_brings_it_back_a_worker_is_lost_for_good_from_the_first_word():
  peer = Canned('prefill0')
  engine = ProcessEngine({'prefill0': peer}, {'prefill0': 1}, {'prefill0': 0.0})
  peer.lost.append('gone')
  lost, gone = events_of(engine, 2)
  assert not lost.returning and not gone.returning
  engine.close()


def test_a_run_ends_when_it_is_told_that_all_processes_are_lost(peers):
  told: list = []
  built = build_processes(config('1P1D'), TINY, peers, when_lost=told.append)
  (fail,) = told
  built.backend.start_clock()
  fail(DeviceError('the control service is lost'))
  with pytest.raises(DeviceError, match='the control service is lost'):
    built.backend.wait(LONG_S)
  built.backend.close()


# ---------------------------------------------------------------------------- tries


def handshake_of(peers, run=None, say=lambda line: None) -> Handshake:
  """One after which the workers are loaded and no way is connected."""
  run = run or config(f'{len(peers) // 2}P{len(peers) // 2}D')
  handshake = Handshake(run, TINY, peers, say)
  handshake.specs = {spec.name: spec for spec in run.cluster}
  handshake.count_on({name: handshake.begin(name) for name in peers})
  handshake.admit([handshake.load(name, 1).hello for name in peers])
  return handshake


@pytest.mark.parametrize('wrong', ['weights', 'devices', 'model', 'node', 'cut'])
def test_one_that_does_not_fit_keeps_no_other_away(wrong):
  peers = peers_of(split='2P2D')
  handshake = handshake_of(peers)
  peer = peers['decode0']
  match wrong:
    case 'weights':
      peer.weights = 'other'
    case 'devices':
      handshake._config = dataclasses.replace(handshake._config, dtype='bfloat16')
      peer.kind = DeviceKind('Tesla T4', 'gpu', '7.5')
    case 'model':
      peer.raises = {'load': [HandshakeError('another model')]}
    case 'cut':
      peer.raises = {'receive_from': [HandshakeError('another piece_heads')]}
    case 'node':
      for one in peers.values():
        one.node = '127.0.0.1'
      handshake = handshake_of(peers)
      peer.node = 'elsewhere'
  with pytest.raises(HandshakeError):
    handshake.revive('decode0', 2)
  for name in ('prefill0', 'prefill1', 'decode1'):
    assert handshake.revive(name, 2).incarnation == 2
    assert peers[name].asked.count('restart') == 1
  assert peer.asked.count('receive_from') == (wrong == 'cut')  # nobody counts on it any more


def test_all_that_come_back_are_compared_with_what_the_run_began_with(peers):
  handshake = handshake_of(peers)
  for name in peers:  # both are lost, and there is nobody else to compare with
    handshake._forget(name)
  peers['decode0'].weights = 'other'
  with pytest.raises(HandshakeError, match=r"'decode0' has weights that sum to other, but worker 'prefill0' has"):
    handshake.revive('decode0', 2)
  assert isinstance(handshake.revive('prefill0', 2), Revived)


def test_what_may_be_over_soon_is_tried_again_after_a_while(built, peers, hasty):
  peers['decode0'].raises = {'load': [RuntimeError('RESOURCE_EXHAUSTED'), DeviceError('in use')]}
  engine = built.backend
  engine.start_clock()
  peers['decode0'].lost.append('it was killed')
  _, back = events_of(engine, 2)
  assert back.incarnation == 2 and back.comeback.tries == 3 and back.comeback.failed_s >= 2e-4


def test_one_that_hangs_beside_a_worker_that_comes_back_does_not_keep_it_away(peers):
  handshake = handshake_of(peers)
  silent = PeerLost('prefill0 has not answered for 60 s')
  peers['prefill0'].raises = {'send_to': [silent], 'clock': [silent]}
  assert isinstance(handshake.revive('decode0', 2), Revived)
  assert peers['prefill0'].asked.count('send_to') == 1  # it makes the way when it is back


def test_a_way_that_failed_between_two_that_live_is_made_again(peers):
  handshake = handshake_of(peers)
  peers['prefill0'].raises = {'send_to': [PeerLost('a call was lost')]}
  handshake.revive('decode0', 2)
  assert peers['prefill0'].asked.count('send_to') == 2
  peers['prefill0'].raises = {'send_to': [PeerLost('a call was lost')] * 2}
  with pytest.raises(PeerLost, match='a call was lost'):  # rather another try than a way that nobody makes
    handshake.revive('decode0', 3)


def test_a_worker_whose_next_process_has_loaded_nothing_is_not_waited_for(peers):
  """The other was lost, and has another process, while a worker came back that knew it from before."""
  handshake = handshake_of(peers)

  def restarted(other):
    handshake._forget('prefill0')
    raise PeerLost('process 7 has not loaded a worker yet')

  peers['prefill0']._send_to = restarted
  assert isinstance(handshake.revive('decode0', 2), Revived)
  assert peers['prefill0'].asked.count('send_to') == 1


def test_of_two_that_come_back_at_once_only_one_makes_the_way_between_them(peers):
  handshake = handshake_of(peers)
  going, most = [0], [0]
  lock = threading.Lock()

  def connecting(other):
    with lock:
      going[0] += 1
      most[0] = max(most[0], going[0])
    time.sleep(0.05)
    with lock:
      going[0] -= 1
    return (WayPlan('kv', 4, 'float32', 1, (1, 1), ((1, 1),)),), {}

  peers['prefill0']._send_to = connecting
  threads = [threading.Thread(target=handshake.connect, args=('prefill0', 'decode0')) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert most == [1]


# ---------------------------------------------------------------------------- compiled programs


def test_processes_of_a_host_share_a_folder_of_programs_and_another_host_has_its_own():
  peers = peers_of('here', 'there')
  handshake = handshake_of(peers)
  assert [one.assigned[-1].compilation_cache for one in peers.values()] == [
    '/programs-of-prefill0', '/programs-of-decode0',
  ]  # fmt: skip
  peers = peers_of('here', 'here')
  handshake = handshake_of(peers)
  first, second = (one.assigned[-1].compilation_cache for one in peers.values())
  assert first == second == '/programs-of-prefill0'
  handshake.revive('prefill0', 2)
  assert peers['prefill0'].assigned[-1].compilation_cache == first


@pytest.mark.parametrize('given', ['/kept/here', 'off'])
def test_a_folder_that_the_config_names_is_taken_as_it_is(given):
  peers = peers_of()
  built = build_processes(dataclasses.replace(config('1P1D'), compilation_cache=given), TINY, peers)
  assert {one.assigned[-1].compilation_cache for one in peers.values()} == {given}
  assert not any('share_programs' in one.asked for one in peers.values())
  built.backend.close()


def test_where_the_named_folder_takes_no_programs_a_temporary_one_does_and_it_is_said_once_a_host(monkeypatch):
  peers = peers_of()
  for one in peers.values():
    monkeypatch.setattr(one, '_why_not_kept', lambda folder: 'Read-only file system', raising=False)
  said = []
  built = build_processes(dataclasses.replace(config('1P1D'), compilation_cache='/kept'), TINY, peers, say=said.append)
  assert len({one.assigned[-1].compilation_cache for one in peers.values()} | {'/kept'}) == 2
  (line,) = [line for line in said if 'Read-only' in line]
  assert line == (
    "compilation_cache '/kept' takes no programs on here (Read-only file system); they are kept for this run only"
  )
  built.backend.close()


def test_where_no_folder_can_be_made_the_run_is_served_without_and_it_is_said_once(peers):
  for one in peers.values():
    one.raises = {'share_programs': [OSError(28, 'No space left on device')] * 9}
  said = []
  built = build_processes(config('1P1D'), TINY, peers, say=said.append)
  assert [one.assigned[-1].compilation_cache for one in peers.values()] == [None, None]
  assert len([line for line in said if 'No space left on device' in line and 'programs' in line]) == 1
  built.backend.close()


def test_a_process_that_hangs_over_the_folder_keeps_no_other_of_its_host_waiting(peers):
  handshake = handshake_of(peers)
  peers['decode0'].waits = {'share_programs': threading.Event()}

  def come_back():
    with pytest.raises(PeerLost):
      handshake.revive('decode0', 2)

  hanging = threading.Thread(target=come_back)
  hanging.start()
  while peers['decode0'].asked.count('share_programs') < 2:
    time.sleep(0.001)
  assert isinstance(handshake.revive('prefill0', 2), Revived) and hanging.is_alive()
  peers['decode0'].closed.set()
  hanging.join()


def test_the_controller_keeps_the_folder_of_its_host_until_the_end(monkeypatch, tmp_path):
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
  peers, made = peers_of(node_name(), node_name()), []

  def share(folder, readable=None):  # as a process that is killed at once
    made.append(ProgramFolder.share(folder))
    os.close(made[-1]._held)
    return made[-1].path

  for one in peers.values():
    one._share_programs = share
  built = build_processes(config('1P1D'), TINY, peers)
  assert len({one.path for one in made}) == 1
  remove_when_unused(made[0].path, 0.0)
  assert os.path.isdir(made[0].path)
  monkeypatch.setattr(program_folders_module, '_REMOVE_S', LONG_S)
  built.backend.close()
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('kept', ['programs', '/kept', 'gs://bucket/kept'])
def test_processes_are_told_paths_that_mean_the_same_in_every_folder(kept, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'weights.gguf').touch()
  peers = peers_of()
  run = dataclasses.replace(config('1P1D'), compilation_cache=kept, checkpoint='weights.gguf')
  handshake_of(peers, run)
  assigned = peers['decode0'].assigned[-1]
  assert assigned.checkpoint == str(tmp_path / 'weights.gguf')
  assert assigned.compilation_cache == (str(tmp_path / kept) if kept == 'programs' else kept)


@pytest.mark.parametrize('name', ['random', 'smollm2', 'owner/name', 'owner/name:file.gguf'])
def test_a_checkpoint_that_is_no_path_keeps_its_name(name, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'random').touch()
  assert absolute_checkpoint(name) == name


# ---------------------------------------------------------------------------- the first time


@pytest.mark.parametrize('method', ['machine', 'load', 'fetch'])
def test_a_process_that_hangs_at_the_start_is_told_at_once_though_others_are_not_done(peers, method):
  lost = PeerLost("the process of worker 'decode0' has not answered for 60 s")
  peers['prefill0'].waits = {method: threading.Event()} if method != 'fetch' else {}
  peers['decode0'].raises = {method: [lost]}
  with pytest.raises(PeerLost, match="'decode0' has not answered for 60 s"):
    build_processes(config('1P1D'), TINY, peers)
  assert all(one.closed.is_set() for one in peers.values())


@pytest.mark.parametrize('method', ['machine', 'load'])
def test_a_process_that_hangs_when_it_is_done_is_noticed_while_others_are_not(peers, method, monkeypatch):
  monkeypatch.setattr(processes_module, '_LOOK_S', 0.01)
  peers['prefill0'].waits = {method: threading.Event()}
  peers['decode0'].raises = {'clock': [PeerLost("the process of worker 'decode0' has not answered for 60 s")]}
  with pytest.raises(PeerLost, match="'decode0' has not answered for 60 s"):
    build_processes(config('1P1D'), TINY, peers)
  assert peers['prefill0'].asked[-1] == method


def test_a_pull_from_a_process_that_hangs_is_not_waited_for(peers, monkeypatch):
  monkeypatch.setattr(processes_module, '_LOOK_S', 0.01)
  peers['decode0'].waits = {'fetch': threading.Event()}
  peers['prefill0'].raises = {'clock': [PeerLost("the process of worker 'prefill0' has not answered for 60 s")]}
  with pytest.raises(PeerLost, match="'prefill0' has not answered for 60 s"):
    build_processes(config('1P1D'), TINY, peers)


def test_a_pull_of_which_nothing_comes_though_both_live_is_not_waited_for(peers, monkeypatch):
  """A firewall swallows it."""
  monkeypatch.setattr(processes_module, '_LOOK_S', 0.01)
  monkeypatch.setattr(processes_module, '_PULL_S', 0.02)
  peers['decode0'].waits = {'fetch': threading.Event()}
  with pytest.raises(DeviceError, match=r"'decode0' pulled nothing from 'prefill0' at here:1 for 0\.02 s"):
    build_processes(config('1P1D'), TINY, peers)
  assert all(one.closed.is_set() for one in peers.values())
