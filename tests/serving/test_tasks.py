"""Transfers that are given up, and transfers that are tried again."""

import math

import pytest

from pdjax.serving import ALL, Cancel, Chunk, Phase, PolicyError, Step
from pdjax.serving.actions import Abandon, Resend
from pdjax.serving.events import Withdrawn
from pdjax.serving.orders import TransferOrder
from pdjax.types import TransferSpec
from tests.serving.driver import TWICE, Driver, due, fail, moving

# ---------------------------------------------------------------------------- given up


def test_a_completion_that_comes_before_the_backend_has_let_go_counts():
  cluster, order = moving()
  due(cluster, cluster.now_s + 10.0)
  (abandon,) = cluster.must()
  cluster.end(order)
  assert cluster.phase('a') is Phase.DECODING
  cluster.end(abandon)
  assert cluster.phase('a') is Phase.DECODING and cluster.state.next_timer_s == math.inf


def test_a_transfer_that_is_being_given_up_cannot_be_given_up_again():
  """A policy that asked for it whenever it is asked would be asked for ever."""
  cluster, order = moving()
  (abandon,) = cluster.start(Abandon(order.id))
  with pytest.raises(PolicyError, match='is being given up already'):
    cluster.start(Abandon(order.id))
  cluster.end(abandon)
  cluster.end(cluster.start(Cancel('a'))[0])
  cluster.assert_idle()


def test_transfers_that_are_not_there_can_be_neither_given_up_nor_tried_again():
  cluster, order = moving()
  for action in (Abandon(99), Resend(order.id)):
    with pytest.raises(PolicyError, match=f'transfer={action.transfer}'):
      cluster.start(action)


# ---------------------------------------------------------------------------- tried again


def test_a_failed_transfer_is_tried_again_after_a_while_with_the_same_pages():
  cluster, first = moving()
  fail(cluster, first)
  assert cluster.must() == () and cluster.phase('a') is Phase.MOVING
  assert (cluster.free_pages('prefill0'), cluster.free_pages('decode0')) == (13, 12)
  assert cluster.state.next_timer_s == cluster.now_s + 4.0
  due(cluster, cluster.now_s + 4.0)
  (second,) = cluster.must()
  assert second.id != first.id
  assert second.span == first.span
  cluster.end(second)
  assert cluster.phase('a') is Phase.DECODING and cluster.free_pages('prefill0') == 16
  cluster.end(cluster.start(Step('decode0', decodes=ALL))[0], {'a': 1}, {'a': 'stop'})
  cluster.assert_idle()


def test_a_cancelled_request_is_not_tried_again():
  cluster, order = moving()
  fail(cluster, order)
  cluster.end(cluster.start(Cancel('a'))[0])
  assert cluster.state.next_timer_s == math.inf
  cluster.assert_idle()


def failed_beside_another(staging_pages: int) -> tuple[Driver, TransferOrder]:
  """The transfer of 'a' has failed, that of 'b' is under way, each of two pages."""
  cluster = Driver(faults=TWICE, transfer=TransferSpec(staging_bytes=staging_pages * 4 * 256, deadline_s=1000.0))
  for name in 'ab':
    cluster.arrive(name, prompt_len=8)
  step, first, second = cluster.start(Step('prefill0', (Chunk('a', 0, 8, 'decode0'), Chunk('b', 0, 8, 'decode0'))))
  cluster.end(step, {'a': 1, 'b': 1})
  fail(cluster, first)
  return cluster, second


def test_staging_without_room_lets_a_second_try_wait_for_its_turn():
  cluster, second = failed_beside_another(staging_pages=4)
  cluster.arrive('c', prompt_len=8)
  step, third = cluster.start(Step('prefill0', (Chunk('c', 0, 8, 'decode0'),)))
  due(cluster, cluster.now_s + 4.0)
  assert cluster.must() == ()
  cluster.end(second)
  (again,) = cluster.must()
  assert again.request == 'a'
  for order in (step, third, again):
    cluster.end(order, {'c': 1} if order is step else {})
  assert {cluster.phase(name) for name in 'abc'} == {Phase.DECODING}


@pytest.mark.parametrize('is_cancelled', [False, True])
def test_what_is_new_does_not_take_the_room_that_a_second_try_waits_for(is_cancelled):
  cluster, second = failed_beside_another(staging_pages=5)
  for name, prompt_len in (('c', 8), ('d', 4)):
    cluster.arrive(name, prompt_len=prompt_len)
  cluster.start(Step('prefill0', (Chunk('c', 0, 8, 'decode0'),)))
  due(cluster, cluster.now_s + 4.0)
  assert cluster.must() == ()
  assert cluster.state.books.holdings['prefill0'].staging_out.free_bytes == 4 * 256  # as much as 'd' would take
  assert len(cluster.start(Step('prefill0', (Chunk('d', 0, 4, 'decode0'),)))) == 1
  if is_cancelled:
    cluster.apply(Withdrawn('a'))
  else:
    cluster.end(second)
  orders = [*cluster.must(), *cluster.must()]
  moved = [order.request for order in orders if isinstance(order, TransferOrder)]
  assert moved == (['d'] if is_cancelled else ['a', 'd'])
