"""A deployment serves again and again, on devices and simulated, each time with nothing left of the time before."""

import contextlib
import dataclasses
import itertools
import time

import pytest

import pdjax
from pdjax import deployment
from pdjax.deployment import deploy
from pdjax.engine.worker import Worker
from pdjax.kv.transfer import Parcel
from pdjax.metrics import EventLog
from pdjax.model.checkpoint import RandomCheckpoint
from pdjax.opened_model import OpenedModel
from pdjax.reporting import describe
from pdjax.serving import invariants
from pdjax.serving.events import Done, Finished, Started, Turn, WorkerLost
from pdjax.serving.orders import TransferOrder
from pdjax.serving.page_allocator import PageAllocator
from pdjax.types import PrefixCache, RayCluster
from pdjax.workload import Fixed, Listed, Poisson
from tests.engine.plain import generate
from tests.tiny import TINY, config, prompt

BACKENDS = ('engine', 'simulator')
OPENED = OpenedModel(TINY)


class Plain:
  """A policy that has `decide` alone."""

  def __init__(self):
    self._policy = pdjax.Disaggregated(max_prefill_tokens=16)

  def decide(self, view):
    return self._policy.decide(view)


class Hourly:
  """A cost model that has its two methods alone."""

  def step_seconds(self, model, worker, chunks, contexts, steps):
    return 3600.0

  def transfer_seconds(self, model, source, target, num_bytes):
    return 60.0


def _small(**fields):
  return dataclasses.replace(config(max_sequences=2, max_step_tokens=16, max_chunks=2, max_fused_steps=1), **fields)


def _tokens(events):
  return {event.request: event.tokens for event in events if isinstance(event, Finished)}


@pytest.mark.parametrize('backend', BACKENDS)
def test_each_service_begins_anew_and_knows_the_lengths_of_its_own_requests(backend):
  logs = []
  with contextlib.closing(deploy(_small(), OPENED, backend)) as deployment:
    for length in (2, 5, 2):
      workload = pdjax.Poisson(requests_per_s=100.0, num_requests=3, prompt=pdjax.Fixed(4), output=pdjax.Fixed(length))
      one = dataclasses.replace(deployment, config=_small(workload=workload))
      events = tuple(one.serve(OPENED.arrivals(one.config)))
      report = one.report(events, notes=('mine',))
      assert (report.completed, report.backend, report.notes[0]) == (3, backend, 'mine')
      assert report.config['workload'] == describe(workload)
      logs.append(events)
  assert [{len(tokens) for tokens in _tokens(events).values()} for events in logs] == [{2}, {5}, {2}]
  assert _tokens(logs[0]) == _tokens(logs[2])
  assert all(next(event.now_s for event in events if isinstance(event, Turn)) < 1.0 for events in logs)
  if backend == 'simulator':
    assert logs[0] == logs[2]


def test_a_service_that_was_broken_off_leaves_nothing_to_the_next(monkeypatch):
  """Closed after any event, with requests of the same ids at another place: whatever is under way then comes late."""
  collect, wait = Worker.collect, Parcel.wait
  monkeypatch.setattr(Worker, 'collect', lambda *args: (time.sleep(0.02), collect(*args))[1])
  monkeypatch.setattr(Parcel, 'wait', lambda parcel: (time.sleep(0.02), wait(parcel))[1])
  first, second = (
    [pdjax.Request(f'r{i}', prompt(length, seed=seed + i), pdjax.SamplingParams(max_tokens=8, ignore_eos=True))
     for i, length in enumerate((9, 5, 20, 7))]
    for seed in (0, 10)
  )  # fmt: skip
  expected, under_way = {request.id: generate(TINY, request)[0] for request in second}, 0
  with contextlib.closing(deploy(_small(), OPENED)) as deployment:
    whole = len(tuple(deployment.serve(Listed(first))))
    for kept in range(1, whole, 7):
      events = deployment.serve(Listed(first))
      for event in itertools.islice(events, kept):
        under_way += isinstance(event, Started) - (isinstance(event, Done) and event.to_come == 0)
      events.close()
      assert _tokens(deployment.serve(Listed(second))) == expected, f'closed after {kept} events'
  assert under_way > 10


def test_a_worker_that_failed_as_a_service_was_broken_off_has_new_pages_in_the_next():
  requests = [pdjax.Request('r', prompt(9), pdjax.SamplingParams(max_tokens=3, ignore_eos=True))]
  with contextlib.closing(deploy(_small(), OPENED)) as deployment:
    engine = deployment.built.backend
    before = engine.workers['decode0'].incarnation
    engine._runners['decode0'].post_broken(before, 'it failed late')
    events = tuple(deployment.serve(Listed(requests)))
    assert engine.workers['decode0'].incarnation == before + 1
  assert not any(isinstance(event, WorkerLost) for event in events)
  assert _tokens(events) == {'r': generate(TINY, requests[0])[0]}


def test_a_policy_and_a_cost_model_of_plain_classes_serve_on_both_backends():
  run = _small(policy=Plain(), cost=Hourly())
  events = {}
  for backend in BACKENDS:
    with contextlib.closing(deploy(run, OPENED, backend)) as deployment:
      events[backend] = tuple(deployment.serve(OPENED.arrivals(run)))
      report = deployment.report(events[backend])
    assert report.completed == len(run.workload.requests)
    assert any(isinstance(event, Started) and isinstance(event.order, TransferOrder) for event in events[backend])
    assert report.calibrated == (backend == 'engine')
  assert report.ttft.median_ms >= 3600e3  # the cost model's own seconds


def test_policies_see_the_cost_of_each_worker_on_both_backends():
  """They are the same figures, so that the same policy decides alike by them."""
  seen = {}

  class Asks(Plain):
    def decide(self, view):
      seen[backend] = {name: (one.cost.prefill_seconds(9), one.cost.spec) for name, one in view.workers.items()}
      first, second = view.prefill_workers[0], view.decode_workers[0]
      seen[backend]['way'] = first.cost.transfer_seconds(second.cost, 7)
      return super().decide(view)

  run = _small(policy=Asks(), cost=Hourly())
  for backend in BACKENDS:
    with contextlib.closing(deploy(run, OPENED, backend)) as deployment:
      events = tuple(deployment.serve(OPENED.arrivals(run)))
      assert seen[backend]['way'] == Hourly().transfer_seconds(None, None, None, 7)
      for worker in deployment.built.workers:
        assert seen[backend][worker.name] == (3600.0, worker)
    assert any(isinstance(event, Started) for event in events)
  assert seen['engine'] == seen['simulator']


def test_the_log_has_each_event_by_the_time_that_it_comes(tmp_path):
  run = _small()
  with contextlib.closing(deploy(run, OPENED, 'simulator')) as deployment, EventLog(tmp_path / 'log') as log:
    for number, event in enumerate(deployment.serve(OPENED.arrivals(run), log), 1):
      assert len(log) == number and list(log)[-1] is event


def test_a_simulation_is_sized_by_the_memory_of_its_chip_and_waits_for_nobody():
  chip = dataclasses.replace(pdjax.ChipSpec.generic_cpu(), memory_bytes=1e5)
  with pytest.raises(ValueError, match=r'do not fit on device 0'):
    deploy(_small(cost=pdjax.Roofline(chip)), OPENED, 'simulator')
  small = pdjax.prefill_pool(1, chip=chip) + _small().workers[1:]
  with pytest.raises(ValueError, match=r'do not fit on device 0'):
    deploy(_small(workers=small), OPENED, 'simulator')
  unbounded = deploy(_small(cost=Hourly()), OPENED, 'simulator')
  assert [worker.num_pages for worker in unbounded.built.workers] == [64, 64]
  with pytest.raises(ValueError, match='the deployment is simulated, and nobody can wait in virtual time'):
    pdjax.Session(unbounded).start()


def test_processes_are_given_the_checkpoint_by_the_name_under_which_all_find_the_same(monkeypatch):
  given = []

  def build(config, model, say):
    given.append(config.checkpoint)
    raise RuntimeError('as far as this test goes')

  monkeypatch.setattr(deployment, '_build_processes', build)
  asked = dataclasses.replace(config(), checkpoint='owner/name@main', processes=RayCluster())
  opened = OpenedModel(TINY, RandomCheckpoint(TINY), source='owner/name@0123abc')
  with pytest.raises(RuntimeError, match='as far as'):
    deploy(asked, opened)
  assert given == ['owner/name@0123abc']


def test_the_books_are_looked_at_after_every_turn_where_that_is_asked_for(monkeypatch):
  """With and without a prefix cache; what is wrong with them ends the run."""
  run = config('1P1D', workload=Poisson(requests_per_s=5.0, num_requests=4, prompt=Fixed(9), output=Fixed(4)))
  run = dataclasses.replace(run, check_invariants=True, prefix_cache=PrefixCache(block_tokens=4))
  looked = []
  check = invariants.check
  monkeypatch.setattr(invariants, 'check', lambda books: looked.append(check(books)))
  report = pdjax.simulate(run).report
  assert report.completed == 4 and len(looked) > 10
  drop = PageAllocator.drop
  monkeypatch.setattr(PageAllocator, 'drop', lambda place, pages: drop(place, [*pages][1:]))
  with pytest.raises(AssertionError, match=r'pages .* have .* holders and'):
    pdjax.simulate(run)


def test_a_cache_that_takes_what_was_made_in_another_way_is_told_in_the_report():
  run = config('1P1D', workload=Poisson(requests_per_s=5.0, num_requests=2, prompt=Fixed(9), output=Fixed(4)))
  caches = [PrefixCache(block_tokens=4, lossy=lossy) for lossy in (False, True)]
  told = [pdjax.simulate(dataclasses.replace(run, prefix_cache=cache)).report.notes for cache in caches]
  assert [any('lossy=True' in note for note in notes) for notes in told] == [False, True]
