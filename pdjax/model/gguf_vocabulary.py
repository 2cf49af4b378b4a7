"""Builds the tokenizer that the `tokenizer.*` keys of a GGUF file describe."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from pdjax.model.end_tokens import EndTokens

# token types of GGUF
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_SPECIAL_TOKENS = {'bos': 'bos', 'eos': 'eos', 'unk': 'unknown', 'pad': 'padding'}

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r'\p{N}{1,3}', r'\p{N}')
_TEKKEN_WORDS = (
  r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+'
  r'|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*'
  r'|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)

_SEED_CODER_WORDS = _QWEN2_WORDS.replace(r'[^\s\p{L}\p{N}]+[\r\n]*', r'[^\s\p{L}\p{N}\r\n]+')

_BYTE_TOKENS = tuple(f'<0x{byte:02X}>' for byte in range(256))

# How tokenizer.ggml.pre cuts text into words, before words become bytes.
_WORDS: dict[str, tuple[str, ...]] = {
  'gpt-2': (_GPT2_WORDS,),
  'smollm': (r'\p{N}', _GPT2_WORDS),
  'llama-bpe': (_LLAMA3_WORDS,),
  'qwen2': (_QWEN2_WORDS,),
  'tekken': (_TEKKEN_WORDS,),
  'seed-coder': (_SEED_CODER_WORDS,),
  'deepseek-coder': (r'[\r\n]', r'\s?\p{L}+', r'\s?\p{P}+', '[一-龥ࠀ-一가-\ud7ff]+', r'\p{N}'),
  'default': (r'[\p{P}$+<=>^~|]+', _GPT2_WORDS, r'\p{N}+', '[0-9][0-9][0-9]'),
}
# Other names for the same cuts, as llama.cpp and transformers read them, where the architectures are ours.
_SAME_WORDS = {
  'gpt-2': ('a.x-4.0', 'mellum', 'trillion'),
  'smollm': ('command-r', 'minerva-7b', 'refact', 'starcoder'),
  'llama-bpe': ('dbrx', 'falcon3', 'llama-v3', 'llama3', 'midm-2.0', 'pixtral', 'smaug-bpe'),
  'qwen2': ('deepseek-r1-qwen', 'kormo', 'megrez'),
}
_WORDS |= {other: _WORDS[pre] for pre, others in _SAME_WORDS.items() for other in others}
# A word that is a token needs no merges, and raw text begins with a token.
_WHOLE_WORDS = ('falcon3', 'llama-bpe', 'llama-v3', 'llama3', 'midm-2.0', 'pixtral', 'tekken')
_COMPOSED = ('deepseek-r1-qwen', 'qwen2')  # e and an accent are read as é
# What ends the turns of a chat model, and what else ends its answers, by tokenizer.ggml.pre. Its generation_config.json
# lists all of them, a GGUF file names the first only. (Base models end with another token, and go on past turns;
# SmolLM2, of 'smollm', goes on past its <|endoftext|>.)
_LLAMA3_ENDS = ('<|eot_id|>', ('<|end_of_text|>', '<|eom_id|>'))
_CHAT_ENDS: dict[str, tuple[str, tuple[str, ...]]] = {
  'qwen2': ('<|im_end|>', ('<|endoftext|>',)),
  'llama-bpe': _LLAMA3_ENDS,
  'llama-v3': _LLAMA3_ENDS,
  'llama3': _LLAMA3_ENDS,
}
_KINDS = {str: 'text', int: 'whole number', float: 'number', bool: 'truth value', list: 'list'}


@dataclasses.dataclass(frozen=True)
class GGUFVocabulary:
  """The `tokenizer.ggml.*` keys of a GGUF file."""

  metadata: Mapping[str, Any]
  source: str

  def get(self, key: str, kind: type, default: Any = None) -> Any:
    return self.checked(f'tokenizer.ggml.{key}', kind, default)

  def checked(self, key: str, kind: type, default: Any) -> Any:
    value = self.metadata.get(key, default)
    if value is not default and type(value) is not kind:
      raise self._error(key, repr(value), f'a {_KINDS[kind]}')
    return value

  def array(self, key: str, kind: type = str) -> list:
    values = self.get(key, list)
    if not values:
      raise ValueError(
        f'{self.source} has no tokenizer.ggml.{key}, expected it for a {self.get("model", str)!r} tokenizer; '
        'convert the model again.'
      )
    if odd := [value for value in values if type(value) is not kind]:
      raise self._error(f'tokenizer.ggml.{key}', f'a list with {odd[0]!r}', f'a {_KINDS[kind]} in each place')
    return values

  @property
  def pre(self) -> str:
    """The name of the way text is cut into words: a key of `_WORDS`, if it is known here."""
    return self.get('pre', str, 'default')

  @functools.cached_property
  def tokens(self) -> list[str]:
    return self.array('tokens')

  def one_each(self, key: str, kind: type) -> list:
    """An array with a value for each token."""
    values = self.array(key, kind)
    if len(values) != len(self.tokens):
      raise self._error(
        f'tokenizer.ggml.{key}', f'{len(values)} values', f'one for each of its {len(self.tokens)} tokens'
      )
    return values

  def token_id(self, key: str) -> int | None:
    token_id = self.get(key, int)
    if token_id is not None and not 0 <= token_id < len(self.tokens):
      raise self._error(f'tokenizer.ggml.{key}', token_id, f'less than its {len(self.tokens)} tokens')
    return token_id

  def token(self, key: str) -> str | None:
    token_id = self.token_id(key)
    return None if token_id is None else self.tokens[token_id]

  def special_tokens(self) -> dict[str, str]:
    """The special tokens by the names that chat templates call."""
    names = {f'{name}_token': self.token(f'{key}_token_id') for name, key in _SPECIAL_TOKENS.items()}
    return {name: token for name, token in names.items() if token is not None}

  def typed(self) -> list[tuple[str, int]]:
    """Each token with its type, if the file has any types."""
    if self.get('token_type', list) is None:
      return []
    return list(zip(self.tokens, self.one_each('token_type', int), strict=True))

  def end_tokens(self) -> EndTokens:
    """The tokens that the keys name as ends, and others that end answers of a chat model of this vocabulary."""
    keys = [f'{place}_token_id' for place in ('eos', 'eot', 'eom')]
    named_alone = self.get('tokens', list) is None  # ends without a vocabulary
    ids = {key: self.get(key, int) if named_alone else self.token_id(key) for key in keys}
    named: list[tuple[str, tuple[int, ...]]] = []
    named += [(f'tokenizer.ggml.{key}', (token_id,)) for key, token_id in ids.items() if token_id is not None]
    turn_end, others = _CHAT_ENDS.get(self.pre, ('', ()))
    if not named_alone and self.token('eos_token_id') == turn_end:
      found = [i for i, (token, kind) in enumerate(self.typed()) if kind == _CONTROL and token in others]
      if found:
        named.append(('tokenizer.ggml.tokens', tuple(found)))
    return EndTokens(tuple(named))

  def _error(self, key: str, found: object, expected: str) -> ValueError:
    return ValueError(f'{self.source} has {key}={found}, expected {expected}; convert the model again.')


def build_backend(described: GGUFVocabulary) -> tokenizers.Tokenizer:
  """The tokenizer proper.

  Raises:
    ValueError: if it is of a kind that is not known here, or incomplete.
  """
  kind = described.get('model', str)
  if kind == 'gpt2':
    backend = _byte_level_bpe(described)
  elif kind == 'llama':
    backend = _sentencepiece_bpe(described)
  else:
    raise ValueError(
      f"{described.source} has tokenizer.ggml.model {kind!r}, expected 'gpt2' or 'llama'; "
      'pdjax knows no other kind in GGUF yet, so use the model as safetensors with its tokenizer.json.'
    )
  _add_tokens(backend, described)
  return backend


def _byte_level_bpe(described: GGUFVocabulary) -> tokenizers.Tokenizer:
  """Byte-pair encoding over UTF-8 bytes (Radford et al. 2019), cut into words by `tokenizer.ggml.pre`."""
  pre = described.pre
  if pre not in _WORDS:
    raise ValueError(
      f'{described.source} has tokenizer.ggml.pre {pre!r}, expected one of {", ".join(sorted(_WORDS))}; another way to '
      'cut words gives other tokens, so use the model as safetensors with its tokenizer.json.'
    )
  merges = [tuple(merge.split(' ')) for merge in described.array('merges')]
  backend = _bpe(described, merges, ignore_merges=pre in _WHOLE_WORDS)
  if pre in _COMPOSED:
    backend.normalizer = normalizers.NFC()
  words = [pre_tokenizers.Split(Regex(pattern), behavior='isolated') for pattern in _WORDS[pre]]
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [*words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  backend.decoder = decoders.ByteLevel()
  _add_ends(backend, described, begins=pre in _WHOLE_WORDS)
  return backend


def _sentencepiece_bpe(described: GGUFVocabulary) -> tokenizers.Tokenizer:
  """Byte-pair encoding of SentencePiece (Kudo and Richardson 2018): a pair's rank is the score of what it makes."""
  if described.get('remove_extra_whitespaces', bool, False):
    raise ValueError(
      f'{described.source} has tokenizer.ggml.remove_extra_whitespaces=True, which pdjax does not do; '
      'use the model as safetensors with its tokenizer.json.'
    )
  tokens, scores = described.tokens, described.one_each('scores', float)
  ids = {token: i for i, token in enumerate(tokens)}
  ranked = []
  for i, token in enumerate(tokens):
    for cut in range(1, len(token)):
      left, right = token[:cut], token[cut:]
      if left in ids and right in ids:
        ranked.append((-scores[i], ids[left], ids[right]))
  merges = [(tokens[left], tokens[right]) for _, left, right in sorted(ranked)]
  lost = next((token for token in _BYTE_TOKENS if token not in ids), None)
  unknown = described.token('unknown_token_id')
  if lost is not None and unknown is None:
    raise ValueError(
      f'{described.source} lacks token {lost!r} and names no unknown token, expected one of them for characters that '
      'have no token of their own; convert the model again.'
    )
  backend = _bpe(described, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
  spaces: list[normalizers.Normalizer] = [normalizers.Replace(' ', '▁')]
  strip = []
  if described.get('add_space_prefix', bool, True):
    spaces.insert(0, normalizers.Prepend('▁'))
    strip = [decoders.Strip(' ', left=1, right=0)]
  backend.normalizer = normalizers.Sequence(spaces)
  backend.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), *strip])
  _add_ends(backend, described, begins=True)
  return backend


def _bpe(described: GGUFVocabulary, merges: list, **options: Any) -> tokenizers.Tokenizer:
  vocabulary = {token: i for i, token in enumerate(described.tokens)}
  try:
    return tokenizers.Tokenizer(models.BPE(vocabulary, merges, **options))
  except Exception as error:  # the Rust side raises nothing more precise
    raise ValueError(
      f'{described.source} has tokens and merges that do not fit together ({error}); convert the model again.'
    ) from error


def _add_ends(backend: tokenizers.Tokenizer, described: GGUFVocabulary, begins: bool):
  """Put a beginning and an end token around raw text where the file asks for them; `begins` if it does not say."""
  ends = {}
  for place, default in (('bos', begins), ('eos', False)):
    token, token_id = described.token(f'{place}_token_id'), described.token_id(f'{place}_token_id')
    if described.get(f'add_{place}_token', bool, default) and token is not None:
      ends[place] = (token, token_id)
  if ends:
    template = [ends['bos'][0]] if 'bos' in ends else []
    template += ['$A', ends['eos'][0]] if 'eos' in ends else ['$A']
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(ends.values()))


def _add_tokens(backend: tokenizers.Tokenizer, described: GGUFVocabulary):
  """Let control and user-defined tokens be found in text before anything else cuts it."""
  added = [(token, kind) for token, kind in described.typed() if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
  special = [AddedToken(token, special=True, normalized=False) for token, kind in added if kind != _USER_DEFINED]
  backend.add_special_tokens(special)
  backend.add_tokens([AddedToken(t, special=False, normalized=False) for t, kind in added if kind == _USER_DEFINED])
