"""A request arrives and ends once, and all that it held is free once the orders about it have ended."""

import itertools

import pytest

from pdjax.serving import ALL, Cancel, Chunk, Phase, Step, Transfer
from pdjax.serving.events import Failed, Finished, Withdrawn
from pdjax.serving.orders import EndOrder, Order
from pdjax.types import colocated_pool
from tests.serving.driver import ONE_OF_EACH, SETUPS, SIZES, TWICE, Driver, end_well

# ---------------------------------------------------------------------------- arriving


def test_a_second_request_of_the_same_name_is_refused():
  cluster = Driver()
  cluster.arrive('a')
  with pytest.raises(ValueError, match="request 'a' is being served already; ids must be unique"):
    cluster.arrive('a', prompt_len=9)
  assert cluster.view.requests['a'].request.prompt_len == 6


def test_the_context_bounds_what_is_generated():
  cluster = Driver(colocated_pool(1, **SIZES))
  cluster.arrive('a', prompt_len=62, max_tokens=50)
  assert cluster.view.requests['a'].limit == 3  # the last token needs no place in the cache
  assert cluster.view.pages_needed('a', 'both0', decodes=True) == 16  # 64 tokens
  cluster.arrive('b', prompt_len=64, max_tokens=50)
  assert cluster.view.requests['b'].limit == 1


def test_a_request_of_which_a_trace_says_that_it_generates_nothing_generates_one_token():
  cluster = Driver()
  cluster.state.expect({'a': 0}.get)
  cluster.arrive('a')
  (step,) = cluster.start(Step('prefill0', (Chunk('a', 0, 6),)))
  assert step.chunks[0].limit == 1


def test_a_rejection_is_an_order_that_names_the_reason():
  cluster = Driver()
  cluster.arrive('a', prompt_len=65)
  (order,) = cluster.must()
  assert isinstance(order, EndOrder) and order.finish_reason == 'rejected' and 'context' in order.reason
  assert cluster.phase('a') is Phase.ENDING and cluster.must() == ()


# ---------------------------------------------------------------------------- ending by itself


def test_a_request_that_ends_with_its_first_token_moves_nothing():
  cluster = Driver()
  cluster.arrive('a', max_tokens=1)
  orders = cluster.start(Step('prefill0', (Chunk('a', 0, 6),)))
  cluster.end(orders[0], {'a': 1}, {'a': 'length'})
  assert len(orders) == 1 and cluster.finished[0].tokens == (7,)
  cluster.assert_idle()


def test_a_sequence_that_stops_early_leaves_its_second_step_to_run_out():
  cluster = Driver(colocated_pool(1, **SIZES))
  cluster.arrive('a', max_tokens=10)
  (step,) = cluster.start(Step('both0', (Chunk('a', 0, 6),)))
  (decode,) = cluster.start(Step('both0', decodes=ALL))
  cluster.end(step, {'a': 1}, {'a': 'stop'})
  assert cluster.state.unfinished and not cluster.view.requests
  cluster.end(decode, {'a': 1})  # a token past the end changes nothing
  assert cluster.finished == [Finished(1.0, 'a', 'stop', (7,))]
  cluster.assert_idle()


# ---------------------------------------------------------------------------- withdrawn and cancelled


PHASES = pytest.mark.parametrize('phase', SETUPS, ids=lambda phase: getattr(phase, 'value', phase))


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
      end_well(cluster, order)
    assert [one.finish_reason for one in cluster.finished] == ['cancelled']
    cluster.assert_idle()


@PHASES
def test_tokens_delivered_before_a_cancellation_stay_and_later_ones_do_not_count(phase):
  cluster, orders = SETUPS[phase]()
  delivered = tuple(cluster.view.requests['a'].tokens)
  (end,) = cluster.start(Cancel('a'))
  for order in (*orders, end):
    end_well(cluster, order)
  assert cluster.finished[0].tokens == delivered and cluster.finished[0].error is None


def test_a_cancelled_request_takes_no_further_part():
  cluster, _ = SETUPS[Phase.PREFILLING]()
  cluster.apply(Withdrawn('a'))
  worker = cluster.state.workers['prefill0']
  assert not worker.prefilling and worker.queued_tokens == 8  # what is under way is still computed


def test_cancelling_reaches_the_prefill_side_at_once():
  cluster = Driver(faults=TWICE)
  cluster.arrive('a', prompt_len=10)
  step, transfer = cluster.start(Step('prefill0', (Chunk('a', 0, 4, 'decode0'),)))
  cluster.apply(Withdrawn('a'))
  assert not cluster.state.workers['prefill0'].prefilling
  (end,) = cluster.must()
  (abandon,) = cluster.must()
  assert abandon.transfer == transfer.id
  for order in (end, abandon, step):
    cluster.end(order)
  assert [one.finish_reason for one in cluster.finished] == ['cancelled']
  cluster.assert_idle()


@pytest.mark.parametrize('times', [1, 2])
def test_who_withdraws_twice_is_told_once(times):
  cluster, _ = SETUPS[Phase.WAITING]()
  for _ in range(times):
    cluster.apply(Withdrawn('a'))
  (end,) = cluster.must()
  cluster.apply(Withdrawn('a'))  # it is being ended already
  assert cluster.must() == ()
  cluster.end(end)
  cluster.apply(Withdrawn('a'))  # it is gone
  assert cluster.must() == () and len(cluster.finished) == 1


def test_a_request_withdrawn_as_it_ends_has_ended():
  cluster, (first, second) = SETUPS[Phase.DECODING]()
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


def test_an_end_that_fails_ends_the_request_all_the_same():
  cluster, _ = SETUPS[Phase.WAITING]()
  (end,) = cluster.start(Cancel('a'))
  cluster.apply(Failed(end.id, 1.0, 'boom'))
  assert [(one.finish_reason, one.error) for one in cluster.finished] == [('error', 'boom')]
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
