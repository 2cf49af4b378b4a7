"""A requests file is read line by line, each on its own, and what became of it is written back."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
  assert read({'prompt_token_ids': [5]}) == [Request('request-0', (5,)).seeded(0, 0)]


def test_blank_lines_are_skipped_and_rows_are_numbered_without_them(read):
  requests = read('', {'prompt': 'a'}, '   ', {'prompt': 'b', 'id': 'mine'}, {'prompt': 'c'}, '')
  assert [request.id for request in requests] == ['request-0', 'mine', 'request-2']


def test_odd_line_breaks_inside_text_and_a_byte_order_mark_are_read(read):
  requests = read(b'\xef\xbb\xbf{"prompt": "a\xe2\x80\xa8b"}\r', {'prompt': 'c'})
  assert [request.prompt for request in requests] == [(1, 97, 0x2028, 98), (1, 99)]


@pytest.mark.parametrize(
  ('fields', 'reason'),
  [
    ({'prompt_token_ids': []}, 'prompt is empty'),
    ({'prompt': ''}, 'prompt is empty'),
    ({'messages': []}, 'prompt is empty'),
    ({'prompt_token_ids': [-1]}, 'token id -1'),
    ({'prompt_token_ids': [100]}, 'token id 100, expected ids from 0 to 99'),
    ({'prompt': 'a', 'max_tokens': 0}, 'max_tokens is 0'),
    ({'prompt': 'a', 'temperature': -0.5}, 'temperature is -0.5'),
    ({'prompt': 'a', 'top_k': -1}, 'top_k is -1'),
    ({'prompt': 'a', 'top_p': 0}, 'top_p is 0'),
    ({'prompt': 'a', 'top_p': 1.5}, 'top_p is 1.5'),
    ({'prompt': 'a', 'seed': -1}, 'seed is -1'),
    ({'prompt': 'a', 'arrival_s': -1}, 'arrival_s=-1'),
    ('{"prompt": "a", "arrival_s": 1e999}', 'arrival_s is inf'),
    ('{"prompt": "a", "temperature": 1e999}', 'temperature is inf'),
  ],
)
def test_an_impossible_line_is_refused_and_the_others_are_served(read, fields, reason):
  before, refused, after = read({'prompt': 'a'}, fields, {'prompt': 'b'}, vocab_size=100)
  assert isinstance(before, Request)
  assert isinstance(after, Request)
  assert isinstance(refused, Refused)
  assert refused.id == 'line-2' and refused.line == 2
  assert refused.error.startswith('line 2: ') and reason in refused.error


def test_a_prompt_that_the_tokenizer_refuses_is_refused(read):
  def encode(text):
    raise KeyError('no such characters')  # whatever it raises: it is a program of someone else

  (refused,) = read({'prompt': 'a'}, encode=encode)
  assert refused.id == 'line-1' and "prompt cannot become tokens (KeyError: 'no such characters')" in refused.error


# What is no JSON, by RFC 8259; what has other types, by OpenAI's API reference; the others by our contract.
@pytest.mark.parametrize(
  ('line', 'wrong'),
  [
    ('{"prompt": "a"', 'not JSON'),
    (b'{"prompt": "\xff"}', 'not JSON'),
    ('{"prompt": "a", "temperature": NaN}', 'NaN is not a JSON number'),
    ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is there twice"),
    ([1, 2], 'found [1, 2], expected a JSON object'),
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
    ({'prompt': 'a', 'top_p': [1]}, 'top_p is [1]'),
    ({'prompt': 'a', 'seed': 1.0}, 'seed is 1.0'),
    ({'prompt': 'a', 'stop_token_ids': 2}, 'stop_token_ids is 2'),
    ({'prompt': 'a', 'ignore_eos': 1}, 'ignore_eos is 1, expected true or false'),
    ({'prompt': 'a', 'arrival_s': True}, 'arrival_s is true'),
    ({'prompt': 'a', 'id': 3}, 'id is 3'),
    ({'prompt': 'a', 'id': ''}, 'id is ""'),
    ({'prompt': 'a', 'id': 'first'}, "the id 'first' is that of line 1 too"),
    ({'prompt': 'a', 'max_tokens': 3, 'max_completion_tokens': 4}, 'max_tokens is 3 and max_completion_tokens 4'),
    ({'prompt': 'a', 'logit_bias': {'5': 1}}, 'logit_bias is {"5": 1}, which pdjax cannot honour'),
    ({'prompt': 'a', 'response_format': {'type': 'json_object'}}, 'response_format'),
    ({'prompt': 'a', 'tools': [{}]}, 'tools is there with prompt'),
    ({'messages': [{'role': 'user', 'content': 'a'}], 'tool_choice': 'required'}, 'tool_choice'),
    ({'prompt': 'a', 'guided_regex': 'a+'}, 'guided_regex'),
    ({'prompt': None}, 'found none of them'),
    ({'messages': [{'role': None, 'content': 'a'}]}, 'expected a list of'),
    ({'messages': [{'role': 'user', 'contents': 'a'}]}, 'expected a list of'),
    ({'prompt': 'a', 'id': 'half \ud83d'}, 'half a surrogate pair'),
    ({'prompt': 'a', 'stop': ['\udc00']}, 'half a surrogate pair'),
    ({'prompt': 'a', 'stop': [5]}, 'stop is [5], expected text in quotes or a list of texts'),
    ({'prompt': 'a', 'logprobs': True}, 'logprobs is true, expected an integer or null'),
  ],
)
def test_a_malformed_line_is_refused_by_its_number(read, line, wrong):
  before, refused, after = read({'prompt': 'good', 'id': 'first'}, '', line, {'prompt': 'good'})
  assert isinstance(before, Request) and after == Request('request-2', (1, *map(ord, 'good'))).seeded(0, 2)
  assert refused.line == 3 and refused.error.startswith('line 3: ') and wrong in refused.error
  assert refused.id == 'line-3'  # an id that another has is none of its own


def test_a_refused_line_keeps_the_id_that_it_gives_itself(read):
  assert [row.id for row in read({'id': 'mine', 'promt': 'a'}, {'id': 'line-3', 'prompt': 'a'}, {'promt': 'a'})] == [
    'mine', 'line-3', 'line-3-2',
  ]  # fmt: skip


@pytest.mark.parametrize('line', [{'prompt': 'a'}, {'messages': [{'role': 'user', 'content': 'a'}]}])
def test_text_without_a_tokenizer_is_refused(read, line):
  refused, served = read(line, {'prompt_token_ids': [3]}, encode=None, encode_chat=None)
  assert 'needs a tokenizer' in refused.error and isinstance(served, Request)


@pytest.mark.parametrize('name', ['missing.jsonl', '.'])
def test_a_file_that_cannot_be_read_stops_the_reading(tmp_path, name):
  with pytest.raises(OSError):
    read_requests(tmp_path / name)


# By our contract: an id that a line gives itself, or one of its samples, is never a default.
@pytest.mark.parametrize(
  ('lines', 'names'),
  [
    ([{'id': 'request-1'}, {}], ['request-1', 'request-1-2']),
    ([{}, {'id': 'request-0'}], ['request-0-2', 'request-0']),
    ([{}, {'id': 'request-0#1'}], ['request-0-2', 'request-0#1']),
    ([{'id': 'request-1', 'n': 2}, {'n': 2}], ['request-1', 'request-1-2']),
    ([{'id': 'request-1'}, {}, {'id': 'request-1-2'}], ['request-1', 'request-1-3', 'request-1-2']),
    ([{'id': None}, {'id': 'request-0'}, {'id': None}], ['request-0-2', 'request-0', 'request-2']),
  ],
)
def test_a_default_id_is_one_that_nobody_took(read, lines, names):
  rows = read(*({'prompt': 'a', 'n': 3} | line for line in lines))
  assert all(isinstance(row, Request) for row in rows) and [row.id for row in rows] == names


def test_a_line_may_say_whose_it_is_and_what_it_shares(read):
  rows = read(
    {'prompt': 'a', 'tenant': 'ann'}, {'prompt': 'a', 'tenant': 'bob', 'cache_salt': 'both', 'cache_prefix': False},
    {'prompt': 'a', 'tenant': 7}, {'prompt': 'a', 'cache_salt': ''}, {'prompt': 'a', 'cache_prefix': 'no'},
  )  # fmt: skip
  assert [(row.tenant, row.salt, row.cache_prefix) for row in rows[:2]] == [
    ('ann', 'ann', True),
    ('bob', 'both', False),
  ]
  problems = ('tenant is 7', 'cache_salt is ""', 'cache_prefix is "no"')
  for row, words in zip(rows[2:], problems, strict=True):
    assert isinstance(row, Refused) and words in row.error


def test_a_line_may_say_its_class_its_priority_and_its_deadline(read):
  rows = read(
    {'prompt': 'a', 'class_name': 'chat', 'priority': -2, 'deadline_s': 1.5, 'n': 2}, {'prompt': 'a'},
    {'prompt': 'a', 'class_name': ''}, {'prompt': 'a', 'priority': 1.5}, {'prompt': 'a', 'priority': 2**31},
    {'prompt': 'a', 'deadline_s': 0}, {'prompt': 'a', 'deadline_s': '1'}, {'prompt': 'a', 'class': 'chat'},
  )  # fmt: skip
  said = [(one.class_name, one.priority, one.deadline_s) for row in rows[:2] for one in row.samples()]
  assert said == [('chat', -2, 1.5), ('chat', -2, 1.5), (None, 0, None)]
  problems = (
    'line 3: class_name is ""', 'line 4: priority is 1.5, expected an integer', 'priority=2147483648, expected an int',
    'deadline_s=0, expected a positive number', 'line 7: deadline_s is "1"', "did you mean 'class_name'?",
  )  # fmt: skip
  for row, words in zip(rows[2:], problems, strict=True):
    assert isinstance(row, Refused) and words in row.error, row.error


OPTIONAL = (
  'id', 'max_tokens', 'max_completion_tokens', 'temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty',
  'presence_penalty', 'frequency_penalty', 'seed', 'stop', 'stop_token_ids', 'ignore_eos', 'logprobs', 'n', 'arrival_s',
  'tools', 'tenant', 'cache_salt', 'cache_prefix', 'class_name', 'priority', 'deadline_s',
  'logit_bias', 'response_format', 'prompt_token_ids', 'messages',
  'tool_choice', 'stream',
)  # fmt: skip


# By OpenAI's API reference and vLLM's protocol, where all optional keys may be null.
@pytest.mark.parametrize('key', OPTIONAL)
def test_a_key_that_is_null_is_as_good_as_left_out(read, key):
  assert read({'prompt': 'a', key: None}) == read({'prompt': 'a'})


# By OpenAI's API reference these are the values that ask for nothing; that such a line is served, by our contract.
@pytest.mark.parametrize(
  'fields',
  [
    {'logit_bias': {}}, {'response_format': {'type': 'text'}}, {'tools': []}, {'tool_choice': 'auto'},
    {'stream': False}, {'best_of': 1}, {'echo': False}, {'functions': []}, {'min_tokens': 0}, {'suffix': ''},
  ],
)  # fmt: skip
def test_a_key_of_other_servers_that_asks_for_nothing_is_served(read, fields):
  assert read({'prompt': 'a'} | fields) == read({'prompt': 'a'})


def test_max_completion_tokens_is_max_tokens(read):
  for fields in ({'max_completion_tokens': 7}, {'max_completion_tokens': 7, 'max_tokens': 7}):
    assert read({'prompt': 'a'} | fields)[0].sampling.max_tokens == 7


def test_messages_reach_the_template_as_they_are_and_tools_where_there_are_any(read):
  seen = []

  def encode_chat(messages, **tools):
    seen.append((messages, tools))
    return [1]

  messages = [
    {'role': 'user', 'name': 'ann', 'content': [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]},
    {'role': 'assistant', 'content': None, 'tool_calls': [{'function': {'name': 'f', 'arguments': '{}'}}]},
    {'role': 'assistant', 'tool_calls': []},
    {'role': 'tool', 'tool_call_id': '1', 'content': '3'},
  ]
  tool = {'type': 'function', 'function': {'name': 'f'}}
  with_tools, without = read(
    {'messages': messages, 'tools': [tool]}, {'messages': messages}, encode_chat=encode_chat, chat_end_ids=(7, 9)
  )
  assert seen == [(messages, {'tools': [tool]}), (messages, {})]
  assert with_tools.end_token_ids == without.end_token_ids == (7, 9)


def test_only_a_chat_ends_with_the_ends_of_chats(read):
  chat, text, tokens = read(
    {'messages': [{'role': 'user', 'content': 'a'}]}, {'prompt': 'a'}, {'prompt_token_ids': [1]}, chat_end_ids=(7,)
  )
  assert [row.end_token_ids for row in (chat, text, tokens)] == [(7,), (), ()]


def test_lines_without_a_seed_have_different_ones_by_run_and_row(read):
  line = {'prompt': 'a', 'temperature': 1.5}
  rows = [row.sampling.seed for seed in (0, 1) for row in read(line, line, line, {**line, 'seed': 5}, seed=seed)]
  assert rows[3] == rows[7] == 5 and len({*rows}) == 7
  assert [row.sampling.seed for row in read(line, line, line)] == rows[:3]


# Ways to make any line bad, each with what the refusal says.
BAD = {
  'no JSON': (lambda row: json.dumps(row)[:-1], 'not JSON'),
  'no UTF-8': (lambda row: b'{"prompt": "\xff"}', 'not JSON'),
  'no object': (lambda row: [row], 'expected a JSON object'),
  'unknown key': (lambda row: row | {'max_token': 3}, 'unknown key'),
  'two prompts': (lambda row: row | {'prompt': 'a', 'prompt_token_ids': [1]}, 'exactly one'),
  'no prompt': (lambda row: {key: value for key, value in row.items() if 'prompt' not in key}, 'found none'),
  'wrong type': (lambda row: row | {'temperature': 'hot'}, 'expected a number'),
  'half a pair': (lambda row: {'prompt': 'smile \ud83d', 'id': row.get('id')}, 'surrogates not allowed'),
  'half a chat': (lambda row: {'messages': [{'role': 'user', 'content': '\ude00'}]}, 'surrogates not allowed'),
  'half a pair as id': (lambda row: row | {'id': '\ud83d'}, 'half a surrogate pair'),
  'empty': (lambda row: {'prompt_token_ids': []}, 'prompt is empty'),
  'not a number': (lambda row: json.dumps(row | {'top_p': math.nan}), 'NaN is not a JSON number'),
  'infinite': (lambda row: '{"prompt": "a", "arrival_s": 1e999}', 'arrival_s is inf'),
  'logit_bias': (lambda row: row | {'logit_bias': {'1': 100}}, 'cannot honour'),
  'response_format': (lambda row: row | {'response_format': {'type': 'json_schema'}}, 'cannot honour'),
  'id of another': (lambda row: row | {'id': 'first'}, 'is that of line 1 too'),
}
GOOD = (
  {'prompt_token_ids': [5], 'id': 'first'},
  {'prompt': 'ab', 'temperature': 1.5},
  {'prompt': 'ab', 'temperature': 1.5, 'n': 3, 'id': None},
  {'prompt_token_ids': [7, 8], 'id': 'request-3', 'arrival_s': 0.5},
  {'prompt': 'ab', 'temperature': 1.5, 'arrival_s': 0.25},
)


def strict_encode(text):
  text.encode()
  return [1, *map(ord, text)]


@given(ways=st.lists(st.one_of(st.none(), st.sampled_from(sorted(BAD))), min_size=len(GOOD), max_size=len(GOOD)))
def test_lines_made_bad_change_nothing_for_the_others(tmp_path_factory, ways):
  path = tmp_path_factory.getbasetemp() / 'property.jsonl'

  def read(rows):
    path.write_bytes(b'\n'.join(row if isinstance(row, bytes) else as_line(row).encode() for row in rows))
    return read_requests(path, strict_encode, lambda messages: strict_encode(messages[0]['content']), 500)

  ways[0] = None if ways[0] == 'id of another' else ways[0]
  if ways[0] is not None:  # then nobody has that id
    ways = [None if way == 'id of another' else way for way in ways]
  good = read(GOOD)
  rows = read(row if way is None else BAD[way][0](row) for row, way in zip(GOOD, ways, strict=True))
  assert len(rows) == len(GOOD)
  for number, (row, expected, way) in enumerate(zip(rows, good, ways, strict=True), start=1):
    if way is None:
      assert row == expected
    else:
      assert row.line == number and row.error.startswith(f'line {number}: ') and BAD[way][1] in row.error


def test_tokens_need_no_tokenizer(read):
  assert len(read({'prompt_token_ids': [1]}, encode=None, encode_chat=None)) == 1


def test_a_completion_is_written_with_its_times():
  request = Request('x', (1, 2), arrival_s=1.0)
  assert completion_row(Completion(request.seeded(0, 0), (7, 8), 'stop', text='hi', token_times_s=(1.5, 1.75))) == {
    'id': 'x', 'prompt_token_ids': [1, 2], 'output_token_ids': [7, 8], 'text': 'hi', 'finish_reason': 'stop',
    'error': None, 'arrival_s': 1.0, 'ttft_s': 0.5, 'e2el_s': 0.75, 'token_times_s': [1.5, 1.75],
    'seed': request.seeded(0, 0).sampling.seed, 'cached_tokens': 0, 'logprobs': None,
  }  # fmt: skip


def test_a_completion_is_written_with_its_log_probabilities():
  sample = Request('x', (1, 2), SamplingParams(n=2, logprobs=1)).samples()[1]
  row = completion_row(Completion(sample, (7,), 'length', logprobs=(TokenLogprob(-0.5, ((7, -0.5),)),)))
  assert row['id'] == 'x#1' and json.loads(json.dumps(row))['logprobs'] == [{'logprob': -0.5, 'top': [[7, -0.5]]}]
  assert completion_row(Completion(sample, (), 'cancelled'))['logprobs'] == []


def test_log_probabilities_that_are_not_finite_are_their_names(tmp_path):
  told = (TokenLogprob(math.nan, ((7, math.inf), (8, -math.inf))),)
  request = Request('x', (1,), SamplingParams(logprobs=2))
  write_completions(tmp_path / 'out.jsonl', [Completion(request, (7,), 'length', logprobs=told)])
  text = (tmp_path / 'out.jsonl').read_text()
  assert json.loads(text, parse_constant=pytest.fail)['logprobs'] == [
    {'logprob': 'NaN', 'top': [[7, 'Infinity'], [8, '-Infinity']]}
  ]


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
