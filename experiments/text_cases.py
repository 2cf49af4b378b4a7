"""Answers that `bench_text` streams: three kinds of vocabulary, each with those that are worst for it."""

import dataclasses
from collections.abc import Sequence

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from pdjax.model.tokenizer import Tokenizer

EARLY, LATE = 60, 6000
STOP = ('\n\nUser:', '<|end|>', 'the end of it all')
PROSE = (
  'It was the best of times, it was the worst of times; the age of wisdom and of foolishness. '
  'A naïve café owner in 東京 😀 said: "Bring 12 cups, 7.5 spoons & 3 plates!" Didn\'t they? '
)
PUNCTUATED = 'a . b , c ! d ? e . '
MANY_BYTES = 'é漢😀'  # of two, three and four bytes, none of which is a token of its own


@dataclasses.dataclass(frozen=True)
class Case:
  """An answer to stream, in a kind of vocabulary."""

  vocabulary: str
  answer: str
  tokenizer: Tokenizer = dataclasses.field(repr=False)
  tokens: tuple[int, ...] = dataclasses.field(repr=False)
  stop: tuple[str, ...] = ()

  @property
  def name(self) -> str:
    """The case in words."""
    return f'{self.vocabulary}, {self.answer}' + (', stop strings' if self.stop else '')


def cases() -> list[Case]:
  """Every kind of vocabulary with the inputs that are worst for it, without and with stop strings."""
  letters, pieces, words, late = _byte_level(), _byte_fallback(), _word_piece(), _changed_late()
  streamed: list[tuple[str, str, Tokenizer, Sequence[int]]] = [
    ('byte level', 'prose', letters, letters.encode(PROSE)),
    ('byte level', 'a lone byte', letters, letters.encode('é')[:1]),
    ('byte level', 'a run of bytes', letters, letters.encode(MANY_BYTES)),
    ('byte fallback', 'prose', pieces, pieces.encode(PROSE)),
    ('byte fallback', 'a lone byte', pieces, pieces.encode('é')[-2:-1]),
    ('byte fallback', 'a run of bytes', pieces, pieces.encode(MANY_BYTES)[-9:]),
    ('words', 'prose', words, words.encode(PROSE)),
    ('words', 'one without end', words, _one(words, '##s')),
    ('words', 'punctuation', words, words.encode(PUNCTUATED)),
    ('changed late', 'prose', late, late.encode(PROSE)),
    ('changed late', 'what almost matches', late, _one(late, '▁')),
  ]
  return [
    Case(vocabulary, answer, tokenizer, _repeated(tokens), stop)
    for vocabulary, answer, tokenizer, tokens in streamed
    for stop in ((), STOP)
  ]


def _one(tokenizer: Tokenizer, token: str) -> tuple[int, ...]:
  token_id = tokenizer.backend.token_to_id(token)
  assert token_id is not None
  return (token_id,)


def _repeated(tokens: Sequence[int]) -> tuple[int, ...]:
  return (tuple(tokens) * (LATE // len(tokens) + 1))[:LATE]


def _trained(model: models.Model, trainer: trainers.Trainer, **parts) -> Tokenizer:
  backend = tokenizers.Tokenizer(model)
  for name, part in parts.items():
    setattr(backend, name, part)
  backend.train_from_iterator([PROSE.encode('ascii', 'ignore').decode()] * 3, trainer)
  return Tokenizer(backend)


def _byte_level() -> Tokenizer:
  trainer = trainers.BpeTrainer(
    vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
  )
  split = pre_tokenizers.ByteLevel(add_prefix_space=False)
  return _trained(models.BPE(), trainer, pre_tokenizer=split, decoder=decoders.ByteLevel())


_SPACES_AND_BYTES = (decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse())


def _sentencepiece(*last: decoders.Decoder) -> Tokenizer:
  """Pieces of words, and bytes for all else."""
  trainer = trainers.BpeTrainer(
    vocab_size=500, special_tokens=[f'<0x{byte:02X}>' for byte in range(256)], show_progress=False
  )
  split = pre_tokenizers.Metaspace()
  one = _trained(models.BPE(byte_fallback=True), trainer, pre_tokenizer=split)
  backend = tokenizers.Tokenizer(one.backend.model)  # without the bytes as special tokens, which would be left out
  backend.pre_tokenizer, backend.decoder = split, decoders.Sequence([*_SPACES_AND_BYTES, *last])
  return Tokenizer(backend)


def _byte_fallback() -> Tokenizer:
  return _sentencepiece(decoders.Strip(' ', 1, 0))


def _changed_late() -> Tokenizer:
  """One whose decoder changes text across tokens, so that some of it has to wait."""
  return _sentencepiece(decoders.Replace(' .', '.'), decoders.Replace(Regex('  [,;!?]'), '!'))


def _word_piece() -> Tokenizer:
  trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=['[UNK]', '##s'], show_progress=False)
  one = _trained(models.WordPiece(unk_token='[UNK]'), trainer, pre_tokenizer=pre_tokenizers.BertPreTokenizer())
  backend = tokenizers.Tokenizer(one.backend.model)
  backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
  return Tokenizer(backend)
