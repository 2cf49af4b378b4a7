"""Tokens to text while they come: the same text as the library's, as soon as it is sure, at the same cost."""

import functools
import itertools
import json
import pathlib

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models

from pdjax.model.decoding import Decoding
from tests.calls import calls_of

TEXTS = json.loads((pathlib.Path(__file__).parents[1] / 'data' / 'texts.json').read_text(encoding='utf-8'))

_CHARACTERS = ('A', ' ', '.', 'é', '漢', '😀', 'a', '|', '\n')
BYTES = (*dict.fromkeys(f'<0x{byte:02X}>' for char in _CHARACTERS for byte in char.encode()), '<0x4a>', '<0x+1>')
VOCABULARY = (
  '<s>', '▁', '▁cat', 'cat', 'a', 'aa', 'a▁', '▁▁', ' .', '.', ' ', ' a ', '   ', '.a', '##', '##a', 'a</w>', '</w>',
  'b</w>c</w>', '|', '<pad>', '<pad>a', "'", " '", "n't", " n't", ' do', ' not', 'é', '漢', '😀', 'Ġ', 'Ã', '©', 'Ġa',
  'ð', 'Ł', 'ĺ', 'Ģ', 'x<0x41>', '<0', 'x41>', *BYTES,
)  # fmt: skip

CHAINS = {
  'none': lambda: None,
  'ByteLevel': decoders.ByteLevel,
  'Llama': lambda: decoders.Sequence(
    [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
  ),
  'Gemma': lambda: decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]),
  'Metaspace': decoders.Metaspace,
  'Metaspace that keeps the first': lambda: decoders.Metaspace(prepend_scheme='never'),
  'Metaspace behind bytes': lambda: decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
  'Metaspace behind bytes and Fuse': lambda: decoders.Sequence(
    [decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()]
  ),
  'WordPiece': decoders.WordPiece,
  'WordPiece without cleanup': lambda: decoders.WordPiece(cleanup=False),
  'WordPiece behind bytes': lambda: decoders.Sequence([decoders.ByteFallback(), decoders.WordPiece()]),
  'BPEDecoder': decoders.BPEDecoder,
  'CTC': decoders.CTC,
  'Replace behind Fuse': lambda: decoders.Sequence(
    [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(' .', '.')]
  ),
  'Replace of a bounded regular expression behind ByteLevel': lambda: decoders.Sequence(
    [decoders.ByteLevel(), decoders.Replace(Regex(' (?:[.a]|😀){1,2}'), '-')]
  ),
}


def decoding(decoder: decoders.Decoder | None, vocabulary=VOCABULARY) -> Decoding:
  backend = tokenizers.Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token='a'))
  if decoder is not None:
    backend.decoder = decoder
  backend.add_special_tokens(['<s>'])
  return Decoding(backend)


def pieces(one: Decoding, ids) -> list[str]:
  """The piece of each token, and what was held back."""
  run = one.begin()
  return [*map(run.take, ids), run.end()]


def of_library(one: Decoding, ids, skip_special: bool = True) -> str:
  try:
    return one._backend.decode(ids, skip_special_tokens=skip_special)
  except BaseException as error:
    if type(error).__name__ != 'PanicException':  # Strip of 0.23 ends so where a token has less than it would take off
      raise
    assume(False)
    raise AssertionError from error


def byte_runs_are_characters(ids) -> bool:
  names = [VOCABULARY[i] for i in ids if i < len(VOCABULARY) and VOCABULARY[i] != '<s>']
  runs = ''.join(name[3:5].replace('+', '0') if name in BYTES else '|' for name in names).split('|')
  try:
    return all(bytes.fromhex(run).decode() is not None for run in runs)
  except UnicodeDecodeError:
    return False


CHARACTER = st.sampled_from(_CHARACTERS).map(lambda char: [VOCABULARY.index(f'<0x{b:02X}>') for b in char.encode()])
TOKEN = st.integers(0, len(VOCABULARY) + 1).map(lambda token: [token])
IDS = st.lists(st.one_of(TOKEN, TOKEN, CHARACTER), max_size=14).map(lambda parts: [*itertools.chain(*parts)])


@functools.cache
def known_chain(name: str) -> Decoding:
  return decoding(CHAINS[name]())


@pytest.mark.parametrize('name', CHAINS)
@settings(max_examples=60, deadline=None)
@given(ids=IDS, skip_special=st.booleans())
def test_pieces_are_the_text_that_the_library_gives(name, ids, skip_special):
  one = known_chain(name)
  text = one.decode(ids)
  assert ''.join(pieces(one, ids)) == text
  if 'ByteFallback' not in str(one._backend.decoder) or byte_runs_are_characters(ids):
    assert text == of_library(one, ids)
    assert one.decode(ids, skip_special) == of_library(one, ids, skip_special)


WORDS = st.sampled_from(['▁', ' ', 'a', 'aa', ' .', 'aba', '##', '</w>', '|', ''])
STAGES = st.one_of(
  st.builds(decoders.Replace, WORDS, WORDS),
  st.sampled_from(
    [' [.a]', 'a{1,3}', '(?:ab|a|aa.)', '.', 'a|ab', ' ?\\.', '[[:alpha:]] ', '\\s+', '^a', 'a$', 'a*', '\\p{L}{2,3}?']
  ).map(lambda pattern: decoders.Replace(Regex(pattern), '-$1')),
  st.builds(decoders.Strip, st.sampled_from(' ▁a.'), st.integers(0, 3), st.just(0)),
  st.builds(decoders.Strip, st.sampled_from(' ▁a.'), st.just(0), st.integers(0, 3)),
  st.builds(decoders.Metaspace, prepend_scheme=st.sampled_from(['always', 'first', 'never'])),
  st.builds(decoders.WordPiece, st.sampled_from(['##', '', '▁']), st.booleans()),
  st.builds(decoders.BPEDecoder, st.sampled_from(['</w>', '', 'a'])),
  st.builds(decoders.CTC, st.sampled_from(['<pad>', '', 'a']), st.sampled_from(['|', '', 'a']), st.booleans()),
  st.builds(decoders.ByteLevel),
  st.builds(decoders.ByteFallback),
  st.builds(decoders.Fuse),
)


@settings(max_examples=300, deadline=None)
@given(stages=st.lists(STAGES, max_size=4), many=st.lists(IDS, min_size=1, max_size=4))
def test_any_decoder_gives_the_text_of_the_library_or_is_refused(stages, many):
  one = decoding(decoders.Sequence(stages))
  for ids in many:
    if byte_runs_are_characters(ids):
      text = of_library(one, ids)
      assert one.decode(ids) == text
      if one.refusal is None:
        assert ''.join(pieces(one, ids)) == text


# SentencePiece of Google (0.2.3) says what becomes of bytes that are no characters
@pytest.mark.parametrize('run', TEXTS['byte_runs'])
def test_a_run_of_bytes_is_what_sentencepiece_makes_of_it(run):
  vocabulary = ['▁cat', *(f'<0x{byte:02X}>' for byte in range(256))]
  one = decoding(CHAINS['Llama'](), vocabulary)
  ids = [0, *(1 + byte for byte in bytes.fromhex(run)), 0]
  assert one.decode(ids) == ''.join(pieces(one, ids)) == f'cat{TEXTS["byte_runs"][run]} cat'
  assert one.decode(ids[:-1]) == f'cat{TEXTS["byte_runs"][run]}'


REPLACE, BYTE, FUSE = decoders.Replace, decoders.ByteFallback, decoders.Fuse


@pytest.mark.parametrize(
  ('stages', 'tokens', 'expected'),  # a character is out when its bytes are complete, and a bad byte when that is known
  [
    ([BYTE(), FUSE()], ['<0xE6>', '<0xBC>', '<0xA2>', '<0xC3>', '<0xA9>', 'a'], ['', '', '漢', '', 'é', 'a', '']),
    ([BYTE(), FUSE()], ['<0x41>', '<0x41>', '<0xF0>'], ['A', 'A', '', '\ufffd']),
    ([BYTE(), FUSE()], ['<0xA9>', '<0xF0>', '<0xF0>', 'a'], ['\ufffd', '', '\ufffd', '\ufffda', '']),
    ([BYTE(), FUSE()], ['<0xE6>', '<s>', '<0xBC>', '<0xA2>'], ['', '', '', '漢', '']),
    ([decoders.ByteLevel()], ['Ã', 'Ã', '©', 'a'], ['', '\ufffd', 'é', 'a', '']),
    ([decoders.ByteLevel()], ['Ã', '漢', 'é'], ['', '\ufffd漢', '', '\ufffd']),  # 漢 is no letter of the alphabet
    # what a later token may change waits, and no more
    ([FUSE(), REPLACE(' .', '.')], ['a', ' ', ' ', '.', ' a ', 'a'], ['a', '', ' ', '.', ' a', ' a', '']),
    ([REPLACE(' .', '.'), FUSE()], ['a', ' ', '.'], ['a', ' ', '.', '']),
    ([FUSE(), REPLACE('aaa', 'b')], ['a', 'a', 'a', 'aa', '.'], ['', '', 'b', '', 'aa.', '']),
    ([FUSE(), decoders.Strip(' ', 0, 2)], ['a', '   ', ' ', '.', ' '], ['a', ' ', ' ', '  .', '', '']),
    ([BYTE(), decoders.Strip(' ', 0, 1)], ['<0x41>', '<0x20>', '<0x41>', '<0x20>', 'a'], ['A', '', ' A', '', 'a', '']),
    ([FUSE(), REPLACE(Regex(' [.a]'), '-')], ['a', ' ', '.', 'é', '漢'], ['', 'a', '-', '', 'é', '漢']),
    ([decoders.BPEDecoder()], ['a</w>', 'b</w>c</w>', 'a'], ['a', ' b', ' c a', '']),
    ([decoders.BPEDecoder()], ['cat', 'a</w>'], ['cat', 'a', '']),
    ([decoders.CTC()], ['a', 'a', '<pad>', 'a', '|'], ['a', '', '', 'a', ' ', '']),
    ([decoders.WordPiece()], ['a', '##a', '.', 'cat'], ['a', 'a', '.', ' cat', '']),
    ([FUSE(), decoders.WordPiece()], ['a', ' ', "n't", '.'], ['a', '', "n't", '.', '']),
    ([decoders.Metaspace()], ['▁cat', '▁', 'cat'], ['cat', ' ', 'cat', '']),
    ([decoders.Strip(' ', 1, 0)], [' a ', ' a '], ['a ', 'a ', '']),
    ([FUSE(), decoders.Strip(' ', 2, 0)], [' ', '   ', ' a '], ['', '  ', ' a ', '']),
  ],
)
def test_text_is_out_as_soon_as_it_is_sure(stages, tokens, expected):
  one = decoding(decoders.Sequence(stages))
  assert pieces(one, [VOCABULARY.index(token) for token in tokens]) == expected


@pytest.mark.parametrize(
  ('stages', 'words'),
  [
    ([FUSE(), REPLACE(Regex(r'\s+'), ' ')], ("Replace of the regular expression '\\\\s+'", 'no bounded length')),
    ([decoders.ByteLevel(), REPLACE(Regex(r'a(?=b)'), '')], ("'a(?=b)'", 'look beyond')),
    ([FUSE(), REPLACE(Regex('a?'), '-')], ("'a?'", 'where there is nothing')),
    ([FUSE(), REPLACE('', '-')], ("Replace of ''", 'where there is nothing')),
    ([BYTE(), REPLACE(Regex('a+$'), '')], ('behind ByteFallback, without Fuse', "'a+$'")),
    ([FUSE(), decoders.ByteLevel()], ('ByteLevel', 'joins all tokens')),
    ([BYTE(), decoders.BPEDecoder()], ('BPEDecoder', 'without Fuse')),
    ([BYTE(), decoders.CTC()], ('CTC', 'without Fuse')),
  ],
)
def test_a_decoder_without_a_bound_is_refused_by_name_and_still_decodes_whole_lists(stages, words):
  one = decoding(decoders.Sequence(stages))
  ids = [VOCABULARY.index(token) for token in ('a', ' a ', 'cat', 'é')]
  assert one.decode([*ids, len(VOCABULARY) + 5]) == of_library(one, ids)
  with pytest.raises(ValueError) as raised:
    one.begin()
  assert all(word in str(raised.value) for word in (*words, 'before that stage')), raised.value


@pytest.mark.parametrize('pattern', [r'\s+', r'a(?=b)', 'a?', '', 'a+$', '^a'])
def test_a_regular_expression_over_single_tokens_needs_no_bound(pattern):
  one = decoding(decoders.Sequence([REPLACE(Regex(pattern), '-'), FUSE()]))
  ids = [VOCABULARY.index(token) for token in ('a', '   ', 'aa', 'cat', ' a ')]
  assert ''.join(pieces(one, ids)) == of_library(one, ids)


def test_a_decoder_written_in_python_is_refused_by_name():
  class Shouting:
    def decode_chain(self, tokens):
      return [token.upper() for token in tokens]

  one = decoding(decoders.Decoder.custom(Shouting()))
  assert one.decode([VOCABULARY.index('cat')]) == 'CAT'
  with pytest.raises(ValueError, match='program of its own'):
    one.begin()


@pytest.mark.parametrize('token', [-1, len(VOCABULARY), 2**31, 2**32, 2**70])
def test_tokens_beyond_the_vocabulary_stand_for_no_text(token):
  for name in ('none', 'Llama', 'ByteLevel'):
    one = known_chain(name)
    known = [VOCABULARY.index('a'), VOCABULARY.index('cat')]
    mixed = [token, known[0], token, known[1]]
    assert one.decode(mixed) == ''.join(pieces(one, mixed)) == one.decode(known)


def held_characters(one: object) -> int:
  """Characters in all that an object keeps in its own fields."""
  if isinstance(one, str | bytes):
    return len(one)
  if isinstance(one, list | tuple):
    return sum(map(held_characters, one))
  return sum(map(held_characters, vars(one).values())) if hasattr(one, '__dict__') else 0


@pytest.mark.parametrize('name', CHAINS)
@pytest.mark.parametrize(
  'tokens', [['<0xE6>'], ['a', ' ', '.'], ['Ã'], ['<0xE6>', '<0xBC>', '<0xA2>'], ['</w>'], [' ']]
)
def test_a_token_costs_the_same_however_long_the_answer(name, tokens):
  one = known_chain(name)
  period = [VOCABULARY.index(token) for token in tokens]
  run = one.begin()
  run.take(period[0])
  early = calls_of(run.take, period * 20)
  kept = held_characters(run._stages)
  for token in period * 1000:
    run.take(token)
  assert calls_of(run.take, period * 20) <= 1.1 * early
  assert held_characters(run._stages) <= kept + 8


@pytest.mark.parametrize('silent', [0, 3])
def test_only_the_end_of_a_prompt_is_read(silent):
  class Counted(tuple):
    reads = 0

    def __getitem__(self, index):
      Counted.reads += 1
      return super().__getitem__(index)

  one = known_chain('Replace behind Fuse')
  special, cat = VOCABULARY.index('<s>'), VOCABULARY.index('▁cat')
  assert one.priming(Counted([cat] * 5000 + [special] * silent)) == [cat] * 8
  assert Counted.reads == 8 + silent
