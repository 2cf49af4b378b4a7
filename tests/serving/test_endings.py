"""However a request ends, all that it held is free once the orders about it have ended."""

import itertools

import pytest

from pdjax.serving import ALL, Cancel, Chunk, Phase, PolicyError, Step, Transfer
from pdjax.serving.events import Failed, Withdrawn, WorkerBack, WorkerLost
from pdjax.serving.orders import EndOrder, Order, StepOrder, TransferOrder
from pdjax.types import colocated_pool, decode_pool, prefill_pool
from tests.serving.driver import ONE_OF_EACH, SIZES, Driver


def _waiting() -> tuple[Driver, list[Order]]:
  cluster = Driver()
  cluster.arrive('a', prompt_len=10)
  return cluster, []


def _prefilling() -> tuple[Driver, list[Order]]:
  cluster, _ = _waiting()
  first = cluster.start(Step('prefill0', (Chunk('a', 0, 4, 'decode0'),)))
  return cluster, [*first, *cluster.start(Step('prefill0', (Chunk('a', 4, 4, 'decode0'),)))]


def _last_chunk() -> tuple[Driver, list[Order]]:
  cluster, _ = _waiting()
  return cluster, [*cluster.start(Step('prefill0', (Chunk('a', 0, 10, 'decode0'),)))]


def _prefilled() -> tuple[Driver, list[Order]]:
  cluster, _ = _waiting()
  cluster.end(cluster.start(Step('prefill0', (Chunk('a', 0, 10),)))[0], {'a': 1})
  return cluster, []


def _moving() -> tuple[Driver, list[Order]]:
  cluster, _ = _prefilled()
  return cluster, [*cluster.start(Transfer('a', 'decode0'))]


def _decoding() -> tuple[Driver, list[Order]]:
  cluster, (transfer,) = _moving()
  cluster.end(transfer)
  return cluster, [cluster.start(Step('decode0', decodes=ALL))[0] for _ in range(2)]


def _colocated() -> tuple[Driver, list[Order]]:
  cluster = Driver(colocated_pool(1, **SIZES))
  cluster.arrive('a', prompt_len=10)
  chunk = cluster.start(Step('both0', (Chunk('a', 0, 10),)))
  return cluster, [*chunk, *cluster.start(Step('both0', decodes=ALL))]


SETUPS = {
  Phase.WAITING: _waiting,
  Phase.PREFILLING: _prefilling,
  'last chunk': _last_chunk,
  Phase.PREFILLED: _prefilled,
  Phase.MOVING: _moving,
  Phase.DECODING: _decoding,
  'colocated': _colocated,
}
PHASES = pytest.mark.parametrize('phase', SETUPS, ids=lambda phase: getattr(phase, 'value', phase))


def _end(cluster: Driver, order: Order) -> None:
  """An order of request `a` ends well; a step with its last chunk or a decode brings it a token."""
  brings = isinstance(order, StepOrder) and (order.decodes or any(chunk.is_last for chunk in order.chunks))
  cluster.end(order, {'a': 1} if brings else {})


def _in_turns(orders: list[Order], end: Order) -> list[list[Order]]:
  """The ways in which the end of a request may fall among its other orders, each worker first in, first out."""
  return [[*orders[:place], end, *orders[place:]] for place in range(len(orders) + 1)]


@PHASES
def test_a_withdrawn_request_releases_everything_in_whatever_order_things_end(phase):
  num_orders = len(SETUPS[phase]()[1])
  for place in range(num_orders + 1):
    cluster, orders = SETUPS[phase]()
    if isinstance(phase, Phase):
      assert cluster.phase('a') is phase
    cluster.apply(Withdrawn('a'))
    assert not cluster.view.waiting and not cluster.view.prefilled
    (end,) = cluster.must()
    assert end == EndOrder(end.id, 'a', 'cancelled', 'cancelled') and cluster.phase('a') is Phase.ENDING
    for order in _in_turns(orders, end)[place]:
      _end(cluster, order)
    assert [one.finish_reason for one in cluster.finished] == ['cancelled']
    cluster.assert_idle()


@PHASES
def test_tokens_delivered_before_a_cancellation_stay_and_later_ones_do_not_count(phase):
  cluster, orders = SETUPS[phase]()
  delivered = tuple(cluster.view.requests['a'].tokens)
  (end,) = cluster.start(Cancel('a'))
  for order in (*orders, end):
    _end(cluster, order)
  assert cluster.finished[0].tokens == delivered and cluster.finished[0].error is None


def test_pages_of_a_cancelled_transfer_are_free_only_when_it_has_ended():
  cluster, (transfer,) = _moving()
  (end,) = cluster.start(Cancel('a'))
  cluster.end(end)
  assert (cluster.free_pages('prefill0'), cluster.free_pages('decode0')) == (13, 13)
  cluster.end(transfer)
  cluster.assert_idle()


def test_a_cancelled_request_takes_no_further_part():
  cluster, _ = _prefilling()
  cluster.apply(Withdrawn('a'))
  worker = cluster.state.workers['prefill0']
  assert not worker.prefilling and worker.queued_tokens == 8  # what is under way is still computed


@pytest.mark.parametrize('times', [1, 2])
def test_who_withdraws_twice_is_told_once(times):
  cluster, _ = _waiting()
  for _ in range(times):
    cluster.apply(Withdrawn('a'))
  (end,) = cluster.must()
  cluster.apply(Withdrawn('a'))  # it is being ended already
  assert cluster.must() == ()
  cluster.end(end)
  cluster.apply(Withdrawn('a'))  # it is gone
  assert cluster.must() == () and len(cluster.finished) == 1


def test_a_request_withdrawn_as_it_ends_has_ended():
  cluster, (first, second) = _decoding()
  cluster.apply(Withdrawn('a'))
  cluster.end(first, {'a': 1}, {'a': 'stop'})  # in the same turn
  assert cluster.must() == ()
  cluster.end(second)
  assert [one.finish_reason for one in cluster.finished] == ['stop']
  cluster.assert_idle()


def test_a_request_that_cannot_run_may_be_withdrawn_as_it_arrives():
  cluster = Driver()
  cluster.arrive('a', prompt_len=65)
  cluster.apply(Withdrawn('a'))
  (end,) = cluster.must()
  cluster.end(end)
  assert [one.finish_reason for one in cluster.finished] == ['rejected']
  cluster.assert_idle()


def test_a_withdrawal_of_an_unknown_request_changes_nothing():
  cluster = Driver()
  cluster.apply(Withdrawn('nobody'))
  assert cluster.must() == ()


# ---------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize('phase', [Phase.PREFILLING, 'last chunk', Phase.MOVING, Phase.DECODING, 'colocated'])
def test_a_failed_order_ends_its_requests_and_releases_everything(phase):
  for failed in range(len(SETUPS[phase]()[1])):
    cluster, orders = SETUPS[phase]()
    for index, order in enumerate(orders):
      if index == failed:
        cluster.apply(Failed(order.id, 1.0, 'boom'))
      else:
        _end(cluster, order)
    (end,) = cluster.finished
    assert (end.request, end.finish_reason, end.error) == ('a', 'error', 'boom')
    cluster.assert_idle()


def test_a_failed_step_ends_only_the_requests_in_it():
  cluster = Driver(colocated_pool(1, **SIZES))
  for name in 'abc':
    cluster.arrive(name)
  cluster.end(cluster.start(Step('both0', (Chunk('a', 0, 6),)))[0], {'a': 1})
  (failing,) = cluster.start(Step('both0', (Chunk('b', 0, 3),), ALL))
  (later,) = cluster.start(Step('both0', (Chunk('c', 0, 6),)))
  cluster.apply(Failed(failing.id, 1.0, 'boom'))
  assert {end.request: end.tokens for end in cluster.finished} == {'a': (7,), 'b': ()}
  cluster.end(later, {'c': 1})
  assert cluster.phase('c') is Phase.DECODING
  cluster.end(cluster.start(Step('both0', decodes=ALL))[0], {'c': 1}, {'c': 'stop'})
  cluster.assert_idle()


def test_an_end_that_fails_ends_the_request_all_the_same():
  cluster, _ = _waiting()
  (end,) = cluster.start(Cancel('a'))
  cluster.apply(Failed(end.id, 1.0, 'boom'))
  assert [(one.finish_reason, one.error) for one in cluster.finished] == [('error', 'boom')]
  cluster.assert_idle()


@pytest.mark.parametrize('phase', [phase for phase in SETUPS if phase != Phase.WAITING])
@pytest.mark.parametrize('lost', ['prefill0', 'decode0'])
def test_a_lost_worker_ends_every_request_that_had_pages_there(phase, lost):
  cluster, orders = SETUPS[phase]()
  lost = 'both0' if phase == 'colocated' else lost
  held = lost in cluster.view.requests['a'].pages
  cluster.apply(WorkerLost(lost, 1.0, 'gone'))
  gone = [order for order in orders if _runs_on(order, lost)]
  if held:
    assert [(end.finish_reason, end.error) for end in cluster.finished] == [('error', 'gone')]
  else:
    assert cluster.finished == [] and 'a' in cluster.view.requests
  for order in orders:
    if order not in gone:
      _end(cluster, order)
  for order in gone:  # what is heard of them later counts for nothing
    _end(cluster, order)
  if not held:
    cluster.end(cluster.start(Cancel('a'))[0])
  cluster.assert_idle()


def _runs_on(order: Order, worker: str) -> bool:
  if isinstance(order, TransferOrder):
    return worker in (order.source, order.target)
  return isinstance(order, StepOrder) and order.worker == worker


def test_a_lost_worker_leaves_the_others_alone_and_serves_again_once_it_is_back():
  workers = prefill_pool(2, **SIZES) + decode_pool(1, **SIZES)
  cluster = Driver(workers)
  orders = []
  for index, name in enumerate('ab'):
    cluster.arrive(name)
    orders.append(cluster.start(Step(f'prefill{index}', (Chunk(name, 0, 6),))))
  cluster.arrive('c')
  cluster.apply(WorkerLost('prefill0', 1.0, 'gone'))
  assert [end.request for end in cluster.finished] == ['a']
  assert cluster.phase('b') is Phase.PREFILLING and cluster.phase('c') is Phase.WAITING
  assert cluster.free_pages('prefill0') == 16
  with pytest.raises(PolicyError, match=r"'prefill0' is lost \(.+\); wait"):
    cluster.start(Step('prefill0', (Chunk('c', 0, 6),)))
  assert cluster.view.room().orders('prefill0') == 0 and not cluster.view.room().fits('c', 'prefill0', decodes=False)
  cluster.apply(WorkerBack('prefill0', 1.5, incarnation=2))
  (again,) = cluster.start(Step('prefill0', (Chunk('c', 0, 6),)))
  assert again.incarnation == 2
  cluster.end(again, {'c': 1}, {'c': 'stop'})
  cluster.end(orders[1][0], {'b': 1}, {'b': 'stop'})
  cluster.assert_idle()


def test_a_lost_decode_worker_frees_the_pages_kept_for_the_transfer():
  cluster, (transfer,) = _moving()
  cluster.apply(WorkerLost('decode0', 1.0, 'gone'))
  assert (cluster.free_pages('prefill0'), cluster.free_pages('decode0')) == (16, 16)
  cluster.end(transfer)
  cluster.assert_idle()


def test_requests_in_every_phase_at_once_all_release_what_they_hold():
  for order_of_ends in itertools.permutations(range(3)):
    cluster = Driver(ONE_OF_EACH)
    for name in 'dmp':
      cluster.arrive(name)
    (step,) = cluster.start(Step('prefill0', (Chunk('d', 0, 6), Chunk('m', 0, 6))))
    cluster.end(step, {'d': 1, 'm': 1})
    cluster.end(cluster.start(Transfer('d', 'decode0'))[0])
    under_way = [
      *cluster.start(Transfer('m', 'decode0')),
      *cluster.start(Step('decode0', decodes=ALL)),
      *cluster.start(Step('prefill0', (Chunk('p', 0, 4),))),
    ]
    ends = [cluster.start(Cancel(name))[0] for name in 'dmp']
    for index in order_of_ends:
      cluster.end(ends[index])
      cluster.end(under_way[index])
    assert sorted(end.request for end in cluster.finished) == ['d', 'm', 'p']
    cluster.assert_idle()
