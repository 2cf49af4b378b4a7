"""Single tokens in a stage of a tokenizer's decoder, whose text may come in pieces."""

from collections.abc import Callable
from typing import Protocol

from tokenizers import Regex, decoders, pre_tokenizers

from pdjax.model.text_search import TextSearch


class TokenText(Protocol):
  """The text that a stage makes of a single token, whose own text comes in pieces."""

  def take(self, text: str) -> str:
    """Take more of the token; return the text that is certain with it."""

  def close(self) -> str:
    """Take note that the token is complete; return the text that was held back."""


BeginToken = Callable[[bool], TokenText]
"""Makes the beginning of a token, given whether it is the first."""
Rule = Callable[[str], str]
"""Makes one whole token of another."""


class Kept:
  """A token as it is."""

  def take(self, text: str) -> str:
    return text

  def close(self) -> str:
    return ''


class Joined:
  """A token behind a space."""

  def __init__(self):
    self._before = ' '

  def take(self, text: str) -> str:
    text, self._before = self._before + text, ''
    return text

  def close(self) -> str:
    return self._before


class Mapped:
  """A token with one character changed."""

  def __init__(self, char: str, content: str):
    self._char, self._content = char, content

  def take(self, text: str) -> str:
    return text.replace(self._char, self._content)

  def close(self) -> str:
    return ''


class Replaced:
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


class ReplacedByRegex:
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


class Stripped:
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


class Continued:
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
