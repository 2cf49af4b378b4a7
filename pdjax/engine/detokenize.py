"""Tokens to text as they come: the text that is sure, and stop strings found across the borders of tokens."""

import functools
import itertools
from collections.abc import Sequence

from pdjax.model.text_search import TextSearch
from pdjax.model.tokenizer import Tokenizer


class Detokenizer:
  """A tokenizer as seen from its output, for any number of sequences."""

  def __init__(self, tokenizer: Tokenizer):
    """Use the decoder of `tokenizer`.

    Raises:
      ValueError: if it is one that may change text of any length, so that no text is sure before the last token.
    """
    self.decoding = tokenizer.decoding
    if self.decoding.refusal is not None:
      raise ValueError(
        f'{tokenizer.source} cannot give text while tokens come: {self.decoding.refusal}. Change "decoder" in its '
        'tokenizer.json, or serve token ids without a tokenizer.'
      )


class TextStream:
  """The text of one sequence while its tokens come.

  All that comes out, put together, is what decoding the prompt's last tokens and all of these adds to decoding the
  former alone, up to the first stop string to appear. Text is held back while the tokenizer's decoder may change it, as
  within a character, or while it may be the beginning of a stop string. The text that comes out with a token depends
  on the tokens alone, so another worker that is given those so far goes on where this one is.
  """

  def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
    """Begin before the first token behind `prompt`; `stop` are the texts that end it."""
    decoding = detokenizer.decoding
    self._run, alone = decoding.begin(), decoding.begin()
    for token in decoding.priming(prompt):
      self._run.take(token)
      alone.take(token)
    self._prompt_rest = alone.end()  # text of the prompt that is not sure yet: the answer may begin otherwise
    self._search = _search(tuple(stop)) if stop else None
    self._state = 0
    self._held = ''

  def take(self, tokens: Sequence[int]) -> tuple[str, int | None]:
    """Add tokens.

    Returns:
      The text that is sure now and was not before, and if a stop string is complete how many of these tokens it
      takes to be sure of that; the others count for nothing then.
    """
    sure: list[str] = []
    for count, token in enumerate(tokens, start=1):
      text = self._run.take(token)
      if not text:
        continue
      if self._prompt_rest:
        text = self._without_prompt(text)
      if self._search is not None:
        text, completed = self._until_stop(text)
        if completed:
          return ''.join(sure) + text, count
      sure.append(text)
    return ''.join(sure), None

  def end(self) -> tuple[str, bool]:
    """End the sequence; the text held back, up to a stop string if it completes one, and whether it does."""
    text, completed = self._without_prompt(self._run.end()), False
    if self._search is not None:
      text, completed = self._until_stop(text)
    rest, self._held = self._held, ''
    return text + rest, completed

  def _without_prompt(self, text: str) -> str:
    """The text without what the prompt has alone, as far as it begins the same."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, self._prompt_rest, strict=False))
    same = sum(1 for _ in pairs)
    self._prompt_rest = self._prompt_rest[same:] if same == len(text) else ''
    return text[same:]

  def _until_stop(self, text: str) -> tuple[str, bool]:
    """The text that is sure, with `text` added, to be before any stop string, and whether one is complete."""
    assert self._search is not None
    self._state, end = self._search.read(self._state, text)
    held = self._held + text[:end]
    sure = len(held) - (self._search.begun(self._state) if end is None else self._search.complete(self._state))
    self._held = held[sure:] if end is None else ''
    return held[:sure], end is not None


_search = functools.lru_cache(maxsize=16)(TextSearch)  # samples of a prompt, and often all requests, share their own
