"""Sequences as the host follows them: how far they are, what ends them, and which are followed at all."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pdjax.engine.detokenize import Detokenizer
from pdjax.engine.sequences import Followed, log_probabilities
from pdjax.model.sampling import Chosen
from pdjax.serving.orders import MAX_ORDERS, Admission, ChunkOrder, Join, StepOrder
from pdjax.types import Request, SamplingParams
from pdjax.types.request import TokenLogprob
from tests.tiny import byte_tokenizer

EOS = 1
PROMPT = (5, 6, 7)
LOGPROBS = (TokenLogprob(-0.5), TokenLogprob(-0.25))


def ids(text: str) -> list[int]:
  return [ord(sign) - 32 + 3 for sign in text]


def never(most):
  raise AssertionError('nobody asked for log probabilities')


def following(limit: int = 9, tokens=(), has_text: bool = True, **sampling) -> Followed:
  """The request 'r', followed."""
  followed = Followed((EOS,), Detokenizer(byte_tokenizer()) if has_text else None)
  followed.follow(Request('r', PROMPT, SamplingParams(max_tokens=limit, **sampling)), tokens, limit)
  return followed


def test_ids_are_those_of_the_tokenizer():
  assert byte_tokenizer().decode(ids('Hi you')) == 'Hi you'


def test_tokens_are_counted_up_to_the_limit():
  followed = following(limit=4)
  for count, (tokens, reason) in enumerate([('ab', None), ('c', None), ('d', 'length')]):
    result = followed.result('r', ids(tokens), never)
    assert (result.text, list(result.tokens), result.finish_reason) == (tokens, ids(tokens), reason)
    assert followed.ids == (() if count == 2 else ('r',))
  assert followed.result('r', ids('e'), never) is None  # what is computed behind the end counts for nothing


def test_tokens_that_were_delivered_before_count_too():
  assert following(limit=4, tokens=ids('abc')).result('r', ids('d'), never).finish_reason == 'length'


def test_a_stop_token_ends_a_sequence_unless_it_is_to_be_ignored():
  assert following().result('r', [*ids('a'), EOS], never).finish_reason == 'stop'
  assert following(limit=2).result('r', [*ids('a'), EOS], never).finish_reason == 'stop'  # at the limit too
  assert following(ignore_eos=True).result('r', [*ids('a'), EOS], never).finish_reason is None
  assert following(stop_token_ids=(50,), has_text=False).result('r', [50], never).finish_reason == 'stop'


def test_a_stop_string_ends_a_sequence_within_a_step_and_across_steps():
  result = following(stop=('yz',)).result('r', ids('xyzab'), never)
  assert (result.text, list(result.tokens), result.finish_reason) == ('x', ids('xyz'), 'stop')
  followed = following(stop=('yz',))
  first = followed.result('r', ids('xy'), never)
  assert (first.text, first.finish_reason, followed.ids) == ('x', None, ('r',))  # the y may be the stop string's
  second = followed.result('r', ids('zab'), never)
  assert (second.text, list(second.tokens), second.finish_reason) == ('', ids('z'), 'stop')
  assert followed.ids == ()


def test_text_that_may_have_become_a_stop_string_comes_with_the_end():
  result = following(limit=2, stop=('yz',)).result('r', ids('xy'), never)
  assert (result.text, result.finish_reason) == ('xy', 'length')


def test_a_stop_string_is_found_across_the_tokens_delivered_before():
  result = following(tokens=ids('y'), stop=('yz',)).result('r', ids('z'), never)
  assert (result.text, result.finish_reason) == ('', 'stop')


def test_without_a_tokenizer_there_is_no_text_and_no_stop_string():
  result = following(stop=('yz',), has_text=False).result('r', ids('xyz'), never)
  assert (result.text, len(result.tokens), result.finish_reason) == ('', 3, None)


def test_a_sequence_that_decodes_elsewhere_is_let_go_of_and_has_not_ended():
  followed = following()
  result = followed.result('r', ids('a'), never, leaves=True)
  assert (result.text, result.finish_reason, followed.ids) == ('a', None, ())


@pytest.mark.parametrize('before', ['', 'ab'])
def test_an_error_takes_the_place_of_the_last_token_and_ends_the_sequence(before):
  followed = following()
  result = followed.result('r', [*ids(before), 9], never, 'NaN')
  assert (list(result.tokens), result.text, result.finish_reason, result.error) == (ids(before), before, 'error', 'NaN')
  assert followed.ids == ()


def test_an_error_behind_the_end_is_none():
  result = following(limit=2).result('r', [*ids('ab'), 9], never, 'NaN')
  assert (list(result.tokens), result.finish_reason, result.error) == (ids('ab'), 'length', None)


def test_log_probabilities_are_told_of_the_tokens_that_count():
  asked = []
  followed = following(limit=1, logprobs=3)
  result = followed.result('r', ids('a'), lambda most: [asked.append(most), LOGPROBS][1])
  assert asked == [3] and result.logprobs == LOGPROBS[:1]
  assert following().result('r', ids('a'), never).logprobs == ()


def test_log_probabilities_are_those_of_the_row_with_so_many_of_the_likeliest():
  chosen = dataclasses.replace(
    Chosen.of(jnp.zeros((2, 3), jnp.int32), 96),
    logprobs=np.float32([[-1, -2, -4], [-8, -16, -32]]),
    top_tokens=np.arange(12).reshape(2, 3, 2),
    top_logprobs=-np.arange(12, dtype=np.float32).reshape(2, 3, 2),
  )
  assert log_probabilities(chosen, np.s_[:2, 1], 1) == (
    TokenLogprob(-2.0, ((2, -2.0),)),
    TokenLogprob(-16.0, ((8, -8.0),)),
  )
  assert log_probabilities(chosen, (1, 2), 2) == (TokenLogprob(-32.0, ((10, -10.0), (11, -11.0))),)
  assert log_probabilities(chosen, (0, 0), 0) == (TokenLogprob(-1.0, ()),)


# ---------------------------------------------------------------------------- who is followed

WHOLE = Request('r', PROMPT, SamplingParams(max_tokens=9))
BEHIND = StepOrder(1, 'w', joins=(Join('r', 0, 4, 9),))


def chunk(start: int, *, begins: bool = False) -> StepOrder:
  return StepOrder(2, 'w', (ChunkOrder(WHOLE, start, len(PROMPT) - start, (0,), 9, begins=begins),))


ANEW = {
  'its first chunk': chunk(0),
  'its first chunk behind what is cached': chunk(1, begins=True),
  'an admission': StepOrder(2, 'w', joins=(Join('r', 0, 3, 8, admission=Admission(WHOLE, (0,), (4,), 9)),)),
}


@pytest.mark.parametrize('order', ANEW.values(), ids=ANEW)
def test_a_request_of_which_a_step_is_missing_is_followed_again_when_it_begins_again(order):
  followed = following()
  let_go = followed.leave_out(('r',))
  assert followed.result('r', ids('a'), never) is not None  # of a step before
  let_go()
  followed.expect(chunk(1))
  followed.follow(WHOLE, (), 9)
  assert followed.ids == () and followed.left_out == ('r',)
  followed.expect(order)
  followed.follow(WHOLE, (), 9)
  assert followed.ids == ('r',) and followed.left_out == ()


def test_or_once_no_more_steps_can_come_that_were_decided_in_ignorance():
  followed = following()
  followed.leave_out(('r',))
  for _ in range(MAX_ORDERS):
    followed.expect(BEHIND)
    assert followed.left_out == ('r',)
  followed.expect(BEHIND)
  assert followed.left_out == ()


def test_whoever_is_forgotten_is_neither_followed_nor_left_out():
  followed = following()
  followed.leave_out(('r',))
  followed.forget('r')
  followed.forget('nobody')
  assert followed.ids == followed.left_out == ()
  assert followed.result('r', ids('a'), never) is None
