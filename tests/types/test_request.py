"""Bad requests are refused with the value, what was expected and what to change."""

import dataclasses
import math

import numpy as np
import pytest

from pdjax.types import SLO, Request, SamplingParams


@pytest.mark.parametrize(
  'field, value, words',
  [
    ('max_tokens', 0, 'max_tokens is 0, expected at least 1; ask for one token or leave it out'),
    ('max_tokens', -5, 'max_tokens is -5, expected at least 1'),
    ('temperature', -0.5, 'temperature is -0.5, expected 0'),
    ('temperature', math.inf, 'temperature is inf'),
    ('temperature', math.nan, 'temperature is nan'),
    ('top_k', -1, 'top_k is -1, expected 0'),
    ('top_p', 0.0, 'top_p is 0.0, expected a number above 0 and at most 1'),
    ('top_p', 1.5, 'top_p is 1.5'),
    ('top_p', math.nan, 'top_p is nan'),
    ('max_tokens', 2**31, 'max_tokens is 2147483648, expected a count below 2**31; ask for fewer'),
    ('top_k', 2**31, 'top_k is 2147483648'),
    ('stop_token_ids', (5, -1), 'stop_token_ids[1] is -1, expected a token id from 0'),
    ('seed', -1, 'seed is -1, expected an integer from 0'),
    ('seed', 2**63, f'seed is {2**63}'),
    ('min_p', -0.1, 'min_p is -0.1, expected a number from 0 (all tokens) to 1'),
    ('min_p', math.nan, 'min_p is nan'),
    ('repetition_penalty', 0.0, 'repetition_penalty is 0.0, expected a number from 0.001 to 1000; 1 changes nothing'),
    ('repetition_penalty', math.nan, 'repetition_penalty is nan'),
    ('presence_penalty', 2.5, 'presence_penalty is 2.5, expected a number from -2 to 2; 0 changes nothing'),
    ('frequency_penalty', -math.inf, 'frequency_penalty is -inf'),
    ('stop', 'END', "stop is 'END', expected a tuple of texts; write ('END',)"),
    ('stop', ('a', ''), 'stop has an empty text'),
    ('logprobs', 21, "logprobs is 21, expected 0 (the token's own) to 20 likeliest tokens, or None"),
    ('n', 0, 'n is 0, expected 1 to 1024 samples'),
    ('max_tokens', 2.5, 'max_tokens is 2.5, expected an integer'),
    ('seed', 'lucky', "seed is 'lucky', expected an integer"),
    ('logprobs', 2.5, 'logprobs is 2.5, expected an integer'),
    ('stop_token_ids', (5.0,), 'stop_token_ids[0] is 5.0, expected a token id from 0'),
    ('temperature', 1e39, 'temperature is 1e+39, expected 0 (greedy) or a positive number below 3.4e38'),
    ('temperature', 'hot', "temperature is 'hot', expected a number"),
    ('top_p', True, 'top_p is True, expected a number'),
    ('seed', True, 'seed is True, expected an integer'),
    ('logprobs', True, 'logprobs is True, expected an integer'),
    ('logprobs', 0.0, 'logprobs is 0.0, expected an integer'),
    ('logprobs', '', "logprobs is '', expected an integer"),
    ('seed', [], 'seed is [], expected an integer'),
    ('max_tokens', None, 'max_tokens is None, expected an integer'),
    ('stop', None, 'stop is None, expected a tuple of texts'),
    ('stop_token_ids', 5, 'stop_token_ids is 5, expected a tuple of token ids'),
    ('stop_token_ids', (True,), 'stop_token_ids[0] is True'),
    ('ignore_eos', 'no', "ignore_eos is 'no', expected True or False"),
    ('temperature', np.float16('inf'), 'temperature is inf'),
    ('temperature', np.True_, 'expected a number'),
    ('stop', ('a' * 9000, 'b' * 9000), 'stop has 18000 characters, expected at most 16384'),
    ('stop', ('a', '\udfff'), "a stop string has half a surrogate pair, '\\udfff', at position 0"),
    ('seed', math.nan, 'seed is nan, expected an integer'),
    ('seed', 0.5, 'seed is 0.5, expected an integer'),
    ('stop', (5,), 'stop[0] is 5, expected a text'),
  ],
)
def test_sampling_out_of_range_is_refused(field, value, words):
  with pytest.raises(ValueError) as error:
    SamplingParams(**{field: value})
  assert words in str(error.value)


def test_the_ends_of_the_ranges_are_allowed():
  SamplingParams(max_tokens=1, temperature=0.0, top_k=0, top_p=1.0, seed=2**63 - 1, min_p=1.0, logprobs=0, n=1024)


def test_an_empty_prompt_is_refused():
  with pytest.raises(ValueError, match=r"request 'r' has prompt=\(\), expected at least one token; give"):
    Request('r', ())


def test_a_text_is_no_prompt():
  with pytest.raises(
    ValueError, match="request 'r' has prompt='Hello', expected a sequence of token ids; tokenize it first"
  ):
    Request('r', 'Hello')


def test_the_last_token_needs_no_place_in_the_context():
  request = Request('r', (1,) * 10, SamplingParams(max_tokens=5))
  assert [request.token_limit(context_len) for context_len in (100, 14, 13, 10)] == [5, 5, 4, 1]


@pytest.mark.parametrize('arrival_s', [-0.1, math.nan, math.inf])
def test_an_arrival_that_never_comes_is_refused(arrival_s):
  with pytest.raises(ValueError, match=f"request 'r' has arrival_s={arrival_s}, expected 0 or later"):
    Request('r', (1,), arrival_s=arrival_s)


def test_a_prompt_is_measured_without_being_read():
  request = Request('r', range(10**12))
  assert request.prompt_len == 10**12


def test_a_request_is_a_value():
  assert Request('r', (1, 2)) == Request('r', (1, 2)) != Request('r', (1, 3))
  with pytest.raises(dataclasses.FrozenInstanceError):
    Request('r', (1,)).arrival_s = 2.0


# A limit, and what it is: by our contract, as an infinite limit bounds nothing.
@pytest.mark.parametrize(
  ('limit', 'kept'),
  [(math.inf, None), (float('1e999'), None), (np.float32('inf'), None), (None, None), (1e308, 1e308), (5e-324, 5e-324)],
)
@pytest.mark.parametrize('field', ['ttft_ms', 'tpot_ms', 'e2el_ms'])
def test_an_infinite_limit_is_left_free(field, limit, kept):
  assert SLO(**{field: limit}) == SLO(**{field: kept})
  if limit is not None:
    assert getattr(SLO.parse(f'{field.removesuffix("_ms")}:{limit}'), field) == kept


@pytest.mark.parametrize('limit', [math.nan, -math.inf, 0.0, -0.0, -1.0, np.float32('nan'), '500', True, 10**400])
def test_a_limit_that_is_none_is_refused(limit):
  with pytest.raises(ValueError, match=f'ttft_ms is .?{str(limit)[:60]}.*, expected a positive number'):
    SLO(ttft_ms=limit)


@pytest.mark.parametrize(
  'name', ['\ud83d', 'a\udc00b', '\udcff.jsonl']
)  # the last is how Python reads a bad byte of a path
def test_an_id_that_no_file_can_hold_is_refused(name):
  with pytest.raises(ValueError, match='the id of a request has half a surrogate pair'):
    Request(name, (1,))


# By our contract: what a step or a report would stumble over, with the requests of others in it.
@pytest.mark.parametrize(
  ('field', 'value', 'words'),
  [
    ('end_token_ids', (2**40,), 'end_token_ids[0]=1099511627776, expected a token id from 0'),
    ('end_token_ids', ('x',), "end_token_ids[0]='x'"),
    ('end_token_ids', (-5,), 'end_token_ids[0]=-5'),
    ('end_token_ids', (1.5,), 'end_token_ids[0]=1.5'),
    ('sampling', {'max_tokens': 4}, "request 'a' has sampling={'max_tokens': 4}, expected SamplingParams"),
    ('sampling', None, "request 'a' has sampling=None, expected SamplingParams"),
    ('slo', 'x', "request 'a' has slo='x', expected"),
    ('session', 5, "request 'a' has session=5, expected"),
    ('session', '\ud800', 'the session of a request has half a surrogate pair'),
    ('end_token_ids', None, 'end_token_ids=None, expected a tuple of token ids'),
    ('prompt', 5, "request 'a' has prompt=5, expected a sequence of token ids"),
    ('arrival_s', 'soon', "request 'a' has arrival_s='soon', expected a number, 0 or later"),
  ],
)
def test_what_would_break_others_later_is_refused_as_it_is_made(field, value, words):
  with pytest.raises(ValueError) as error:
    Request(**{'id': 'a', 'prompt': (1,), field: value})
  assert words in str(error.value)


@pytest.mark.parametrize('name', [5, None, b'a'])
def test_an_id_that_is_no_text_is_refused(name):
  with pytest.raises(ValueError, match='expected a text'):
    Request(name, (1,))


def test_a_whole_surrogate_pair_is_a_character():
  assert Request('\ud83d\ude00'.encode('utf-16', 'surrogatepass').decode('utf-16'), (1,)).id == '😀'


def test_stop_tokens_are_the_requests_the_models_and_the_chats_each_once():
  chat = Request('a', (1,), SamplingParams(stop_token_ids=(7, 3, 7)), end_token_ids=(9, 8))
  assert chat.stop_tokens((3, 9)) == (3, 7, 8, 9)
  assert Request('a', (1,), SamplingParams(), end_token_ids=(8,)).stop_tokens(()) == (8,)
  assert Request('a', (1,), SamplingParams(ignore_eos=True), end_token_ids=(8,)).stop_tokens((3,)) == ()
  samples = Request('a', (1,), SamplingParams(n=3), end_token_ids=(9, 8)).samples()
  assert [sample.end_token_ids for sample in samples] == [(9, 8)] * 3


@pytest.mark.parametrize(
  'text, slo',
  [
    ('ttft:500 tpot:50', SLO(500, 50)),
    ('e2el:2.5', SLO(e2el_ms=2.5)),
    ('ttft:500,tpot:50', SLO(500, 50)),
    ('', SLO()),
  ],
)
def test_limits_are_read_in_milliseconds(text, slo):
  assert SLO.parse(text) == slo


@pytest.mark.parametrize(
  'text, words',
  [
    ('ttft=500', 'not of the form name:milliseconds'),
    ('ttft:fast', "'ttft:fast' is not of the form name:milliseconds, e.g. ttft:500"),
    ('itl:5', "'itl' is unknown; the names are ttft, tpot, e2el"),
    ('ttft:0', 'ttft_ms is 0.0, expected a positive number'),
    ('tpot:-1', 'tpot_ms is -1.0'),
    ('tpot:nan', 'tpot_ms is nan'),
  ],
)
def test_limits_that_make_no_sense_are_refused(text, words):
  with pytest.raises(ValueError) as error:
    SLO.parse(text)
  assert words in str(error.value)


def test_a_seed_that_numpy_drew_serves_several_samples():
  seed = np.random.default_rng(0).integers(1 << 62)
  seeds = [
    [sample.sampling.seed for sample in Request('a', (1,), SamplingParams(seed=one, n=4)).samples()]
    for one in (seed, int(seed))
  ]
  assert seeds[0] == seeds[1] and len(set(seeds[0])) == 4


def test_a_sample_of_unknown_length_is_as_long_as_its_request():
  lengths = {'a': 5, 'a#2': 3}
  samples = Request('a', (1, 2), SamplingParams(max_tokens=9, n=3)).samples()
  assert [one.token_limit(8, lengths.get) for one in samples] == [5, 5, 3]
  assert [one.token_limit(8) for one in samples] == [7, 7, 7]
  assert samples[0].token_limit(4, lengths.get) == 3
