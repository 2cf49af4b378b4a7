"""Requests that an opened model makes of prompts and workloads, and how they end."""

import dataclasses
import json

import pytest

import pdjax
from pdjax import launch
from pdjax.opened_model import OpenedModel
from tests.tiny import TINY, byte_tokenizer, config, prompt

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<turn>\n{% endfor %}"


@pytest.mark.parametrize('bad', [None, 5, b'ab', {'role': 'user', 'content': 'x'}, {1, 2}, [1, 'a'], [1.5], ''])
def test_what_is_no_prompt_is_a_value_error_that_says_which(bad):
  opened = OpenedModel(TINY, None, byte_tokenizer())
  with pytest.raises(ValueError, match='the prompt is'):
    opened.make_request('a', bad)


def test_only_chats_end_as_their_template_ends_an_answer():
  tokenizer = dataclasses.replace(byte_tokenizer(), chat_template=TEMPLATE)
  opened = OpenedModel(TINY, None, tokenizer)
  chats = ['Hi', [{'role': 'user', 'content': 'Hi'}]]
  assert [opened.make_request('a', chat).end_token_ids for chat in chats] == [(2,), (2,)]
  assert opened.make_request('a', prompt(3)).end_token_ids == ()
  assert OpenedModel(TINY, None, byte_tokenizer()).make_request('a', 'Hi').end_token_ids == ()
  workload = pdjax.Poisson(num_requests=2, prompts=('Hi', 'Ho'), sampling=pdjax.SamplingParams(max_tokens=3))
  arrivals = opened.arrivals(config(workload=workload))
  assert [event.request.end_token_ids for event in arrivals.due(float('inf'))] == [(2,), (2,)]


def test_the_report_names_the_ends_of_sequence_and_who_says_so(tmp_path):
  tokenizer = dataclasses.replace(byte_tokenizer(), chat_template=TEMPLATE)
  result = launch.simulate(config(), workdir=tmp_path, opened=OpenedModel(TINY, None, tokenizer))
  ends = {'config.model': [1], 'chat template': [2]}
  assert result.report.environment['end_tokens'] == ends
  assert json.loads((tmp_path / 'report.json').read_text())['environment']['end_tokens'] == ends


def test_the_requests_that_are_known_before_anything_is_answered_come_in_their_order_with_seeds():
  opened = OpenedModel(TINY)
  chats = pdjax.MultiTurn(num_chats=2, turns=pdjax.Fixed(3), prompt=pdjax.Fixed(5), output=pdjax.Fixed(4))
  assert [one.id for one in opened.known_requests(config(workload=chats))] == ['chat-0-turn-0', 'chat-1-turn-0']
  listed = dataclasses.replace(config(), seed=7)
  known = opened.known_requests(listed)
  assert [one.id for one in known] == [one.id for one in listed.workload.requests]
  assert known == [event.request for event in opened.arrivals(listed).due(float('inf'), ())]
  assert all(one.sampling.seed is not None for one in known)


def test_a_workload_that_cannot_be_reported_is_refused_before_it_is_served():
  class Bare:
    num_requests, request_rate, burstiness = 1, None, None

    def arrivals(self, context):
      raise AssertionError('nothing of it is served')

  with pytest.raises(ValueError, match='workload Bare has no max_concurrency, seed; a pdjax'):
    launch.simulate(config(workload=Bare()))
