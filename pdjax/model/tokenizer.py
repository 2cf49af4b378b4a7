"""Text and chats to tokens and back, by the rules that a checkpoint carries."""

import dataclasses
import datetime
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from pdjax.model.decoding import Decoding
from pdjax.model.text_files import read_json, read_text

# token types of GGUF
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """A checkpoint's tokenizer and its chat template.

  Text that spells a special token (`<|im_end|>`) becomes that token, in raw text and in chats alike, as in the
  models' own tokenizers. Keep such text out of untrusted prompts if that matters.

  Attributes:
    backend: The tokenizer proper; its post-processor adds what the checkpoint wants around raw text.
    chat_template: Jinja source that renders a chat, or None.
    special_tokens: What templates may call by name: `bos_token`, `eos_token` and others.
    eos_token_ids: Tokens that end a sequence.
    source: Where it came from, for error messages.
  """

  backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
  chat_template: str | None = dataclasses.field(default=None, repr=False)
  special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
  eos_token_ids: tuple[int, ...] = ()
  turn_end_ids: tuple[int, ...] = ()
  source: str = 'the tokenizer'

  @property
  def vocab_size(self) -> int:
    """Tokens it can give, special ones included; a model's V may be padded beyond it."""
    return self.backend.get_vocab_size(with_added_tokens=True)

  def encode(self, text: str) -> list[int]:
    """Token ids of raw text, with a beginning or end token only where the checkpoint itself adds one."""
    return self.backend.encode(text).ids

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """The text of these tokens; bytes that are no valid UTF-8 become U+FFFD and leave those beside them alone.

    Args:
      ids: Token ids; those beyond the vocabulary stand for no text.
      skip_special: Leave out control tokens such as the end of a sequence.
    """
    return self.decoding.decode(ids, skip_special)

  @functools.cached_property
  def decoding(self) -> Decoding:
    """What turns tokens to text, for whole lists as for one token at a time."""
    return Decoding(self.backend)

  def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
    """Token ids of a chat, as the model was trained to see it.

    Args:
      messages: Mappings with `role` (`system`, `user`, `assistant`) and `content`, in order.
      add_generation_prompt: End with what opens an answer of the model.

    Raises:
      ValueError: if there is no template, the messages are not such mappings, or the template refuses them.
    """
    if self.chat_template is None:
      raise ValueError(
        f'{self.source} has no chat template, expected one to render a chat; '
        'give the prompt as raw text to encode(), or use an instruction-tuned checkpoint.'
      )
    if not _are_messages(messages):
      raise ValueError(f"messages are {messages!r}, expected a list like [{{'role': 'user', 'content': 'Hello'}}].")
    try:
      text = _compile(self.chat_template).render(
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        tools=None,
        documents=None,
        **self.special_tokens,
      )
    except Exception as error:  # a template is a program of someone else: it may raise anything
      raise ValueError(
        f'the chat template of {self.source} refuses these messages ({type(error).__name__}: {error}); '
        'check their roles, order and contents against what the model expects.'
      ) from error
    return self.backend.encode(text, add_special_tokens=False).ids  # the template writes its own beginning token

  @classmethod
  def from_gguf_metadata(cls, metadata: Mapping[str, Any], source: str = 'the GGUF metadata') -> 'Tokenizer':
    """Build the tokenizer that a GGUF file describes.

    Args:
      metadata: The file's `tokenizer.*` keys with plain Python values.
      source: The file, for error messages.

    Raises:
      ValueError: if it is of a kind that is not known here, or incomplete.
    """
    described = _GGUFVocabulary(metadata, source)
    kind = described.get('model', str)
    if kind == 'gpt2':
      backend = _byte_level_bpe(described)
    elif kind == 'llama':
      backend = _sentencepiece_bpe(described)
    else:
      raise ValueError(
        f"{source} has tokenizer.ggml.model {kind!r}, expected 'gpt2' or 'llama'; "
        'pdjax knows no other kind in GGUF yet, so use the model as safetensors with its tokenizer.json.'
      )
    _add_tokens(backend, described)
    names = {f'{name}_token': described.token(f'{key}_token_id') for name, key in _GGUF_SPECIAL_TOKENS.items()}
    return cls(
      backend=backend,
      chat_template=described.checked('tokenizer.chat_template', str, None),
      special_tokens={name: token for name, token in names.items() if token is not None},
      eos_token_ids=described.end_ids(),
      source=source,
    )

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Write the files that `from_folder` reads."""
    folder = pathlib.Path(folder)
    self.backend.save(str(folder / 'tokenizer.json'))
    config = json.dumps(dict(self.special_tokens), ensure_ascii=False, indent=2)
    (folder / 'tokenizer_config.json').write_text(config, encoding='utf-8')
    if self.chat_template is not None:
      (folder / 'chat_template.jinja').write_text(self.chat_template, encoding='utf-8')

  @classmethod
  def from_folder(cls, folder: str | os.PathLike[str], eos_token_ids: Sequence[int] = ()) -> 'Tokenizer':
    """Read tokenizer.json, and tokenizer_config.json and chat_template.jinja where they exist.

    Args:
      folder: Where the files are.
      eos_token_ids: Tokens that end a sequence, if the model's configuration names them; else the tokenizer's own.

    Raises:
      FileNotFoundError: if there is no tokenizer.json.
      ValueError: if a file cannot be read as what it should be.
    """
    folder = pathlib.Path(folder)
    path = folder / 'tokenizer.json'
    if not path.is_file():
      raise FileNotFoundError(f'{folder} has no tokenizer.json, expected one; download it with the model.')
    try:
      backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises nothing more precise
      raise ValueError(f'{path} is damaged or of an unknown kind ({error}); download it again.') from error
    backend.no_truncation()
    backend.no_padding()
    config_path = folder / 'tokenizer_config.json'
    config = read_json(config_path) if config_path.is_file() else {}
    special_tokens = {}
    for name, value in config.items():
      if name.endswith('_token') and value is not None and not isinstance(value, bool):
        special_tokens[name] = str(value.get('content')) if isinstance(value, dict) else str(value)
    for name in ('bos_token', 'eos_token'):  # chat templates write these
      if name in special_tokens and backend.token_to_id(special_tokens[name]) is None:
        raise ValueError(
          f'{path} lacks token {special_tokens[name]!r}, expected it because tokenizer_config.json names it as {name}; '
          'the two do not belong together: download both again.'
        )
    if unknown := [token for token in eos_token_ids if not 0 <= token < 2**32 or backend.id_to_token(token) is None]:
      raise ValueError(
        f'{path} lacks a token of id {unknown[0]}, expected it because the configuration of the model names it as the '
        'end of a sequence; the two do not belong together: download both again.'
      )
    eos_id = backend.token_to_id(special_tokens.get('eos_token', ''))
    if not eos_token_ids and eos_id is not None:
      eos_token_ids = (eos_id,)
    return cls(
      backend=backend,
      chat_template=_folder_template(folder, config_path, config),
      special_tokens=special_tokens,
      eos_token_ids=tuple(eos_token_ids),
      source=str(folder),
    )


# Chat templates


class _GenerationTag(jinja2.ext.Extension):
  """`{% generation %}`, which marks an assistant's words for training, renders what is inside."""

  tags = {'generation'}  # noqa: RUF012 (jinja2's own way)

  def parse(self, parser):
    next(parser.stream)
    return parser.parse_statements(('name:endgeneration',), drop_needle=True)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
  """The template, in a sandbox with what templates of Hugging Face rely on."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _raise_exception
  environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  return environment.from_string(source)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _are_messages(messages: Any) -> bool:
  return not isinstance(messages, str) and all(isinstance(m, Mapping) and 'role' in m for m in messages)


def _raise_exception(message: str):
  raise jinja2.TemplateError(message)


# GGUF


def gguf_end_ids(metadata: Mapping[str, Any], source: str) -> tuple[int, ...]:
  """Tokens that end a sequence, by the `tokenizer.*` keys of a GGUF file.

  Raises:
    ValueError: if what the keys hold cannot be.
  """
  return _GGUFVocabulary(metadata, source).end_ids()


_GGUF_SPECIAL_TOKENS = {'bos': 'bos', 'eos': 'eos', 'unk': 'unknown', 'pad': 'padding'}

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

_BYTE_TOKENS = tuple(f'<0x{byte:02X}>' for byte in range(256))

# how tokenizer.ggml.pre cuts text into words, before words become bytes
_WORDS: dict[str, tuple[str, ...]] = {
  'gpt-2': (_GPT2_WORDS,),
  'smollm': (r'\p{N}', _GPT2_WORDS),
  'llama-bpe': (_LLAMA3_WORDS,),
  'qwen2': (_QWEN2_WORDS,),
  'tekken': (_TEKKEN_WORDS,),
  'default': (r'[\p{P}$+<=>^~|]+', _GPT2_WORDS, r'\p{N}+', '[0-9][0-9][0-9]'),
}
_WHOLE_WORDS = ('llama-bpe', 'tekken')  # a word that is a token needs no merges, and raw text begins with a token
# By the same key: what ends the turns of a chat model, and what else ends its answers. Its generation_config.json lists
# all of them, a GGUF file names the first only. (Base models end with another token, and go on past turns; SmolLM2, of
# 'smollm', goes on past its <|endoftext|>.)
_CHAT_ENDS = {
  'qwen2': ('<|im_end|>', ('<|endoftext|>',)),
  'llama-bpe': ('<|eot_id|>', ('<|end_of_text|>', '<|eom_id|>')),
}
_KINDS = {str: 'text', int: 'whole number', float: 'number', bool: 'truth value', list: 'list'}
_ALIASES = {'llama3': 'llama-bpe', 'llama-v3': 'llama-bpe'}


@dataclasses.dataclass(frozen=True)
class _GGUFVocabulary:
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
    """How text is cut into words: a key of `_WORDS`, if it is a way known here."""
    pre = self.get('pre', str, 'default')
    return _ALIASES.get(pre, pre)

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

  def typed(self) -> list[tuple[str, int]]:
    """Each token with its type, if the file has any types."""
    if self.get('token_type', list) is None:
      return []
    return list(zip(self.tokens, self.one_each('token_type', int), strict=True))

  def end_ids(self) -> tuple[int, ...]:
    keys = [f'{place}_token_id' for place in ('eos', 'eot', 'eom')]
    if self.get('tokens', list) is None:  # they may be named all the same
      ids = [self.get(key, int) for key in keys]
    else:
      ids = [self.token_id(key) for key in keys]
      turn_end, others = _CHAT_ENDS.get(self.pre, ('', ()))
      if self.token('eos_token_id') == turn_end:
        ids += [i for i, (token, kind) in enumerate(self.typed()) if kind == _CONTROL and token in others]
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))

  def _error(self, key: str, found: object, expected: str) -> ValueError:
    return ValueError(f'{self.source} has {key}={found}, expected {expected}; convert the model again.')


def _byte_level_bpe(described: _GGUFVocabulary) -> tokenizers.Tokenizer:
  """Byte-pair encoding over UTF-8 bytes (Radford et al. 2019), cut into words by `tokenizer.ggml.pre`."""
  pre = described.pre
  if pre not in _WORDS:
    raise ValueError(
      f'{described.source} has tokenizer.ggml.pre {pre!r}, expected one of {", ".join(_WORDS)}; another way to cut '
      'words gives other tokens, so use the model as safetensors with its tokenizer.json.'
    )
  merges = [tuple(merge.split(' ')) for merge in described.array('merges')]
  backend = _bpe(described, merges, ignore_merges=pre in _WHOLE_WORDS)
  if pre == 'qwen2':
    backend.normalizer = normalizers.NFC()
  words = [pre_tokenizers.Split(Regex(pattern), behavior='isolated') for pattern in _WORDS[pre]]
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [*words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  backend.decoder = decoders.ByteLevel()
  _add_ends(backend, described, begins=pre in _WHOLE_WORDS)
  return backend


def _sentencepiece_bpe(described: _GGUFVocabulary) -> tokenizers.Tokenizer:
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


def _bpe(described: _GGUFVocabulary, merges: list, **options: Any) -> tokenizers.Tokenizer:
  vocabulary = {token: i for i, token in enumerate(described.tokens)}
  try:
    return tokenizers.Tokenizer(models.BPE(vocabulary, merges, **options))
  except Exception as error:  # the Rust side raises nothing more precise
    raise ValueError(
      f'{described.source} has tokens and merges that do not fit together ({error}); convert the model again.'
    ) from error


def _add_ends(backend: tokenizers.Tokenizer, described: _GGUFVocabulary, begins: bool):
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


def _add_tokens(backend: tokenizers.Tokenizer, described: _GGUFVocabulary):
  """Let control and user-defined tokens be found in text before anything else cuts it."""
  added = [(token, kind) for token, kind in described.typed() if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
  special = [AddedToken(token, special=True, normalized=False) for token, kind in added if kind != _USER_DEFINED]
  backend.add_special_tokens(special)
  backend.add_tokens([AddedToken(t, special=False, normalized=False) for t, kind in added if kind == _USER_DEFINED])


# Folders of Hugging Face


def _folder_template(folder: pathlib.Path, config_path: pathlib.Path, config: Mapping[str, Any]) -> str | None:
  """The chat template: a file of its own goes before the configuration, and the default before named ones."""
  path = folder / 'chat_template.jinja'
  if path.is_file():
    return read_text(path)
  template = config.get('chat_template')
  if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
    default = next((entry for entry in template if entry.get('name') == 'default'), None)
    template = default and default.get('template', default)  # one without its text is refused as what it is
  if template is not None and not isinstance(template, str):
    raise ValueError(
      f'{config_path} has the chat_template {template!r}, expected a text, or a list of names with a text each; '
      'download it again.'
    )
  return template
