"""Roles change while requests are served: a worker drains, takes nothing new, and is another once it is empty."""

import dataclasses
import random
from collections import Counter

import pytest

from pdjax.policies import Colocated, Disaggregated
from pdjax.serving import (
  ALL,
  Chunk,
  ClusterState,
  Phase,
  PolicyError,
  Preempt,
  Step,
  StuckError,
  SwitchRole,
  Transfer,
  serve,
)
from pdjax.serving.events import Failed, Finished, RoleChanged, TimerDue, Turn, Withdrawn, WorkerBack, WorkerLost
from pdjax.simulator import Replay, Simulator
from pdjax.types import (
  FaultSpec,
  Request,
  Role,
  SamplingParams,
  TransferSpec,
  colocated_pool,
  decode_pool,
  prefill_pool,
)
from pdjax.workload import Listed
from tests.faults.injection import Again
from tests.faults.oracles import assert_right, watched
from tests.faults.shadow import ShadowSimulator, plain_tokens
from tests.faults.test_matrix_simulated import plain
from tests.faults.test_random_faults import DEADLINE_S, PAGE_BYTES, Dying, Leaving, some_requests
from tests.serving.driver import SIZES, Driver, due, fail, snapshot
from tests.switching import EITHER, RandomRoles, SwitchByLoad, TakeTurns, is_allowed
from tests.test_simulator import HandCost
from tests.tiny import TINY

PREFILL, DECODE, BOTH = Role.PREFILL, Role.DECODE, Role.BOTH
MAY = SIZES | {'may_become': EITHER}


def cluster_of(prefills: int, decodes: int, **options) -> Driver:
  """Workers that may take either role."""
  return Driver(prefill_pool(prefills, **MAY) + decode_pool(decodes, **MAY), **options)


def new_roles(cluster: Driver) -> tuple[RoleChanged, ...]:
  """The roles that changed since this was last asked."""
  return tuple(one for one in cluster.state.take_told() if isinstance(one, RoleChanged))


def switch(cluster: Driver, worker: str, role: Role) -> tuple[RoleChanged, ...]:
  """Give a worker a role; the changes that came of it at once."""
  assert cluster.start(SwitchRole(worker, role)) == ()
  return new_roles(cluster)


def sides(cluster: Driver) -> tuple[list[str], list[str]]:
  """The names of those that prefill and of those that decode."""
  view = cluster.view
  return [worker.name for worker in view.prefill_workers], [worker.name for worker in view.decode_workers]


def prefill(cluster: Driver, name: str, worker: str, send_to: str | None = None) -> list:
  """Compute a prompt in one step, its first token delivered; the transfers that left with it."""
  step, *transfers = cluster.start(Step(worker, (Chunk(name, 0, 6, send_to),)))
  cluster.end(step, {name: 1})
  return transfers


# ---------------------------------------------------------------------------- the way of a change


def test_an_empty_worker_has_its_new_role_at_once_and_takes_its_work():
  cluster = cluster_of(2, 1)
  cluster.now_s = cluster.state.books.now_s = 5.0
  assert switch(cluster, 'prefill1', DECODE) == (RoleChanged(5.0, 'prefill1', DECODE, PREFILL, 5.0),)
  worker = cluster.view.workers['prefill1']
  assert (worker.role, worker.spec.role, worker.draining) == (DECODE, PREFILL, None)
  assert sides(cluster) == (['prefill0'], ['prefill1', 'decode0'])
  cluster.arrive('a')
  with pytest.raises(PolicyError, match="worker 'prefill1' has role decode, so it takes no chunks"):
    cluster.start(Step('prefill1', (Chunk('a', 0, 6),)))
  (transfer,) = prefill(cluster, 'a', 'prefill0', send_to='prefill1')
  cluster.end(transfer)
  cluster.end(cluster.start(Step('prefill1', decodes=ALL, steps=3))[0], {'a': 3}, {'a': 'length'})
  cluster.assert_idle()


def test_a_worker_that_prefills_drains_until_its_last_prompt_has_moved_on():
  cluster = cluster_of(2, 1)
  cluster.arrive('begun', prompt_len=10)
  cluster.arrive('computed')
  cluster.arrive('new')
  prefill(cluster, 'computed', 'prefill0')
  step, *_ = cluster.start(Step('prefill0', (Chunk('begun', 0, 4, 'decode0'),)))
  assert switch(cluster, 'prefill0', DECODE) == ()
  worker = cluster.view.workers['prefill0']
  assert (worker.role, worker.draining) == (PREFILL, DECODE)
  assert sides(cluster) == (['prefill0', 'prefill1'], ['decode0'])  # it has prompts to go on with
  before = snapshot(cluster.state)
  with pytest.raises(PolicyError, match="'prefill0' is draining to become decode, so it takes no new request"):
    cluster.start(Step('prefill0', (Chunk('new', 0, 6),)))
  assert snapshot(cluster.state) == before
  assert not cluster.view.room().fits('new', 'prefill0', decodes=False)
  assert cluster.view.room().fits('new', 'prefill1', decodes=False)
  cluster.end(step)
  step, *sent = cluster.start(Step('prefill0', (Chunk('begun', 4, 6, 'decode0'),)))  # whose first chunk was sent before
  cluster.end(step, {'begun': 1})
  (moved,) = cluster.start(Transfer('computed', 'decode0'))
  for transfer in (*sent, moved):
    assert worker.role is PREFILL, 'its pages are still read'
    cluster.end(transfer)
  for transfer in list(cluster.state.books.in_flight.values()):
    cluster.end(transfer)
  (changed,) = new_roles(cluster)
  assert (changed.worker, changed.role, changed.before) == ('prefill0', DECODE, PREFILL)
  assert changed.now_s > changed.asked_s and worker.role is DECODE and worker.draining is None
  assert sides(cluster) == (['prefill1'], ['prefill0', 'decode0'])


def test_a_worker_that_decodes_drains_until_its_last_sequence_and_its_last_step_have_ended():
  cluster = cluster_of(1, 2)
  for name in ('a', 'b'):
    cluster.arrive(name)
  for transfer in prefill(cluster, 'a', 'prefill0', send_to='decode0'):
    cluster.end(transfer)
  assert switch(cluster, 'decode0', PREFILL) == ()
  with pytest.raises(PolicyError, match="'decode0' is draining to become prefill, so it takes no new request"):
    cluster.start(Step('prefill0', (Chunk('b', 0, 6, 'decode0'),)))
  prefill(cluster, 'b', 'prefill0')
  with pytest.raises(PolicyError, match="'decode0' is draining to become prefill, so it takes no new request"):
    cluster.start(Transfer('b', 'decode0'))
  first, second = (cluster.start(Step('decode0', decodes=ALL))[0] for _ in range(2))
  cluster.end(first, {'a': 1}, {'a': 'stop'})
  worker = cluster.view.workers['decode0']
  assert worker.free_pages == worker.num_pages and worker.role is DECODE, 'a step of it is still under way'
  cluster.end(second)
  assert [one.role for one in new_roles(cluster)] == [PREFILL]
  assert sides(cluster) == (['prefill0', 'decode0'], ['decode1'])
  cluster.arrive('c')
  prefill(cluster, 'c', 'decode0')
  for name, source in (('b', 'prefill0'), ('c', 'decode0')):
    (transfer,) = cluster.start(Transfer(name, 'decode1'))
    assert transfer.source == source
    cluster.end(transfer)
  assert {cluster.phase('b'), cluster.phase('c')} == {Phase.DECODING}


def test_what_is_on_its_way_to_a_draining_worker_is_decoded_there():
  cluster = cluster_of(1, 2)
  cluster.arrive('a')
  (transfer,) = prefill(cluster, 'a', 'prefill0', send_to='decode0')
  assert switch(cluster, 'decode0', PREFILL) == ()
  cluster.end(transfer)
  assert cluster.phase('a') is Phase.DECODING and cluster.view.workers['decode0'].role is DECODE
  cluster.end(cluster.start(Step('decode0', decodes=ALL))[0], {'a': 1}, {'a': 'stop'})
  assert cluster.view.workers['decode0'].role is PREFILL
  cluster.assert_idle()


def test_a_transfer_that_failed_and_is_tried_again_keeps_its_source_from_changing():
  cluster = cluster_of(2, 1, faults=FaultSpec(max_attempts=3, backoff_s=1.0))
  cluster.arrive('a')
  (transfer,) = prefill(cluster, 'a', 'prefill0', send_to='decode0')
  switch(cluster, 'prefill0', DECODE)
  fail(cluster, transfer)
  assert not cluster.state.books.in_flight and cluster.view.workers['prefill0'].role is PREFILL
  due(cluster, cluster.now_s + 1.0)
  (again,) = cluster.must()
  cluster.end(again)
  assert cluster.view.workers['prefill0'].role is DECODE


def test_a_worker_of_both_roles_becomes_one_of_either_once_it_is_empty():
  cluster = Driver(colocated_pool(2, **SIZES | {'may_become': EITHER}))
  cluster.arrive('a')
  prefill(cluster, 'a', 'both0')
  switch(cluster, 'both0', DECODE)
  assert cluster.view.workers['both0'].role is BOTH
  cluster.end(cluster.start(Step('both0', decodes=ALL))[0], {'a': 1}, {'a': 'stop'})
  assert cluster.view.workers['both0'].role is DECODE and sides(cluster) == (['both1'], ['both0', 'both1'])
  switch(cluster, 'both0', BOTH)
  assert sides(cluster) == (['both0', 'both1'], ['both0', 'both1'])


def test_a_change_may_be_called_off_or_be_another_before_it_has_come():
  cluster = Driver(colocated_pool(2, **SIZES | {'may_become': EITHER}))
  cluster.arrive('a')
  cluster.arrive('b')
  prefill(cluster, 'a', 'both0')
  worker = cluster.view.workers['both0']
  switch(cluster, 'both0', DECODE)
  cluster.now_s = cluster.state.books.now_s = 7.0
  switch(cluster, 'both0', PREFILL)
  assert worker.draining is PREFILL
  switch(cluster, 'both0', BOTH)
  assert worker.draining is None and cluster.view.room().fits('b', 'both0', decodes=True)
  prefill(cluster, 'b', 'both0')
  cluster.end(cluster.start(Step('both0', decodes=ALL))[0], {'a': 1, 'b': 1}, {'a': 'stop', 'b': 'stop'})
  assert worker.role is BOTH and not new_roles(cluster)


# ---------------------------------------------------------------------------- refusals


REFUSED = {
  'of nobody': ('decode9', PREFILL, "worker 'decode9' is unknown; the workers are prefill0"),
  'that it may not take': (
    'decode0',
    BOTH,
    "the roles of worker 'decode0' are decode, prefill; name one of them",
  ),
  'that is none': ('decode0', 'translate', "the roles of worker 'decode0' are decode, prefill"),
  'that it has': ('decode0', DECODE, "worker 'decode0' has that role already; look at its `role` and `draining`"),
  'of the last that prefills': ('prefill0', DECODE, 'no other worker goes on to prefill; wait until one has that role'),
}


@pytest.mark.parametrize('role', REFUSED)
def test_a_role_is_refused(role):
  cluster = cluster_of(1, 2)
  worker, name, words = REFUSED[role]
  action = SwitchRole(worker, name)
  before = snapshot(cluster.state), sides(cluster)
  with pytest.raises(PolicyError, match=words) as error:
    cluster.start(action)
  assert repr(action) in str(error.value)
  assert (snapshot(cluster.state), sides(cluster)) == before
  assert not cluster.state.books.draining and not new_roles(cluster)


def test_the_last_that_decodes_keeps_its_role_also_while_another_drains_to_decode():
  cluster = cluster_of(2, 1)
  cluster.arrive('a')
  prefill(cluster, 'a', 'prefill0')  # which would have nowhere to go, so that neither were ever empty
  switch(cluster, 'prefill0', DECODE)
  with pytest.raises(PolicyError, match='no other worker goes on to decode; wait until one has that role'):
    cluster.start(SwitchRole('decode0', PREFILL))
  with pytest.raises(PolicyError, match="worker 'prefill0' is draining to have that role already"):
    cluster.start(SwitchRole('prefill0', DECODE))
  (transfer,) = cluster.start(Transfer('a', 'decode0'))
  cluster.end(transfer)
  switch(cluster, 'decode0', PREFILL)
  assert cluster.view.workers['prefill0'].role is DECODE and cluster.view.workers['decode0'].draining is PREFILL


def test_one_worker_alone_may_widen_its_role_and_go_back_when_another_has_it():
  cluster = Driver(prefill_pool(1, **SIZES, may_become=(BOTH,)) + decode_pool(1, **MAY))
  switch(cluster, 'prefill0', BOTH)
  switch(cluster, 'decode0', PREFILL)
  with pytest.raises(PolicyError, match='no other worker goes on to decode'):
    cluster.start(SwitchRole('prefill0', PREFILL))
  assert sides(cluster) == (['prefill0', 'decode0'], ['prefill0'])


def test_a_role_may_be_named_by_its_text():
  cluster = cluster_of(2, 1)
  switch(cluster, 'prefill0', 'decode')
  assert cluster.view.workers['prefill0'].role is DECODE


# ---------------------------------------------------------------------------- losses


def test_a_worker_that_is_lost_while_it_drains_comes_back_with_its_new_role():
  cluster = cluster_of(1, 2, faults=FaultSpec())
  cluster.arrive('a')
  for transfer in prefill(cluster, 'a', 'prefill0', send_to='decode0'):
    cluster.end(transfer)
  switch(cluster, 'decode0', PREFILL)
  cluster.apply(WorkerLost('decode0', cluster.now_s, 'gone', returning=True))
  cluster.apply(WorkerBack('decode0', cluster.now_s, 2))
  assert cluster.view.workers['decode0'].role is PREFILL and cluster.phase('a') is Phase.WAITING
  (step, *transfers) = cluster.start(Step('decode0', (Chunk('a', 0, 6, 'decode1'),)))  # begun again, at that very place
  assert step.incarnation == 2
  cluster.end(step)
  for transfer in transfers:
    cluster.end(transfer)
  cluster.end(cluster.start(Step('decode1', decodes=ALL))[0], {'a': 1}, {'a': 'stop'})
  cluster.assert_idle()


def give_up(cluster: Driver, worker: str) -> None:
  """A worker is lost, and nobody waits for it any more."""
  cluster.apply(WorkerLost(worker, cluster.now_s, 'gone'))
  due(cluster, cluster.state.next_timer_s)
  assert cluster.view.workers[worker].given_up


def test_a_worker_that_is_given_up_does_not_count_as_one_that_is_left():
  cluster = cluster_of(2, 2, faults=FaultSpec(patience_s=10.0))
  give_up(cluster, 'decode1')
  with pytest.raises(PolicyError, match='no other worker goes on to decode'):
    cluster.start(SwitchRole('decode0', PREFILL))
  give_up(cluster, 'prefill0')
  with pytest.raises(PolicyError, match='no other worker goes on to prefill'):
    cluster.start(SwitchRole('prefill1', DECODE))


def test_another_takes_the_role_of_one_that_is_given_up_and_nobody_is_refused_meanwhile():
  cluster = cluster_of(1, 2, faults=FaultSpec(patience_s=10.0))
  cluster.arrive('before')
  give_up(cluster, 'prefill0')
  cluster.arrive('behind')
  assert not cluster.must() and {*cluster.view.waiting} == {'before', 'behind'} and not cluster.finished
  switch(cluster, 'decode0', PREFILL)
  for name in ('before', 'behind'):
    (transfer,) = prefill(cluster, name, 'decode0', send_to='decode1')
    cluster.end(transfer)
  assert cluster.phase('behind') is Phase.DECODING


def test_a_prompt_is_refused_that_nobody_but_the_worker_that_holds_it_could_decode():
  """Or that worker would never be empty, and never decode."""
  cluster = cluster_of(2, 1, faults=FaultSpec(patience_s=10.0))
  cluster.arrive('a')
  prefill(cluster, 'a', 'prefill0')
  switch(cluster, 'prefill0', DECODE)
  give_up(cluster, 'prefill1')
  assert not cluster.finished
  give_up(cluster, 'decode0')
  (ended,) = cluster.finished
  assert "only worker 'prefill0' could decode it, and its prompt could be nowhere else" in ended.error
  assert cluster.view.workers['prefill0'].role is DECODE


def test_a_request_waits_for_a_worker_that_has_another_role_now():
  """Only decode1 has pages for it; while that prefills, it is not refused."""
  large = SIZES | {'num_pages': 64}
  workers = prefill_pool(1, **large) + decode_pool(1, **SIZES) + decode_pool(2, **large | {'may_become': EITHER})[1:]
  cluster = Driver(workers)
  switch(cluster, 'decode1', PREFILL)
  cluster.arrive('long', prompt_len=30, max_tokens=40)
  assert not cluster.must() and [*cluster.view.waiting] == ['long']
  step = cluster.start(Step('prefill0', (Chunk('long', 0, 30),)))[0]
  cluster.end(step, {'long': 1})
  assert cluster.phase('long') is Phase.PREFILLED
  with pytest.raises(PolicyError, match="worker 'decode1' has role prefill; name one that decodes"):
    cluster.start(Transfer('long', 'decode1'))
  switch(cluster, 'decode1', DECODE)
  (transfer,) = cluster.start(Transfer('long', 'decode1'))
  cluster.end(transfer)
  assert cluster.phase('long') is Phase.DECODING


def test_a_request_is_refused_where_one_worker_alone_has_room_and_never_both_roles():
  workers = prefill_pool(1, **MAY | {'num_pages': 64}) + decode_pool(2, **SIZES | {'num_pages': 4})
  cluster = Driver(workers)
  cluster.arrive('long', prompt_len=30, max_tokens=8)
  assert "only worker 'prefill0' could decode it" in cluster.reject_unfit().error
  both = dataclasses.replace(workers[0], may_become=(BOTH,))
  cluster = Driver((both, *workers[1:]))
  cluster.arrive('long', prompt_len=30, max_tokens=8)
  assert not cluster.must()


def only_another_role_has_room(cluster: Driver) -> None:
  """A prompt waits and another is computed, which decode0 has no pages for; prefill0 might decode them."""
  for name in ('long', 'later'):
    cluster.arrive(name, prompt_len=30, max_tokens=40)
  cluster.end(cluster.start(Step('prefill0', (Chunk('long', 0, 30),)))[0], {'long': 1})


def test_where_nothing_can_change_requests_that_only_another_role_could_take_are_refused():
  """They would keep those behind them waiting for ever, as no policy gives that role."""
  large = SIZES | {'num_pages': 64}
  cluster = Driver(prefill_pool(2, **large | {'may_become': (DECODE,)}) + decode_pool(1, **SIZES | {'num_pages': 12}))
  only_another_role_has_room(cluster)
  cluster.arrive('short')
  assert not cluster.must()
  assert cluster.state.check_progress()
  (computed,) = cluster.state.take_finished()
  assert not cluster.must()  # the end of one may let another go on
  assert cluster.state.check_progress()
  waiting = cluster.reject_unfit()
  assert (computed.request, computed.finish_reason) == ('long', 'error')
  assert (waiting.request, waiting.finish_reason) == ('later', 'rejected')
  for ended in (computed, waiting):
    assert "'decode0', has 12 in all" in ended.error
    assert 'let the policy give prefill0 or prefill1 another role (SwitchRole)' in ended.error
  assert [*cluster.view.waiting] == ['short']
  with pytest.raises(StuckError, match='or give a worker another role'):  # that is the policy's own doing
    cluster.state.check_progress()


def test_a_run_goes_on_behind_requests_that_only_another_role_could_take():
  large = SIZES | {'num_pages': 64}
  workers = prefill_pool(2, **large | {'may_become': (DECODE,)}) + decode_pool(1, **SIZES | {'num_pages': 12})
  requests = [
    Request(f'r{index}', tuple(range(2, 2 + length)), SamplingParams(max_tokens=limit))
    for index, (length, limit) in enumerate([(6, 4), (30, 40), (6, 4), (30, 1), (30, 40), (7, 3)])
  ]
  state = ClusterState(TINY, workers, 4)
  simulator = Simulator(TINY, workers, HandCost())
  events = [*serve(Listed(requests), Disaggregated(), simulator, state)]
  ends = {event.request: event for event in events if isinstance(event, Finished)}
  assert {name: one.finish_reason for name, one in ends.items()} == {
    'r0': 'length', 'r1': 'error', 'r2': 'length', 'r3': 'length', 'r4': 'error', 'r5': 'length',
  }  # fmt: skip
  again = Replay(TINY, workers, events)
  assert [*serve(Listed(requests), Disaggregated(), again, ClusterState(TINY, workers, 4))] == events


# ---------------------------------------------------------------------------- bundled policies


def test_colocated_leaves_alone_whoever_has_another_role_and_wants_one_that_may_have_both():
  cluster = Driver(colocated_pool(2, **SIZES | {'may_become': EITHER}))
  cluster.arrive('a')
  switch(cluster, 'both0', PREFILL)
  assert Colocated(token_budget=16).decide(cluster.view) == [Step('both1', (Chunk('a', 0, 6),))]
  with pytest.raises(PolicyError, match='wants workers of role "both"'):
    Colocated().decide(cluster_of(1, 1).view)


def test_disaggregated_gives_a_draining_worker_nothing_new_and_lets_it_end_what_it_has():
  cluster = cluster_of(2, 2)
  for name in ('a', 'b'):
    cluster.arrive(name, prompt_len=20)
  policy = Disaggregated(max_prefill_tokens=8)
  (step, *_) = policy.decide(cluster.view)
  cluster.start(step)
  switch(cluster, step.worker, DECODE)
  target = step.chunks[0].send_to
  answer = policy.decide(cluster.view)
  by_worker = {one.worker: one.chunks for one in answer}
  other = next(worker.name for worker in cluster.view.prefill_workers if worker.name != step.worker)
  assert by_worker[step.worker] == (Chunk('a', 8, 8, target),)
  assert [chunk.request for chunk in by_worker[other]] == ['b']


# ---------------------------------------------------------------------------- whole runs


def some(count: int, rng: random.Random) -> list[Request]:
  requests = [
    Request(
      f'r{index}', tuple(rng.randrange(2, 96) for _ in range(rng.randint(1, 20))),
      SamplingParams(max_tokens=rng.randint(1, 20), n=rng.choice((1, 1, 1, 2)), ignore_eos=True),
      arrival_s=rng.random() * rng.choice((0, 400)),
    )
    for index in range(count)
  ]  # fmt: skip
  return sorted(requests, key=lambda request: request.arrival_s)


ANY = {'may_become': (Role.PREFILL, Role.DECODE, Role.BOTH)}
CLUSTERS = {
  '1P2D': prefill_pool(1, **MAY) + decode_pool(2, **MAY),
  '2P2D, some of which stay what they are': prefill_pool(1, **MAY) + decode_pool(1, **SIZES) + colocated_pool(2, **MAY),
  '3C of unlike pages': (*colocated_pool(2, **SIZES, **ANY), *decode_pool(1, page_size=2, **SIZES, **ANY)),
}
WAYS = (
  TransferSpec(granularity='chunk', deadline_s=1e9),
  TransferSpec(granularity='layers', layer_groups=2, staging_bytes=8 * PAGE_BYTES, deadline_s=1e9),
)


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('ahead', ['all', 1])
@pytest.mark.parametrize('name', CLUSTERS)
def test_at_any_time_roles_may_change_and_everyone_ends_with_the_tokens_of_a_plain_loop(name, ahead, seed):
  rng = random.Random(seed)
  workers = [dataclasses.replace(one, num_pages=24, page_size=one.page_size or 4) for one in CLUSTERS[name]]
  workers = [dataclasses.replace(one, num_pages=48) if one.page_size == 2 else one for one in workers]
  requests, policy = some(60, rng), RandomRoles(Disaggregated(max_prefill_tokens=24), every=rng.randint(1, 4))

  def empty_state() -> ClusterState:
    return ClusterState(TINY, workers, 4, WAYS[seed % 2], faults=FaultSpec(), pages_ahead=ahead)

  state = empty_state()
  simulator = ShadowSimulator(TINY, workers, HandCost(), page_sizes={one.name: one.page_size for one in workers})
  events = []
  for event in watched(serve(Listed(requests), policy, simulator, state), state, most_turns=50_000):
    events.append(event)
    if isinstance(event, Turn):
      assert_sides(state)
  samples = [sample for request in requests for sample in request.samples()]
  ends = assert_right(events, samples, state, lambda request: plain_tokens(TINY, request))
  assert set(ends.values()) == {'length'}
  assert sum(isinstance(event, RoleChanged) for event in events) >= 3
  assert list(serve(Listed(requests), policy, Replay(TINY, workers, events), empty_state())) == events


def assert_sides(state: ClusterState) -> None:
  """Some prefill and some decode, and the books refuse what would change that, and nothing else."""
  view = state.view
  workers = view.workers.values()
  assert [*view.prefill_workers] == [worker for worker in workers if worker.role.prefills] != []
  assert [*view.decode_workers] == [worker for worker in workers if worker.role.decodes] != []
  for worker in workers:
    assert worker.role in worker.spec.roles
    for role in worker.spec.roles:
      if not is_allowed(view, worker, role):
        with pytest.raises(PolicyError):
          state.start(SwitchRole(worker.name, role))


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('name', CLUSTERS)
def test_roles_change_while_five_percent_of_everything_goes_wrong(name, seed):
  """Transfers fail, workers die and come back, users leave; all of it while they change their roles."""
  rng = random.Random(seed)
  workers = [dataclasses.replace(one, num_pages=48, page_size=one.page_size or 4) for one in CLUSTERS[name]]
  policy = RandomRoles(Disaggregated(max_prefill_tokens=24), every=7)
  arrivals = Leaving(some_requests(200, rng), rng, within_s=300.0)
  simulator = ShadowSimulator(
    TINY, workers, HandCost(), page_sizes={one.name: one.page_size for one in workers}, slow_s=30.0
  )
  backend = Dying(simulator, rng, late_s=130.0, workers=simulator.incarnations, down_s=50.0)

  def empty_state() -> ClusterState:
    travels = dataclasses.replace(WAYS[seed % 2], deadline_s=DEADLINE_S, checksums=True)
    faults = FaultSpec(corruption='retry', max_attempts=20, backoff_s=1.0)
    return ClusterState(TINY, workers, 4, travels, faults=faults)

  state = empty_state()
  events = list(watched(serve(arrivals, policy, backend, state), state, most_turns=100_000))
  ends = Counter(assert_right(events, arrivals.requests.values(), state, plain).values())
  assert set(ends) <= {'length', 'cancelled'} and ends['length'] > 0.9 * ends.total()
  happened = Counter(type(event) for event in events)
  assert happened[RoleChanged] > 5 and happened[WorkerLost] > 2 and happened[Withdrawn] > 2
  assert happened[Failed] + happened[TimerDue] > 5
  assert list(serve(Again(arrivals), policy, Replay(TINY, workers, events), empty_state())) == events


@pytest.mark.parametrize('policy', [SwitchByLoad(), TakeTurns()])
def test_policies_from_outside_change_roles_and_bring_everyone_through(policy):
  workers = CLUSTERS['1P2D']
  requests = some(80, random.Random(3))
  state = ClusterState(TINY, workers, 4, TransferSpec(granularity='chunk', deadline_s=1e9))
  simulator = ShadowSimulator(TINY, workers, HandCost(), page_sizes={one.name: 4 for one in workers})
  events = list(serve(Listed(requests), policy, simulator, state))
  samples = [sample for request in requests for sample in request.samples()]
  assert set(assert_right(events, samples, state, lambda request: plain_tokens(TINY, request)).values()) == {'length'}
  roles = {(event.before, event.role) for event in events if isinstance(event, RoleChanged)}
  assert roles == {(PREFILL, DECODE), (DECODE, PREFILL)}


def test_a_policy_that_gives_roles_back_and_forth_in_one_turn_is_ended():
  class Restless(Disaggregated):
    def decide(self, view):
      worker = view.workers['prefill0']
      return [SwitchRole(worker.name, DECODE if worker.role is PREFILL else PREFILL)]

  workers = prefill_pool(2, **MAY) + decode_pool(1, **MAY)
  state = ClusterState(TINY, workers, 4)
  simulator = ShadowSimulator(TINY, workers, HandCost(), page_sizes={one.name: 4 for one in workers})
  with pytest.raises(PolicyError, match='answers in one turn that started no order'):
    list(serve(Listed(some(1, random.Random(0))), Restless(), simulator, state))


def test_a_preempted_request_begins_again_elsewhere_so_that_a_worker_drains_sooner():
  workers = prefill_pool(1, **MAY) + decode_pool(2, **MAY)
  cluster = Driver(workers)
  cluster.state = ClusterState(TINY, workers, 4, pages_ahead=1)
  cluster.arrive('a', max_tokens=20)
  (transfer,) = prefill(cluster, 'a', 'prefill0', send_to='decode0')
  cluster.end(transfer)
  switch(cluster, 'decode0', PREFILL)
  cluster.start(Preempt('a'))
  assert [one.worker for one in new_roles(cluster)] == ['decode0'] and [*cluster.view.waiting] == ['a']
