"""A requests file is read strictly, and what became of it is written back."""

import json

import pytest

from pdjax.types.request import Completion, Request, SamplingParams, TokenLogprob
from pdjax.workload.requests_file import Refused, completion_row, read_requests, write_completions


def encode(text):
  return [1, *map(ord, text)]


def encode_chat(messages):
  return [2, *(ord(message['content'][0]) for message in messages)]


@pytest.fixture
def read(tmp_path):
  """Reads a file of these lines; anything but text and bytes is written as JSON."""

  def read(*lines, **tokenizers):
    path = tmp_path / 'in.jsonl'
    raw = [line if isinstance(line, bytes) else line.encode() for line in map(as_line, lines)]
    path.write_bytes(b'\n'.join(raw))
    return read_requests(path, **({'encode': encode, 'encode_chat': encode_chat} | tokenizers))

  return read


def as_line(line):
  return line if isinstance(line, str | bytes) else json.dumps(line)


def test_each_kind_of_prompt_becomes_tokens(read):
  messages = [{'role': 'system', 'content': 'be'}, {'role': 'user', 'content': 'hi'}]
  requests = read({'prompt_token_ids': [5, 6]}, {'prompt': 'ab'}, {'messages': messages})
  assert [request.prompt for request in requests] == [(5, 6), (1, 97, 98), (2, 98, 104)]


def test_every_key_reaches_the_request(read):
  (request,) = read(
    {
      'id': 'x', 'prompt_token_ids': [5], 'max_tokens': 3, 'temperature': 1, 'top_k': 4, 'top_p': 0.5, 'seed': 6,
      'stop_token_ids': [7, 8], 'ignore_eos': True, 'arrival_s': 2, 'min_p': 0.1, 'repetition_penalty': 1.2,
      'presence_penalty': 0.3, 'frequency_penalty': -0.4, 'stop': ['a', 'b'], 'logprobs': 5, 'n': 2,
    }
  )  # fmt: skip
  sampling = SamplingParams(
    3, 1, top_k=4, top_p=0.5, seed=6, stop_token_ids=(7, 8), ignore_eos=True, min_p=0.1, repetition_penalty=1.2,
    presence_penalty=0.3, frequency_penalty=-0.4, stop=('a', 'b'), logprobs=5, n=2,
  )  # fmt: skip
  assert request == Request('x', (5,), sampling, 2.0)


def test_what_is_left_out_takes_its_default(read):
  assert read({'prompt_token_ids': [5]}) == [Request('request-0', (5,))]


def test_blank_lines_are_skipped_and_rows_are_numbered_without_them(read):
  requests = read('', {'prompt': 'a'}, '   ', {'prompt': 'b', 'id': 'mine'}, {'prompt': 'c'}, '')
  assert [request.id for request in requests] == ['request-0', 'mine', 'request-2']


def test_odd_line_breaks_inside_text_and_a_byte_order_mark_are_read(read):
  requests = read(b'\xef\xbb\xbf{"prompt": "a\xe2\x80\xa8b"}\r', {'prompt': 'c'})
  assert [request.prompt for request in requests] == [(1, 97, 0x2028, 98), (1, 99)]


@pytest.mark.parametrize(
  ('fields', 'reason'),
  [
    ({'prompt_token_ids': []}, 'empty prompt'),
    ({'prompt': ''}, 'empty prompt'),
    ({'messages': []}, 'empty prompt'),
    ({'prompt_token_ids': [-1]}, 'token id -1'),
    ({'prompt_token_ids': [100]}, 'token id 100, expected ids from 0 to 99'),
    ({'prompt': 'a', 'max_tokens': 0}, 'max_tokens is 0'),
    ({'prompt': 'a', 'temperature': -0.5}, 'temperature is -0.5'),
    ({'prompt': 'a', 'top_k': -1}, 'top_k is -1'),
    ({'prompt': 'a', 'top_p': 0}, 'top_p is 0'),
    ({'prompt': 'a', 'top_p': 1.5}, 'top_p is 1.5'),
    ({'prompt': 'a', 'seed': -1}, 'seed is -1'),
    ({'prompt': 'a', 'arrival_s': -1}, 'arrives at -1'),
    ('{"prompt": "a", "arrival_s": 1e999}', 'arrival_s is inf'),
    ('{"prompt": "a", "temperature": 1e999}', 'temperature is inf'),
  ],
)
def test_an_impossible_line_is_refused_and_the_others_are_served(read, fields, reason):
  before, refused, after = read({'prompt': 'a'}, fields, {'prompt': 'b'}, vocab_size=100)
  assert isinstance(before, Request)
  assert isinstance(after, Request)
  assert isinstance(refused, Refused)
  assert refused.id == 'request-1'
  assert reason in refused.error


def test_a_prompt_that_the_tokenizer_refuses_is_refused(read):
  def encode(text):
    raise ValueError('no such characters')

  (refused,) = read({'prompt': 'a'}, encode=encode)
  assert refused == Refused('request-0', (), 'no such characters')


@pytest.mark.parametrize(
  ('line', 'wrong'),
  [
    ('{"prompt": "a"', 'not JSON'),
    (b'{"prompt": "\xff"}', 'not JSON'),
    ('{"prompt": "a", "temperature": NaN}', 'NaN is not a JSON number'),
    ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is there twice"),
    ([1, 2], r'found \[1, 2\], expected a JSON object'),
    ({}, 'found none of them, expected exactly one of'),
    ({'max_tokens': 3}, 'found none of them'),
    ({'prompt': 'a', 'prompt_token_ids': [1]}, 'found prompt_token_ids and prompt, expected exactly one'),
    ({'prompt': 'a', 'max_token': 3}, "unknown key 'max_token'; did you mean 'max_tokens'?"),
    ({'prompt': 'a', 'zzz': 3}, "unknown key 'zzz'; The keys are"),
    ({'prompt_token_ids': 'abc'}, 'prompt_token_ids is "abc", expected a list of integers'),
    ({'prompt_token_ids': [1, True]}, 'expected a list of integers'),
    ({'prompt_token_ids': [1, 2.0]}, 'expected a list of integers'),
    ({'prompt': ['a']}, 'expected text'),
    ({'messages': 'hi'}, 'expected a list of'),
    ({'messages': [{'role': 'user'}]}, 'expected a list of'),
    ({'messages': [{'role': 'user', 'content': 3}]}, 'expected a list of'),
    ({'prompt': 'a', 'max_tokens': True}, 'max_tokens is true, expected an integer'),
    ({'prompt': 'a', 'max_tokens': 2.5}, 'max_tokens is 2.5'),
    ({'prompt': 'a', 'temperature': '1'}, 'temperature is "1", expected a number'),
    ({'prompt': 'a', 'temperature': False}, 'temperature is false'),
    ({'prompt': 'a', 'top_p': None}, 'top_p is null'),
    ({'prompt': 'a', 'seed': 1.0}, 'seed is 1.0'),
    ({'prompt': 'a', 'stop_token_ids': 2}, 'stop_token_ids is 2'),
    ({'prompt': 'a', 'ignore_eos': 1}, 'ignore_eos is 1, expected true or false'),
    ({'prompt': 'a', 'arrival_s': True}, 'arrival_s is true'),
    ({'prompt': 'a', 'id': 3}, 'id is 3'),
    ({'prompt': 'a', 'id': ''}, 'id is ""'),
    ({'prompt': 'a', 'id': 'request-0'}, "the id 'request-0' is that of line 1 too"),
    ({'prompt': 'a', 'stop': [5]}, r'stop is \[5\], expected text in quotes or a list of texts'),
    ({'prompt': 'a', 'logprobs': True}, 'logprobs is true, expected an integer or null'),
  ],
)
def test_a_malformed_line_stops_the_reading_with_its_number(read, line, wrong):
  with pytest.raises(ValueError, match=rf'in\.jsonl, line 3: .*{wrong}'):
    read({'prompt': 'good'}, '', line)


@pytest.mark.parametrize('line', [{'prompt': 'a'}, {'messages': [{'role': 'user', 'content': 'a'}]}])
def test_text_without_a_tokenizer_stops_the_reading(read, line):
  with pytest.raises(ValueError, match=r'line 1: .* needs a tokenizer'):
    read(line, encode=None, encode_chat=None)


def test_tokens_need_no_tokenizer(read):
  assert len(read({'prompt_token_ids': [1]}, encode=None, encode_chat=None)) == 1


def test_a_completion_is_written_with_its_times():
  request = Request('x', (1, 2), arrival_s=1.0)
  assert completion_row(Completion(request, (7, 8), 'stop', text='hi', token_times_s=(1.5, 1.75))) == {
    'id': 'x', 'prompt_token_ids': [1, 2], 'output_token_ids': [7, 8], 'text': 'hi', 'finish_reason': 'stop',
    'error': None, 'arrival_s': 1.0, 'ttft_s': 0.5, 'e2el_s': 0.75, 'token_times_s': [1.5, 1.75], 'logprobs': None,
  }  # fmt: skip


def test_a_completion_is_written_with_its_log_probabilities():
  sample = Request('x', (1, 2), SamplingParams(n=2, logprobs=1)).samples()[1]
  row = completion_row(Completion(sample, (7,), 'length', logprobs=(TokenLogprob(-0.5, ((7, -0.5),)),)))
  assert row['id'] == 'x#1' and json.loads(json.dumps(row))['logprobs'] == [{'logprob': -0.5, 'top': [[7, -0.5]]}]
  assert completion_row(Completion(sample, (), 'cancelled'))['logprobs'] == []


def test_one_stop_string_needs_no_list(read):
  (request,) = read({'prompt_token_ids': [5], 'stop': 'END'})
  assert request.sampling.stop == ('END',)


def test_a_cancelled_request_has_a_first_token_but_no_end():
  row = completion_row(Completion(Request('x', (1,)), (7,), 'cancelled', token_times_s=(0.5,)))
  assert (row['ttft_s'], row['e2el_s']) == (0.5, None)


def test_rejected_requests_and_refused_lines_have_one_shape_and_no_times():
  rejected = completion_row(Completion(Request('x', (1,)), (), 'rejected', error='too long'))
  refused = completion_row(Refused('y', (1,), 'too long'))
  assert rejected == refused | {'id': 'x', 'arrival_s': 0.0}
  assert (refused['finish_reason'], refused['ttft_s'], refused['e2el_s'], refused['token_times_s']) == (
    'rejected', None, None, [],
  )  # fmt: skip


def test_completions_are_one_json_object_a_line_in_their_order(tmp_path):
  path = tmp_path / 'new' / 'requests.jsonl'
  outcomes = [Completion(Request('a', (1,)), (2,), 'length', text='é\u2028\ud800'), Refused('b', (), 'empty')]
  write_completions(path, [*outcomes, completion_row(outcomes[0])])
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert rows == [completion_row(outcome) for outcome in [*outcomes, outcomes[0]]]
