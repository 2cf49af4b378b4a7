"""The state as a whole: events in, actions out, and whether anything can still change."""

import math

import pytest

from pdjax.serving import ALL, Cancel, Chunk, Phase, Step, StuckError
from pdjax.serving.events import Done, Failed, Finished
from pdjax.serving.orders import Admission, ChunkOrder, Join, StepOrder, TransferOrder
from pdjax.types import colocated_pool
from pdjax.types.span import Span
from tests.serving.driver import ONE_OF_EACH, SIZES, TINY, Driver, fail, moving

EIGHT = 8 * TINY.cached_token_bytes('float32')  # bytes of two pages


def test_one_prompt_goes_through_two_workers():
  cluster = Driver()
  cluster.state.books.holdings['decode0'].pages.take({'kv': 5})  # so that page numbers differ on the two sides
  request = cluster.arrive('a', prompt_len=6, max_tokens=4)
  assert cluster.phase('a') is Phase.WAITING and list(cluster.view.waiting) == ['a']

  step, transfer = cluster.start(Step('prefill0', (Chunk('a', 0, 6, send_to='decode0'),)))
  assert step == StepOrder(0, 'prefill0', (ChunkOrder(request, 0, 6, pages={'kv': (0, 1)}, limit=4, begins=True),))
  assert transfer == TransferOrder(1, 'a', 'prefill0', 'decode0', Span((0, 1), (5, 6), 0, 8), after=0, num_bytes=EIGHT)
  assert cluster.phase('a') is Phase.PREFILLING and not cluster.view.waiting
  assert cluster.state.workers['prefill0'].queued_tokens == 6
  assert (cluster.free_pages('prefill0'), cluster.free_pages('decode0')) == (14, 8)  # 6 and 6 + 3 tokens

  cluster.end(step, {'a': 1})
  assert cluster.phase('a') is Phase.MOVING and cluster.view.requests['a'].tokens == [7]
  assert cluster.state.workers['prefill0'].queued_tokens == 0
  assert cluster.free_pages('prefill0') == 14  # until the pages have travelled

  cluster.end(transfer)
  assert cluster.phase('a') is Phase.DECODING and list(cluster.state.workers['decode0'].decoding) == ['a']
  assert cluster.free_pages('prefill0') == 16

  (first,) = cluster.start(Step('decode0', decodes=ALL))
  (second,) = cluster.start(Step('decode0', decodes=('a',)))
  admission = Admission(request, pages={'kv': (5, 6, 7)}, tokens=(7,), limit=4)
  assert first == StepOrder(2, 'decode0', joins=(Join('a', 0, 6, 3, admission=admission),), decodes=True)
  assert second == StepOrder(3, 'decode0', decodes=True) and second.batch is first.batch
  assert first.batch.requests == ('a',) and first.batch.slots == (0,)
  cluster.end(first, {'a': 1})
  (third,) = cluster.start(Step('decode0', decodes=ALL))
  assert third == StepOrder(4, 'decode0', decodes=True) and third.batch is first.batch
  cluster.end(second, {'a': 1})
  cluster.end(third, {'a': 1}, {'a': 'length'})

  assert cluster.finished == [Finished(5.0, 'a', 'length', (7, 7, 7, 7))]
  cluster.state.books.holdings['decode0'].pages.drop({'kv': range(5)})
  cluster.assert_idle()


def test_what_several_steps_brought_is_kept_until_it_is_taken():
  cluster = Driver(colocated_pool(1, **SIZES))
  cluster.arrive('a')
  first, second = *cluster.start(Step('both0', (Chunk('a', 0, 6),))), *cluster.start(Step('both0', decodes=ALL))
  cluster.end(first, {'a': 1})
  cluster.end(second, {'a': 1})
  assert [one.order for one in cluster.state.take_told()] == [first.id, second.id]
  assert cluster.state.take_told() == []


def test_room_counts_what_a_decision_took():
  cluster = Driver()
  cluster.arrive('a', prompt_len=20, max_tokens=1)  # 5 pages
  room = cluster.view.room()
  for _ in range(3):
    assert room.fits('a', 'decode0', decodes=True)
    room.take('a', 'decode0', decodes=True)
  assert (room.pages('decode0'), room.slots('decode0')) == (1, 1)
  assert not room.fits('a', 'decode0', decodes=True)
  assert room.pages('prefill0') == 16 and cluster.view.room().pages('decode0') == 16
  room.take_tokens('prefill0', 20)
  assert (room.queued_tokens('prefill0'), cluster.view.room().queued_tokens('prefill0')) == (20, 0)


def test_a_completion_that_comes_twice_or_for_nobody_changes_nothing():
  cluster, order = moving()
  cluster.end(order)
  for event in (Done(order.id, 0.0, 1.0), Failed(order.id, 1.0, 'boom'), Done(12345, 0.0, 1.0)):
    assert not cluster.state.apply(event, cluster.now_s)
  assert cluster.phase('a') is Phase.DECODING


# ---------------------------------------------------------------------------- waits that can never end


def test_a_wait_that_can_never_end_names_the_requests_and_the_pages():
  cluster = Driver(ONE_OF_EACH)
  cluster.arrive('a', prompt_len=6)
  cluster.arrive('b', prompt_len=12, max_tokens=9)
  cluster.end(cluster.start(Step('prefill0', (Chunk('b', 0, 12),)))[0], {'b': 1})
  with pytest.raises(StuckError) as error:
    cluster.state.check_progress()
  for words in ('2 requests wait', 'a (waiting, 3 pages)', 'b (prefilled, 5 pages)', 'prefill0 13/16', 'decode0 16/16'):
    assert words in str(error.value)


def test_who_waits_for_an_order_is_not_stuck():
  cluster = Driver()
  cluster.state.check_progress()  # nobody is there
  cluster.arrive('a')
  (step,) = cluster.start(Step('prefill0', (Chunk('a', 0, 6),)))
  cluster.state.check_progress()
  cluster.end(step, {'a': 1})
  with pytest.raises(StuckError):
    cluster.state.check_progress()


def test_a_run_with_something_due_later_is_not_stuck():
  cluster, order = moving()
  fail(cluster, order)
  assert math.isfinite(cluster.state.next_timer_s)  # so that nobody asks whether it is
  cluster.end(cluster.start(Cancel('a'))[0])
  cluster.arrive('b')
  with pytest.raises(StuckError):
    cluster.state.check_progress()
