"""The stages of a tokenizer's decoder, each taking tokens as they come and giving on what no later token can change.

A decoder of the tokenizers library maps a list of tokens to a list of texts, stage by stage, and the results are put
together. Here each stage is a machine. Up to the first stage that joins tokens, machines hand on whole tokens. Behind
it a token is long and not complete for a while, and they hand on pieces of it: some text, and '' where a token ends.
"""

import codecs
import re
from collections.abc import Callable
from typing import Protocol

from pdjax.model.decoded_token import BeginToken, Rule


class Stage(Protocol):
  """One stage of a decoder, in the middle of a list of tokens."""

  def take(self, pieces: list[str]) -> list[str]:
    """Take the texts of the stage before; return those that are certain with them."""

  def end(self) -> list[str]:
    """Take note that no more will come; return the texts that were held back."""


class Each:
  """Makes one token of each, by functions for the first and for the others."""

  def __init__(self, first: Rule, other: Rule):
    self._next, self._other = first, other

  def take(self, pieces: list[str]) -> list[str]:
    if not pieces:
      return pieces
    changed = [self._next(pieces[0]), *map(self._other, pieces[1:])]
    self._next = self._other
    return changed

  def end(self) -> list[str]:
    return []


class EachInPieces:
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


class Fused:
  """Makes one token of all."""

  def take(self, pieces: list[str]) -> list[str]:
    return [piece for piece in pieces if piece]

  def end(self) -> list[str]:
    return ['']


_UTF8 = codecs.getincrementaldecoder('utf-8')


class Letters:
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


def bytes_of(token: str) -> bytes:
  """A token with any letter outside the alphabet, as added tokens may have, is text that stands for itself."""
  if all(letter in _LETTERS for letter in token):
    return bytes(_LETTERS[letter] for letter in token)
  return token.encode()


# as the library reads hexadecimal numbers
_HEX = '0123456789abcdefABCDEF'
_BYTES = {f'<0x{high}{low}>': bytes([int(high + low, 16)]) for high in _HEX + '+' for low in _HEX}
_ALONE = re.compile('[\udc80-\udcff]')


class Bytes:
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


class BytesInPieces:
  """The same for tokens in pieces: each waits while it may come to name a byte."""

  def __init__(self):
    self._bytes = Bytes()
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


class WordEnds:
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


class Repeats:
  """Leaves out a token that is the one before, and tokens that come to nothing (Graves et al. 2006)."""

  def __init__(self, change: Rule):
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
