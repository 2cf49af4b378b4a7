"""Tokens to text as they come: pieces that are sure, and stop strings found across the borders of tokens."""

from collections.abc import Sequence

from pdjax.model.tokenizer import Tokenizer

_UNFINISHED = '\ufffd'  # what a decoder puts for bytes that are no whole character yet


class Detokenizer:
  """A tokenizer as seen from its output: what decodes, and which tokens are silent or stand for single bytes."""

  def __init__(self, tokenizer: Tokenizer):
    self.decode = tokenizer.decode
    added = tokenizer.backend.get_added_tokens_decoder()
    self.silent_tokens = frozenset(token for token, one in added.items() if one.special)
    # A run of byte tokens is decoded as a whole: one bad byte at its end turns all of it into U+FFFD, so nothing of
    # it is sure before another token follows. Byte-level tokenizers have no such tokens and lack nothing.
    named = (tokenizer.backend.token_to_id(f'<0x{byte:02X}>') for byte in range(256))
    self.byte_tokens = frozenset(token for token in named if token is not None)


class TextStream:
  """The text of one sequence while its tokens come.

  The pieces put together are the tokenizer's text of all the tokens, up to the first stop string to appear. Text is
  held back while it ends within a character or may be the beginning of a stop string. Which pieces come out depends
  on the tokens alone, so another worker that is given the tokens so far goes on where this one is.
  """

  def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = ()):
    """Begin before the first token; `stop` are the texts that end it."""
    self._detokenizer = detokenizer
    self._stop = tuple(stop)
    self._window: list[int] = []  # tokens that the next are decoded with: their neighbours decide about spaces
    self._known = ''  # the text of those of the window that are decoded already
    self._held = ''

  def take(self, tokens: Sequence[int]) -> tuple[str, int | None]:
    """Add tokens.

    Returns:
      The text that is sure now and was not before, and if a stop string is complete how many of these tokens it
      takes to be sure of that; the others count for nothing then.
    """
    pieces = []
    for count, token in enumerate(tokens, start=1):
      new = self._decode(token)
      if not new:
        continue
      if not self._stop:
        pieces.append(new)
        continue
      self._held += new
      end = self._find_stop()
      if end is not None:
        return ''.join(pieces) + self._release(end), count
      pieces.append(self._release(len(self._held) - self._may_begin_stop()))
    return ''.join(pieces), None

  def end(self) -> tuple[str, bool]:
    """No token will follow: the text held back, up to a stop string if that completes one, and whether it does."""
    self._held += self._detokenizer.decode(self._window)[len(self._known) :]
    end = self._find_stop()
    return self._release(len(self._held) if end is None else end), end is not None

  def _decode(self, token: int) -> str:
    """The text that is certain with this token."""
    if token in self._detokenizer.silent_tokens:
      return ''
    self._window.append(token)
    if token in self._detokenizer.byte_tokens:
      return ''
    text = self._detokenizer.decode(self._window)
    if text.endswith(_UNFINISHED):
      return ''
    new = text[len(self._known) :]
    if new:
      self._window = [token]
      self._known = self._detokenizer.decode(self._window)
    return new

  def _find_stop(self) -> int | None:
    """Where the stop string begins that is the first to be complete in the text held back."""
    found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
    return min(found)[1] if found else None

  def _may_begin_stop(self) -> int:
    """Length of the longest end of the text held back that a stop string may begin with."""
    longest = min(len(self._held), max(map(len, self._stop)) - 1)
    ends = (self._held[-length:] for length in range(longest, 0, -1))
    return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stop)), 0)

  def _release(self, length: int) -> str:
    sure, self._held = self._held[:length], self._held[length:]
    return sure
