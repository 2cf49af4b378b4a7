"""The state, one event at a time, when transfers fail and workers are lost."""

import itertools
import math

import pytest

from pdjax.serving import ALL, Cancel, Chunk, Phase, PolicyError, Step, StuckError, Transfer
from pdjax.serving.actions import Abandon, Resend
from pdjax.serving.events import Done, Failed, TimerDue, Withdrawn, WorkerBack, WorkerLost
from pdjax.serving.orders import AbandonOrder, TransferOrder
from pdjax.serving.timers import Timers
from pdjax.serving.transfers import Attempt, Transfers
from pdjax.types import FaultSpec, TransferSpec, colocated_pool, decode_pool, prefill_pool
from tests.serving.driver import SIZES, Driver

TWICE = FaultSpec(max_attempts=2, backoff_s=4.0)
TWO_AND_TWO = prefill_pool(2, **SIZES) + decode_pool(2, **SIZES)


def moving(faults: FaultSpec = TWICE, prompt_len: int = 10, **options) -> tuple[Driver, TransferOrder]:
  """A prompt with its first token delivered, on its way."""
  cluster = Driver(faults=faults, transfer=TransferSpec(deadline_s=10.0), **options)
  cluster.arrive('a', prompt_len=prompt_len)
  cluster.end(cluster.start(Step('prefill0', (Chunk('a', 0, prompt_len),)))[0], {'a': 1})
  (transfer,) = cluster.start(Transfer('a', 'decode0'))
  return cluster, transfer


def due(cluster: Driver, now_s: float) -> list[TimerDue]:
  """Let it be that late; what was due."""
  cluster.now_s = now_s
  timers = cluster.state.timers_due(now_s)
  for event in timers:
    cluster.apply(event)
  return timers


def fail(cluster: Driver, order, **fields) -> None:
  cluster.apply(Failed(order.id, cluster.now_s, 'boom', **fields))


# ---------------------------------------------------------------------------- transfers


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


def test_each_try_waits_twice_as_long_as_the_one_before():
  cluster, order = moving(FaultSpec(max_attempts=4, backoff_s=1.0))
  for wait_s in (1.0, 2.0, 4.0):
    fail(cluster, order)
    assert cluster.state.next_timer_s == cluster.now_s + wait_s
    due(cluster, cluster.now_s + wait_s)
    (order,) = cluster.must()


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


def test_a_completion_that_comes_before_the_backend_has_let_go_counts():
  cluster, order = moving()
  due(cluster, cluster.now_s + 10.0)
  (abandon,) = cluster.must()
  cluster.end(order)
  assert cluster.phase('a') is Phase.DECODING
  cluster.end(abandon)
  assert cluster.phase('a') is Phase.DECODING and cluster.state.next_timer_s == math.inf


def test_what_has_ended_in_the_turn_of_its_deadline_is_in_time():
  cluster, order = moving()
  cluster.end(order)
  assert due(cluster, 1000.0) == []


def test_the_time_of_a_transfer_begins_when_its_step_has_ended():
  cluster = Driver(faults=TWICE, transfer=TransferSpec(deadline_s=10.0))
  cluster.arrive('a', prompt_len=8)
  step, transfer = cluster.start(Step('prefill0', (Chunk('a', 0, 8, 'decode0'),)))
  assert cluster.state.next_timer_s == math.inf
  cluster.now_s = 500.0
  cluster.end(step, {'a': 1})
  assert cluster.state.next_timer_s == cluster.now_s + 10.0
  cluster.end(transfer)
  assert cluster.state.next_timer_s == math.inf


def test_a_completion_that_comes_twice_or_for_nobody_changes_nothing():
  cluster, order = moving()
  cluster.end(order)
  for event in (Done(order.id, 0.0, 1.0), Failed(order.id, 1.0, 'boom'), Done(12345, 0.0, 1.0)):
    assert not cluster.state.apply(event, cluster.now_s)
  assert cluster.phase('a') is Phase.DECODING


@pytest.mark.parametrize(
  ('backoff_s', 'number', 'wait_s'),
  [(1.0, 6, 32.0), (1.0, 7, 60.0), (1.0, 5000, 60.0), (0.0, 5000, 0.0), (100.0, 9, 100.0), (1e308, 9, 1e308)],
)
def test_a_transfer_is_never_waited_for_longer_than_a_minute_before_it_is_tried_again(backoff_s, number, wait_s):
  timers = Timers()
  transfers = Transfers(timers, math.inf, FaultSpec(max_attempts=10_000, backoff_s=backoff_s))
  assert transfers.try_again(Attempt(moving()[1], 'a', number), 0.0) and timers.next_s == wait_s


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


def test_a_cancelled_request_is_not_tried_again():
  cluster, order = moving()
  fail(cluster, order)
  cluster.end(cluster.start(Cancel('a'))[0])
  assert cluster.state.next_timer_s == math.inf
  cluster.assert_idle()


def test_transfers_that_are_not_there_can_be_neither_given_up_nor_tried_again():
  cluster, order = moving()
  for action in (Abandon(99), Resend(order.id)):
    with pytest.raises(PolicyError, match=f'transfer={action.transfer}'):
      cluster.start(action)


def test_a_transfer_that_is_being_given_up_cannot_be_given_up_again():
  """A policy that asked for it whenever it is asked would be asked for ever."""
  cluster, order = moving()
  (abandon,) = cluster.start(Abandon(order.id))
  with pytest.raises(PolicyError, match='is being given up already'):
    cluster.start(Abandon(order.id))
  cluster.end(abandon)
  cluster.end(cluster.start(Cancel('a'))[0])
  cluster.assert_idle()


def test_a_run_with_something_due_later_is_not_stuck():
  cluster, order = moving()
  fail(cluster, order)
  assert math.isfinite(cluster.state.next_timer_s)  # so that nobody asks whether it is
  cluster.end(cluster.start(Cancel('a'))[0])
  cluster.arrive('b')
  with pytest.raises(StuckError):
    cluster.state.check_progress()


# ---------------------------------------------------------------------------- workers


def decoding(count: int = 3, **options) -> Driver:
  """A request with so many tokens, in a slot of `decode0`."""
  cluster, transfer = moving(**{'workers': TWO_AND_TWO} | options)
  cluster.end(transfer)
  for _ in range(count - 1):
    cluster.end(cluster.start(Step('decode0', decodes=ALL))[0], {'a': 1})
  return cluster


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
  (decode,) = step.decodes
  assert decode.admission.tokens == (7, 7, 7) and decode.context == 12
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
  assert step.decodes[0].admission.tokens == (7, 7) and step.decodes[0].context == 7
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
  assert {decode.request: decode.admission.copy for decode in step.decodes} == {'a': None, 'a#2': None}
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
