"""Sources hand out every request once, at its time, and answer what finishes."""

import math

import pytest

from pdjax.serving.events import Arrived, Finished
from pdjax.types.request import Request, SamplingParams
from pdjax.workload.arrivals import Chat, Chats, ChatTurn, ClosedLoop, Listed


def requests_at(*times_s):
  return [Request(f'r{i}', (1, 2, 3), arrival_s=time_s) for i, time_s in enumerate(times_s)]


def finished(request_id, now_s, tokens=(7,), reason='stop'):
  return Finished(now_s, request_id, reason, tokens)


def due(arrivals, now_s, *ends):
  """The requests that arrive, each of which must come as `Arrived`."""
  events = arrivals.due(now_s, ends)
  assert all(isinstance(event, Arrived) for event in events)
  return [event.request for event in events]


def ids(requests):
  return [request.id for request in requests]


def test_listed_requests_come_in_time_order_and_once():
  arrivals = Listed(requests_at(3.0, 1.0, 1.0, 2.0))
  assert arrivals.next_s() == 1.0
  assert ids(due(arrivals, 0.9)) == []
  assert ids(due(arrivals, 2.0)) == ['r1', 'r2', 'r3']
  assert not arrivals.closed
  assert arrivals.next_s() == 3.0
  assert ids(due(arrivals, 10.0)) == ['r0']
  assert arrivals.closed
  assert arrivals.next_s() == math.inf


def test_an_empty_list_is_closed_from_the_start():
  assert Listed([]).closed


def test_listed_tells_true_output_lengths_where_known():
  arrivals = Listed(requests_at(0.0, 0.0), {'r0': 5})
  assert arrivals.output_len('r0') == 5
  assert arrivals.output_len('r1') is None


def test_the_ids_of_samples_are_taken():
  with pytest.raises(ValueError, match="'a#1'"):
    Listed([Request('a', (1,), SamplingParams(n=2)), Request('a#1', (2,))])


def test_two_requests_of_one_id_are_refused():
  with pytest.raises(ValueError, match="'same'"):
    Listed([Request('same', (1,)), Request('same', (2,))])


def test_a_closed_loop_never_exceeds_its_concurrency_and_sends_everything():
  arrivals = ClosedLoop(requests_at(*[0.0] * 11), max_concurrency=3)
  now_s, in_flight, seen, ends = 0.0, [], [], []
  while not arrivals.closed or in_flight:
    in_flight += due(arrivals, now_s, *ends)
    seen += ids(in_flight[-3:])
    assert len(in_flight) <= 3
    now_s += 1.0
    ends = [finished(in_flight.pop(0).id, now_s) for _ in range(min(len(in_flight), 1 + int(now_s) % 2))]
  assert list(dict.fromkeys(seen)) == [f'r{i}' for i in range(11)]


def test_a_closed_loop_sends_the_next_when_one_has_finished_and_the_user_has_thought():
  arrivals = ClosedLoop(requests_at(9.0, 9.0, 9.0), max_concurrency=2, think_s=0.5)
  assert [request.arrival_s for request in due(arrivals, 0.0)] == [0.0, 0.0]
  assert arrivals.next_s() == math.inf
  assert due(arrivals, 2.1, finished('r1', 2.0)) == []
  assert arrivals.next_s() == 2.5
  (request,) = due(arrivals, 2.6)
  assert (request.id, request.arrival_s) == ('r2', 2.5)
  assert arrivals.closed


def test_a_user_of_a_closed_loop_waits_for_every_sample():
  requests = [Request(name, (1,), SamplingParams(n=2)) for name in 'ab']
  arrivals = ClosedLoop(requests, max_concurrency=1)
  assert ids(due(arrivals, 0.0)) == ['a']
  assert due(arrivals, 1.0, finished('a', 1.0)) == []
  assert ids(due(arrivals, 2.0, finished('a#1', 2.0))) == ['b']


def test_a_closed_loop_goes_on_after_a_rejected_request_and_ignores_strangers():
  arrivals = ClosedLoop(requests_at(0.0, 0.0), max_concurrency=1)
  due(arrivals, 0.0)
  assert due(arrivals, 1.0, finished('stranger', 1.0)) == []
  assert ids(due(arrivals, 1.0, finished('r0', 1.0, (), 'rejected'))) == ['r1']


@pytest.mark.parametrize('fields', [{'max_concurrency': 0}, {'max_concurrency': 1, 'think_s': -1.0}])
def test_impossible_closed_loops_are_refused(fields):
  with pytest.raises(ValueError, match=r'ClosedLoop\(\) is given (max_concurrency=0|think_s=-1)'):
    ClosedLoop(requests_at(0.0), **fields)


def chat(name, *users, start_s=0.0, max_tokens=4):
  turns = tuple(ChatTurn(user, SamplingParams(max_tokens=max_tokens), output_len=2) for user in users)
  return Chat(name, turns, start_s)


def test_a_chat_prompt_is_the_last_prompt_its_whole_answer_and_what_the_user_adds():
  arrivals = Chats([chat('c', (1, 2), (3,), (4, 5))], max_context=100, think_s=1.5)
  (first,) = due(arrivals, 0.0)
  assert (first.id, first.session, first.prompt) == ('c-turn-0', 'c', (1, 2))
  assert due(arrivals, 1.0, finished(first.id, 1.0, (8, 9))) == []
  assert arrivals.next_s() == 2.5
  (second,) = due(arrivals, 2.5)
  assert (second.session, second.arrival_s, second.prompt) == ('c', 2.5, (1, 2, 8, 9, 3))
  assert not arrivals.closed
  due(arrivals, 3.0, finished(second.id, 3.0, (6,), 'length'))
  (third,) = due(arrivals, 9.0)
  assert third.prompt == (1, 2, 8, 9, 3, 6, 4, 5)
  assert arrivals.closed
  assert arrivals.output_len(third.id) == 2


def test_a_chat_stops_before_it_would_exceed_the_context():
  arrivals = Chats([chat('c', (1, 2), (3,), max_tokens=4)], max_context=8)
  (first,) = due(arrivals, 0.0)
  assert due(arrivals, 1.0, finished(first.id, 1.0, (8, 9))) == []  # 2 + 2 + 1 + 4 tokens are one too many
  assert arrivals.closed

  arrivals = Chats([chat('c', (1, 2), (3,), max_tokens=4)], max_context=9)
  (first,) = due(arrivals, 0.0)
  assert len(due(arrivals, 1.0, finished(first.id, 1.0, (8, 9)))) == 1


@pytest.mark.parametrize('reason', ['rejected', 'error', 'cancelled'])
def test_a_chat_ends_with_a_turn_that_did_not_end_well(reason):
  arrivals = Chats([chat('a', (1,), (2,)), chat('b', (3,))], max_context=100, max_concurrency=1)
  (first,) = due(arrivals, 0.0)
  assert ids(due(arrivals, 1.0, finished(first.id, 1.0, (), reason))) == ['b-turn-0']
  assert arrivals.closed


def test_chats_wait_for_a_place():
  chats = [chat(f'c{i}', (1,), (2,)) for i in range(5)]
  arrivals = Chats(chats, max_context=100, max_concurrency=2)
  now_s, in_flight, seen, ends = 0.0, [], [], []
  while not arrivals.closed or in_flight:
    arrived = due(arrivals, now_s, *ends)
    seen += ids(arrived)
    in_flight += arrived
    assert len({request.session for request in in_flight}) <= 2
    now_s += 1.0
    ends = [finished(in_flight.pop(0).id, now_s)]
  assert len(seen) == 10
  assert seen.index('c0-turn-1') < seen.index('c2-turn-0')


def test_chats_without_a_limit_start_at_their_times():
  arrivals = Chats([chat('late', (1,), start_s=5.0), chat('early', (2,), start_s=1.0)], max_context=100)
  assert ids(due(arrivals, 4.0)) == ['early-turn-0']
  assert ids(due(arrivals, 5.0)) == ['late-turn-0']


def test_a_chat_whose_first_turn_does_not_fit_is_refused():
  with pytest.raises(ValueError, match="chat 'c' begins with 3 tokens"):
    Chats([chat('c', (1, 2, 3), max_tokens=6)], max_context=8)
