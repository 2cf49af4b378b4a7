"""Policies that ask for what cannot be done, and requests that can never run, are told what and why."""

import dataclasses
from collections import UserList

import pytest

from pdjax.serving import ALL, Cancel, Chunk, PolicyError, Preempt, Reject, Step, SwitchRole, Transfer
from pdjax.serving.actions import Action
from pdjax.types import Role, WorkerSpec, colocated_pool, decode_pool, prefill_pool
from tests.serving.driver import ONE_OF_EACH, SIZES, Driver, snapshot


@pytest.fixture
def cluster():
  """One request in each phase, on two prefill workers, one decode worker and one of both roles.

  `w` waits, `p` is being prefilled on prefill0 and sent to decode0, `d` decodes on decode0, `f` is prefilled on
  prefill1 and `e` is being ended; `long` waits with more tokens than one step takes.
  """
  tiny_worker = WorkerSpec('small', Role.DECODE, **SIZES | {'num_pages': 1})
  workers = prefill_pool(2, **SIZES) + decode_pool(1, **SIZES) + colocated_pool(1, **SIZES)
  cluster = Driver((*workers, tiny_worker))
  for name, prompt_len in (('d', 4), ('f', 6), ('p', 10), ('w', 6), ('long', 40), ('e', 5)):
    cluster.arrive(name, prompt_len)
  step, transfer = cluster.start(Step('prefill1', (Chunk('d', 0, 4, 'decode0'),)))
  cluster.end(step, {'d': 1})
  cluster.end(transfer)
  cluster.end(cluster.start(Step('prefill1', (Chunk('f', 0, 6),)))[0], {'f': 1})
  cluster.start(Step('prefill0', (Chunk('p', 0, 4, 'decode0'),)))
  cluster.start(Cancel('e'))
  return cluster


def _chunk(worker: str, *fields) -> Step:
  return Step(worker, (Chunk(*fields),))


MISUSES: dict[str, tuple[object, str]] = {
  'unknown worker': (Step('decode9', decodes=ALL), "worker 'decode9' is unknown; the workers are prefill0, prefill1"),
  'chunk of nobody': (_chunk('prefill1', 'x', 0, 6), "request 'x' is unknown or finished"),
  'decode of nobody': (Step('decode0', decodes=('x',)), "request 'x' is unknown"),
  'transfer of nobody': (Transfer('x', 'decode0'), "request 'x' is unknown"),
  'transfer to nowhere': (Transfer('f', 'decode9'), "worker 'decode9' is unknown"),
  'chunk sent nowhere': (_chunk('prefill1', 'w', 0, 6, 'decode9'), "worker 'decode9' is unknown"),
  'cancel of nobody': (Cancel('x'), "request 'x' is unknown"),
  'reject of nobody': (Reject('x', 'why'), "request 'x' is unknown"),
  'chunk on a decode worker': (_chunk('decode0', 'w', 0, 6), "'decode0' has role decode, so it takes no chunks"),
  'chunk of a decoding request': (_chunk('prefill1', 'd', 0, 4), "request 'd' is decoding, so it takes no chunk"),
  'chunk of a cancelled request': (_chunk('prefill1', 'e', 0, 5), "request 'e' is ending, so it takes no chunk"),
  'chunk on another worker': (_chunk('prefill1', 'p', 4, 6, 'decode0'), "'p' is being prefilled on 'prefill0'"),
  'chunk from the middle': (_chunk('prefill1', 'w', 1, 5), "next chunk of 'w' starts at 0 and has 1 to 6 tokens"),
  'chunk again': (_chunk('prefill0', 'p', 0, 4, 'decode0'), "next chunk of 'p' starts at 4 and has 1 to 6 tokens"),
  'chunk past the prompt': (_chunk('prefill1', 'w', 0, 7), "next chunk of 'w' starts at 0 and has 1 to 6 tokens"),
  'empty chunk': (_chunk('prefill1', 'w', 0, 0), 'has 1 to 6 tokens'),
  'target forgotten': (_chunk('prefill0', 'p', 4, 6), "earlier chunks of 'p' were sent to 'decode0'"),
  'target changed': (_chunk('prefill0', 'p', 4, 6, 'both0'), "earlier chunks of 'p' were sent to 'decode0'"),
  'sent to itself': (_chunk('both0', 'w', 0, 6, 'both0'), "'w' cannot be sent to 'both0'; name another worker"),
  'sent to a prefill worker': (_chunk('prefill1', 'w', 0, 6, 'prefill0'), "cannot be sent to 'prefill0'"),
  'too many tokens': (_chunk('prefill1', 'long', 0, 33), '1 chunks with 33 tokens, .* 4 chunks and 32 tokens'),
  'no steps': (Step('decode0', decodes=ALL, steps=0), "steps=0, but worker 'decode0' takes 1 to 16"),
  'too many steps': (Step('decode0', decodes=ALL, steps=17), 'steps=17, .* takes 1 to 16; name one of these'),
  'steps beside chunks': (
    Step('both0', (Chunk('w', 0, 6),), steps=2),
    "steps=2, but worker 'both0' takes 1 to 1 beside chunks",
  ),
  'decode of a waiting request': (Step('decode0', decodes=('w',)), "'w' has nothing to decode on worker 'decode0'"),
  'decode elsewhere': (Step('both0', decodes=('d',)), "'d' has nothing to decode on worker 'both0'"),
  'decode on a prefill worker': (Step('prefill1', decodes=('f',)), "'f' has nothing to decode"),
  'two chunks of a request': (
    Step('prefill1', (Chunk('w', 0, 3), Chunk('w', 0, 3))),
    'a request stands in it twice',
  ),
  'two decodes of a request': (Step('decode0', decodes=('d', 'd')), 'a request stands in it twice'),
  'nothing to do': (Step('prefill1'), 'nothing to do; give it chunks or sequences that can decode'),
  'nobody to decode': (Step('both0', decodes=ALL), 'nothing to do'),
  'no room to send to': (
    _chunk('prefill1', 'w', 0, 6, 'small'),
    "'w' needs 3 pages and a slot on 'small', which has 1 pages and 4 slots left",
  ),
  'no room to move to': (Transfer('f', 'small'), "needs 3 pages and a slot on 'small', which has 1 pages"),
  'transfer of a waiting request': (Transfer('w', 'decode0'), 'is waiting; only one that is prefilled, or decodes'),
  'transfer of one that decodes by no way': (
    Transfer('d', 'both0'),
    "no way from 'decode0' to 'both0'; .* moves_any",
  ),
  'transfer of a decoding request to itself': (Transfer('d', 'decode0'), 'it decodes there already'),
  'transfer from elsewhere': (Transfer('f', 'decode0', 'prefill0'), "is at 'prefill1' and not at 'prefill0'; leave"),
  'transfer to a prefill worker': (Transfer('f', 'prefill0'), "'prefill0' has role prefill; name one that decodes"),
  'reject after the start': (Reject('p', 'why'), 'only a waiting one can be rejected, cancel it'),
  'cancel of a cancelled request': (Cancel('e'), 'is being ended already'),
  'reject of a cancelled request': (Reject('e', 'why'), 'is being ended already'),
  'a chunk that begins in no whole token': (_chunk('prefill1', 'w', 0.0, 6), 'needs integers for start and length'),
  'a chunk of half a token': (_chunk('prefill1', 'w', 0, 1.5), 'needs integers for start and length'),
  'a chunk of a text': (_chunk('prefill1', 'w', 0, '5'), 'needs integers for start and length'),
  'a chunk of a truth value': (_chunk('prefill1', 'w', False, 5), 'needs integers for start and length'),
  'no tuple of chunks': (Step('prefill1', chunks=5), 'chunks=5, expected a tuple of Chunk'),
  'names for chunks': (Step('prefill1', chunks=('w',)), r"chunks=\('w',\), expected a tuple of Chunk"),
  'no decodes': (Step('decode0', decodes=None), 'decodes=None, expected ALL or a tuple of ids'),
  'all as a text': (Step('decode0', decodes='all'), "decodes='all', expected ALL or a tuple of ids"),
  'standing as a text': (Step('decode0', decodes=ALL, steps='standing'), "'standing', expected an integer or STANDING"),
  'a step and a half': (Step('decode0', decodes=ALL, steps=1.5), 'steps=1.5, expected an integer or STANDING'),
  'whether to step': (Step('decode0', decodes=ALL, steps=True), 'steps=True, expected an integer or STANDING'),
  'a list for a worker': (Step(['decode0'], decodes=ALL), r"worker \['decode0'\] is unknown"),
  'a list for a request': (Transfer(['f'], 'decode0'), r"request \['f'\] is no id; name a request by its id"),
  'a list for who is cancelled': (Cancel(['f']), r"request \['f'\] is no id"),
  'a list for who is refused': (Reject(['w'], 'why'), r"request \['w'\] is no id"),
  'a list for who changes': (SwitchRole(['prefill0'], Role.DECODE), r"worker \['prefill0'\] is unknown"),
  'a list for who gives way': (Preempt(['d']), r"request \['d'\] is no id"),
  'no action at all': (
    'decode, please',
    'is no action; answer with Step, Transfer, Cancel, Reject, Preempt, SwitchRole or WakeAt',
  ),
}


@pytest.mark.parametrize('misuse', MISUSES)
def test_misuse_names_the_action_and_changes_nothing(cluster, misuse):
  action, words = MISUSES[misuse]
  before = snapshot(cluster.state)
  with pytest.raises(PolicyError, match=words) as error:
    cluster.start(action)
  assert repr(action) in str(error.value)
  assert snapshot(cluster.state) == before


def test_a_worker_takes_no_third_step():
  cluster = Driver(colocated_pool(1, **SIZES))
  cluster.arrive('a', prompt_len=30)
  for start in (0, 10):
    cluster.start(_chunk('both0', 'a', start, 10))
  before = snapshot(cluster.state)
  with pytest.raises(PolicyError, match="'both0' has 2 steps in flight already; wait for one to end"):
    cluster.start(_chunk('both0', 'a', 20, 10))
  assert snapshot(cluster.state) == before


def _refused(cluster: Driver, action: Action, words: str) -> None:
  before = snapshot(cluster.state)
  with pytest.raises(PolicyError, match=words):
    cluster.start(action)
  assert snapshot(cluster.state) == before


def test_a_step_takes_no_more_chunks_than_the_worker_allows():
  cluster = Driver()
  for index in range(5):
    cluster.arrive(f'r{index}', prompt_len=2, max_tokens=1)
  chunks = tuple(Chunk(f'r{index}', 0, 2) for index in range(5))
  _refused(cluster, Step('prefill0', chunks), '5 chunks with 10 tokens, .* 4 chunks and 32 tokens')
  cluster.start(Step('prefill0', chunks[:4]))


def test_prompts_that_fit_one_by_one_may_not_fit_together():
  small = SIZES | {'num_pages': 4}
  cluster = Driver(prefill_pool(1, **small) + decode_pool(1, **SIZES))
  for name in 'ab':
    cluster.arrive(name, prompt_len=10)  # 3 pages
  chunks = (Chunk('a', 0, 10), Chunk('b', 0, 10))
  _refused(cluster, Step('prefill0', chunks), "'b' needs 3 pages on 'prefill0', which has 1 pages")
  cluster.start(Step('prefill0', chunks[:1]))


def test_prompts_sent_to_one_worker_need_a_slot_each():
  one_slot = SIZES | {'max_sequences': 1}
  cluster = Driver(prefill_pool(1, **SIZES) + decode_pool(1, **one_slot))
  for name in 'ab':
    cluster.arrive(name)
  chunks = (Chunk('a', 0, 6, 'decode0'), Chunk('b', 0, 6, 'decode0'))
  _refused(cluster, Step('prefill0', chunks), "'b' needs 3 pages and a slot on 'decode0', which has 13 .* 0 slots left")
  cluster.start(Step('prefill0', (chunks[0], Chunk('b', 0, 6))))


def test_a_sequence_with_every_token_asked_for_takes_no_other_step():
  cluster = Driver(colocated_pool(1, **SIZES))
  cluster.arrive('a', max_tokens=2)
  cluster.end(cluster.start(_chunk('both0', 'a', 0, 6))[0], {'a': 1})
  cluster.start(Step('both0', decodes=ALL))
  _refused(cluster, Step('both0', decodes=('a',)), "'a' has nothing to decode on worker 'both0'")
  _refused(cluster, Step('both0', decodes=ALL), 'nothing to do')


# ---------------------------------------------------------------------------- what can never run


# Of a sequence of its own a request looks at no token as it is made: it may not have them yet.
@pytest.mark.parametrize(
  'fields, words',
  [
    ({'prompt_len': 65}, 'the prompt has 65 tokens, but the context of tiny is 64; shorten the prompt'),
    ({'prompt': (5, 96, 7)}, 'token id 96 in the prompt, but the ids of tiny are 0 to 95; use its tokenizer'),
    ({'prompt': UserList([5, -1])}, 'token id -1 in the prompt'),
    ({'prompt': UserList([5, 1.5])}, 'token id 1.5 in the prompt'),
    ({'prompt': UserList(['a'])}, "token id 'a' in the prompt"),
    ({'prompt': UserList([5, None])}, 'token id None in the prompt'),
    ({'prompt': UserList([float('nan')])}, 'token id nan in the prompt'),
    ({'stop_token_ids': tuple(range(2, 10))}, "9 stop tokens asked for, the model's own included, but at most 8"),
    ({'stop_token_ids': tuple(range(2, 11)), 'ignore_eos': True}, '9 stop tokens asked for'),
    (
      {'prompt_len': 33, 'max_tokens': 1},
      "33 prompt tokens and up to 1 generated ones need 9 pages of 4 tokens, but the largest worker that prefills, "
      "'prefill0', has 8 in all; raise num_pages, shorten the prompt or lower max_tokens",
    ),
    (
      {'prompt_len': 20, 'max_tokens': 30},
      "20 prompt tokens and up to 30 generated ones need 13 pages of 4 tokens, but the largest worker that decodes, "
      "'decode0', has 12 in all",
    ),
  ],
)  # fmt: skip
def test_what_can_never_run_is_rejected_and_the_others_are_served(fields, words):
  small, large = SIZES | {'num_pages': 8}, SIZES | {'num_pages': 12}
  cluster = Driver(prefill_pool(1, **small) + decode_pool(1, **large))
  cluster.arrive('bad', **fields)
  cluster.arrive('good')
  assert list(cluster.view.waiting) == ['good']
  end = cluster.reject_unfit()
  assert (end.request, end.finish_reason, end.tokens) == ('bad', 'rejected', ()) and words in end.error
  step, transfer = cluster.start(Step('prefill0', (Chunk('good', 0, 6, 'decode0'),)))
  cluster.end(step, {'good': 1}, {'good': 'stop'})
  cluster.end(transfer)
  cluster.assert_idle()


@pytest.mark.parametrize(
  'fields',
  [
    {'prompt_len': 64, 'max_tokens': 1},
    {'prompt_len': 64, 'max_tokens': 9},  # cut to one
    {'prompt': (0, 95)},
    {'stop_token_ids': tuple(range(2, 9))},
    {'stop_token_ids': (1, *range(2, 9))},  # the model's own counts once
    {'stop_token_ids': tuple(range(2, 10)), 'ignore_eos': True},
  ],
)
def test_what_just_fits_is_served(fields):
  cluster = Driver()
  cluster.arrive('a', **fields)
  assert list(cluster.view.waiting) == ['a'] and cluster.must() == ()


def test_the_largest_worker_of_a_phase_decides_what_fits():
  small = prefill_pool(1, **SIZES | {'num_pages': 2})
  large = dataclasses.replace(ONE_OF_EACH[0], name='large')
  cluster = Driver((*small, large, ONE_OF_EACH[1]))
  cluster.arrive('a', prompt_len=20)
  assert list(cluster.view.waiting) == ['a']


def test_a_request_for_one_token_needs_no_room_to_decode():
  cluster = Driver(prefill_pool(1, **SIZES) + decode_pool(1, **SIZES | {'num_pages': 2}))
  cluster.arrive('a', prompt_len=20, max_tokens=1)
  assert list(cluster.view.waiting) == ['a']


def test_random_prompts_are_not_read_to_be_checked():
  class Unread(tuple):
    vocab_size = 96

    def __iter__(self):
      raise AssertionError('the prompt was read')

  cluster = Driver()
  cluster.arrive('a', prompt=Unread((1, 2, 3)))
  assert list(cluster.view.waiting) == ['a']
