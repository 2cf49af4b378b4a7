"""Deadlines, failed orders and lost places: what ends with them, and what begins again."""

import itertools
import math

import pytest

from pdjax.serving import ALL, Cancel, Chunk, Phase, PolicyError, Step, Transfer
from pdjax.serving.events import Done, Failed, Withdrawn, WorkerBack, WorkerLost
from pdjax.serving.orders import AbandonOrder, Order, StepOrder, TransferOrder
from pdjax.types import FaultSpec, colocated_pool, decode_pool, prefill_pool
from tests.serving.driver import SETUPS, SIZES, TWICE, TWO_AND_TWO, Driver, decoding, due, end_well, fail, moving

# ---------------------------------------------------------------------------- deadlines and transfers that failed


def test_a_transfer_past_its_deadline_keeps_its_pages_until_the_backend_has_let_go():
  cluster, order = moving(FaultSpec(transfer='fail'))
  assert cluster.state.next_timer_s == cluster.now_s + 10.0
  (timer,) = due(cluster, cluster.now_s + 10.0)
  assert (timer.timer, timer.about) == ('deadline', order.id)
  (abandon,) = cluster.must()
  assert abandon == AbandonOrder(abandon.id, order.id, 'prefill0', 'decode0')
  assert cluster.free_pages('prefill0') == 13 and not cluster.finished
  cluster.end(abandon)
  assert [end.error for end in cluster.finished] == ['the transfer did not end within 10 s']
  cluster.assert_idle()
  assert not cluster.state.apply(Done(order.id, 0.0, 99.0), 99.0)  # nobody listens any more


def test_what_has_ended_in_the_turn_of_its_deadline_is_in_time():
  cluster, order = moving()
  cluster.end(order)
  assert due(cluster, 1000.0) == []


def test_a_transfer_tried_often_enough_is_computed_again_and_then_the_error_is_told():
  cluster, order = moving()
  for _ in range(2):
    fail(cluster, order)
    due(cluster, cluster.now_s + 4.0)
    (order,) = cluster.must()
    fail(cluster, order)  # for the last time
    if cluster.finished:
      break
    assert cluster.phase('a') is Phase.WAITING
    assert (cluster.free_pages('prefill0'), cluster.free_pages('decode0')) == (16, 16)
    (step,) = cluster.start(Step('prefill0', (Chunk('a', 0, 10),)))
    assert step.chunks[0].delivered == (7,) and not step.chunks[0].is_last
    cluster.end(step)
    (order,) = cluster.start(Transfer('a', 'decode0'))
  assert [(end.finish_reason, end.error, end.tokens) for end in cluster.finished] == [('error', 'boom', (7,))]
  cluster.assert_idle()


@pytest.mark.parametrize('corrupt', [False, True])
@pytest.mark.parametrize('answer', ['retry', 'recompute', 'fail'])
def test_what_is_done_about_a_failed_transfer_and_about_a_damaged_one_is_said_apart(answer, corrupt):
  other = 'fail' if answer != 'fail' else 'retry'
  answers = {'transfer': other, 'corruption': answer} if corrupt else {'transfer': answer, 'corruption': other}
  cluster, order = moving(FaultSpec(**answers))
  fail(cluster, order, corrupt=corrupt)
  match answer:
    case 'retry':
      assert cluster.phase('a') is Phase.MOVING and math.isfinite(cluster.state.next_timer_s)
    case 'recompute':
      assert cluster.phase('a') is Phase.WAITING
    case 'fail':
      assert [end.error for end in cluster.finished] == ['boom']
      cluster.assert_idle()


# ---------------------------------------------------------------------------- failures that end requests


@pytest.mark.parametrize('phase', [Phase.PREFILLING, 'last chunk', Phase.MOVING, Phase.DECODING, 'colocated'])
def test_a_failed_order_ends_its_requests_and_releases_everything(phase):
  for failed in range(len(SETUPS[phase]()[1])):
    cluster, orders = SETUPS[phase]()
    for index, order in enumerate(orders):
      if index == failed:
        cluster.apply(Failed(order.id, 1.0, 'boom'))
      else:
        end_well(cluster, order)
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
      end_well(cluster, order)
  for order in gone:  # what is heard of them later counts for nothing
    end_well(cluster, order)
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
  cluster, (transfer,) = SETUPS[Phase.MOVING]()
  cluster.apply(WorkerLost('decode0', 1.0, 'gone'))
  assert (cluster.free_pages('prefill0'), cluster.free_pages('decode0')) == (16, 16)
  cluster.end(transfer)
  cluster.assert_idle()


# ---------------------------------------------------------------------------- lost workers, and what begins again


def test_a_request_whose_decode_worker_is_lost_begins_again_with_what_it_got():
  cluster = decoding()
  cluster.apply(WorkerLost('decode0', 9.0, 'gone'))
  entry = cluster.view.requests['a']
  assert entry.phase is Phase.WAITING and entry.tokens == [7, 7, 7] and entry.prompt_left == 12
  (first,) = cluster.start(Step('prefill1', (Chunk('a', 0, 8),)))
  second, transfer = cluster.start(Step('prefill1', (Chunk('a', 8, 4),)))[0], None
  assert [*first.chunks[0].token_ids, *second.chunks[0].token_ids] == [*range(2, 12), 7, 7]
  assert not second.chunks[0].is_last and second.chunks[0].restores
  cluster.end(first)
  cluster.end(second)
  assert cluster.phase('a') is Phase.PREFILLED
  (transfer,) = cluster.start(Transfer('a', 'decode1'))
  assert transfer.span.tokens == 12
  cluster.end(transfer)
  (step,) = cluster.start(Step('decode1', decodes=ALL))
  (join,) = step.joins
  assert join.admission.tokens == (7, 7, 7) and join.context == 12
  cluster.end(step, {'a': 1}, {'a': 'length'})
  assert [end.tokens for end in cluster.finished] == [(7,) * 4]
  cluster.assert_idle()


def test_on_one_worker_a_request_begun_again_is_admitted_when_its_tokens_are_computed():
  cluster = Driver(colocated_pool(2, **SIZES), faults=TWICE)
  cluster.arrive('a', prompt_len=6)
  cluster.end(cluster.start(Step('both0', (Chunk('a', 0, 6),)))[0], {'a': 1})
  cluster.end(cluster.start(Step('both0', decodes=ALL))[0], {'a': 1})
  cluster.apply(WorkerLost('both0', 9.0, 'gone'))
  (step,) = cluster.start(Step('both1', (Chunk('a', 0, 7),)))
  assert step.chunks[0].slot is None and cluster.state.workers['both1'].decodable() == []
  cluster.end(step)
  (step,) = cluster.start(Step('both1', decodes=ALL))
  assert step.joins[0].admission.tokens == (7, 7) and step.joins[0].context == 7
  cluster.end(step, {'a': 2}, {'a': 'length'})
  cluster.assert_idle()


@pytest.mark.parametrize('computed', [False, True])
def test_a_prompt_that_is_whole_where_it_is_computed_is_sent_elsewhere_and_not_computed_again(computed):
  cluster = Driver(TWO_AND_TWO, faults=TWICE)
  cluster.arrive('a', prompt_len=10)
  step, first = cluster.start(Step('prefill0', (Chunk('a', 0, 4, 'decode0'),)))
  last, second = cluster.start(Step('prefill0', (Chunk('a', 4, 6, 'decode0'),)))
  cluster.end(step)
  if computed:
    cluster.end(last, {'a': 1})
  cluster.apply(WorkerLost('decode0', 9.0, 'gone'))
  if not computed:
    assert cluster.phase('a') is Phase.PREFILLING
    cluster.end(last, {'a': 1})
  assert cluster.phase('a') is Phase.PREFILLED
  for order in (first, second):
    assert not cluster.state.apply(Done(order.id, 0.0, 9.0), 9.0)
  (transfer,) = cluster.start(Transfer('a', 'decode1'))
  assert (transfer.span.start, transfer.span.tokens) == (0, 12)
  cluster.end(transfer)
  assert cluster.phase('a') is Phase.DECODING


def test_a_request_begun_again_comes_before_those_that_came_after_it():
  cluster = Driver(TWO_AND_TWO, faults=TWICE)
  for name in 'abcd':
    cluster.arrive(name)
  cluster.start(Step('prefill0', (Chunk('a', 0, 6), Chunk('c', 0, 6))))
  assert list(cluster.view.waiting) == ['b', 'd']
  cluster.apply(WorkerLost('prefill0', 1.0, 'gone'))
  assert list(cluster.view.waiting) == ['a', 'b', 'c', 'd']


def test_a_request_waits_for_its_own_steps_before_it_begins_again():
  """A chunk is under way on a worker that lives, while a transfer of the one before has failed for good."""
  cluster = Driver(faults=FaultSpec(transfer='recompute'))
  cluster.arrive('a', prompt_len=10)
  step, transfer = cluster.start(Step('prefill0', (Chunk('a', 0, 4, 'decode0'),)))
  last, rest = cluster.start(Step('prefill0', (Chunk('a', 4, 6, 'decode0'),)))
  cluster.end(step)
  fail(cluster, transfer)
  assert cluster.phase('a') is Phase.RESTARTING and not cluster.view.waiting
  (abandon,) = cluster.must()
  cluster.end(abandon)
  assert cluster.phase('a') is Phase.RESTARTING
  cluster.end(last, {'a': 1})  # a token is a token
  assert cluster.phase('a') is Phase.WAITING and cluster.view.requests['a'].delivered == (7,)
  assert not cluster.state.apply(Done(rest.id, 0.0, 9.0), 9.0)
  cluster.apply(Withdrawn('a'))
  cluster.end(cluster.must()[0])
  cluster.assert_idle()


def test_samples_that_have_begun_begin_again_each_by_itself():
  cluster = Driver(TWO_AND_TWO, faults=TWICE)
  cluster.arrive('a', prompt_len=10, n=3)
  cluster.end(cluster.start(Step('prefill0', (Chunk('a', 0, 10),)))[0], {'a': 1})
  cluster.end(cluster.start(Transfer('a', 'decode0'))[0])
  names = ('a', 'a#1', 'a#2')
  cluster.end(cluster.start(Step('decode0', decodes=ALL))[0], dict.fromkeys(names, 1), {'a#1': 'stop'})
  cluster.apply(WorkerLost('decode0', 9.0, 'gone'))
  assert list(cluster.view.waiting) == ['a', 'a#2']
  (step,) = cluster.start(Step('prefill0', (Chunk('a', 0, 11), Chunk('a#2', 0, 10))))
  assert [chunk.delivered for chunk in step.chunks] == [(7, 7), (7,)]
  cluster.end(step)
  for name in ('a', 'a#2'):
    cluster.end(cluster.start(Transfer(name, 'decode1'))[0])
  (step,) = cluster.start(Step('decode1', decodes=ALL))
  assert {join.request: join.admission.copies for join in step.joins} == {'a': {}, 'a#2': {}}
  cluster.end(step, {'a': 1, 'a#2': 1}, {'a': 'stop', 'a#2': 'stop'})
  cluster.assert_idle()


def test_samples_that_wait_for_a_prompt_that_is_lost_compute_it_each_for_itself():
  cluster = Driver(TWO_AND_TWO, faults=TWICE)
  cluster.arrive('a', prompt_len=10, n=3)
  step, _ = cluster.start(Step('prefill0', (Chunk('a', 0, 10, 'decode0'),)))
  cluster.end(step, {'a': 1})
  cluster.apply(WorkerLost('prefill0', 9.0, 'gone'))
  assert list(cluster.view.waiting) == ['a', 'a#1', 'a#2'] and cluster.free_pages('decode0') == 16
  (step,) = cluster.start(Step('prefill1', tuple(Chunk(name, 0, 10) for name in ('a', 'a#1', 'a#2'))))
  assert [chunk.is_last for chunk in step.chunks] == [False, True, True]
  cluster.end(step, {'a#1': 1, 'a#2': 1}, {'a#1': 'stop', 'a#2': 'stop'})
  cluster.apply(Withdrawn('a'))
  cluster.end(cluster.must()[0])
  cluster.assert_idle()


def test_what_no_prefill_worker_holds_any_more_ends_with_the_numbers():
  """The prompt fitted, the prompt and what was delivered do not."""
  workers = prefill_pool(1, **SIZES | {'num_pages': 3}) + decode_pool(1, **SIZES)
  cluster = decoding(workers=workers, prompt_len=12)
  cluster.apply(WorkerLost('decode0', 9.0, 'gone'))
  (end,) = cluster.finished
  assert end.finish_reason == 'error' and 'need 4 pages of 4 tokens' in end.error
  cluster.assert_idle()


def test_a_request_that_is_begun_too_often_ends_with_the_error():
  cluster = Driver(faults=FaultSpec(max_attempts=3))
  cluster.arrive('a')
  for incarnation in itertools.count(2):
    cluster.start(Step('prefill0', (Chunk('a', 0, 6),)))
    cluster.apply(WorkerLost('prefill0', 1.0, 'gone'))
    cluster.apply(WorkerBack('prefill0', 1.0, incarnation))
    if cluster.finished:
      break
  assert incarnation == 4 and [end.error for end in cluster.finished] == ['gone']
  cluster.assert_idle()


def test_requests_wait_for_a_lost_worker_for_a_while_and_then_learn_why():
  cluster = decoding(faults=FaultSpec(patience_s=30.0), workers=prefill_pool(1, **SIZES) + decode_pool(1, **SIZES))
  cluster.apply(WorkerLost('decode0', 9.0, 'gone'))
  assert cluster.phase('a') is Phase.WAITING
  cluster.state.check_progress()  # it may come back
  due(cluster, cluster.state.next_timer_s)
  assert [end.error for end in cluster.finished] == ["every worker that decodes is lost: 'decode0' (gone)."]
  cluster.arrive('b')
  assert cluster.reject_unfit().finish_reason == 'rejected'
  cluster.apply(WorkerBack('decode0', 99.0, 2))
  cluster.arrive('c')
  assert cluster.must() == () and list(cluster.view.waiting) == ['c']


def test_a_worker_that_comes_back_in_time_is_not_given_up():
  cluster = decoding(faults=FaultSpec(patience_s=30.0))
  cluster.apply(WorkerLost('decode0', 9.0, 'gone'))
  cluster.apply(WorkerBack('decode0', 10.0, 2))
  assert cluster.state.next_timer_s == math.inf


def test_patience_runs_only_while_nobody_brings_the_worker_back():
  cluster = decoding(faults=FaultSpec(patience_s=30.0), workers=prefill_pool(1, **SIZES) + decode_pool(1, **SIZES))
  cluster.apply(WorkerLost('decode0', 9.0, 'gone', returning=True))
  assert cluster.state.next_timer_s == math.inf and cluster.phase('a') is Phase.WAITING
  cluster.state.check_progress()  # it is on its way
  cluster.arrive('b')
  due(cluster, 5000.0)
  assert not cluster.finished and list(cluster.view.waiting) == ['a', 'b']
  cluster.apply(WorkerLost('decode0', 5000.0, 'it did not come back in 3 tries'))
  assert cluster.state.next_timer_s == cluster.now_s + 30.0
  assert due(cluster, cluster.now_s + 29.0) == [] and not cluster.finished
  due(cluster, cluster.now_s + 30.0)
  error = "every worker that decodes is lost: 'decode0' (it did not come back in 3 tries)."
  assert [(end.request, end.error) for end in cluster.finished] == [('a', error), ('b', error)]
  assert cluster.free_pages('prefill0') == 16


def test_a_worker_that_is_lost_once_more_while_it_was_given_time_is_brought_back_without_a_limit():
  cluster = decoding(faults=FaultSpec(patience_s=30.0))
  cluster.apply(WorkerLost('decode0', 9.0, 'gone'))
  assert cluster.state.next_timer_s == cluster.now_s + 30.0
  cluster.apply(WorkerLost('decode0', 9.5, 'gone', returning=True))
  assert cluster.state.next_timer_s == math.inf
  cluster.apply(WorkerBack('decode0', 500.0, 2))
  assert cluster.state.workers['decode0'].up and cluster.state.next_timer_s == math.inf


def test_another_incarnation_of_a_worker_is_the_end_of_the_one_before_even_if_nobody_saw_it_die():
  cluster = decoding()
  (step,) = cluster.start(Step('decode0', decodes=ALL))
  cluster.apply(WorkerBack('decode0', 9.0, 2))
  assert cluster.phase('a') is Phase.WAITING and not cluster.state.workers['decode0'].num_steps
  assert not cluster.state.apply(Done(step.id, 0.0, 9.0), 9.0)
  assert not cluster.state.apply(WorkerBack('decode0', 9.0, 2), 9.0) and cluster.state.workers['decode0'].up


def test_confirmations_that_a_dead_worker_owed_are_waited_for_no_longer():
  cluster, order = moving()
  due(cluster, cluster.now_s + 10.0)
  (abandon,) = cluster.must()
  cluster.apply(WorkerLost('decode0', 99.0, 'gone'))
  assert cluster.phase('a') is Phase.PREFILLED
  assert not cluster.state.apply(Done(abandon.id, 0.0, 99.0), 99.0)
  assert not cluster.state.apply(Done(order.id, 0.0, 99.0), 99.0)


# ---------------------------------------------------------------------------- steps that could not begin


def test_a_prompt_whose_step_could_not_begin_begins_again_once_its_later_steps_have_ended():
  cluster = Driver(faults=TWICE)
  cluster.arrive('a', prompt_len=10)
  first, _ = cluster.start(Step('prefill0', (Chunk('a', 0, 4, 'decode0'),)))
  last, *transfers = cluster.start(Step('prefill0', (Chunk('a', 4, 6, 'decode0'),)))
  fail(cluster, first)
  assert cluster.phase('a') is Phase.RESTARTING and cluster.finished == []
  for transfer in cluster.must():
    cluster.end(transfer)
  assert cluster.phase('a') is Phase.RESTARTING and transfers
  cluster.end(last)  # nothing of it counts, so it brought nothing
  assert cluster.phase('a') is Phase.WAITING and cluster.state.workers['prefill0'].up
  assert (cluster.free_pages('prefill0'), cluster.free_pages('decode0')) == (16, 16)
  cluster.end(cluster.start(Step('prefill0', (Chunk('a', 0, 10),)))[0], {'a': 1}, {'a': 'stop'})
  assert [end.tokens for end in cluster.finished] == [(7,)]
  cluster.assert_idle()


def test_a_decode_step_that_could_not_begin_lets_its_requests_begin_again_with_what_the_steps_around_it_bring():
  cluster = decoding(1)
  before, failing = (cluster.start(Step('decode0', decodes=ALL))[0] for _ in range(2))
  cluster.end(before, {'a': 1})
  (behind,) = cluster.start(Step('decode0', decodes=ALL))
  fail(cluster, failing)
  assert cluster.phase('a') is Phase.RESTARTING
  cluster.end(behind)  # its slot was cleared
  entry = cluster.view.requests['a']
  assert entry.phase is Phase.WAITING and entry.delivered == (7, 7) and cluster.state.workers['decode0'].up
  assert cluster.free_pages('decode0') == 16


def test_only_so_many_steps_of_a_request_may_fail_to_begin():
  cluster = Driver(faults=TWICE)
  cluster.arrive('a')
  for _ in range(2):
    assert cluster.finished == []
    fail(cluster, cluster.start(Step('prefill0', (Chunk('a', 0, 6),)))[0])
  assert [(end.finish_reason, end.error) for end in cluster.finished] == [('error', 'boom')]
  cluster.assert_idle()


def test_a_cancelled_request_whose_step_could_not_begin_is_cancelled():
  cluster = Driver(faults=TWICE)
  cluster.arrive('a')
  (step,) = cluster.start(Step('prefill0', (Chunk('a', 0, 6),)))
  (end,) = cluster.start(Cancel('a'))
  fail(cluster, step)
  assert cluster.finished == []
  cluster.end(end)
  assert [end.finish_reason for end in cluster.finished] == ['cancelled']
  cluster.assert_idle()


def test_samples_that_wait_for_a_prompt_whose_step_could_not_begin_compute_it_each_for_itself():
  cluster = Driver(faults=TWICE)
  cluster.arrive('a', n=3)
  fail(cluster, cluster.start(Step('prefill0', (Chunk('a', 0, 6),)))[0])
  assert list(cluster.view.waiting) == ['a', 'a#1', 'a#2']
