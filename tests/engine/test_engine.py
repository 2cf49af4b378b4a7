"""Failures where nothing is tried twice: who it concerns learns why, all others are served, and nothing hangs."""

import dataclasses
import itertools
import math
import threading
import time

import pytest

from pdjax.engine.engine import Engine
from pdjax.engine.packing import Packing
from pdjax.engine.programs import Admit, Decode
from pdjax.engine.runner import describe
from pdjax.engine.worker import Worker
from pdjax.kv.transfer import DevicePut, Parcel
from pdjax.serving.events import Done, Failed, Started, WorkerLost
from pdjax.serving.orders import TransferOrder
from pdjax.types import Request, SamplingParams
from pdjax.types.faults import ALL_FAIL
from pdjax.types.span import Span
from tests.engine.cluster import Cluster, Served
from tests.engine.plain import generate
from tests.engine.test_replay import replay
from tests.tiny import prompt

BOOM = 'RuntimeError: the device is on fire'


def failing(function, when, times: int = 1):
  """The function, which raises on the first calls it is to fail on."""
  calls = itertools.count()

  def fails(*args, **kwargs):
    if when(*args) and next(calls) < times:
      raise RuntimeError('the device is on fire\nand more that is for the log alone')
    return function(*args, **kwargs)

  return fails


def some_requests(later_s: float = 0.6) -> list[Request]:
  """Five at once, and two once whatever failed has failed."""
  now = [Request(f'now{i}', prompt(length, seed=i), SamplingParams(max_tokens=6, ignore_eos=True))
         for i, length in enumerate((3, 9, 17, 5, 4))]  # fmt: skip
  later = [Request(f'later{i}', prompt(6 + i, seed=i), SamplingParams(max_tokens=6, ignore_eos=True), later_s)
           for i in range(2)]  # fmt: skip
  return [*now, *later]


def assert_others_exact(cluster: Cluster, served: Served, failed: set[str]):
  """Those that failed have an error, all others the plain loop's tokens; what came before an error is right, too."""
  assert {name for name, one in served.by_id.items() if one.finish_reason == 'error'} == failed
  assert len(served.completions) == len(served.requests)
  for request in served.requests:
    one, (tokens, reason) = served.by_id[request.id], generate(cluster.model, request)
    if request.id in failed:
      assert one.error == BOOM
      assert one.token_ids == tokens[: len(one.token_ids)]
    else:
      assert (one.token_ids, one.finish_reason, one.error) == (tokens, reason, None)


def orders_with(served: Served, event: type) -> list:
  return [one for one in served.events if isinstance(one, event)]


@pytest.fixture
def one_and_one(one_and_one) -> Cluster:
  return one_and_one.changed(faults=ALL_FAIL)


@pytest.fixture
def colocated(colocated) -> Cluster:
  return colocated.changed(faults=ALL_FAIL)


@pytest.fixture(params=['one_and_one', 'colocated'])
def cluster(request) -> Cluster:
  return request.getfixturevalue(request.param)


def names_in(order) -> set[str]:
  return set(order.requests)


def test_a_prompt_step_that_cannot_be_dispatched_fails_its_requests_alone(cluster, monkeypatch):
  def second_prompt(packing, chunks, size):
    return any(chunk.request.id == 'now1' for chunk in chunks)

  monkeypatch.setattr(Packing, 'chunks', failing(Packing.chunks, second_prompt))
  served = cluster.serve(some_requests(0.1))
  (failed,) = orders_with(served, Failed)
  assert failed.error == BOOM
  order = next(one.order for one in orders_with(served, Started) if one.order.id == failed.order)
  assert 'now1' in names_in(order)
  assert_others_exact(cluster, served, names_in(order))


def test_a_decode_step_that_cannot_be_dispatched_fails_its_requests_alone(one_and_one, monkeypatch):
  monkeypatch.setattr(Worker, 'run', failing(Worker.run, lambda worker, program, *_: isinstance(program, Decode)))
  served = one_and_one.serve(some_requests(0.1))
  (failed,) = orders_with(served, Failed)
  order = next(one.order for one in orders_with(served, Started) if one.order.id == failed.order)
  assert_others_exact(one_and_one, served, names_in(order))
  assert orders_with(served, WorkerLost) == []


def test_an_admission_that_cannot_be_dispatched_fails_its_requests_alone(one_and_one, monkeypatch):
  monkeypatch.setattr(Worker, 'run', failing(Worker.run, lambda worker, program, *_: isinstance(program, Admit)))
  served = one_and_one.serve(some_requests(0.1))
  (failed,) = orders_with(served, Failed)
  order = next(one.order for one in orders_with(served, Started) if one.order.id == failed.order)
  assert_others_exact(one_and_one, served, names_in(order))
  assert orders_with(served, WorkerLost) == []
  assert [worker.followed.left_out for worker in one_and_one.workers.values()] == [(), ()]  # whoever ended is forgotten


def test_a_request_that_ended_well_in_the_step_before_is_not_failed(one_and_one, monkeypatch):
  """The step that cannot be dispatched was decided before anyone knew of the stop token."""
  whole = Request('whole', prompt(9, seed=4), SamplingParams(max_tokens=6))
  first, second, *_ = generate(one_and_one.model, whole)[0]
  assert first != second
  stopped = dataclasses.replace(whole, sampling=SamplingParams(max_tokens=6, stop_token_ids=(second,)))
  steps = itertools.count()
  collect = Worker.collect

  def collect_late(worker, order, pending):
    if order.decodes:
      time.sleep(0.1)  # the next step has been refused by now
    return collect(worker, order, pending)

  monkeypatch.setattr(Worker, 'collect', collect_late)
  monkeypatch.setattr(
    Worker,
    'run',
    failing(Worker.run, lambda worker, program, *_: isinstance(program, Decode) and next(steps) == 1),
  )
  served = one_and_one.serve([stopped])
  assert len(orders_with(served, Failed)) == 1
  assert_others_exact(one_and_one, served, set())


@pytest.mark.parametrize('phase', ['chunks', 'decodes'])
def test_a_step_that_fails_on_the_device_loses_the_worker_and_those_with_pages_there(cluster, monkeypatch, phase):
  incarnations = {name: worker.incarnation for name, worker in cluster.workers.items()}
  monkeypatch.setattr(Worker, 'collect', failing(Worker.collect, lambda worker, order, _: getattr(order, phase)))
  served = cluster.serve(some_requests())
  (lost,) = orders_with(served, WorkerLost)
  assert lost.error == BOOM
  failed = {name for name, one in served.by_id.items() if one.finish_reason == 'error'}
  assert failed and not any(name.startswith('later') for name in failed)
  assert_others_exact(cluster, served, failed)
  rebuilt = {name for name, worker in cluster.workers.items() if worker.incarnation > incarnations[name]}
  assert rebuilt == {lost.worker}


def test_a_step_that_dies_with_its_pages_loses_the_worker(one_and_one, monkeypatch):
  """Donated pages are gone if the program fails inside the call."""
  calls = itertools.count()
  dispatch = Worker.dispatch

  def dispatch_and_die(worker, order, *after):
    if order.decodes and next(calls) == 1:
      for layer in worker.pages.layers:
        layer.delete()
      raise RuntimeError('the device is on fire')
    return dispatch(worker, order, *after)

  monkeypatch.setattr(Worker, 'dispatch', dispatch_and_die)
  served = one_and_one.serve(some_requests())
  (lost,) = orders_with(served, WorkerLost)
  assert lost.worker == 'decode0'
  failed = {name for name, one in served.by_id.items() if one.finish_reason == 'error'}
  assert failed and not any(name.startswith('later') for name in failed)
  assert_others_exact(one_and_one, served, failed)


def test_a_run_in_which_a_worker_was_lost_is_reproduced_from_its_record(cluster, monkeypatch):
  monkeypatch.setattr(Worker, 'collect', failing(Worker.collect, lambda worker, order, _: order.decodes))
  served = cluster.serve(some_requests())
  monkeypatch.undo()
  assert len(orders_with(served, WorkerLost)) == 1
  assert replay(cluster, served, served.events) == served.events


def test_steps_of_a_lost_worker_are_not_heard_of_again(cluster, monkeypatch):
  """The step after the one that failed ends well before anyone has noticed."""
  next_dispatched, broke, next_ended = threading.Event(), threading.Event(), threading.Event()
  dispatch, collect = Worker.dispatch, Worker.collect
  decodes = itertools.count()

  def dispatch_and_count(worker, order, *after):
    pending = dispatch(worker, order, *after)
    if order.decodes and next(decodes) == 1:
      next_dispatched.set()
    return pending

  def collect_and_fail_once(worker, order, pending):
    outcome = collect(worker, order, pending)
    if not order.decodes or next_ended.is_set():
      return outcome
    if broke.is_set():
      next_ended.set()
      return outcome
    next_dispatched.wait(10)
    broke.set()
    raise RuntimeError('the device is on fire')

  def prepare(engine):
    take = engine._mailbox.collect

    def take_late(until_s):
      if broke.is_set():
        next_ended.wait(10)
        time.sleep(0.05)
      return take(until_s)

    monkeypatch.setattr(engine._mailbox, 'collect', take_late)

  monkeypatch.setattr(Worker, 'dispatch', dispatch_and_count)
  monkeypatch.setattr(Worker, 'collect', collect_and_fail_once)
  requests = [dataclasses.replace(one, id=f'r{i}') for i, one in enumerate(some_requests(0.0)[:2])]
  served = cluster.serve(requests, prepare=prepare)
  monkeypatch.undo()
  assert next_ended.is_set()
  (lost,) = orders_with(served, WorkerLost)
  gone = {one.order.id for one in orders_with(served, Started) if getattr(one.order, 'worker', '') == lost.worker}
  after = served.events[served.events.index(lost) :]
  assert not [one for one in after if isinstance(one, Done) and one.order in gone]
  assert replay(cluster, served, served.events) == served.events


def test_pieces_that_never_arrive_fail_their_request_alone(one_and_one, monkeypatch):
  monkeypatch.setattr(Parcel, 'wait', failing(Parcel.wait, lambda parcel: True))
  served = one_and_one.serve(some_requests(0.1))
  (failed,) = orders_with(served, Failed)
  order = next(one.order for one in orders_with(served, Started) if one.order.id == failed.order)
  assert_others_exact(one_and_one, served, {order.request})
  assert replay(one_and_one, served, served.events) == served.events


def test_pages_that_cannot_be_sent_fail_their_request_alone(one_and_one, monkeypatch):
  monkeypatch.setattr(DevicePut, 'send', failing(DevicePut.send, lambda way, span: len(span.source_pages) == 1))
  served = one_and_one.serve(some_requests(0.1))
  (failed,) = orders_with(served, Failed)
  order = next(one.order for one in orders_with(served, Started) if one.order.id == failed.order)
  assert_others_exact(one_and_one, served, {order.request})


def test_pieces_that_cannot_be_written_lose_the_target(one_and_one, monkeypatch):
  monkeypatch.setattr(DevicePut, 'receive', failing(DevicePut.receive, lambda way, parcel: True))
  served = one_and_one.serve(some_requests())
  (lost,) = orders_with(served, WorkerLost)
  assert lost.worker == 'decode0'
  failed = {name for name, one in served.by_id.items() if one.finish_reason == 'error'}
  assert failed and not any(name.startswith('later') for name in failed)
  assert_others_exact(one_and_one, served, failed)


def test_what_is_left_of_an_earlier_run_is_neither_heard_of_nor_written(one_and_one, monkeypatch):
  released, received = threading.Event(), []
  wait, receive = Parcel.wait, DevicePut.receive

  def late(parcel):
    released.wait(20.0)
    wait(parcel)

  engine = Engine(one_and_one.workers.values(), one_and_one.transports)
  span = Span((1,), (2,), 0, one_and_one.config.page_size)
  orders = [TransferOrder(5, name, 'prefill0', 'decode0', span, incarnations=incarnations_of(engine)) for name in 'ab']
  monkeypatch.setattr(Parcel, 'wait', late)
  engine.submit(orders[:1])
  monkeypatch.setattr(Parcel, 'wait', wait)
  monkeypatch.setattr(DevicePut, 'receive', lambda way, parcel: received.append(parcel) or receive(way, parcel))
  engine.start_clock()
  released.set()
  while engine._waiters._running:  # the first lands
    time.sleep(0.001)
  engine.submit(orders[1:])
  _, (done,) = engine.wait(math.inf)
  assert done.order == 5 and len(received) == 1
  engine.close()
  assert not engine._incoming.under_way


def incarnations_of(engine: Engine) -> tuple[int, int]:
  return engine.workers['prefill0'].incarnation, engine.workers['decode0'].incarnation


def test_an_interrupt_ends_a_wait_and_what_it_notes_is_of_the_turn(one_and_one):
  engine = Engine(list(one_and_one.workers.values()), one_and_one.transports)
  engine.start_clock()
  noted = []
  waker = threading.Timer(0.02, lambda: engine.interrupt(noted.append))
  waker.start()
  now_s, events = engine.wait(math.inf)
  waker.join()
  engine.close()
  assert events == [] and len(noted) == 1 and noted[0] < now_s


def test_everything_may_fail_and_the_run_still_ends(one_and_one, monkeypatch):
  monkeypatch.setattr(Parcel, 'wait', failing(Parcel.wait, lambda parcel: True, times=10**6))
  requests = some_requests(0.0)
  served = one_and_one.serve(requests)
  assert_others_exact(one_and_one, served, {request.id for request in requests})
  assert served.report.completed == 0 and served.report.wire_bytes == 0


def test_an_error_is_told_in_one_line():
  assert describe(ValueError('first\nsecond')) == 'ValueError: first'
  assert describe(KeyError()) == 'KeyError: '
