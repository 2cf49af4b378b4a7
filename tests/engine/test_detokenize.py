"""Tokens to text piece by piece: nothing is lost, nothing comes too soon, and stop strings end it wherever they lie."""

import itertools
import random

import numpy as np
import pytest

from pdjax.engine.detokenize import Detokenizer, TextStream
from pdjax.model.tokenizer import Tokenizer
from tests.model.test_tokenizer import sentencepiece
from tests.tiny import byte_tokenizer

TEXTS = ('Hello, world!', 'naïve café', '東京 and 🙂👩‍👩‍👧, then more', '', ' leading', '日')


@pytest.fixture(scope='module', params=['byte level', 'byte fallback'])
def tokenizer(request) -> Tokenizer:
  return byte_tokenizer() if request.param == 'byte level' else Tokenizer.from_gguf_metadata(sentencepiece())


def pieces(tokenizer: Tokenizer, tokens, stop=()) -> tuple[list[str], int | None]:
  """The piece of each token, the last one with what was held back, and which token completed a stop string."""
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
def test_pieces_are_the_text(tokenizer, text):
  tokens = tokenizer.encode(text)
  for end in range(len(tokens) + 1):  # whole characters or not
    assert ''.join(pieces(tokenizer, tokens[:end])[0]) == tokenizer.decode(tokens[:end])


@pytest.mark.parametrize('seed', range(20))
def test_pieces_of_any_tokens_are_their_text(tokenizer, seed):
  """Broken characters, special tokens and ids beyond the vocabulary included."""
  tokens = np.random.default_rng(seed).integers(0, tokenizer.vocab_size + 3, 60).tolist()
  assert ''.join(pieces(tokenizer, tokens)[0]) == tokenizer.decode(tokens)


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
  assert pieces(tokenizer, tokens)[0] == ['a', '', '', '', '🙂', 'b']


def cut(text: str, stop) -> str:
  """Text up to the stop string that is the first to be complete."""
  found = [(text.index(one) + len(one), text.index(one)) for one in stop if one in text]
  return text[: min(found)[1]] if found else text


@pytest.mark.parametrize(
  'stop', [('o, w',), ('wor', 'ello'), ('!',), ('ll', 'l'), ('lo, x', 'o, wo'), ('zzz', 'world!!'), ('H',)]
)
def test_text_ends_before_the_first_stop_string(tokenizer, stop):
  tokens = tokenizer.encode(TEXTS[0])
  texts, completed = pieces(tokenizer, tokens, stop)
  whole = tokenizer.decode(tokens)
  assert ''.join(texts) == cut(whole, stop)
  if completed is None:
    assert cut(whole, stop) == whole
  else:
    assert any(one in tokenizer.decode(tokens[:completed]) for one in stop)


def test_tokens_run_up_to_the_one_that_completes_a_stop_string():
  tokenizer = byte_tokenizer()
  for stop, count in ((('o, w',), 8), (('wor', 'ello'), 5), (('!', 'H'), 1)):
    assert pieces(tokenizer, tokenizer.encode(TEXTS[0]), stop)[1] == count


def test_what_may_be_the_beginning_of_a_stop_string_is_held_back_until_it_is_not():
  tokenizer = byte_tokenizer()
  texts, completed = pieces(tokenizer, tokenizer.encode('ab<|<|ex|'), ('<|end|>', '|!'))
  assert texts == ['a', 'b', '', '', '<|', '', '', '<|ex', '|'] and completed is None


@pytest.mark.parametrize('seed', range(10))
def test_no_piece_of_random_text_has_to_be_taken_back(seed):
  """Over a tiny alphabet stop strings begin, overlap and complete all the time."""
  tokenizer = byte_tokenizer()
  rng = np.random.default_rng(seed)
  text = ''.join(rng.choice(list('ab'), 40))
  stop = tuple(''.join(rng.choice(list('ab'), size)) for size in (3, 5, 6))
  tokens = tokenizer.encode(text)
  texts, _ = pieces(tokenizer, tokens, stop)
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


class Words:
  """Stands for a detokenizer whose tokens are words of several letters."""

  silent_tokens = byte_tokens = frozenset()

  def __init__(self, words):
    self._words = words

  def decode(self, tokens) -> str:
    return ''.join(self._words[token] for token in tokens)


def test_of_stop_strings_in_one_token_the_first_to_be_complete_ends_the_text():
  rng = random.Random(0)

  def word(most: int) -> str:
    return ''.join(rng.choice('abc') for _ in range(rng.randint(1, most)))

  for _ in range(2000):
    words, stop = [word(4) for _ in range(12)], tuple(word(5) for _ in range(rng.randint(1, 3)))
    stream = TextStream(Words(words), stop)
    text = ''
    for token in range(len(words)):
      piece, completed = stream.take([token])
      text += piece
      if completed:
        break
    else:
      text += stream.end()[0]
    whole = ''.join(words)
    ends = [(whole.index(one) + len(one), whole.index(one)) for one in stop if one in whole]
    assert text == (whole[: min(ends)[1]] if ends else whole), (words, stop)
