"""The stages of a tokenizer's decoder, each taking tokens as they come and giving on what no later token can change.

A decoder of the tokenizers library maps a list of tokens to a list of texts, stage by stage, and the results are put
together. Here each stage is a machine. Up to the first stage that joins tokens, machines hand on whole tokens. Behind
it a token is long and not complete for a while, and they hand on pieces of it: some text, and '' where a token ends.
"""

import codecs
import enum
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from tokenizers import Regex, decoders, pre_tokenizers

from pdjax.model.regex_width import Unbounded, match_width
from pdjax.model.text_search import TextSearch


class Stage(Protocol):
  """One stage of a decoder, in the middle of a list of tokens."""

  def take(self, pieces: list[str]) -> list[str]:
    """Take what the stage before gives; what is certain with it."""

  def end(self) -> list[str]:
    """No more will come; what was held back."""


class TokenText(Protocol):
  """What a stage makes of a single token, whose text comes in pieces."""

  def take(self, text: str) -> str:
    """Take more of the token; what is certain with it."""

  def close(self) -> str:
    """The token is complete; what was held back."""


class Unstreamable(ValueError):
  """A decoder that may change text of any length; the message names the stage and says what to change."""


MakeStage = Callable[[], Stage]
BeginToken = Callable[[bool], TokenText]
"""Makes the beginning of a token, given whether it is the first."""
_Rule = Callable[[str], str]
"""Makes one whole token of another."""


class _Flow(enum.Enum):
  """What comes out of a stage."""

  WHOLE = 'whole tokens'
  PIECES = 'tokens in pieces'
  ONE = 'a single token in pieces'


def stages_of(decoder: Mapping[str, Any] | None) -> tuple[tuple[MakeStage, ...], int]:
  """The stages of a decoder, as tokenizer.json describes it.

  Returns:
    What makes each stage anew, and how many characters before a place may have a say in what is made of it.

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
    self._rules: tuple[_Rule, _Rule] | None = None

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
      self.stages.append(functools.partial(_EachInPieces, begin))

  def add_rules(self, first: _Rule, other: _Rule) -> None:
    """Add a stage that makes one whole token of each; it joins the one before if that does so too."""
    if self._rules is not None:
      self.stages.pop()
      first, other = (functools.partial(_both, *rules) for rules in zip(self._rules, (first, other), strict=True))
    self._rules = first, other
    self.stages.append(functools.partial(_Each, functools.cache(first), functools.cache(other)))


def _whole(begin: BeginToken, first: bool, token: str) -> str:
  text = begin(first)
  return text.take(token) + text.close()


def _both(rule: _Rule, then: _Rule, token: str) -> str:
  return then(rule(token))


# Stages


class _Each:
  """Makes one token of each, by functions for the first and for the others."""

  def __init__(self, first: _Rule, other: _Rule):
    self._next, self._other = first, other

  def take(self, pieces: list[str]) -> list[str]:
    if not pieces:
      return pieces
    changed = [self._next(pieces[0]), *map(self._other, pieces[1:])]
    self._next = self._other
    return changed

  def end(self) -> list[str]:
    return []


class _EachInPieces:
  """Makes one token of each, while they come in pieces."""

  def __init__(self, begin: BeginToken):
    self._begin = begin
    self._token = begin(True)

  def take(self, pieces: list[str]) -> list[str]:
    changed = []
    for piece in pieces:
      text = self._token.take(piece) if piece else self._token.close()
      if text:
        changed.append(text)
      if not piece:
        changed.append('')
        self._token = self._begin(False)
    return changed

  def end(self) -> list[str]:
    return []


class _Fused:
  """Makes one token of all."""

  def take(self, pieces: list[str]) -> list[str]:
    return [piece for piece in pieces if piece]

  def end(self) -> list[str]:
    return ['']


_UTF8 = codecs.getincrementaldecoder('utf-8')


class _Letters:
  """Makes one token of all, whose letters stand for bytes (GPT-2's alphabet of 256)."""

  def __init__(self, bytes_of: Callable[[str], bytes]):
    self._bytes_of = bytes_of
    self._text = _UTF8('replace')

  def take(self, pieces: list[str]) -> list[str]:
    text = self._text.decode(b''.join(map(self._bytes_of, pieces)))
    return [text] if text else []

  def end(self) -> list[str]:
    rest = self._text.decode(b'', final=True)
    return [rest, ''] if rest else ['']


_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))  # these bytes have their Latin-1 letters
_LETTERS = {chr(byte): byte for byte in _PRINTABLE} | {
  chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)
}


def _bytes_of(token: str) -> bytes:
  """A token with any letter outside the alphabet, as added tokens may have, is text that stands for itself."""
  if all(letter in _LETTERS for letter in token):
    return bytes(_LETTERS[letter] for letter in token)
  return token.encode()


# as the library reads hexadecimal numbers
_HEX = '0123456789abcdefABCDEF'
_BYTES = {f'<0x{high}{low}>': bytes([int(high + low, 16)]) for high in _HEX + '+' for low in _HEX}
_ALONE = re.compile('[\udc80-\udcff]')


class _Bytes:
  """Makes one token of each run of tokens that name bytes, and keeps the others.

  A byte that belongs to no character becomes U+FFFD and the characters beside it stay, as in SentencePiece. The
  library would turn the whole run into U+FFFD, which nobody can know before its end.
  """

  def __init__(self):
    self._text = _UTF8('surrogateescape')  # marks bytes one by one, where 'replace' marks some of them together
    self._in_run = False

  def take(self, pieces: list[str]) -> list[str]:
    out = []
    for token in pieces:
      byte = _BYTES.get(token)
      if byte is not None:
        self._in_run = True
        if text := self._text.decode(byte):
          out.append(_ALONE.sub('\ufffd', text))
        continue
      if self._in_run:
        out += self.end()
      out += [token, ''] if token else ['']
    return out

  def end(self) -> list[str]:
    if not self._in_run:
      return []
    self._in_run = False
    rest = self._text.decode(b'', final=True)
    return [_ALONE.sub('\ufffd', rest), ''] if rest else ['']


_BYTES_BEGUN = frozenset(name[:length] for name in _BYTES for length in range(1, len(name)))


class _BytesInPieces:
  """The same for tokens in pieces: each waits while it may come to name a byte."""

  def __init__(self):
    self._bytes = _Bytes()
    self._held: str | None = ''  # None once the token is known to name none

  def take(self, pieces: list[str]) -> list[str]:
    out = []
    for piece in pieces:
      if not piece:
        out += [''] if self._held is None else self._bytes.take([self._held])
        self._held = ''
      elif self._held is None:
        out.append(piece)
      else:
        self._held += piece
        if self._held not in _BYTES_BEGUN and self._held not in _BYTES:
          out += [*self._bytes.end(), self._held]
          self._held = None
    return out

  def end(self) -> list[str]:
    return self._bytes.end()


class _WordEnds:
  """Puts a space for what ends a word, and nothing for it in the last token, so that it waits for the next one."""

  def __init__(self, suffix: str, in_pieces: bool):
    self._suffix = suffix
    self._in_pieces = in_pieces  # what follows does not ask where a token ends
    self._held: str | None = None

  def take(self, pieces: list[str]) -> list[str]:
    out = []
    for token in pieces:
      if self._held is not None:
        out.append(self._held.replace(self._suffix, ' '))
        self._held = None
      at = token.find(self._suffix)
      if at < 0:
        out.append(token)
        continue
      if self._in_pieces:
        out.append(token[:at])
        token = token[at:]
      self._held = token
    return out

  def end(self) -> list[str]:
    return [] if self._held is None else [self._held.replace(self._suffix, '')]


class _Repeats:
  """Leaves out a token that is the one before, and tokens that come to nothing (Graves et al. 2006)."""

  def __init__(self, change: _Rule):
    self._change = change
    self._last: str | None = None

  def take(self, pieces: list[str]) -> list[str]:
    out = []
    for token in pieces:
      if token != self._last:
        self._last = token
        out.append(self._change(token))
    return [token for token in out if token]

  def end(self) -> list[str]:
    return []


# What becomes of a single token


class _Kept:
  """A token as it is."""

  def take(self, text: str) -> str:
    return text

  def close(self) -> str:
    return ''


class _Joined:
  """A token behind a space."""

  def __init__(self):
    self._before = ' '

  def take(self, text: str) -> str:
    text, self._before = self._before + text, ''
    return text

  def close(self) -> str:
    return self._before


class _Mapped:
  """A token with one character changed."""

  def __init__(self, char: str, content: str):
    self._char, self._content = char, content

  def take(self, text: str) -> str:
    return text.replace(self._char, self._content)

  def close(self) -> str:
    return ''


class _Replaced:
  """A token with a text replaced; what may be the beginning of that text waits."""

  def __init__(self, search: TextSearch, pattern: str, content: str):
    self._search, self._pattern, self._content = search, pattern, content
    self._state = 0

  def take(self, text: str) -> str:
    parts = [self._pattern[: self._search.begun(self._state)]]
    start = 0
    while True:
      self._state, end = self._search.read(self._state, text, start)
      parts.append(text[start:end])
      if end is None:
        break
      parts[-2:] = [''.join(parts[-2:])[: -len(self._pattern)], self._content, '']
      start, self._state = end, 0
    read = ''.join(parts)
    return read[: len(read) - self._search.begun(self._state)]

  def close(self) -> str:
    return self._pattern[: self._search.begun(self._state)]


class _ReplacedByRegex:
  """A token with a regular expression's matches replaced; what the longest match from there on could reach waits."""

  def __init__(self, replace: decoders.Decoder, regex: Regex, most: int):
    self._replace, self._most = replace, most
    self._all, self._unmatched = (pre_tokenizers.Split(regex, behavior) for behavior in ('isolated', 'removed'))
    self._held = ''

  def take(self, text: str) -> str:
    self._held += text
    sure = self._sure()
    text, self._held = self._held[:sure], self._held[sure:]
    return self._replace.decode([text]) if text else ''

  def close(self) -> str:
    return self._replace.decode([self._held])

  def _sure(self) -> int:
    """Before this many characters matches begin and end, or do not, whatever follows."""
    known = len(self._held) - self._most + 1  # a match that begins before here is seen whole
    if known <= 0:
      return 0
    unmatched = {span for _, span in self._unmatched.pre_tokenize_str(self._held)}
    sure = 0
    for _, (begin, end) in self._all.pre_tokenize_str(self._held):
      if begin >= known:
        break
      sure = min(end, known) if (begin, end) in unmatched else end
    return sure


class _Stripped:
  """A token without some of a character at its ends; as much of it as would be taken off at the end waits."""

  def __init__(self, char: str, start: int, stop: int):
    self._char, self._start, self._stop = char, start, stop
    self._held = ''

  def take(self, text: str) -> str:
    while self._start and text:
      if text[0] != self._char:
        self._start = 0
      else:
        self._start -= 1
        text = text[1:]
    if not self._stop:
      return text
    text = self._held + text
    kept = len(text) - min(self._stop, len(text) - len(text.rstrip(self._char)))
    text, self._held = text[:kept], text[kept:]
    return text

  def close(self) -> str:
    return ''


class _Continued:
  """A token without the prefix that says that it goes on with a word, or behind a space if it has none."""

  def __init__(self, prefix: str):
    self._prefix = prefix
    self._held: str | None = ''  # while the prefix is not decided

  def take(self, text: str) -> str:
    if self._held is None:
      return text
    self._held += text
    if len(self._held) < len(self._prefix) and self._prefix.startswith(self._held):
      return ''
    return self.close()

  def close(self) -> str:
    if self._held is None:
      return ''
    text, self._held = self._held, None
    return text[len(self._prefix) :] if text.startswith(self._prefix) else ' ' + text


# How each is built. A builder gets the chain so far, the stage's own description, and that of the stage behind it.


def _add_fuse(chain: _Chain, part: Mapping[str, Any], following: Mapping[str, Any]) -> None:
  chain.add(_Fused, _Flow.ONE)


def _add_none(chain: _Chain, part: Mapping[str, Any], following: Mapping[str, Any]) -> None:
  chain.add_each(lambda first: _Kept() if first else _Joined())


def _add_byte_level(chain: _Chain, part: Mapping[str, Any], following: Mapping[str, Any]) -> None:
  if chain.flow is not _Flow.WHOLE:
    raise Unstreamable(_too_late(chain, 'ByteLevel', 'its last letter may change what all of it stands for'))
  chain.add(functools.partial(_Letters, functools.cache(_bytes_of)), _Flow.ONE)


def _add_byte_fallback(chain: _Chain, part: Mapping[str, Any], following: Mapping[str, Any]) -> None:
  if chain.flow is _Flow.WHOLE:
    chain.add(_Bytes, _Flow.PIECES)
  else:
    chain.add(_BytesInPieces, chain.flow)


def _add_strip(chain: _Chain, part: Mapping[str, Any], following: Mapping[str, Any]) -> None:
  char, start, stop = part['content'], part['start'], part['stop']
  chain.add_each(lambda first: _Stripped(char, start, stop), start + stop)


def _add_metaspace(chain: _Chain, part: Mapping[str, Any], following: Mapping[str, Any]) -> None:
  char, dropped = part['replacement'], part['prepend_scheme'] != 'never'
  chain.add_each(lambda first: _Mapped(char, '' if first and dropped else ' '))


def _add_word_piece(chain: _Chain, part: Mapping[str, Any], following: Mapping[str, Any]) -> None:
  prefix = part['prefix']
  chain.add_each(lambda first: _Kept() if first else _Continued(prefix))
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
  chain.add_each(lambda first: _Replaced(search, pattern, content), len(pattern))


def _add_replace(chain: _Chain, part: Mapping[str, Any], following: Mapping[str, Any]) -> None:
  (kind, pattern), content = next(iter(part['pattern'].items())), part['content']
  if kind == 'String' and len(pattern) == 1:
    chain.add_each(lambda first: _Mapped(pattern, content))
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
  chain.add_each(lambda first: _ReplacedByRegex(replace, regex, most), most)


def _by_library(decoder: decoders.Decoder, token: str) -> str:
  return decoder.decode([token])


def _add_bpe(chain: _Chain, part: Mapping[str, Any], following: Mapping[str, Any]) -> None:
  suffix = part['suffix']
  if chain.flow is _Flow.WHOLE:
    in_pieces = following['type'] == 'Fuse'
    chain.add(functools.partial(_WordEnds, suffix, in_pieces), _Flow.PIECES if in_pieces else _Flow.WHOLE)
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
    chain.add(functools.partial(_Repeats, functools.cache(functools.partial(_replace_all, changes))), _Flow.WHOLE)
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
