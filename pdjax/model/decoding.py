"""Token ids to text by a tokenizer's own decoder, for a whole list or while they come."""

import json
from collections.abc import Iterable, Sequence

import tokenizers

from pdjax.model.decoder_chain import MakeStage, Unstreamable, stages_of
from pdjax.model.decoding_stages import Stage

_PRIMING_TOKENS = 8  # of these, four bytes may belong to one character and one be the first of a text


class Decoding:
  """A tokenizer as seen from its output.

  Attributes:
    refusal: The reason text cannot be given while its tokens come, or None.
  """

  def __init__(self, backend: tokenizers.Tokenizer):
    """Read the decoder of `backend`, which does not change from here on."""
    self._backend = backend
    self._special = frozenset(token for token, one in backend.get_added_tokens_decoder().items() if one.special)
    self._texts: dict[int, str] = {}
    self._stages: tuple[MakeStage, ...] = ()
    self._reach = 0
    self.refusal: str | None = None
    try:
      self._stages, self._reach = stages_of(_describe(backend))
    except Unstreamable as error:
      self.refusal = str(error)

  def __reduce__(self):
    return Decoding, (self._backend,)  # functions made for this decoder do not travel

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """The text of these tokens; the pieces of a `DecodingRun` put together are the same."""
    if self.refusal is not None:
      known = [token for token in ids if self.token(token) is not None]
      return self._backend.decode(known, skip_special_tokens=skip_special)
    tokens = (self.token(token) for token in ids if not (skip_special and token in self._special))
    pieces = [token for token in tokens if token is not None]
    for make in self._stages:
      stage = make()
      pieces = stage.take(pieces) + stage.end()
    return ''.join(pieces)

  def begin(self) -> 'DecodingRun':
    """Begin before the first token.

    Raises:
      ValueError: if there is a `refusal`.
    """
    if self.refusal is not None:
      raise ValueError(self.refusal)
    return DecodingRun(self, [make() for make in self._stages])

  def priming(self, prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, enough to know what the next one's text is; special tokens are left out."""
    tokens: list[int] = []
    chars = 0
    for index in range(len(prompt) - 1, -1, -1):
      token = prompt[index]
      text = self.text_of(token)
      if text is not None:
        tokens.append(token)
        chars += len(text)
        if len(tokens) >= _PRIMING_TOKENS and chars > self._reach:
          break
    return tokens[::-1]

  def text_of(self, token: int) -> str | None:
    """A token as the vocabulary spells it, None for a special one and those beyond the vocabulary."""
    return None if token in self._special else self.token(token)

  def token(self, token: int) -> str | None:
    """A token as the vocabulary spells it, None beyond the vocabulary."""
    text = self._texts.get(token)
    if text is None and 0 <= token < 2**32:
      text = self._backend.id_to_token(token)
      if text is not None:
        self._texts[token] = text
    return text


class DecodingRun:
  """The text of tokens while they come."""

  def __init__(self, decoding: Decoding, stages: list[Stage]):
    self._decoding = decoding
    self._stages = stages

  def take(self, token: int) -> str:
    """The text that is sure with one more token; special tokens stand for none."""
    text = self._decoding.text_of(token)
    if text is None:
      return ''
    pieces = [text]
    for stage in self._stages:
      pieces = stage.take(pieces)
    return ''.join(pieces)

  def end(self) -> str:
    """No token will follow: the text held back."""
    pieces: list[str] = []
    for stage in self._stages:
      pieces = stage.take(pieces) + stage.end()
    return ''.join(pieces)


def _describe(backend: tokenizers.Tokenizer) -> dict | None:
  """The decoder as tokenizer.json has it."""
  if backend.decoder is None:
    return None
  try:
    return json.loads(backend.decoder.__getstate__())  # the whole tokenizer's JSON holds it too, and takes long
  except Exception as error:  # the Rust side raises nothing more precise
    raise Unstreamable(f'its decoder is a program of its own ({error}), expected one that JSON describes') from error
