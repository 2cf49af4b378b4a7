"""Reads a tokenizer's decoder, as tokenizer.json describes it, into the stages that do the same while tokens come."""

import enum
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Regex, decoders

from pdjax.model.decoded_token import (
  BeginToken,
  Continued,
  Joined,
  Kept,
  Mapped,
  Replaced,
  ReplacedByRegex,
  Rule,
  Stripped,
)
from pdjax.model.decoding_stages import (
  Bytes,
  BytesInPieces,
  Each,
  EachInPieces,
  Fused,
  Letters,
  Repeats,
  Stage,
  WordEnds,
  bytes_of,
)
from pdjax.model.regex_width import Unbounded, match_width
from pdjax.model.text_search import TextSearch

MakeStage = Callable[[], Stage]


class Unstreamable(ValueError):
  """A decoder that may change text of any length; the message names the stage and says what to change."""


class _Flow(enum.Enum):
  """The form of the text that comes out of a stage."""

  WHOLE = 'whole tokens'
  PIECES = 'tokens in pieces'
  ONE = 'a single token in pieces'


def stages_of(decoder: Mapping[str, Any] | None) -> tuple[tuple[MakeStage, ...], int]:
  """The stages of a decoder, as tokenizer.json describes it.

  Returns:
    Functions that make each stage anew, and the number of characters before a position that can change its text.

  Raises:
    Unstreamable: if there is a stage whose text is not sure before the end, or one that is not known here.
  """
  chain = _Chain()
  parts = [{'type': 'None'}] if decoder is None else list(_flat(decoder))
  for part, following in itertools.pairwise([*parts, {'type': 'Fuse'}]):  # in the end texts are put together
    kind = part['type']
    if kind not in _BUILDERS:
      raise Unstreamable(f'the decoder {kind} is not known to pdjax, expected {", ".join(sorted(_BUILDERS))}')
    _BUILDERS[kind](chain, part, following)
  return tuple(chain.stages), chain.reach


def _flat(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
  if decoder.get('type') == 'Sequence':
    for part in decoder['decoders']:
      yield from _flat(part)
  else:
    yield decoder


class _Chain:
  """Stages put behind each other, and what comes out of the last."""

  def __init__(self):
    self.stages: list[MakeStage] = []
    self.flow = _Flow.WHOLE
    self.reach = 0
    self._rules: tuple[Rule, Rule] | None = None

  def add(self, make: MakeStage, flow: _Flow) -> None:
    """Add a stage that joins tokens or leaves some out."""
    self.stages.append(make)
    self.flow = flow
    self._rules = None

  def add_each(self, begin: BeginToken, reach: int = 0) -> None:
    """Add a stage that makes one token of each."""
    self.reach += reach
    if self.flow is _Flow.WHOLE:
      self.add_rules(*(functools.partial(_whole, begin, first) for first in (True, False)))
    else:
      self.stages.append(functools.partial(EachInPieces, begin))

  def add_rules(self, first: Rule, other: Rule) -> None:
    """Add a stage that makes one whole token of each; it joins the one before if that does so too."""
    if self._rules is not None:
      self.stages.pop()
      first, other = (functools.partial(_both, *rules) for rules in zip(self._rules, (first, other), strict=True))
    self._rules = first, other
    self.stages.append(functools.partial(Each, functools.cache(first), functools.cache(other)))


def _whole(begin: BeginToken, first: bool, token: str) -> str:
  text = begin(first)
  return text.take(token) + text.close()


def _both(rule: Rule, then: Rule, token: str) -> str:
  return then(rule(token))


# How each is built. A builder gets the chain so far, the stage's own description, and that of the stage behind it.


def _add_fuse(chain: _Chain, part: Mapping[str, Any], following: Mapping[str, Any]) -> None:
  chain.add(Fused, _Flow.ONE)


def _add_none(chain: _Chain, part: Mapping[str, Any], following: Mapping[str, Any]) -> None:
  chain.add_each(lambda first: Kept() if first else Joined())


def _add_byte_level(chain: _Chain, part: Mapping[str, Any], following: Mapping[str, Any]) -> None:
  if chain.flow is not _Flow.WHOLE:
    raise Unstreamable(_too_late(chain, 'ByteLevel', 'its last letter may change what all of it stands for'))
  chain.add(functools.partial(Letters, functools.cache(bytes_of)), _Flow.ONE)


def _add_byte_fallback(chain: _Chain, part: Mapping[str, Any], following: Mapping[str, Any]) -> None:
  if chain.flow is _Flow.WHOLE:
    chain.add(Bytes, _Flow.PIECES)
  else:
    chain.add(BytesInPieces, chain.flow)


def _add_strip(chain: _Chain, part: Mapping[str, Any], following: Mapping[str, Any]) -> None:
  char, start, stop = part['content'], part['start'], part['stop']
  chain.add_each(lambda first: Stripped(char, start, stop), start + stop)


def _add_metaspace(chain: _Chain, part: Mapping[str, Any], following: Mapping[str, Any]) -> None:
  char, dropped = part['replacement'], part['prepend_scheme'] != 'never'
  chain.add_each(lambda first: Mapped(char, '' if first and dropped else ' '))


def _add_word_piece(chain: _Chain, part: Mapping[str, Any], following: Mapping[str, Any]) -> None:
  prefix = part['prefix']
  chain.add_each(lambda first: Kept() if first else Continued(prefix))
  if part['cleanup']:
    _add_cleanup(chain)


# what WordPiece and CTC tidy up, in this order
_CLEANUP = {
  ' .': '.', ' ?': '?', ' !': '!', ' ,': ',', " ' ": "'", " n't": "n't", " 'm": "'m", ' do not': " don't", " 's": "'s",
  " 've": "'ve", " 're": "'re",
}  # fmt: skip


def _add_cleanup(chain: _Chain) -> None:
  for pattern, content in _CLEANUP.items():
    _add_replacement(chain, pattern, content)


def _add_replacement(chain: _Chain, pattern: str, content: str) -> None:
  search = TextSearch([pattern])
  chain.add_each(lambda first: Replaced(search, pattern, content), len(pattern))


def _add_replace(chain: _Chain, part: Mapping[str, Any], following: Mapping[str, Any]) -> None:
  (kind, pattern), content = next(iter(part['pattern'].items())), part['content']
  if kind == 'String' and len(pattern) == 1:
    chain.add_each(lambda first: Mapped(pattern, content))
  elif kind == 'String' and pattern:
    _add_replacement(chain, pattern, content)
  else:
    _add_regex(chain, pattern, content, kind == 'String')


def _add_regex(chain: _Chain, pattern: str, content: str, is_text: bool) -> None:
  regex = Regex(pattern)
  replace = decoders.Replace(pattern if is_text else regex, content)
  if chain.flow is _Flow.WHOLE:
    rule = functools.partial(_by_library, replace)
    chain.add_rules(rule, rule)
    return
  what = f'Replace of {pattern!r}' if is_text else f'Replace of the regular expression {pattern!r}'
  try:
    least, most = match_width(pattern)
  except Unbounded:
    raise Unstreamable(_too_late(chain, what, 'its matches have no bounded length, or look beyond it')) from None
  if not least:
    raise Unstreamable(_too_late(chain, what, 'it matches where there is nothing'))
  chain.add_each(lambda first: ReplacedByRegex(replace, regex, most), most)


def _by_library(decoder: decoders.Decoder, token: str) -> str:
  return decoder.decode([token])


def _add_bpe(chain: _Chain, part: Mapping[str, Any], following: Mapping[str, Any]) -> None:
  suffix = part['suffix']
  if chain.flow is _Flow.WHOLE:
    in_pieces = following['type'] == 'Fuse'
    chain.add(functools.partial(WordEnds, suffix, in_pieces), _Flow.PIECES if in_pieces else _Flow.WHOLE)
  elif chain.flow is _Flow.PIECES:
    raise Unstreamable(_too_late(chain, 'BPEDecoder', 'whether it is the last decides about its spaces'))
  elif suffix:  # a single token is the last
    _add_replacement(chain, suffix, '')


def _add_ctc(chain: _Chain, part: Mapping[str, Any], following: Mapping[str, Any]) -> None:
  if chain.flow is _Flow.PIECES:
    raise Unstreamable(_too_late(chain, 'CTC', 'one that is the same as the one before is left out'))
  changes = [(part['pad_token'], '')]
  if part['cleanup']:
    changes += [*_CLEANUP.items(), (part['word_delimiter_token'], ' ')]
  if chain.flow is _Flow.WHOLE:
    chain.add(functools.partial(Repeats, functools.cache(functools.partial(_replace_all, changes))), _Flow.WHOLE)
    return
  for pattern, content in changes:  # a single token repeats none
    if pattern or content:
      _add_replace(chain, {'pattern': {'String': pattern}, 'content': content}, following)


def _replace_all(changes: Sequence[tuple[str, str]], token: str) -> str:
  for pattern, content in changes:
    token = token.replace(pattern, content)
  return token


def _too_late(chain: _Chain, what: str, why: str) -> str:
  place = 'behind a stage that joins all tokens' if chain.flow is _Flow.ONE else 'behind ByteFallback, without Fuse'
  return (
    f'its {what} stands {place}, where a token is text without a bound, and {why}; expected it before that stage, '
    'where tokens are short'
  )


_BUILDERS: dict[str, Callable[[_Chain, Mapping[str, Any], Mapping[str, Any]], None]] = {
  'None': _add_none,
  'Fuse': _add_fuse,
  'ByteLevel': _add_byte_level,
  'ByteFallback': _add_byte_fallback,
  'Strip': _add_strip,
  'Metaspace': _add_metaspace,
  'WordPiece': _add_word_piece,
  'Replace': _add_replace,
  'BPEDecoder': _add_bpe,
  'CTC': _add_ctc,
}
