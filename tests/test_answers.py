"""Answers are kept as they end, known again by a later run, and never served twice."""

import dataclasses
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdjax import launch
from pdjax.answers import Answers, answer_row, prompt_hash, read_answers
from pdjax.completions import complete
from pdjax.serving.events import Arrived, Delivered, Done, Finished, Result, Turn
from pdjax.types.request import Completion, Request, SamplingParams, TokenLogprob
from pdjax.workload import ClosedLoopWorkload, Fixed, Given, MultiTurn, Poisson, Uniform
from tests.tiny import config, prompt

ONE = Request('one', (3, 14, 15), SamplingParams(max_tokens=4, seed=7))
TOLD = (TokenLogprob(-0.5, ((5, -0.5), (3, -math.inf))), TokenLogprob(math.nan, ()))


def noted(answers: Answers, *requests: Request) -> None:
  """Let these come and end with two tokens each sample, a second apart."""
  for now_s, request in enumerate(requests, start=1):
    answers.note(Turn(float(now_s)))
    answers.note(Arrived(request))
    for sample in request.samples():
      answers.note(Delivered(float(now_s), 0, (Result(sample.id, (5, 6), None, 'ab', TOLD),)))
      answers.note(Finished(float(now_s), sample.id, 'length', (5, 6)))


def test_every_end_is_a_line_with_what_the_request_is_known_by(tmp_path):
  answers = Answers(has_text=True, path=tmp_path / 'answers.jsonl')
  asked = dataclasses.replace(ONE, sampling=SamplingParams(max_tokens=4, seed=7, temperature=0.5, stop=('x',), n=2))
  noted(answers, asked)
  answers.close()
  first, second = read_answers(tmp_path / 'answers.jsonl')
  assert first == json.loads(json.dumps(answer_row(answers.completions[0]))) | {'logprobs': None}
  assert first['prompt_hash'] == prompt_hash([3, 14, 15])
  # sha256sum of the text 3,14,15
  assert first['prompt_hash'] == 'd782ed37519394b899ebf20b383bc29a4568128c3c4544dfeee8f1bcd7c31f63'
  assert first['sampling'] == {'max_tokens': 4, 'temperature': 0.5, 'stop': ['x']}
  assert (first['id'], second['id'], first['seed']) == ('one', 'one#1', 7) and second['seed'] != 7
  assert first['text'] == 'ab' and first['finish_reason'] == 'length' and first['token_times_s'] == [1.0, 1.0]


def test_what_came_too_late_is_no_answer():
  answers = Answers(has_text=True)
  in_time, late = Result('one', (5,), None, 'x'), Result('one', (6,), None, 'y')
  for event in (
    Turn(0.0), Arrived(ONE), Turn(1.0), Done(0, 0.0, 1.0, (in_time,)), Delivered(1.0, 0, (in_time,)), Turn(2.0),
    Done(1, 1.0, 2.0, (late,)), Delivered(2.0, 1, (), (late,)), Finished(2.0, 'one', 'cancelled', (5,)),
    Delivered(2.0, 2, (), (late,)),
  ):  # fmt: skip
    answers.note(event)
  (one,) = answers.completions
  assert (one.token_ids, one.text, one.token_times_s) == ((5,), 'x', (1.0,))


def test_who_has_not_ended_is_told_with_an_error_in_the_place_where_it_came():
  answers = Answers(has_text=False)
  answers.note(Arrived(ONE))
  noted(answers, dataclasses.replace(ONE, id='two'))
  assert [(one.request.id, one.finish_reason) for one in answers.everyone] == [('one', 'error'), ('two', 'length')]
  assert answers.everyone[0].error == 'the run ended before it did.'
  answers.note(Delivered(2.5, 0, (Result('one', (5, 6)),)))
  assert (answers.everyone[0].token_ids, answers.everyone[0].token_times_s) == ((5, 6), (2.5, 2.5))
  assert [one.request.id for one in answers.completions] == ['two']


def test_what_an_interruption_left_unnoted_is_caught_up_and_nothing_is_told_twice(tmp_path):
  events = [
    Turn(1.0), Arrived(ONE), Delivered(1.0, 0, (Result('one', (5,)),)), Finished(1.0, 'one', 'length', (5,)),
    Arrived(dataclasses.replace(ONE, id='two')), Finished(1.0, 'two', 'stop', ()),
  ]  # fmt: skip
  answers = Answers(has_text=False, path=tmp_path / 'answers.jsonl')
  for event in events[:4]:
    answers.note(event)
  answers.catch_up(events)
  answers.close()
  assert [row['id'] for row in read_answers(tmp_path / 'answers.jsonl')] == ['one', 'two']
  assert answers.completions == complete(events, has_text=False)


def test_an_interruption_between_the_line_and_the_note_of_it_costs_no_line(tmp_path, monkeypatch):
  events = [Turn(1.0), Arrived(ONE), Delivered(1.0, 0, (Result('one', (5,)),)), Finished(1.0, 'one', 'length', (5,))]
  answers = Answers(has_text=False, path=tmp_path / 'answers.jsonl')

  def interrupted(line, now_s):
    raise KeyboardInterrupt

  with monkeypatch.context() as signal:
    signal.setattr(answers._file, 'add', interrupted)
    with pytest.raises(KeyboardInterrupt):
      for event in events:
        answers.note(event)
  answers.catch_up(events)
  answers.close()
  assert [row['id'] for row in read_answers(tmp_path / 'answers.jsonl')] == ['one']


# ---------------------------------------------------------------------------- known again


@pytest.fixture
def earlier(tmp_path):
  """The rows of the answers of a run, by its requests."""

  def make(*requests: Request):
    answers = Answers(has_text=True, path=tmp_path / 'answers.jsonl')
    noted(answers, *requests)
    answers.close()
    return read_answers(tmp_path / 'answers.jsonl')

  return make


def asked_again(rows, request: Request) -> list[str]:
  """Of a request, the samples that a resumed run serves."""
  left = Answers(has_text=True, earlier=rows).left(Given((request,)).arrivals(None))
  return [sample.id for event in left.due(0.0) for sample in event.request.samples()]


def test_an_answer_comes_back_as_it_was(earlier):
  request = dataclasses.replace(ONE, sampling=SamplingParams(max_tokens=4, seed=7, logprobs=2), arrival_s=2.5)
  before = Answers(has_text=True)
  noted(before, request)
  again = Answers(has_text=True, earlier=earlier(request))
  again.expect([dataclasses.replace(request, arrival_s=9.0)])  # when it comes does not matter
  assert repr(again.completions) == repr(before.completions)  # NaN is not equal to itself
  assert again.num_earlier == 1 and '1 answer was there before' in again.notes[0]


@pytest.mark.parametrize(
  'change',
  [
    {'id': 'other'},
    {'prompt': (3, 14, 16)},
    {'prompt': (31, 4, 15)},
    {'sampling': SamplingParams(max_tokens=4, seed=8)},
    {'sampling': SamplingParams(max_tokens=5, seed=7)},
    {'sampling': SamplingParams(max_tokens=4, seed=7, stop=('x',))},
  ],
)
def test_a_request_that_asks_for_something_else_is_served(earlier, change):
  rows = earlier(ONE)
  assert asked_again(rows, ONE) == []
  other = dataclasses.replace(ONE, **change)
  assert asked_again(rows, other) == [other.id]


def test_of_several_samples_those_without_an_answer_are_served_under_their_names(earlier):
  whole = dataclasses.replace(ONE, sampling=dataclasses.replace(ONE.sampling, n=3))
  rows = earlier(whole)
  assert asked_again(rows[:1] + rows[2:], whole) == ['one#1']
  assert asked_again(rows[1:], whole) == ['one']
  left = Answers(True, earlier=rows[:1]).left(Given((whole,)).arrivals(None))
  assert [event.request.sampling.seed for event in left.due(0.0)] == [one.sampling.seed for one in whole.samples()[1:]]


@pytest.mark.parametrize('reason', ['error', 'cancelled', 'rejected'])
def test_what_did_not_end_well_is_asked_again_and_a_later_answer_counts(tmp_path, reason):
  answers = Answers(has_text=False, path=tmp_path / 'answers.jsonl')
  answers.note(Arrived(ONE))
  answers.note(Finished(1.0, 'one', reason, (), 'no luck'))
  answers.close()
  rows = read_answers(tmp_path / 'answers.jsonl')
  assert rows[0]['error'] == 'no luck' and asked_again(rows, ONE) == ['one']
  again = Answers(False, tmp_path / 'answers.jsonl', rows)
  noted(again, ONE)
  again.close()
  assert asked_again(read_answers(tmp_path / 'answers.jsonl'), ONE) == []


def test_lines_that_say_nothing_are_passed_over(tmp_path, earlier):
  (row,) = earlier(ONE)
  path = tmp_path / 'odd.jsonl'
  assert read_answers(path) == []
  odd = ['{"id": "one", "fini', '[]', '\udcff', '{"id": ["one"]}', json.dumps(row | {'id': []}), json.dumps(row)[:-5]]
  path.write_bytes('\n'.join([odd[0], json.dumps(row), *odd[1:]]).encode(errors='surrogateescape'))
  assert asked_again(read_answers(path), ONE) == []
  assert asked_again([other for other in read_answers(path) if other != row], ONE) == ['one']


# ---------------------------------------------------------------------------- what is left, and when it comes


def timed(*times_s: float) -> tuple[Request, ...]:
  return tuple(
    Request(f'r{i}', prompt(3 + i), SamplingParams(max_tokens=2, seed=i), time_s) for i, time_s in enumerate(times_s)
  )


def test_the_first_that_is_left_comes_at_once_and_the_others_in_their_spacing(earlier):
  requests = timed(0.0, 1.5, 2.0, 2.0, 7.25)
  answers = Answers(True, earlier=earlier(requests[0], requests[3]))
  left = answers.left(Given(requests).arrivals(None))
  assert left.next_s() == 0.0 and not left.closed
  assert [(one.request.id, one.request.arrival_s) for one in left.due(0.0)] == [('r1', 0.0)]
  assert left.next_s() == 0.5 and left.due(0.25) == []
  assert [(one.request.id, one.request.arrival_s) for one in left.due(0.5)] == [('r2', 0.5)]
  assert [(one.request.id, one.request.arrival_s) for one in left.due(100.0)] == [('r4', 5.75)]
  assert left.closed and left.next_s() == math.inf and answers.num_earlier == 2


def test_nothing_is_left_of_what_is_answered_and_without_answers_all_is_as_it_was(earlier):
  requests = timed(1.0, 2.0)
  assert Answers(True, earlier=earlier(*requests)).left(Given(requests).arrivals(None)).closed
  source = Given(requests).arrivals(None)
  assert Answers(True).left(source) is source
  goes_on = Answers(True, earlier=[]).left(source)  # with a run that was stopped before its first answer
  assert [(one.request.id, one.request.arrival_s) for one in goes_on.due(0.0)] == [('r0', 0.0)]
  assert goes_on.next_s() == 1.0


WORKLOADS = {
  'at times of their own': Poisson(requests_per_s=100, num_requests=12, prompt=Fixed(5), output=Uniform(1, 5)),
  'given': Given((*timed(*(0.1 * i for i in range(8))), Request('n', prompt(4), SamplingParams(6, 1.5, n=3), 0.35))),
  'users who wait': ClosedLoopWorkload(max_concurrency=3, num_requests=12, prompt=Fixed(5), output=Uniform(1, 5)),
  'chats': MultiTurn(num_chats=3, turns=Fixed(3), prompt=Fixed(5), user=Fixed(3), output=Fixed(4)),
}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(sorted(WORKLOADS)), picked=st.lists(st.booleans(), min_size=12, max_size=12))
def test_whatever_was_answered_a_resumed_run_serves_the_rest_and_has_all(kind, picked):
  run = config(workload=WORKLOADS[kind])
  whole = launch.simulate(run)
  assert whole.report.completed >= 9
  rows = [answer_row(one) for one, taken in zip(whole.completions, picked, strict=False) if taken]
  rows = json.loads(json.dumps(rows))
  answers = Answers(False, earlier=rows)
  again = launch.simulate(run, answers=answers)

  def told(result):
    return sorted((one.request.id, one.request.prompt, one.token_ids, one.finish_reason) for one in result.completions)

  assert told(again) == told(whole)
  assert answers.num_earlier == len(rows) and again.report.num_prompts == len(whole.completions) - len(rows)
  arrivals = [event.request.arrival_s for event in again.events if isinstance(event, Arrived)]
  assert not arrivals or min(arrivals) == 0.0


def test_seeds_count_what_was_answered():
  run = config(workload=WORKLOADS['at times of their own'])
  whole = launch.simulate(run)
  answers = Answers(False, earlier=json.loads(json.dumps([answer_row(one) for one in whole.completions[:5]])))
  again = launch.simulate(run, answers=answers)
  seeds = {one.request.id: one.request.sampling.seed for one in whole.completions}
  assert {one.request.id: one.request.sampling.seed for one in again.completions} == seeds


def test_a_completion_without_an_answer_has_no_identity():
  row = answer_row(Completion(ONE, (), 'error', error='x'))
  assert asked_again([row], ONE) == ['one']
