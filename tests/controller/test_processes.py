"""Workers in processes of their own, with threads in the place of processes: what they say to each other and when."""

import dataclasses
import itertools
import threading
import time
import types

import jax
import numpy as np
import pytest

from pdjax import Session
from pdjax.controller.process_engine import ProcessEngine
from pdjax.controller.processes import build_processes, clock_offset
from pdjax.deployment import Deployment
from pdjax.engine.runner import Runner
from pdjax.engine.waiters import Waiters
from pdjax.engine.worker import Worker
from pdjax.engine.worker_engine import WorkerEngine
from pdjax.engine.worker_process import WorkerProcess
from pdjax.kv.transfer import Parcel
from pdjax.kv.transfer.cross_process import Offer, Server, describe_pool
from pdjax.model.checkpoint import RandomCheckpoint
from pdjax.opened_model import OpenedModel
from pdjax.policies import Disaggregated
from pdjax.serving.events import AllBlocksCleared, Done, Failed, RoleChanged, Started, WorkerBack, WorkerLost
from pdjax.serving.orders import AbandonOrder, StepOrder, TransferOrder
from pdjax.serving.peers import Gathered, Offered, PeerLost, Pull, Settle, StartClock, Submit, TransferFailed, Written
from pdjax.types import FaultSpec, HostPlace, PrefixCache, Request, Role, SamplingParams, TransferSpec
from pdjax.types.faults import ALL_FAIL
from pdjax.types.handshake import HandshakeError, Hello, Machine
from pdjax.types.hardware import DeviceKind
from pdjax.types.span import Span
from pdjax.workload import Listed
from tests.controller.thread_peers import Processes, ThreadPeer, assert_right_or_failed, plain
from tests.engine.cluster import compiled
from tests.engine.plain import generate
from tests.switching import EITHER, TakeTurns, under_load
from tests.tiny import TINY, TINY_8_2, config, prompt, requests

SPEC = TransferSpec(granularity='chunk', piece_bytes=4096, checksums=True)


@pytest.fixture(scope='module')
def processes():
  """One prefill and one decode process of one device each."""
  built = Processes.of(dataclasses.replace(config('1P1D'), transfer=SPEC))
  yield built
  built.built.backend.close()


@pytest.fixture(scope='module')
def unequal():
  """A prefill process of two devices and a decode process of four, unlike in page size and cut; KV goes by layers."""
  run = config('1P1D', 2, 4, model=TINY_8_2)
  workers = [dataclasses.replace(one, page_size=size) for one, size in zip(run.workers, (4, 1), strict=True)]
  spec = TransferSpec(granularity='layers', layer_groups=2, piece_bytes=4096, checksums=True)
  built = Processes.of(dataclasses.replace(run, workers=workers, transfer=spec))
  yield built
  built.built.backend.close()


# ---------------------------------------------------------------------------- serving


def test_tokens_are_those_of_a_plain_loop_and_every_byte_is_counted(processes):
  for _ in range(2):  # a second run finds nothing of the first
    served = processes.serve(requests())
    assert served.tokens() == plain(served)
    for order, done in served.transfers():
      assert done.wire_bytes == order.span.tokens * TINY.cached_token_bytes('float32')


def test_unequal_processes_are_exact(unequal):
  served = unequal.serve(requests((1, 3, 16, 17, 40, 5)))
  assert {order.span.layers for order, _ in served.transfers()} >= {(0, 1), (1, 2)}
  assert served.tokens() == plain(served, TINY_8_2)


@pytest.mark.parametrize('split', ['2P1D', pytest.param('2P2D', marks=pytest.mark.slow)])
def test_several_processes_are_exact(split):
  several = Processes.of(dataclasses.replace(config(split), transfer=SPEC))
  try:
    served = several.serve(requests())
    assert {name for order, _ in served.transfers() for name in (order.source, order.target)} == set(several.peers)
    assert served.tokens() == plain(served)
  finally:
    several.built.backend.close()


def test_what_became_of_a_worker_between_two_runs_counts_in_the_next(processes):
  served = processes.serve(requests((9,)))
  peer, heard = processes.peers['decode0'], threading.Event()
  incarnation = processes.built.backend.workers['decode0'].incarnation
  peer.on_news = lambda news: (heard.set() if isinstance(news, WorkerBack) else None, (news,))[1]
  peer.process.engine._runner.post_broken(incarnation, 'it failed late')
  assert heard.wait(20)
  time.sleep(0.2)  # until it is posted
  again = processes.serve(requests((9,)))
  assert again.incarnations['decode0'] == incarnation + 1
  assert again.tokens() == served.tokens() == plain(again)


def test_a_run_that_was_broken_off_leaves_nothing_to_the_next(processes, monkeypatch):
  """Closed after any event, with requests of the same ids: whatever is under way then comes late."""
  collect, wait = Worker.collect, Parcel.wait
  monkeypatch.setattr(Worker, 'collect', lambda *args: (time.sleep(0.02), collect(*args))[1])
  monkeypatch.setattr(Parcel, 'wait', lambda parcel: (time.sleep(0.02), wait(parcel))[1])
  deployment, under_way = Deployment(processes.config, OpenedModel(TINY), processes.built), 0
  whole = len(tuple(deployment.serve(Listed(requests((20, 9, 5))))))
  for kept in range(1, whole, 7):
    events = deployment.serve(Listed(requests((20, 9, 5))))
    for event in itertools.islice(events, kept):
      under_way += isinstance(event, Started) - (isinstance(event, Done) and event.to_come == 0)
    events.close()
    served = processes.serve(requests((5, 17, 9)))
    assert served.tokens() == plain(served), f'closed after {kept} events'
  engines, until_s = [peer.process.engine for peer in processes.peers.values()], time.monotonic() + 20.0
  while any(engine._incoming.under_way or engine._outgoing for engine in engines):
    assert time.monotonic() < until_s
    time.sleep(0.01)
  assert under_way > 10


def test_a_transfer_has_its_times_in_order_though_two_processes_tell_them(processes):
  served = processes.serve(requests())
  assert served.transfers()
  for _, done in served.transfers():
    assert 0 < done.began_s <= done.trip.wire_began_s <= done.trip.arrived_s <= done.ended_s
    assert done.trip.pieces >= 1
  stamps = [event.ended_s for event in served.events if hasattr(event, 'ended_s')]
  assert stamps == sorted(set(stamps))


def test_a_step_and_the_transfers_that_leave_with_it_are_one_message(processes):
  told = []
  peer = processes.peers['prefill0']
  processes.serve(requests((9,)), prepare=lambda: setattr(peer, 'on_tell', lambda m: told.append(m) or m))
  (submit,) = (message for message in told if isinstance(message, Submit))
  step, transfer = submit.orders
  assert isinstance(step, StepOrder) and isinstance(transfer, TransferOrder) and transfer.after == step.id
  assert [type(message) for message in told] == [Submit, Settle]


def test_a_pull_begins_only_once_its_pieces_were_offered(processes):
  said = []
  source, target = processes.peers['prefill0'], processes.peers['decode0']

  def prepare():
    source.on_news = lambda news: said.append(type(news)) or (news,)
    target.on_tell = lambda message: said.append(type(message)) or message

  processes.serve(requests((9,)), prepare)
  assert said.index(Offered) < said.index(Pull)


def test_hosts_that_cannot_reach_each_other_are_refused_before_anything_is_pulled():
  asked = []

  class Elsewhere:
    def __init__(self, node: str):
      self.node = node

    def ask(self, method, *args):
      asked.append(method)
      return Machine(self.node, 1, (DeviceKind('cpu', 'cpu'),), ('cpu:0',), 1e9, '127.0.0.1:1')

  with pytest.raises(
    HandshakeError, match=r"on a lets KV be pulled at 127\.0\.0\.1:1 only, which 'decode0' on b cannot"
  ):
    build_processes(config('1P1D'), TINY, {'prefill0': Elsewhere('a'), 'decode0': Elsewhere('b')})
  assert asked == ['machine', 'machine']


def test_a_way_that_is_made_while_its_worker_serves_leaves_its_pages_alone(processes):
  processes.serve(requests())
  source, target = (processes.peers[name].process for name in ('prefill0', 'decode0'))
  worker, receivers = target.engine.worker, target.engine.receivers
  before = [np.array(layer) for layer in worker.pages.layers]
  assert any(layer[:4].any() for layer in before)
  known = receivers.pop(('prefill0', 'kv'))
  pools = (describe_pool(TINY.cache[0], source.engine.worker.pools['kv']),)
  hello = Hello('prefill0', 1, source._machine, (), TINY, '', 'float32', pools)
  (plan,), _ = target.receive_from(hello)
  assert plan == known.plan('kv') and receivers['prefill0', 'kv'] is not known
  for layer, same in zip(worker.pages.layers, before, strict=True):
    np.testing.assert_array_equal(layer, same)


def test_a_trace_cuts_requests_short_in_other_processes_too(processes):
  lengths = {'r0': 2, 'r3': 1}
  served = processes.serve(requests(), arrivals=Listed(requests(), lengths))
  assert {name: len(one.token_ids) for name, one in served.by_id.items() if name in lengths} == lengths
  assert len(served.by_id['r4'].token_ids) > 2


class Heard:
  """A process that hears what it is told, and tells only what a test has it tell."""

  def __init__(self):
    self.told = []
    self.news = ()

  def tell(self, message):
    self.told.append(message)

  def listen(self):
    time.sleep(0.01)
    news, self.news = self.news, ()
    return news

  def close(self):
    pass


def test_no_two_transfers_have_one_number_though_each_run_counts_its_orders_anew():
  peers = {'prefill0': Heard(), 'decode0': Heard()}
  engine = ProcessEngine(peers, dict.fromkeys(peers, 1), dict.fromkeys(peers, 0.0))
  span = Span((0,), (0,), 0, 4)
  numbers = []
  for _ in range(2):
    engine.start_clock()
    peers['prefill0'].told.clear()
    orders = [TransferOrder(id, 'r', 'prefill0', 'decode0', span) for id in (3, 0, 8)]
    engine.submit(orders)
    engine.submit([AbandonOrder(9, 3, 'prefill0', 'decode0')])
    submit, settle = peers['prefill0'].told
    assert settle == Settle(submit.first_number + 3, pulled=False) == peers['decode0'].told[-1]
    numbers += [submit.first_number + order.id for order in submit.orders]
  assert len(set(numbers)) == 6
  engine.close()


def test_what_is_under_way_as_a_run_begins_is_let_go_of_and_a_step_of_an_earlier_run_is_not_heard_of():
  peers = {'prefill0': Heard(), 'decode0': Heard()}
  engine = ProcessEngine(peers, dict.fromkeys(peers, 1), dict.fromkeys(peers, 0.0))
  number = None
  for _ in range(2):
    engine.start_clock()
    if number is not None:
      told = [message for message in peers['decode0'].told if isinstance(message, Settle)]
      assert told == [Settle(number + 1, pulled=False)]
    transfer = TransferOrder(1, 'r', 'prefill0', 'decode0', Span((0,), (0,), 0, 4))
    engine.submit([StepOrder(0, 'prefill0'), transfer])
    late, number = number, peers['prefill0'].told[-1].first_number
  peers['prefill0'].news = (Done(late, 0.0, 1.0), Failed(late, 1.0, 'late'), Done(number, 0.0, 1.0))
  _, (done,) = engine.wait(20.0)
  assert isinstance(done, Done) and done.order == 0
  engine.close()


# ---------------------------------------------------------------------------- faults


def test_late_doubled_and_reordered_news_of_transfers_change_nothing(processes):
  held: list = []

  def disturb(news):
    match news:
      case Gathered():
        held.append(news)
        return ()  # told after the target's news
      case Written():
        held.append(news)
        return news, news
    return (news,)

  source, target = processes.peers['prefill0'], processes.peers['decode0']

  def prepare():
    source.on_news = lambda news: (*disturb(news), *late())
    target.on_news = disturb

  def late():
    found, held[:] = [one for one in held if isinstance(one, Gathered)], []
    return (*found, *found)

  served = processes.serve(requests(), prepare)
  assert served.tokens() == plain(served)


def test_a_transfer_whose_source_is_not_heard_of_again_ends_when_it_is_written(processes):
  def prepare():
    processes.peers['prefill0'].on_news = lambda news: () if isinstance(news, Gathered) else (news,)

  served = processes.serve(requests(), prepare)
  assert served.tokens() == plain(served) and served.transfers()
  for _, done in served.transfers():
    assert 0 < done.began_s <= done.trip.wire_began_s <= done.trip.arrived_s <= done.ended_s
  assert not any(isinstance(event, Started) and isinstance(event.order, AbandonOrder) for event in served.events)


@pytest.mark.parametrize('faults', [FaultSpec(backoff_s=0.0), ALL_FAIL])
@pytest.mark.parametrize('end', ['prefill0', 'decode0'])
def test_a_transfer_that_fails_on_either_end_is_tried_again_or_fails_its_request_alone(processes, end, faults):
  failed: list[int] = []

  def fail_second(news):
    if isinstance(news, Offered if end == 'prefill0' else Written):
      failed.append(news.number)
      if len(failed) == 2:
        return (TransferFailed(news.number, 'RuntimeError: torn'),)
    return (news,)

  served = processes.changed(faults=faults).serve(
    requests((9, 9, 9, 9)), prepare=lambda: setattr(processes.peers[end], 'on_news', fail_second)
  )
  assert len(assert_right_or_failed(served)) == (1 if faults is ALL_FAIL else 0)


@pytest.mark.parametrize('kind', [Offered, Written])
def test_a_transfer_of_which_news_are_lost_is_given_up_at_its_deadline_and_tried_again(processes, kind):
  dropped: list = []

  def drop_first(news):
    if isinstance(news, kind) and not dropped:
      dropped.append(news)
      return ()
    return (news,)

  def prepare():
    for peer in processes.peers.values():
      peer.on_news = drop_first

  spec = dataclasses.replace(SPEC, deadline_s=0.2)
  served = processes.changed(transfer=spec, faults=FaultSpec(backoff_s=0.0)).serve(requests((9, 9, 9)), prepare)
  assert dropped and assert_right_or_failed(served) == []
  assert any(isinstance(event, Started) and isinstance(event.order, AbandonOrder) for event in served.events)


class Standing(Parcel):
  """Sixty bytes that do not arrive before the link moves again."""

  def __init__(self, link: threading.Event):
    super().__init__((), (0, 1), wire_bytes=60, num_pieces=1, gathered=())
    self._link = link

  def is_there(self):
    return self._link.is_set()

  def wait(self):
    self._link.wait(60.0)


def test_pulls_that_were_given_up_take_no_more_memory_than_staging_has_though_none_ever_ends(processes):
  link = threading.Event()
  engine = WorkerEngine(processes.peers['decode0'].process.engine.worker, staging_bytes=100)
  engine.receivers['prefill0', 'kv'] = types.SimpleNamespace(pull=lambda *_: Standing(link))
  order = TransferOrder(0, 'r', 'prefill0', 'decode0', Span((0,), (0,), 0, 4))
  engine.start_clock()

  def refused(number: int) -> list[TransferFailed]:
    engine.pull(number, order, ())
    engine.settle(number, pulled=True)
    return [news for news in engine.wait(0.0)[1] if isinstance(news, TransferFailed)]

  assert refused(1) == refused(2) == []
  (failed,) = refused(3)
  assert (
    failed.number == 3 and not failed.pulled and 'pulls of 120 bytes' in failed.error and 'prefill0' in failed.error
  )
  link.set()
  assert refused(4) == []
  engine.close()


def fail_once(monkeypatch, kind: type, name: str, when) -> list:
  """Let a method raise when that is first so; what it was called with then."""
  function, failed = getattr(kind, name), []

  def fails(*args):
    if not failed and when(*args):
      failed.append(args)
      raise RuntimeError("can't start new thread")
    return function(*args)

  monkeypatch.setattr(kind, name, fails)
  return failed


@pytest.mark.parametrize('where', ['without_arrays', 'manifest', 'wait for the offer', 'wait for the pieces', 'run'])
def test_whatever_goes_wrong_as_an_order_is_dispatched_fails_that_alone(processes, monkeypatch, where):
  match where:
    case 'without_arrays':
      failed = fail_once(monkeypatch, Offer, where, lambda offer: True)
    case 'manifest':
      found = Offer.manifest
      monkeypatch.setattr(Offer, '_found', lambda offer: found.fget(offer), raising=False)
      failed = fail_once(monkeypatch, Offer, '_found', lambda offer: True)
      monkeypatch.setattr(Offer, where, property(lambda offer: offer._found()))
    case 'run':
      failed = fail_once(monkeypatch, Runner, where, lambda runner, order, after: bool(order.decodes))
    case _:
      at_source = where == 'wait for the offer'
      failed = fail_once(monkeypatch, Waiters, 'add', lambda waiters, key, job: isinstance(key, int) == at_source)
  served = processes.changed(faults=FaultSpec(backoff_s=0.0)).serve(requests((9, 5)))
  assert failed and served.tokens() == plain(served)
  assert len([event for event in served.events if isinstance(event, Failed)]) == 1
  assert not any(isinstance(event, WorkerLost) for event in served.events)


def test_pieces_that_arrive_damaged_are_not_written_and_fail_their_request_alone(unequal, monkeypatch):
  damaged: list[int] = []
  pull = Server.pull

  def damaging(self, address, number, shapes):
    arrays = pull(self, address, number, shapes)
    if not damaged:
      damaged.append(number)
      arrays[0] = jax.device_put(np.asarray(arrays[0]) + np.float32(1e-3), arrays[0].sharding)
    return arrays

  monkeypatch.setattr(Server, 'pull', damaging)
  served = unequal.serve(requests((16, 17, 5)))
  assert damaged
  (failed,) = (one for one in served.completions if one.error)
  assert 'pieces of pages are not those that were sent' in failed.error
  expected = plain(served, TINY_8_2)
  assert all(served.tokens()[name] == expected[name] for name in expected if name != failed.request.id)


@pytest.mark.parametrize('worker', ['prefill0', 'decode0'])
@pytest.mark.parametrize('when', [StartClock, Pull, Written, Settle])
def test_a_killed_process_comes_back_and_everyone_ends_once(processes, worker, when):
  """Killed at once, when a transfer is pulled, when it is written, when it is over."""
  peer = processes.peers[worker]
  seen = []

  def kill_at(kind):
    def watch(said):
      if isinstance(said, kind) and not seen:
        seen.append(said)
        peer.kill()
      return said

    return watch

  def prepare():
    if when is StartClock:
      seen.append(when)
      peer.kill()
      return
    on_target, on_source = processes.peers['decode0'], processes.peers['prefill0']
    if when is Written:
      on_target.on_news = lambda news: (kill_at(Written)(news),)
    else:
      (on_target if when is Pull else on_source).on_tell = kill_at(when)

  served = processes.serve(requests((9, 17, 4, 40, 12)), prepare)
  assert seen
  assert assert_right_or_failed(served) == []  # what was lost is computed again
  (lost,) = (event for event in served.events if isinstance(event, WorkerLost))
  back = [event for event in served.events if isinstance(event, WorkerBack) and event.worker == worker]
  assert lost.worker == worker and 'was killed' in lost.error and back
  after = processes.serve(requests())
  assert after.tokens() == plain(after)


def test_a_step_that_breaks_begins_another_incarnation_in_the_same_process(processes):
  worker = processes.peers['decode0'].process.engine.worker
  collect, broken = worker.collect, []

  def breaking(order, pending):
    if not broken:
      broken.append(order)
      raise RuntimeError('the device fell over')
    return collect(order, pending)

  before = worker.incarnation
  try:
    served = processes.serve(requests((9, 9)), prepare=lambda: setattr(worker, 'collect', breaking))
  finally:
    del worker.collect
  assert [event.error for event in served.events if isinstance(event, WorkerLost)] == [
    'RuntimeError: the device fell over'
  ]
  assert worker.incarnation == before + 1
  assert assert_right_or_failed(served) == []
  after = processes.serve(requests())
  assert after.tokens() == plain(after)


def test_a_worker_that_cannot_come_back_stays_lost_and_the_reason_is_said():
  class Silent:
    name = 'prefill0'

    def ask(self, method, *args):
      raise PeerLost('gone')

    listen = restart = lambda self: self.ask('')
    tell = lambda self, message: None  # noqa: E731
    close = lambda self: None  # noqa: E731

  engine = ProcessEngine({'prefill0': Silent()}, {'prefill0': 1}, {'prefill0': 0.0})
  events = []
  while len(events) < 2:
    now_s, more = engine.wait(30.0)
    assert now_s < 30.0
    events += more
  assert [(event.worker, event.error) for event in events] == [
    ('prefill0', 'gone'),
    ('prefill0', 'it is lost and stays so: gone'),
  ]
  engine.close()


# ---------------------------------------------------------------------------- handshake


def test_a_process_with_other_weights_is_refused_naming_both(monkeypatch):
  run = dataclasses.replace(config('1P1D'), transfer=SPEC)
  peers = {one.name: ThreadPeer(one.name, [device]) for one, device in zip(run.workers, jax.devices(), strict=False)}
  monkeypatch.setattr(WorkerProcess, 'compile_worker', lambda self, worker: {})
  monkeypatch.setattr(
    peers['decode0'].process, '_open_checkpoint', lambda assignment: RandomCheckpoint(assignment.model, seed=1)
  )
  with pytest.raises(HandshakeError, match=r"'prefill0' has weights that sum to \w{16}, but worker 'decode0' has"):
    build_processes(run, run.model, peers)
  for peer in peers.values():
    peer.close()


def test_a_process_of_another_model_is_refused_before_its_weights_are_loaded(tmp_path, monkeypatch):
  from tests.hf import write_folder

  write_folder(tmp_path, RandomCheckpoint(TINY_8_2))
  run = dataclasses.replace(config('1P1D'), checkpoint=str(tmp_path))
  peers = {one.name: ThreadPeer(one.name, [device]) for one, device in zip(run.workers, jax.devices(), strict=False)}
  with pytest.raises(HandshakeError, match=r"checkpoint .* at worker '.*' holds .*query_heads=8.*query_heads=6"):
    build_processes(run, TINY, peers)


@pytest.mark.parametrize('method', ['send_to', 'receive_from'])
def test_a_process_that_has_loaded_nothing_says_so_as_one_that_is_lost(method):
  with pytest.raises(PeerLost, match='has not loaded a worker yet'):
    getattr(WorkerProcess(), method)(None)


def test_clocks_of_other_hosts_are_compared_by_the_quickest_answer():
  class Far:
    asked = 0

    def ask(self, method):
      self.asked += 1
      time.sleep(0.02 if self.asked % 4 else 0.0)
      return time.perf_counter() + 100.0

  assert clock_offset(Far(), 'elsewhere') == pytest.approx(100.0, abs=5e-3)


# ---------------------------------------------------------------------------- what is cached


def alike(*lengths: int) -> list[Request]:
  """Prompts that begin alike, one after another, of these lengths."""
  sampling = SamplingParams(max_tokens=5, seed=3)
  return [
    Request(f'r{index}', prompt(length, seed=1), sampling, arrival_s=0.4 * index)
    for index, length in enumerate(lengths)
  ]


def test_what_processes_have_cached_is_neither_computed_nor_sent_again(processes):
  cached = processes.changed(prefix_cache=PrefixCache(block_tokens=4))
  served = cached.serve(alike(16, 18, 21))
  assert served.tokens() == plain(served)
  assert [served.by_id[f'r{index}'].cached_tokens for index in range(3)] == [0, 16, 16]
  assert {order.request: order.span.tokens for order, _ in served.transfers()} == {'r0': 16, 'r1': 4, 'r2': 8}


@pytest.mark.parametrize('worker', ['prefill0', 'decode0'])
def test_a_process_that_is_killed_has_nothing_cached_when_it_is_back(processes, worker):
  """It dies between the prompt that leaves something there and those that would find it."""
  requests, died = alike(16, 18, 21), []

  class Killing(Disaggregated):
    def decide(self, view):
      if 'r1' in view.requests and not died:
        died.append(worker)
        processes.peers[worker].kill()
      return super().decide(view)

  cached = processes.changed(prefix_cache=PrefixCache(block_tokens=4), policy=Killing())
  served = cached.serve(requests)
  assert served.tokens() == plain(served) and died == [worker]
  assert [event.medium for event in served.events if isinstance(event, AllBlocksCleared)] == [worker]


@pytest.fixture(scope='module')
def beside_a_host():
  """One of each, few pages where prompts are computed, and a process that only holds pages."""
  run = config('1P1D')
  workers = [dataclasses.replace(run.workers[0], num_pages=12), run.workers[1]]
  policy = Disaggregated(max_prefill_tokens=16, returns_to='host0')
  fields = {'policy': policy, 'prefix_cache': PrefixCache(block_tokens=4), 'places': (HostPlace('host0', 2**19),)}
  built = Processes.of(dataclasses.replace(run, workers=workers, transfer=SPEC, **fields))
  yield built
  built.built.backend.close()


def through_a_host() -> list[Request]:
  """A prompt, others that take every page of the prefill worker, and one that begins like the first."""
  begin = prompt(20, seed=1)
  prompts = [(*begin, 3), *(prompt(40, seed=seed) for seed in (3, 4)), (*begin, 5)]
  return [
    Request(f'r{index}', tokens, SamplingParams(max_tokens=4), arrival_s=0.15 * index)
    for index, tokens in enumerate(prompts)
  ]


def test_a_process_that_only_holds_pages_gives_back_what_others_forgot(beside_a_host):
  served = beside_a_host.serve(through_a_host())
  assert served.tokens() == plain(served)
  assert served.by_id['r3'].cached_tokens == 20
  assert {(one.source, one.target) for one in served.report.copies} == {('decode0', 'host0'), ('host0', 'prefill0')}


def test_such_a_process_that_is_killed_comes_back_empty_and_nobody_else_notices(beside_a_host):
  died = []

  class Killing(Disaggregated):
    def decide(self, view):
      if 'r2' in view.requests and not died:
        died.append('host0')
        beside_a_host.peers['host0'].kill()
      return super().decide(view)

  run = beside_a_host.changed(policy=Killing(max_prefill_tokens=16, returns_to='host0'))
  served = run.serve(through_a_host())
  assert served.tokens() == plain(served) and died == ['host0']
  assert served.by_id['r3'].cached_tokens == 0 and served.report.failed == 0
  assert 'host0' in [event.medium for event in served.events if isinstance(event, AllBlocksCleared)]


# ---------------------------------------------------------------------------- a session


def test_a_session_serves_over_processes_as_over_one():
  run = dataclasses.replace(config('1P1D'), transfer=SPEC)
  built = Processes.of(run)
  deployment = Deployment(run, OpenedModel(TINY), built.built)
  with Session(deployment) as session:
    streams = [session.submit(prompt(9, seed), SamplingParams(max_tokens=5)) for seed in range(3)]
    built.peers['decode0'].kill()
    last = session.submit(prompt(7), SamplingParams(max_tokens=50))
    last.cancel()
    answers = [stream.result(60.0) for stream in streams]
  assert last.finish_reason == 'cancelled'
  for answer in answers:
    assert (answer.token_ids, answer.finish_reason) == generate(TINY, answer.request)
  assert session.report().completed == 3


@pytest.fixture(scope='module')
def changing():
  """Three processes that take turns at prefill and decode, one of them of two devices."""
  run = config('1P2D', 1, 2, model=TINY_8_2)
  workers = [dataclasses.replace(one, may_become=EITHER) for one in run.workers]
  built = Processes.of(dataclasses.replace(run, workers=workers, transfer=SPEC, policy=TakeTurns()))
  yield built
  built.built.backend.close()


def changes_of(served) -> list[RoleChanged]:
  return [event for event in served.events if isinstance(event, RoleChanged)]


def test_roles_change_under_load_though_no_process_is_told_of_roles(changing):
  """The ways lead both ways; orders alone say what is to be done."""
  compiled_before = len(compiled)
  served = changing.serve(under_load(100))
  assert len(compiled) == compiled_before, 'something was compiled after the warm-up'
  assert served.tokens() == plain(served, TINY_8_2)
  assert len(changes_of(served)) >= 5 and {change.role for change in changes_of(served)} == {Role.PREFILL, Role.DECODE}


def test_a_process_that_is_killed_while_it_drains_comes_back_with_its_new_role(changing):
  killed: list[tuple[str, Role]] = []

  class Killing(TakeTurns):
    def decide(self, view):
      for worker in view.workers.values():
        if worker.draining and worker.used_bytes and not killed:
          killed.append((worker.name, worker.draining))
          changing.peers[worker.name].kill()
      return super().decide(view)

  served = changing.changed(policy=Killing()).serve(under_load(60))
  assert served.tokens() == plain(served, TINY_8_2)
  ((name, role),) = killed
  lost = next(index for index, event in enumerate(served.events) if isinstance(event, WorkerLost))
  assert served.events[lost].worker == name
  after = next(event for event in served.events[lost:] if isinstance(event, RoleChanged))
  assert (after.worker, after.role) == (name, role)
  assert [event.worker for event in served.events if isinstance(event, WorkerBack)] == [name]
