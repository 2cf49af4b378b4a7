"""What becomes of a lost worker: how often another process is tried, of what it is made, and what the loop hears."""

import dataclasses
import threading
import time

import pytest

from pdjax.engine import processes as processes_module
from pdjax.engine.peers import Loaded, PeerLost
from pdjax.engine.process_engine import ProcessEngine, Revived
from pdjax.engine.processes import Handshake, build_processes
from pdjax.serving.messages import WorkerBack, WorkerLost
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
    self.lives = 1
    self.raises: dict[str, list[Exception]] = {}  # by method, one a call
    self.waits: dict[str, threading.Event] = {}
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
    self.lives += 1

  def close(self):
    self.closed.set()

  def _restart(self):
    pass

  def _machine(self, platform, num_devices, host):
    self.machine = Machine(self.node, self.lives, (DeviceKind('cpu', 'cpu'),), ('cpu:0',), 1e9, f'{self.node}:1')
    return self.machine

  def _measure(self, *_):
    return ChipSpec.tpu_v5e()

  def _lend(self, *_):
    pass

  def _fetch(self, *_):
    return 0.001

  def _clock(self):
    return time.perf_counter()

  def _share_programs(self, folder):
    return folder or f'/programs-of-{self.name}'

  def _load(self, assignment):
    self.assigned.append(assignment)
    spec = assignment.spec
    pool = PoolShape(spec.num_pages, spec.page_size, spec.kv_dtype, 'plain', (spec.tp, 1))
    hello = Hello(spec.name, assignment.incarnation, self.machine, (), TINY, 'sum', 'float32', pool)
    return Loaded(hello, load_s=0.0, compile_s=0.0, program_s={})

  def _send_to(self, other):
    return WayPlan(4, 'float32', 1, (1, 1), ((1, 1),)), {}

  _receive_from = _send_to


def peers_of(*nodes: str) -> dict[str, Canned]:
  names = ('prefill0', 'decode0')
  return {name: Canned(name, node) for name, node in zip(names, nodes or ('here', 'here'), strict=True)}


@pytest.fixture
def peers():
  return peers_of()


@pytest.fixture
def built(peers):
  made = build_processes(config('1P1D'), TINY, peers)
  yield made
  made.engine.close()


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
  engine = built.engine
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
  engine = built.engine
  engine.start_clock()
  peers['decode0'].lost.append('it was stopped')
  lost, back = events_of(engine, 2)
  assert lost.returning and isinstance(back, WorkerBack) and back.comeback.tries == 3
  assert peers['decode0'].asked.count('restart') == 3
  assert 0 < back.comeback.failed_s < back.ended_s - lost.ended_s


def test_a_worker_that_does_not_come_back_in_three_tries_is_told_of_as_lost_for_good(built, peers):
  peers['decode0'].raises = {'machine': [PeerLost(f'silence {i}') for i in range(1, 4)]}
  engine = built.engine
  engine.start_clock()
  peers['decode0'].lost.append('it was stopped')
  lost, gone = events_of(engine, 2)
  assert (lost.returning, gone.returning) == (True, False) and isinstance(gone, WorkerLost)
  assert gone.error == "worker 'decode0' did not come back in 3 tries, of which the last: silence 3"
  engine.start_clock()  # a further run learns it at once
  (again,) = events_of(engine, 1)
  assert (again.worker, again.error, again.returning) == ('decode0', gone.error, False)


def test_a_run_that_begins_while_a_worker_is_being_brought_back_hears_both(built, peers):
  peers['decode0'].waits = {'load': threading.Event()}
  engine = built.engine
  engine.start_clock()
  peers['decode0'].lost.append('it was killed')
  assert events_of(engine, 1)[0].returning
  engine.start_clock()
  (lost,) = events_of(engine, 1)
  assert (lost.worker, lost.returning) == ('decode0', True)
  peers['decode0'].waits['load'].set()
  (back,) = events_of(engine, 1)
  assert isinstance(back, WorkerBack)


def test_a_worker_that_was_given_up_between_two_runs_is_not_waited_for(built, peers):
  peers['decode0'].raises = {'machine': [PeerLost('silence')] * 3}
  engine = built.engine
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


# ---------------------------------------------------------------------------- tries


def handshake_of(peers) -> Handshake:
  """One after which the workers are loaded and no way is connected."""
  handshake = Handshake(config('1P1D'), TINY, peers)
  handshake.specs = {spec.name: spec for spec in config('1P1D').cluster}
  for name in peers:
    handshake.begin(name)
    handshake.load(name, 1)
  return handshake


def test_what_does_not_fit_is_not_tried_again(peers):
  handshake = handshake_of(peers)
  peers['decode0'].raises = {'load': [HandshakeError('other weights')]}
  with pytest.raises(HandshakeError, match='other weights'):
    handshake.revive('decode0', 2)
  assert peers['decode0'].asked.count('restart') == 1


def test_what_may_be_over_soon_is_tried_again_after_a_while(peers, monkeypatch):
  monkeypatch.setattr(processes_module, '_PAUSE_S', 0.05)
  handshake = handshake_of(peers)
  peers['decode0'].raises = {'load': [RuntimeError('RESOURCE_EXHAUSTED'), DeviceError('in use')]}
  revived = handshake.revive('decode0', 2)
  assert revived.incarnation == 2 and revived.comeback.tries == 3 and revived.comeback.failed_s >= 0.1


def test_one_that_hangs_beside_a_worker_that_comes_back_does_not_keep_it_away(peers):
  handshake = handshake_of(peers)
  peers['prefill0'].raises = {'send_to': [PeerLost('prefill0 has not answered for 60 s')]}
  assert isinstance(handshake.revive('decode0', 2), Revived)


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
    return WayPlan(4, 'float32', 1, (1, 1), ((1, 1),)), {}

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
  built.engine.close()


# ---------------------------------------------------------------------------- the first time


@pytest.mark.parametrize('method', ['machine', 'load', 'fetch'])
def test_a_process_that_hangs_at_the_start_is_told_at_once_though_others_are_not_done(peers, method):
  lost = PeerLost("the process of worker 'decode0' has not answered for 60 s")
  peers['prefill0'].waits = {method: threading.Event()} if method != 'fetch' else {}
  peers['decode0'].raises = {method: [lost]}
  with pytest.raises(PeerLost, match="'decode0' has not answered for 60 s"):
    build_processes(config('1P1D'), TINY, peers)
  assert all(one.closed.is_set() for one in peers.values())


def test_a_pull_from_a_process_that_hangs_is_not_waited_for(peers, monkeypatch):
  monkeypatch.setattr(processes_module, '_LOOK_S', 0.01)
  peers['decode0'].waits = {'fetch': threading.Event()}
  peers['prefill0'].raises = {'clock': [PeerLost("the process of worker 'prefill0' has not answered for 60 s")]}
  with pytest.raises(PeerLost, match="'prefill0' has not answered for 60 s"):
    build_processes(config('1P1D'), TINY, peers)
