"""A sequence that decodes moves to another worker: it leaves its batch, its KV travels, and it goes on there."""

import dataclasses

import pytest

from pdjax.serving import ALL, STANDING, Cancel, Chunk, Phase, PolicyError, Step, SwitchRole, Transfer
from pdjax.serving.events import PrefixHit, WorkerBack, WorkerLost
from pdjax.serving.invariants import check
from pdjax.serving.orders import LeaveOrder, StepOrder
from pdjax.types import PrefixCache, Role, WorkerSpec, decode_pool, prefill_pool
from tests.serving.driver import SIZES, TWICE, TWO_AND_TWO, Driver, decoding, fail
from tests.serving.test_books import PAGE_BYTES


def moving(count: int = 3, **options) -> Driver:
  """A request of 10 prompt tokens with so many more, in a slot of `decode0`, from where it may go anywhere."""
  return decoding(count, **{'moves_anywhere': True} | options)


def leave(cluster: Driver, target: str = 'decode1') -> None:
  (order,) = cluster.start(Transfer('a', target))
  assert isinstance(order, LeaveOrder) and (order.request, order.worker) == ('a', 'decode0')
  cluster.end(order)


def test_a_sequence_leaves_travels_with_all_its_pages_and_goes_on():
  cluster = moving()
  leave(cluster)
  assert cluster.phase('a') is Phase.PREFILLED and not cluster.view.workers['decode0'].decoding
  (transfer,) = cluster.must()
  assert (transfer.source, transfer.target, transfer.span.start) == ('decode0', 'decode1', 0)
  assert transfer.span.tokens == 12  # 10 of the prompt and all generated ones but the last
  assert transfer.num_bytes == 3 * PAGE_BYTES
  check(cluster.state.books)
  cluster.end(transfer)
  assert cluster.phase('a') is Phase.DECODING and cluster.free_pages('decode0') == 16
  (step,) = cluster.start(Step('decode1', decodes=ALL))
  (join,) = step.joins
  assert join.admission is not None
  assert (join.context, join.admission.tokens) == (12, (7, 7, 7))
  cluster.end(step, {'a': 1}, {'a': 'length'})
  assert cluster.finished[-1].tokens == (7, 7, 7, 7)
  cluster.assert_idle()


def test_steps_in_flight_end_before_it_travels_and_their_tokens_count():
  cluster = moving(2)
  steps = [cluster.start(Step('decode0', decodes=ALL))[0] for _ in range(2)]
  leave(cluster)
  assert cluster.phase('a') is Phase.LEAVING and cluster.must() == ()
  cluster.end(steps[0], {'a': 1})
  assert cluster.phase('a') is Phase.LEAVING
  cluster.end(steps[1], {'a': 1}, {'a': 'length'})  # and it is over before it could go on
  assert cluster.finished[-1].tokens == (7, 7, 7, 7)
  assert cluster.must() == ()
  cluster.assert_idle()


def test_a_standing_step_is_told_to_let_it_go():
  cluster = moving(2)
  (step,) = cluster.start(Step('decode0', decodes=ALL, steps=STANDING))
  leave(cluster)
  assert cluster.view.workers['decode0'].is_standing is False
  cluster.end(step, {'a': 1})
  (transfer,) = cluster.must()
  assert transfer.span.tokens == 12
  cluster.end(transfer)
  assert cluster.view.requests['a'].num_tokens == 3


def test_it_waits_for_room_where_others_took_it_meanwhile_and_the_policy_finds_it():
  cluster = moving(2, workers=prefill_pool(2, **SIZES) + decode_pool(2, **SIZES | {'max_sequences': 1}))
  (step,) = cluster.start(Step('decode0', decodes=ALL))
  leave(cluster)
  cluster.arrive('b', 4)
  others = cluster.start(Step('prefill0', (Chunk('b', 0, 4, 'decode1'),)))
  cluster.end(step, {'a': 1})
  assert cluster.must() == () and [*cluster.view.prefilled] == ['a']
  for order in others:
    cluster.end(order, {'b': 1} if isinstance(order, StepOrder) else None, {'b': 'stop'})
  (transfer,) = cluster.start(Transfer('a', 'decode1'))
  cluster.end(transfer)
  assert cluster.phase('a') is Phase.DECODING


def test_one_that_finds_no_room_elsewhere_goes_on_where_it_is():
  cluster = moving(2)
  leave(cluster)
  books = cluster.state.books
  books.moving.clear()  # as if others had taken the room
  assert cluster.view.room().fits('a', 'decode0', decodes=True)
  assert cluster.start(Transfer('a', 'decode0')) == () and cluster.phase('a') is Phase.DECODING
  assert cluster.free_pages('decode0') == 12
  (step,) = cluster.start(Step('decode0', decodes=ALL))
  assert [join.admission.tokens for join in step.joins if join.admission] == [(7, 7)]
  check(books)


def test_a_worker_that_drains_is_empty_once_its_sequences_have_moved_on():
  workers = prefill_pool(2, **SIZES) + tuple(
    WorkerSpec(f'decode{i}', 'decode', may_become=('prefill',), **SIZES) for i in range(2)
  )
  cluster = moving(workers=workers)
  cluster.start(SwitchRole('decode0', Role.PREFILL))
  leave(cluster)
  (transfer,) = cluster.must()
  assert cluster.view.workers['decode0'].role is Role.DECODE
  cluster.end(transfer)
  assert cluster.view.workers['decode0'].role is Role.PREFILL and cluster.phase('a') is Phase.DECODING


@pytest.mark.parametrize('lost', ['decode0', 'decode1'])
@pytest.mark.parametrize('when', ['leaving', 'waiting', 'moving'])
def test_wherever_a_place_is_lost_on_the_way_it_begins_again_with_the_tokens_it_has(lost, when):
  cluster = moving(2, faults=TWICE)
  (step,) = cluster.start(Step('decode0', decodes=ALL))
  leave(cluster)
  if when != 'leaving':
    cluster.end(step, {'a': 1})
  if when == 'moving':
    cluster.must()
  cluster.apply(WorkerLost(lost, cluster.now_s, 'gone', returning=True))
  check(cluster.state.books)
  if lost == 'decode1' and when != 'moving':
    assert cluster.phase('a') is (Phase.LEAVING if when == 'leaving' else Phase.PREFILLED)
    if when == 'leaving':
      cluster.end(step, {'a': 1})
    assert cluster.must() == ()
    cluster.apply(WorkerBack(lost, cluster.now_s, 2))
    (transfer,) = cluster.start(Transfer('a', 'decode1'))
    cluster.end(transfer)
    assert cluster.phase('a') is Phase.DECODING
    return
  assert cluster.phase('a') is Phase.WAITING
  assert len(cluster.view.requests['a'].delivered) == (2 if when == 'leaving' else 3)


@pytest.mark.parametrize('answer', ['retry', 'recompute', 'fail'])
def test_a_transfer_that_fails_is_tried_again_or_it_begins_again_or_ends(answer):
  cluster = moving(faults=dataclasses.replace(TWICE, transfer=answer))
  leave(cluster)
  (transfer,) = cluster.must()
  fail(cluster, transfer)
  check(cluster.state.books)
  if answer == 'fail':
    assert cluster.finished[-1].finish_reason == 'error' and cluster.finished[-1].tokens == (7, 7, 7)
    return
  assert cluster.view.requests['a'].tokens == [7, 7, 7]
  if answer == 'recompute':
    assert cluster.phase('a') is Phase.WAITING and cluster.view.requests['a'].prefill_len == 12
    return
  cluster.now_s += 5.0
  for timer in cluster.state.timers_due(cluster.now_s):
    cluster.apply(timer)
  (again,) = cluster.must()
  cluster.end(again)
  assert cluster.phase('a') is Phase.DECODING and cluster.view.requests['a'].target == 'decode1'


def test_one_whose_target_has_another_role_by_then_waits_for_another():
  workers = prefill_pool(1, **SIZES) + tuple(
    WorkerSpec(f'decode{i}', 'decode', may_become=('prefill',), **SIZES) for i in range(3)
  )
  cluster = moving(2, workers=workers)
  (step,) = cluster.start(Step('decode0', decodes=ALL))
  leave(cluster)
  cluster.start(SwitchRole('decode1', Role.PREFILL))
  cluster.end(step, {'a': 1})
  assert cluster.must() == () and [*cluster.view.prefilled] == ['a']
  (transfer,) = cluster.start(Transfer('a', 'decode2'))
  cluster.end(transfer)
  assert cluster.phase('a') is Phase.DECODING


def test_one_goes_on_where_it_is_although_that_worker_drains():
  workers = prefill_pool(1, **SIZES) + tuple(
    WorkerSpec(f'decode{i}', 'decode', may_become=('prefill',), **SIZES) for i in range(2)
  )
  cluster = moving(2, workers=workers)
  cluster.start(SwitchRole('decode0', Role.PREFILL))
  leave(cluster)
  cluster.apply(WorkerLost('decode1', cluster.now_s, 'gone'))
  assert cluster.must() == ()
  assert cluster.start(Transfer('a', 'decode0')) == () and cluster.phase('a') is Phase.DECODING


def test_a_sample_that_no_step_has_decoded_yet_cannot_be_moved():
  """Its last page holds nothing yet: it is copied from that of another as it joins."""
  cluster = Driver(TWO_AND_TWO, moves_anywhere=True)
  cluster.arrive('a', 10, n=2)
  cluster.end(cluster.start(Step('prefill0', (Chunk('a', 0, 10),)))[0], {'a': 1})
  cluster.end(cluster.start(Transfer('a', 'decode0'))[0])
  assert [cluster.view.requests[name].can_move for name in ('a', 'a#1')] == [True, False]
  with pytest.raises(PolicyError, match='further sample that no step has decoded yet; wait until `can_move` says so'):
    cluster.start(Transfer('a#1', 'decode1'))
  cluster.end(cluster.start(Step('decode0', decodes=ALL))[0], {'a': 1, 'a#1': 1})
  assert cluster.view.requests['a#1'].can_move


def test_one_that_moves_is_told_of_as_a_hit_once_and_knows_who_prefilled_it():
  cluster = moving(3, prefix_cache=PrefixCache(block_tokens=2))
  cluster.arrive('b', 10)
  cluster.end(cluster.start(Step('prefill0', (Chunk('b', 0, 10),)))[0], {'b': 1})
  cluster.end(cluster.start(Transfer('b', 'decode0'))[0])
  (order,) = cluster.start(Transfer('b', 'decode1'))
  cluster.end(order)
  (transfer,) = cluster.must()
  hits = [event for event in cluster.state.take_told() if isinstance(event, PrefixHit) and event.request == 'b']
  assert [(hit.place, hit.tokens, hit.side) for hit in hits] == [('decode0', 8, 'decode')]
  cluster.end(transfer)
  assert (cluster.view.requests['b'].worker, cluster.view.requests['b'].prefilled_by) == ('decode0', 'prefill0')


def test_one_that_is_cancelled_on_the_way_leaves_nothing():
  for when in ('leaving', 'waiting', 'moving'):
    cluster = moving(2)
    (step,) = cluster.start(Step('decode0', decodes=ALL))
    leave(cluster)
    if when != 'leaving':
      cluster.end(step, {'a': 1})
    under_way = cluster.must() if when == 'moving' else ()
    cluster.end(cluster.start(Cancel('a'))[0])
    for order in (*under_way, *([step] if when == 'leaving' else [])):
      cluster.end(order)
    for order in cluster.must():  # what gives the transfer up
      cluster.end(order)
    cluster.assert_idle()


def test_a_further_sample_moves_by_itself_and_the_pages_that_it_shared_stay_with_the_other():
  cluster = Driver(TWO_AND_TWO, moves_anywhere=True)
  cluster.arrive('a', 10, n=2)
  cluster.end(cluster.start(Step('prefill0', (Chunk('a', 0, 10),)))[0], {'a': 1})
  cluster.end(cluster.start(Transfer('a', 'decode0'))[0])
  cluster.end(cluster.start(Step('decode0', decodes=ALL))[0], {'a': 1, 'a#1': 1})
  (order,) = cluster.start(Transfer('a#1', 'decode1'))
  cluster.end(order)
  (transfer,) = cluster.must()
  cluster.end(transfer)
  check(cluster.state.books)
  assert cluster.view.requests['a'].target == 'decode0' and cluster.view.requests['a#1'].target == 'decode1'
  assert (cluster.free_pages('decode0'), cluster.free_pages('decode1')) == (12, 12)


def test_what_it_leaves_is_cached_and_what_is_there_does_not_travel():
  cluster = moving(3, prefix_cache=PrefixCache(block_tokens=2))
  leave(cluster)
  (transfer,) = cluster.must()
  cluster.end(transfer)
  check(cluster.state.books)
  cluster.arrive('b', prompt=(*range(2, 12), 7, 7, 7))
  assert [cluster.view.cached_tokens('b', f'decode{i}') for i in range(2)] == [12, 12]
  cluster.end(cluster.start(Step('decode1', decodes=ALL))[0], {'a': 1}, {'a': 'length'})
  cluster.arrive('c', 10)
  cluster.end(cluster.start(Step('prefill0', (Chunk('c', 8, 2),)))[0], {'c': 1})
  (transfer,) = cluster.start(Transfer('c', 'decode0'))
  assert transfer.span.start == 8
  cluster.end(transfer)
  (order,) = cluster.start(Transfer('c', 'decode1'))
  cluster.end(order)
  (transfer,) = cluster.must()
  assert (transfer.span.start, transfer.span.tokens) == (8, 4)


def test_one_whose_tokens_were_made_in_two_ways_is_cached_no_more():
  workers = prefill_pool(1, **SIZES, kv_dtype='float32', weights='float32') + decode_pool(
    2, **SIZES, kv_dtype='int8', weights='float32'
  )
  cluster = moving(3, workers=workers, prefix_cache=PrefixCache(block_tokens=2))
  leave(cluster)
  (transfer,) = cluster.must()
  cluster.end(transfer)
  cluster.end(cluster.start(Step('decode1', decodes=ALL))[0], {'a': 1}, {'a': 'length'})
  check(cluster.state.books)
  cluster.arrive('b', prompt=(*range(2, 12), 7, 7, 7))
  assert cluster.view.cached_tokens('b', 'decode0', 'prefill0') == 8
  assert cluster.view.cached_tokens('b', 'decode1', 'prefill0') == cluster.view.cached_tokens('b', 'decode1') == 0
