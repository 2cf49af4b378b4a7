"""Completions out of events: whole logs, and what samples under way have got so far."""

from pdjax.completions import Drafts, complete
from pdjax.serving.events import Arrived, Delivered, Done, Finished, Result, Turn
from pdjax.types import Request, SamplingParams


def _events():
  """Sample 0 ends before sample 1 does, of a request that comes behind `a`, which ends last of all."""
  two = Request('two', (3, 4), SamplingParams(n=2))
  first, second = (sample.id for sample in two.samples())
  return [
    Turn(0.0),
    Arrived(Request('a', (5,))),
    Arrived(two),
    Turn(1.0),
    Delivered(1.0, 1, (Result('a', (7,), text='x'), Result(first, (8,), text='y'), Result(second, (9,)))),
    Turn(2.0),
    Delivered(2.0, 2, (Result('a', (7, 6), text='z'), Result(first, (5,), 'length'))),
    Finished(2.0, first, 'length', (8, 5)),
    Finished(2.0, second, 'cancelled', (9,)),
    Finished(2.5, 'a', 'stop', (7, 7, 6)),
  ]


def test_completions_come_in_the_order_of_arrival_whoever_ends_first():
  a, first, second = complete(_events(), has_text=True)
  assert [one.request.id for one in (a, first, second)] == ['a', *(one.id for one in _events()[2].request.samples())]
  assert (a.token_ids, a.text, a.token_times_s) == ((7, 7, 6), 'xz', (1.0, 2.0, 2.0))
  assert (first.token_ids, first.finish_reason, second.finish_reason) == ((8, 5), 'length', 'cancelled')
  assert {one.text for one in complete(_events(), has_text=False)} == {None}


def test_who_has_not_ended_is_in_no_completion_but_has_what_came():
  events = _events()[:-1]
  drafts = Drafts(has_text=True)
  ended = [one for event in events if (one := drafts.note(event)) is not None]
  assert tuple(ended) == complete(events, has_text=True)
  a = drafts.unfinished(events[1].request)
  assert (a.token_ids, a.text, a.token_times_s) == ((7, 7, 6), 'xz', (1.0, 2.0, 2.0)) and a.error
  unknown = drafts.unfinished(Request('b', (1,)))
  assert (unknown.token_ids, unknown.finish_reason) == ((), a.finish_reason)


def test_what_was_not_delivered_counts_for_nothing():
  events = [
    Arrived(Request('a', (5,))),
    Done(1, 0.0, 1.0, (Result('a', (7,), text='x'),)),
    Delivered(1.0, 1, (Result('a', (7,), text='x'),)),
    Done(3, 1.0, 2.0, (Result('a', (8,), text='late'),)),
    Delivered(2.0, 3, (), (Result('a', (8,), text='late'),)),
    Finished(2.0, 'a', 'cancelled', (7,)),
  ]
  (one,) = complete(events, has_text=True)
  assert (one.token_ids, one.text, one.token_times_s) == ((7,), 'x', (1.0,))
