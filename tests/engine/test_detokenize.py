"""Tokens to text as they come: nothing is lost, nothing comes too soon, and stop strings end it wherever they lie."""

import functools
import itertools
import json
import pathlib
import random

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from pdjax.engine.detokenize import Detokenizer, TextStream
from pdjax.model.tokenizer import Tokenizer
from pdjax.workload import RandomTokens
from tests.model.test_tokenizer import sentencepiece
from tests.tiny import byte_tokenizer

TEXTS = ('Hello, world!', 'naïve café', '東京 and 🙂👩‍👩‍👧, then more', '', ' leading', '日')


@pytest.fixture(scope='module', params=['byte level', 'byte fallback'])
def tokenizer(request) -> Tokenizer:
  return byte_tokenizer() if request.param == 'byte level' else Tokenizer.from_gguf_metadata(sentencepiece())


def texts_of(tokenizer: Tokenizer, tokens, stop=()) -> tuple[list[str], int | None]:
  """The text of each token, the last one with what was held back, and which token completed a stop string."""
  stream = TextStream(Detokenizer(tokenizer), stop)
  texts = []
  for count, token in enumerate(tokens, start=1):
    text, completed = stream.take([token])
    texts.append(text)
    if completed:
      return texts, count
  rest, completed = stream.end()
  return [*texts[:-1], (texts or [''])[-1] + rest], len(tokens) if completed else None


@pytest.mark.parametrize('text', TEXTS)
def test_texts_of_tokens_are_the_text(tokenizer, text):
  tokens = tokenizer.encode(text)
  for end in range(len(tokens) + 1):  # whole characters or not
    assert ''.join(texts_of(tokenizer, tokens[:end])[0]) == tokenizer.decode(tokens[:end])


@pytest.mark.parametrize('seed', range(20))
def test_texts_of_any_tokens_are_what_they_decode_to(tokenizer, seed):
  """Broken characters, special tokens and ids beyond the vocabulary included."""
  tokens = np.random.default_rng(seed).integers(0, tokenizer.vocab_size + 3, 60).tolist()
  assert ''.join(texts_of(tokenizer, tokens)[0]) == tokenizer.decode(tokens)


@pytest.mark.parametrize('cuts', [(3,), (1, 4), (2, 3, 9)])
def test_how_the_tokens_come_changes_no_text(tokenizer, cuts):
  tokens = tokenizer.encode(TEXTS[2])
  stream = TextStream(Detokenizer(tokenizer), ('none of it',))
  parts = [stream.take(tokens[a:b])[0] for a, b in itertools.pairwise((0, *cuts, len(tokens)))]
  assert ''.join(parts) + stream.end()[0] == tokenizer.decode(tokens)


def test_a_character_comes_when_it_is_whole():
  tokenizer = byte_tokenizer()
  tokens = tokenizer.encode('a🙂b')
  assert len(tokens) == 6
  assert texts_of(tokenizer, tokens)[0] == ['a', '', '', '', '🙂', 'b']


def cut(text: str, stop) -> str:
  """Text up to the stop string that is the first to be complete."""
  found = [(text.index(one) + len(one), text.index(one)) for one in stop if one in text]
  return text[: min(found)[1]] if found else text


@pytest.mark.parametrize(
  'stop', [('o, w',), ('wor', 'ello'), ('!',), ('ll', 'l'), ('lo, x', 'o, wo'), ('zzz', 'world!!'), ('H',)]
)
def test_text_ends_before_the_first_stop_string(tokenizer, stop):
  tokens = tokenizer.encode(TEXTS[0])
  texts, completed = texts_of(tokenizer, tokens, stop)
  whole = tokenizer.decode(tokens)
  assert ''.join(texts) == cut(whole, stop)
  if completed is None:
    assert cut(whole, stop) == whole
  else:
    assert any(one in tokenizer.decode(tokens[:completed]) for one in stop)


def test_tokens_run_up_to_the_one_that_completes_a_stop_string():
  tokenizer = byte_tokenizer()
  for stop, count in ((('o, w',), 8), (('wor', 'ello'), 5), (('!', 'H'), 1)):
    assert texts_of(tokenizer, tokenizer.encode(TEXTS[0]), stop)[1] == count


def test_what_may_be_the_beginning_of_a_stop_string_is_held_back_until_it_is_not():
  tokenizer = byte_tokenizer()
  texts, completed = texts_of(tokenizer, tokenizer.encode('ab<|<|ex|'), ('<|end|>', '|!'))
  assert texts == ['a', 'b', '', '', '<|', '', '', '<|ex', '|'] and completed is None


@pytest.mark.parametrize('seed', range(10))
def test_nothing_of_random_text_has_to_be_taken_back(seed):
  """Over a tiny alphabet stop strings begin, overlap and complete all the time."""
  tokenizer = byte_tokenizer()
  rng = np.random.default_rng(seed)
  text = ''.join(rng.choice(list('ab'), 40))
  stop = tuple(''.join(rng.choice(list('ab'), size)) for size in (3, 5, 6))
  tokens = tokenizer.encode(text)
  texts, _ = texts_of(tokenizer, tokens, stop)
  assert ''.join(texts) == cut(text, stop)
  for count in range(1, len(texts)):  # what is out is what any continuation begins with
    out = ''.join(texts[:count])
    assert text.startswith(out) and len(out) >= count - 5


def test_a_stop_string_completed_by_the_last_of_several_tokens_leaves_the_others_out():
  tokenizer = byte_tokenizer()
  stream = TextStream(Detokenizer(tokenizer), ('cd',))
  assert stream.take(tokenizer.encode('ab')) == ('ab', None)
  assert stream.take(tokenizer.encode('xcdef')) == ('x', 3)


def test_a_stream_goes_on_elsewhere_where_it_was_left(tokenizer):
  tokens = tokenizer.encode(TEXTS[2])
  for left in range(len(tokens)):
    here, there = (TextStream(Detokenizer(tokenizer), ('🙃', 'morel')) for _ in range(2))
    before = here.take(tokens[:left])[0]
    assert there.take(tokens[:left])[0] == before
    assert before + there.take(tokens[left:])[0] + there.end()[0] == tokenizer.decode(tokens)


def words(texts) -> Tokenizer:
  """A tokenizer with a token for each of the texts, which it puts together."""
  backend = tokenizers.Tokenizer(models.WordLevel({text: i for i, text in enumerate(texts)}, unk_token=texts[0]))
  backend.decoder = decoders.Fuse()
  return Tokenizer(backend)


def test_of_stop_strings_in_one_token_the_first_to_be_complete_ends_the_text():
  rng = random.Random(0)

  def word(most: int) -> str:
    return ''.join(rng.choice('abc') for _ in range(rng.randint(1, most)))

  letters = [''.join(some) for size in range(1, 5) for some in itertools.product('abc', repeat=size)]
  detokenizer = Detokenizer(words(letters))
  for _ in range(2000):
    tokens, stop = rng.choices(range(len(letters)), k=12), tuple(word(5) for _ in range(rng.randint(1, 3)))
    stream = TextStream(detokenizer, stop)
    text = ''
    for token in tokens:
      new, completed = stream.take([token])
      text += new
      if completed:
        break
    else:
      text += stream.end()[0]
    assert text == cut(''.join(letters[token] for token in tokens), stop), (tokens, stop)


def test_a_stop_string_is_found_at_the_token_that_completes_it():
  """Within a run of byte tokens too, which the library decodes only when it has ended."""
  tokenizer = Tokenizer.from_gguf_metadata(sentencepiece(add_space_prefix=False, add_bos_token=False))
  tokens = tokenizer.encode('é漢😀' * 40)
  assert len(tokens) == 360
  assert texts_of(tokenizer, tokens, ['😀é'])[1] == 11
  assert ''.join(texts_of(tokenizer, tokens, ['😀é'])[0]) == 'é漢'
  assert texts_of(tokenizer, tokens)[0][:11] == ['', 'é', '', '', '漢', '', '', '', '😀', '', 'é']


# by our contract: the token that makes the stop string certain, and the text before it
@pytest.mark.parametrize(
  ('stop', 'count', 'text'),
  [
    (('漢',), 5, 'é'),
    (('é漢😀é漢',), 14, ''),
    (('漢😀é', '😀'), 9, 'é漢'),
    (('漢é', 'é😀', '😀é漢😀'), 18, 'é漢'),
    (('é漢😀' * 39 + 'é',), 353, ''),
    (('\ufffd',), None, 'é漢😀' * 40),
  ],
)
def test_stop_strings_within_a_run_of_bytes(stop, count, text):
  tokenizer = Tokenizer.from_gguf_metadata(sentencepiece(add_space_prefix=False, add_bos_token=False))
  texts, completed = texts_of(tokenizer, tokenizer.encode('é漢😀' * 40), stop)
  assert (completed, ''.join(texts)) == (count, text)


@pytest.mark.parametrize('lone', ['é', '漢', '😀'])
def test_a_lone_byte_repeated_comes_at_once(tokenizer, lone):
  ids = tokenizer.encode(lone)
  first = ids[-len(lone.encode())]
  texts, _ = texts_of(tokenizer, [first] * 6000)
  assert texts == ['', *['\ufffd'] * 5998, '\ufffd\ufffd']


# What transformers 5.24 decodes prompt and answer to, without what it decodes the prompt alone to.
DECODED = json.loads((pathlib.Path(__file__).parents[1] / 'data' / 'texts.json').read_text(encoding='utf-8'))
BEHIND = [(name, *case) for name, one in DECODED['tokenizers'].items() for case in one['decoded']]


@functools.cache
def of_transformers(name: str) -> Tokenizer:
  return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(DECODED['tokenizers'][name]['tokenizer'])))


def without_beginning(text: str, other: str) -> str:
  """The text from where it is no longer the other."""
  same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False))
  return text[sum(1 for _ in same) :]


@pytest.mark.parametrize(('name', 'prompt', 'answer', 'alone', 'both'), BEHIND)
def test_an_answer_is_what_it_adds_to_its_prompt(name, prompt, answer, alone, both):
  added = without_beginning(both, alone)
  for ahead in ((), tuple(answer) * 50) if alone else ((),):  # what lies before the prompt's own text has no say
    stream = TextStream(Detokenizer(of_transformers(name)), prompt=(*ahead, *prompt))
    texts = [stream.take([token])[0] for token in answer]
    assert ''.join(texts) + stream.end()[0] == added


# by our contract, in words that transformers' values above give their letters to
@pytest.mark.parametrize(
  ('name', 'prompt', 'answer', 'expected'),
  [
    ('llama', ['a'], ['▁cat', '▁cat'], [' cat', ' cat', '']),
    ('llama', ['<s>'], ['▁cat', '▁cat'], ['cat', ' cat', '']),
    ('llama', ['<s>', '▁a', '</s>', '<s>'], ['▁cat'], [' cat', '']),
    ('llama', ['a', '<0xF0>', '<0x9F>'], ['<0x98>', '<0x80>', '.'], ['', '😀', '.', '']),
    ('llama', ['a', '<0xF0>', '<0x9F>'], ['.', '.'], ['.', '.', '']),  # the prompt has the two bad bytes already
    ('llama', ['a', '<0xF0>', '<0x9F>'], ['<0xFF>', '.'], ['\ufffd', '.', '']),
    ('llama', ['a', '<0xF0>'], [], ['']),
    ('gpt2', ['a', 'ðŁ'], ['a'], ['a', '']),
    ('bert', ['[CLS]', 'a'], ['[SEP]', '##s', 'cat'], ['', 's', ' cat', '']),
    ('t5', ['</s>', '<pad>'], ['▁▁', '▁cat'], ['', ' cat', '']),
    ('gpt1', ['a</w>', 'cat</w>'], ['s</w>', 'cat</w>'], [' s', ' cat', '']),
  ],
)
def test_texts_behind_a_prompt(name, prompt, answer, expected):
  tokenizer = of_transformers(name)
  prompt, answer = ([tokenizer.backend.token_to_id(token) for token in tokens] for tokens in (prompt, answer))
  stream = TextStream(Detokenizer(tokenizer), prompt=prompt)
  assert [*(stream.take([token])[0] for token in answer), stream.end()[0]] == expected


def test_stop_strings_are_searched_in_the_answer_alone():
  tokenizer = of_transformers('llama')
  a, cat, stopped = (tokenizer.backend.token_to_id(token) for token in ('a', '▁cat', '.'))
  stream = TextStream(Detokenizer(tokenizer), ('a cat', 'at.'), prompt=[a])
  assert stream.take([cat, cat, a]) == (' cat cat', None)
  assert stream.take([cat, cat]) == ('', 1)
  stream = TextStream(Detokenizer(tokenizer), ('at.',), prompt=[a, cat])
  assert stream.take([stopped, cat]) == ('. c', None) and stream.end() == ('at', False)


def test_a_lazy_prompt_is_as_good_as_a_list():
  tokenizer = of_transformers('llama')
  prompt = RandomTokens(1000, vocab_size=tokenizer.vocab_size, seed=3)
  cat = tokenizer.backend.token_to_id('▁cat')
  lazy, given = (TextStream(Detokenizer(tokenizer), prompt=some) for some in (prompt, list(prompt)))
  assert lazy.take([cat, cat]) == given.take([cat, cat]) and lazy.take([cat])[0] == ' cat'


@given(st.lists(st.integers(0, 300), max_size=12), st.lists(st.integers(0, 300), max_size=12), st.integers(0, 12))
def test_what_a_prompt_and_an_answer_are_together_does_not_depend_on_where_they_part(prompt, answer, left):
  """Another worker that goes on in the middle says the same, and no text of the whole is lost or said twice."""
  tokenizer = Tokenizer.from_gguf_metadata(sentencepiece())
  detokenizer = Detokenizer(tokenizer)
  here, there = (TextStream(detokenizer, ('b a', '\ufffda'), prompt=prompt) for _ in range(2))
  assert here.take(answer[:left])[0] == there.take(answer[:left])[0]
  assert here.take(answer[left:]) == there.take(answer[left:]) and here.end() == there.end()
  plain = TextStream(detokenizer, prompt=prompt)
  text = plain.take(answer)[0] + plain.end()[0]
  alone, both = tokenizer.decode(prompt), tokenizer.decode([*prompt, *answer])
  assert text == without_beginning(both, alone)


def test_a_decoder_without_a_bound_is_refused_when_the_detokenizer_is_made():
  backend = tokenizers.Tokenizer(models.WordLevel({'a': 0}, unk_token='a'))
  backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(tokenizers.Regex(' +'), ' ')])
  with pytest.raises(ValueError, match=r"folder of mine cannot give text.*regular expression ' \+'.*tokenizer.json"):
    Detokenizer(Tokenizer(backend, source='folder of mine'))
