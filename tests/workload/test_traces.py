"""Traces are read as they were recorded, and what is wrong in one is told by file, line and field."""

import dataclasses
import gzip
import hashlib
import itertools
import json
import math
import operator
import pathlib

import pytest

from pdjax import SLO, Request, SamplingParams
from pdjax.overrides import apply_overrides
from pdjax.workload import TraceWorkload, WorkloadContext, read_trace
from tests import tiny

TRACES = pathlib.Path(__file__).parents[1] / 'data' / 'traces'
CONTEXT = WorkloadContext(vocab_size=50, context_len=2**17)
MOONCAKE = {'timestamp': 0, 'input_length': 600, 'output_length': 5, 'hash_ids': [7, 8]}
BAILIAN = {
  'chat_id': 1, 'parent_chat_id': -1, 'timestamp': 0.5, 'input_length': 20, 'output_length': 2, 'type': 'text',
  'turn': 1, 'hash_ids': [1, 2],
}  # fmt: skip
AGENT = {'t': 0.5, 'type': 'n', 'in': 130, 'out': 4, 'hash_ids': [1, 2]}
WEKA = {'id': 's', 'block_size': 64, 'hash_id_scope': 'local', 'requests': [AGENT]}


@pytest.fixture
def write(tmp_path):
  """Writes a file of these lines, objects as JSON, and gives its path."""

  def write(*lines):
    path = tmp_path / 'trace'
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text('\n'.join(texts), encoding='utf-8')
    return path

  return write


def facts(trace):
  """Of each request its id, arrival, lengths, session and blocks."""
  return [
    (one.id, one.arrival_s, one.prompt_len, trace.output_lens[one.id], one.session, one.block_hashes)
    for one in trace.requests
  ]


def test_mooncake_has_milliseconds_and_blocks_of_512():
  trace = read_trace(TRACES / 'mooncake_conversation.jsonl')
  assert (trace.name, trace.format, len(trace.requests)) == ('mooncake_conversation.jsonl', 'mooncake', 222)
  assert facts(trace)[:2] == [
    ('request-0', 0.0, 2290, 316, None, (0, 42, 43, 44, 45)),
    ('request-1', 3.0, 2012, 354, None, (0, 427, 428, 429)),
  ]
  assert trace.requests[3].arrival_s == 5.999
  assert {one.block_size for one in trace.requests} == {512}
  assert all(len(one.block_hashes) == -(-one.prompt_len // 512) for one in trace.requests)


@pytest.mark.parametrize('name', ['mooncake_conversation.jsonl', 'weka_agentic.jsonl', 'azure_code_2023.csv'])
def test_a_format_may_be_named_and_a_file_compressed(name, tmp_path):
  plain = read_trace(str(TRACES / name))
  (tmp_path / 'packed').write_bytes(gzip.compress((TRACES / name).read_bytes()))
  packed = read_trace(tmp_path / 'packed', plain.format)
  assert packed.requests == plain.requests and packed.output_lens == plain.output_lens


def test_a_chat_of_bailian_is_of_the_first_that_it_goes_back_to():
  trace = read_trace(TRACES / 'bailian_made_up.jsonl')
  assert trace.format == 'bailian' and {one.block_size for one in trace.requests} == {16}
  assert facts(trace) == [
    ('request-0', 0.0, 40, 7, '3', (10, 11, 12)),
    ('request-1', 0.75, 33, 1, '9', (20, 11, 12)),
    ('request-3', 7.5, 48, 64, '7', (10, 11, 30)),
    ('request-2', 9.25, 70, 21, '3', (10, 11, 13, 14, 15)),
    ('request-4', 20.0, 96, 3, '3', (10, 11, 13, 14, 16, 17)),
    ('request-5', 29.5, 50, 12, '7', (10, 11, 30, 31)),
  ]


def test_a_parent_may_stand_behind_its_chat(write):
  path = write(BAILIAN | {'chat_id': 2, 'parent_chat_id': 1}, BAILIAN)
  assert [one.session for one in read_trace(path).requests] == ['1', '1']


def test_an_agent_and_its_subagents_are_one_session_whose_ids_are_its_own():
  trace = read_trace(TRACES / 'weka_agentic.jsonl')
  rows = {row['id']: row for row in map(json.loads, (TRACES / 'weka_agentic.jsonl').read_text().splitlines())}
  assert trace.format == 'weka' and len(trace.requests) == 3 + 6 + 5
  main, subagent = rows['trace_0010']['requests'][0], rows['trace_0010']['requests'][1]
  base = int.from_bytes(hashlib.blake2b(b'trace_0010', digest_size=8).digest(), 'little')
  entries = [main, *subagent['requests'], rows['trace_0010']['requests'][2]]
  times = [0.0, 100.65 + 0.0, 100.65 + 7.0, 100.65 + 13.0, 107.0]
  found = {one.id: one for one in trace.requests}
  for index, (entry, arrival_s) in enumerate(zip(entries, times, strict=True)):
    one = found[f'trace_0010-{index}']
    assert (one.session, one.arrival_s, one.prompt_len, one.block_size) == ('trace_0010', arrival_s, entry['in'], 64)
    assert one.block_hashes == tuple((base + local) % 2**64 for local in entry['hash_ids'])
    assert trace.output_lens[one.id] == entry['out']
  assert [one.arrival_s for one in trace.requests] == sorted(one.arrival_s for one in trace.requests)
  firsts = {one.session: one.block_hashes[0] for one in trace.requests}
  assert len({*firsts.values()}) == 3  # all are 1 in the file


def test_subagents_nest_and_their_times_add_up(write):
  inner = {'t': 3.0, 'type': 'subagent', 'requests': [AGENT]}
  outer = {'t': 10.0, 'type': 'subagent', 'requests': [AGENT, inner]}
  trace = read_trace(write(WEKA | {'requests': [AGENT | {'t': 0.0}, outer, AGENT | {'t': 11.0}]}))
  assert [(one.id, one.arrival_s) for one in trace.requests] == [
    ('s-0', 0.0), ('s-1', 10.5), ('s-3', 11.0), ('s-2', 13.5),
  ]  # fmt: skip


def test_ids_of_a_global_scope_mean_the_same_in_every_session(write):
  rows = [WEKA | {'id': name, 'hash_id_scope': 'global'} for name in 'ab']
  assert [one.block_hashes for one in read_trace(write(*rows)).requests] == [(1, 2), (1, 2)]


def test_ids_behind_the_end_of_a_prompt_are_left_out(write):
  entries = [AGENT | {'in': length, 'hash_ids': [1, 2, 3]} for length in (1, 64, 65, 1000)]
  found = read_trace(write(WEKA | {'hash_id_scope': 'global', 'requests': entries})).requests
  assert [one.block_hashes for one in found] == [(1,), (1,), (1, 2), (1, 2, 3)]
  assert read_trace(write(BAILIAN | {'input_length': 16})).requests[0].block_hashes == (1,)


def test_azure_has_dates_and_no_blocks():
  code, chats = (read_trace(TRACES / f'azure_{name}_2023.csv') for name in ('code', 'conversation'))
  assert facts(code)[:2] == [('request-0', 0.0, 4808, 10, None, ()), ('request-1', 0.052, 3180, 8, None, ())]
  assert facts(chats)[1] == ('request-1', 4.314579, 396, 109, None, ())
  assert code.format == 'azure' and len(code.requests) == len(chats.requests) == 200
  assert {one.block_size for one in code.requests} == {None}


def test_azure_may_say_the_zone(write):
  path = write('TIMESTAMP,ContextTokens,GeneratedTokens', '2024-05-10 00:00:00.5+00:00,3,0', '2024-05-10 00:00:02,4,6')
  assert facts(read_trace(path)) == [('request-0', 0.0, 3, 1, None, ()), ('request-1', 1.5, 4, 6, None, ())]


def test_burstgpt_is_read_by_the_names_of_its_columns(write):
  head = 'Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type'
  trace = read_trace(write(head, '5,ChatGPT,472,18,490,Conversation log', '45.5,GPT-4,1087,230,1317,API log', ''))
  assert trace.format == 'burstgpt'
  assert facts(trace) == [('request-0', 0.0, 472, 18, None, ()), ('request-1', 40.5, 1087, 230, None, ())]


def test_a_request_may_generate_what_the_longest_does_and_ends_at_its_own_length():
  trace = read_trace(TRACES / 'azure_code_2023.csv')
  assert {one.sampling for one in trace.requests} == {SamplingParams(max_tokens=697, ignore_eos=True)}
  assert max(trace.output_lens.values()) == 697


# ---------------------------------------------------------------------------- careless input


def nested(depth):
  """A session whose subagents have subagents, as text: to write it, too, takes a deep stack."""
  return '{"id": "s", "block_size": 64, "requests": [' + '{"t": 1, "requests": [' * depth + ']}' * depth + ']}'


HEAD = 'TIMESTAMP,ContextTokens,GeneratedTokens'
WRONG = [
  ('nothing', [], r'trace is empty, expected a request a line'),
  ('blank lines', ['', ' '], r'trace is empty'),
  ('a head alone', [HEAD], r'trace has no request, expected at least one'),
  ('no session', [WEKA | {'requests': []}], r'trace has no request'),
  ('prose', ['once upon a time'], r'line 1: found "once upon a time".*expected one of mooncake, bailian, weka, azure'),
  ('other keys', [{'prompt': 'x'}], r'line 1: found .*begins no known format'),
  ('half a line', [MOONCAKE, '{"timestamp": 1,'], r'line 2: found .*no JSON \(.*\), expected a JSON object'),
  ('a list', [MOONCAKE, [1]], r'line 2: found \[1\], expected a JSON object'),
  ('no length', [MOONCAKE, {'timestamp': 1, 'hash_ids': []}], r'line 2: there is no input_length, expected an integer'),
  (
    'an empty prompt',
    [MOONCAKE | {'input_length': 0}],
    r'line 1: input_length is 0, expected an integer of at least 1',
  ),
  ('a length as text', [MOONCAKE | {'output_length': '5'}], r'line 1: output_length is "5", expected an integer of at'),
  ('a truth', [MOONCAKE | {'output_length': True}], r'line 1: output_length is true, expected an integer'),
  ('a huge prompt', [MOONCAKE | {'input_length': 2**31}], r'input_length is 2147483648, expected an integer from 1 to'),
  ('no time', [MOONCAKE | {'timestamp': None}], r'line 1: timestamp is null, expected a time from 0 to 1e\+18'),
  ('before the start', [MOONCAKE | {'timestamp': -1}], r'line 1: timestamp is -1, expected a time from 0 to 1e\+18'),
  ('a time without end', [MOONCAKE | {'timestamp': float('inf')}], r'timestamp is Infinity, expected a time'),
  ('a time beyond all', ['{"timestamp": 1' + '0' * 400 + '}'], r'line 1: found .*begins no known format'),
  ('a time that no float holds', [MOONCAKE | {'timestamp': 10**400}], r'timestamp is 10+…, expected a time from 0 to'),
  ('thousands of digits', [MOONCAKE, '{"timestamp": 1' + '0' * 5000 + '}'], r'line 2: found .*, which is no JSON'),
  ('half a character', [WEKA | {'id': '\ud800'}], r'line 1: id is "\\ud800", expected a text of whole characters'),
  ('deep subagents', [nested(980)], r'line 1: (requests is|found) .*, expected'),
  ('no end of subagents', [nested(100_000)], r'line 1: found .*, which is no JSON'),
  ('an id', [MOONCAKE | {'hash_ids': 7}], r'line 1: hash_ids is 7, expected a list of ids from 0 to 2\*\*64 - 1'),
  ('ids as texts', [MOONCAKE | {'hash_ids': ['a']}], r'line 1: hash_ids is \["a"\], expected a list of ids'),
  ('an id below 0', [MOONCAKE | {'hash_ids': [-1]}], r'hash_ids is \[-1\], expected a list of ids'),
  ('an id too large', [MOONCAKE | {'hash_ids': [2**64]}], r'hash_ids is \[18446744073709551616\], expected'),
  (
    'other blocks',
    [MOONCAKE | {'input_length': 512}],
    r'hash_ids is \[7, 8\], expected at most 1 ids, one for each 512',
  ),
  ('a chat of its own', [BAILIAN | {'parent_chat_id': 1}], r'parent_chat_id is 1, expected a chat that does not come'),
  (
    'chats in a ring',
    [BAILIAN | {'parent_chat_id': 2}, BAILIAN | {'chat_id': 2, 'parent_chat_id': 1}],
    r'line 2: parent_chat_id is 1, expected a chat that does not come from this one',
  ),
  (
    'a chat without parent',
    [{k: v for k, v in BAILIAN.items() if k != 'parent_chat_id'}],
    r'there is no parent_chat_id',
  ),
  ('a session twice', [WEKA, WEKA], r'line 2: id is "s", expected a session of its own a line'),
  ('a block of 1', [WEKA | {'block_size': 1}], r'line 1: block_size is 1, expected an integer of at least 2'),
  ('no scope', [WEKA | {'hash_id_scope': 'here'}], r"hash_id_scope is \"here\", expected 'local' or 'global'"),
  ('one request', [WEKA | {'requests': AGENT}], r'requests is \{.*, expected a list of requests'),
  ('a request of 1', [WEKA | {'requests': [1]}], r'line 1: requests\[0\]: found 1, expected a JSON object'),
  (
    'deep inside',
    [WEKA | {'requests': [AGENT, {'t': 1, 'requests': [AGENT, AGENT | {'in': 'x'}]}]}],
    r'line 1: requests\[1\]: requests\[1\]: in is "x", expected an integer of at least 1',
  ),
  ('other columns', ['TIMESTAMP,Tokens', 'x,1'], r'line 1: found "TIMESTAMP,Tokens", which begins no known format'),
  ('a value short', [HEAD, '2023-11-16 18:15:46,5'], r'line 2: found "2023-11-16 18:15:46,5", expected 3 values'),
  ('no date', [HEAD, 'noon,5,5'], r'line 2: TIMESTAMP is "noon", expected a date such as 2023-11-16'),
  ('a number for a date', [HEAD, '12.5,5,5'], r'line 2: TIMESTAMP is 12.5, expected a date'),
  ('half a token', [HEAD, '2023-11-16 18:15:46,5.5,5'], r'line 2: ContextTokens is 5.5, expected an integer'),
]


@pytest.mark.parametrize(('lines', 'words'), [pytest.param(*case[1:], id=case[0]) for case in WRONG])
def test_what_is_wrong_is_told_by_file_line_and_field(write, lines, words):
  path = write(*lines)
  with pytest.raises(ValueError, match=words) as error:
    read_trace(path)
  assert str(error.value).startswith(str(path)) and str(error.value).endswith('.') and len(str(error.value)) < 500


def test_a_file_of_another_format_than_is_named_is_refused():
  with pytest.raises(ValueError, match=r'line 1: there is no chat_id'):
    read_trace(TRACES / 'mooncake_conversation.jsonl', 'bailian')
  with pytest.raises(ValueError, match=r'line 1: found the columns .*, expected Timestamp, Request tokens, Response'):
    read_trace(TRACES / 'azure_code_2023.csv', 'burstgpt')
  with pytest.raises(ValueError, match=r"format='csv', expected one of 'mooncake', 'bailian'"):
    read_trace(TRACES / 'azure_code_2023.csv', 'csv')
  with pytest.raises(ValueError, match=r'path=None, expected'):
    read_trace(None)


def test_bytes_that_are_no_text_and_half_a_gzip_are_refused(tmp_path):
  path = tmp_path / 'trace'
  path.write_bytes(json.dumps(MOONCAKE).encode() + b'\n\xff\xfe')
  with pytest.raises(ValueError, match=r'line 2: found no text \(.*\), expected UTF-8'):
    read_trace(path)
  whole = gzip.compress((TRACES / 'weka_agentic.jsonl').read_bytes())
  for data in (whole[: len(whole) // 2], whole[:-3] + b'abc'):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r'found no whole gzip \(.*\), expected one; fetch the file again'):
      read_trace(path)
  with pytest.raises(FileNotFoundError):
    read_trace(tmp_path / 'none')


# ---------------------------------------------------------------------------- the workload


def test_a_workload_replays_a_trace_at_its_pace():
  path = TRACES / 'mooncake_conversation.jsonl'
  trace = read_trace(path)
  workload = TraceWorkload(
    path=path, rate=4, max_requests=30, slo=SLO(ttft_ms=100), sampling=SamplingParams(temperature=0.5)
  )
  assert workload.num_requests == 30 and TraceWorkload(path=path).num_requests == 222
  last_s = trace.requests[29].arrival_s / 4
  assert workload.request_rate == pytest.approx(29 / last_s)
  for _ in range(2):  # the same every time
    arrivals = workload.arrivals(CONTEXT)
    found = [event.request for event in arrivals.due(last_s)]
    assert arrivals.closed and len(found) == 30
    for ours, theirs in zip(found, trace.requests, strict=False):
      assert (ours.id, ours.arrival_s) == (theirs.id, theirs.arrival_s / 4)
      assert (ours.prompt_len, ours.block_hashes) == (theirs.prompt_len, theirs.block_hashes)
      assert ours.sampling == SamplingParams(temperature=0.5, max_tokens=1043, ignore_eos=True)
      assert ours.slo == SLO(ttft_ms=100) and max(ours.prompt) < CONTEXT.vocab_size
      assert arrivals.output_len(ours.id) == trace.output_lens[ours.id]


def test_what_says_another_end_than_the_recorded_one_is_refused():
  path = TRACES / 'bailian_made_up.jsonl'
  for field, value in (('max_tokens', 16), ('stop_token_ids', (1,)), ('stop', ('a',))):
    with pytest.raises(ValueError, match=rf'sampling\.{field}=.* end at their recorded lengths; leave it out'):
      TraceWorkload(path=path, sampling=SamplingParams(**{field: value}))
  config = dataclasses.replace(tiny.config(), workload=TraceWorkload(path=path))
  with pytest.raises(ValueError, match=r'sampling\.max_tokens=4, but the requests of a trace end'):
    apply_overrides(config, ['workload.sampling.max_tokens=4'])


def prompts(workload: TraceWorkload) -> list[Request]:
  return [event.request for event in workload.arrivals(CONTEXT).due(math.inf)]


@pytest.mark.parametrize('name', ['mooncake_conversation', 'bailian_made_up', 'weka_agentic'])
def test_prompts_begin_alike_where_their_ids_do_and_no_further(name):
  requests = prompts(TraceWorkload(path=TRACES / f'{name}.jsonl', max_requests=40))
  shared = 0
  for one, other in itertools.combinations(requests, 2):
    tokens = [*itertools.starmap(operator.eq, zip(one.prompt, other.prompt, strict=False))]
    begins = tokens.index(False) if False in tokens else len(tokens)
    ids = [*itertools.starmap(operator.eq, zip(one.block_hashes, other.block_hashes, strict=False))]
    alike = ids.index(False) if False in ids else len(ids)
    least = min(alike * one.block_size, one.prompt_len, other.prompt_len)
    assert least <= begins < least + 4  # of a vocabulary of 1,000 tokens a few may be equal by chance
    shared += least
  assert shared > 0
  assert [one.prompt[:] for one in requests] == [
    one.prompt[:] for one in prompts(TraceWorkload(path=TRACES / f'{name}.jsonl', rate=9, max_requests=40))
  ]


def test_a_file_that_has_changed_is_read_again(write):
  workload = TraceWorkload(path=write(MOONCAKE))
  assert workload.num_requests == 1
  path = write(MOONCAKE, MOONCAKE)
  assert pathlib.Path(workload.path) == path
  assert workload.num_requests == 2
