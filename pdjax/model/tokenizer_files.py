"""Reads the tokens that a folder of Hugging Face names and adds, and its chat templates, as transformers 5 does."""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers
from absl import logging
from tokenizers import AddedToken

from pdjax.model.text_files import read_json, read_text

_CONFIG, _MAP, _ADDED = 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json'
_EXTRA, _OLDER_EXTRA = 'extra_special_tokens', 'additional_special_tokens'
_NAMES = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')
_FLAGS = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')

Token = str | AddedToken


@dataclasses.dataclass(frozen=True)
class NamedTokens:
  """The tokens that a folder names beside its tokenizer.json.

  Attributes:
    special: Special tokens by the names that chat templates call.
    ends: The token that each file names as the end of a sequence, whichever of them has the last word on the name.
  """

  special: Mapping[str, str]
  ends: Mapping[str, str]


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """The contents of tokenizer_config.json; empty if there is none."""
  path = folder / _CONFIG
  return read_json(path) if path.is_file() else {}


def read_names(
  folder: pathlib.Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer, adds_tokens: bool = True
) -> NamedTokens:
  """Read the tokens that a folder names, and add those that its tokenizer lacks.

  Where tokenizer_config.json has an `added_tokens_decoder`, it is the whole truth. In older folders
  special_tokens_map.json goes before it, and added_tokens.json lists what was added to the vocabulary.

  Args:
    folder: The folder with the files.
    config: The contents of tokenizer_config.json.
    backend: The tokenizer of tokenizer.json; changed in place.
    adds_tokens: False leaves it as it is.

  Raises:
    ValueError: if a file holds what cannot be read as tokens, or names a beginning or an end that is no token.
  """
  read = _Reader(folder, config, backend)
  added = read.added()
  names = {name: token for name, token in read.names.items() if str(token)}
  _check_ends(folder, names, read.sources, backend, [*added.values(), *read.extra])
  if adds_tokens:
    _add_tokens(backend, added, names, read.extra)
    _tell_other_ids(folder, added, backend)
  return NamedTokens({name: str(token) for name, token in names.items()}, read.ends)


def _add_tokens(
  backend: tokenizers.Tokenizer, added: Mapping[int, AddedToken], names: Mapping[str, Token], extra: Iterable[Token]
) -> None:
  """Give the tokenizer the tokens it lacks; one it has takes the flags that it is given last, but stays special."""
  known = backend.get_added_tokens_decoder().values()
  contents = {str(token) for token in (*known, *added.values())}
  new: list[Token] = [token for _, token in sorted(added.items())]
  for token in (*names.values(), *extra):
    if str(token) not in contents and token not in new:
      new.append(token)
  special = {str(token) for token in (*names.values(), *(one for one in known if one.special))}
  backend.add_tokens([_as_added(token, special=str(token) in special) for token in new])


class _Reader:
  """The tokens that the files name, each file by its own rules."""

  def __init__(self, folder: pathlib.Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer):
    self._folder, self._config, self._backend = folder, config, backend
    self.names: dict[str, Token] = {}
    self.sources: dict[str, str] = {}  # the file that has the last word on each name
    self.ends: dict[str, str] = {}
    # Special tokens without names: what stands under the older key counts where the newer is not there.
    keys = (_EXTRA, _OLDER_EXTRA)
    self._extra = {key: self._listed(config[key], _CONFIG, key) for key in keys if key in config}
    if _OLDER_EXTRA in self._extra and not self._extra.get(_EXTRA):
      self._extra[_EXTRA] = self._extra.pop(_OLDER_EXTRA)
    self._read_end(config, _CONFIG)
    self._read_names(config, _CONFIG)
    self._named_ones(_CONFIG)
    self._whole = config.get('added_tokens_decoder') is not None
    if (folder / _MAP).is_file():
      entries = read_json(folder / _MAP)
      self._read_end(entries, _MAP)
      if not self._whole:
        self._read_map(entries)
    order = [*_NAMES, *(name for name in self.names if name not in _NAMES)]
    self.names = {name: self.names[name] for name in order if name in self.names}

  @property
  def extra(self) -> list[Token]:
    """Special tokens without names."""
    extra = self._extra.get(_EXTRA, self._extra.get(_OLDER_EXTRA, []))
    assert isinstance(extra, list)
    return extra

  def added(self) -> dict[int, AddedToken]:
    """The tokens that were added to the vocabulary, by their ids; names take over their flags."""
    added = {}
    if self._whole:
      entries = self._config['added_tokens_decoder']
      if not isinstance(entries, dict):
        raise self._error(_CONFIG, f'added_tokens_decoder={entries!r}', 'tokens by their ids')
      for key, value in entries.items():
        if not key.isdecimal() or not isinstance(value, dict):
          raise self._error(_CONFIG, f'added_tokens_decoder[{key!r}]={value!r}', 'a token with its flags for each id')
        added[int(key)] = self._token(value, _CONFIG, f'added_tokens_decoder[{key!r}]', special=False)
    else:
      if (self._folder / _ADDED).is_file():
        # Not those under the older key: transformers makes no special tokens of them here.
        special = [*(self.names[name] for name in _NAMES if name in self.names), *self._extra.get(_EXTRA, [])]
        for content, token_id in read_json(self._folder / _ADDED).items():
          if type(token_id) is not int:
            raise self._error(_ADDED, f'{content!r}: {token_id!r}', 'an id for each token')
          is_special = content in map(str, special)
          added[token_id] = AddedToken(content, normalized=not is_special, special=is_special)
      added |= self._backend.get_added_tokens_decoder()
    by_content = {str(token): token for token in added.values()}
    standard = {name: token for name, token in self.names.items() if name in _NAMES}
    self.names |= {name: by_content.get(str(token), token) for name, token in standard.items()}
    return added

  def _read_end(self, entries: Mapping[str, Any], file: str) -> None:
    if value := entries.get('eos_token'):
      self.ends[file] = str(self._token(value, file, 'eos_token'))

  def _read_names(self, entries: Mapping[str, Any], file: str) -> None:
    for name, value in entries.items():
      if not name.endswith('_token') or isinstance(value, bool):  # as add_bos_token
        continue
      if name not in _NAMES and isinstance(self.names.get(name), str):  # a name of the model's own: the first counts
        continue
      if value is None:
        self.names.pop(name, None)
      elif isinstance(value, str | dict):
        self.names[name] = self._token(value, file, name)
        self.sources[name] = file
      elif name in _NAMES:
        raise self._error(file, f'{name}={value!r}', 'a text or a token with its flags')

  def _read_map(self, entries: Mapping[str, Any]) -> None:
    self._read_names(entries, _MAP)
    if _OLDER_EXTRA in entries:
      self._extra[_OLDER_EXTRA] = self._listed(entries[_OLDER_EXTRA], _MAP, _OLDER_EXTRA)
    if _EXTRA in entries:
      extra, known = self._listed(entries[_EXTRA], _MAP, _EXTRA), self._extra.get(_EXTRA, [])
      self._extra[_EXTRA] = extra if isinstance(extra, dict) else [*known, *(one for one in extra if one not in known)]
    self._named_ones(_MAP)

  def _named_ones(self, file: str) -> None:
    """Extra special tokens may have names of their own."""
    if isinstance(named := self._extra.get(_EXTRA), dict):
      self.names |= named
      self.sources |= dict.fromkeys(named, file)
      del self._extra[_EXTRA]

  def _listed(self, value: Any, file: str, key: str) -> list[Token] | dict[str, Token]:
    if isinstance(value, dict) and key == _EXTRA:
      return {name: self._token(token, file, f'{key}[{name!r}]') for name, token in value.items()}
    if value is not None and not isinstance(value, list):
      raise self._error(file, f'{key}={value!r}', 'a list of tokens')
    return [self._token(one, file, key) for one in value or [] if one != '']

  def _token(self, value: Any, file: str, key: str, special: bool = True) -> Any:
    """A token as it stands in a file: a text, or an object with flags; `special` if these do not say."""
    if isinstance(value, str):
      return value
    content = value.get('content') if isinstance(value, dict) else None
    flags = {flag: value[flag] for flag in _FLAGS if flag in value} if content else {}
    if not isinstance(content, str) or not all(isinstance(flag, bool) for flag in flags.values()):
      raise self._error(file, f'{key}={value!r}', 'a text or a token with its flags')
    if special and '__type' not in value:
      flags['special'] = True
    return AddedToken(content, **flags)

  def _error(self, file: str, found: str, expected: str) -> ValueError:
    return ValueError(f'{self._folder / file} has {found}, expected {expected}; download it again.')


def _as_added(token: Token, special: bool) -> AddedToken:
  if isinstance(token, str):
    return AddedToken(token, special=True)
  token.special = token.special or special
  return token


def _check_ends(
  folder: pathlib.Path,
  names: Mapping[str, Token],
  sources: Mapping[str, str],
  backend: tokenizers.Tokenizer,
  added: Iterable[Token],
) -> None:
  """Refuse a beginning or an end that would be made up: chat templates write these, and models end with them."""
  contents = {str(token) for token in added}
  for name in ('bos_token', 'eos_token'):
    token = str(names.get(name, ''))
    if token and backend.token_to_id(token) is None and token not in contents:
      raise ValueError(
        f'{folder / "tokenizer.json"} lacks token {token!r}, expected it because {sources[name]} names it as {name}; '
        'the two do not belong together: download both again.'
      )


def _tell_other_ids(folder: pathlib.Path, added: Mapping[int, AddedToken], backend: tokenizers.Tokenizer) -> None:
  """Added tokens follow the vocabulary, whatever id a file gives them: as in transformers, but not in silence."""
  others = {token.content: (token_id, backend.token_to_id(token.content)) for token_id, token in added.items()}
  if others := {content: ids for content, ids in others.items() if ids[0] != ids[1]}:
    logging.warning(
      '%s names ids of added tokens that its tokenizer.json does not give: %s.',
      folder,
      ', '.join(f'{content!r} is {found} and not {named}' for content, (named, found) in others.items()),
    )


# Chat templates


@dataclasses.dataclass(frozen=True)
class Templates:
  """The chat templates of a tokenizer: for any chat, and for one with tools if that is another."""

  default: str | None = None
  tools: str | None = None


def read_templates(folder: pathlib.Path, config: Mapping[str, Any]) -> Templates:
  """The chat templates of a folder: files of their own go before what tokenizer_config.json holds."""
  named = {path.stem: read_text(path) for path in sorted((folder / 'additional_chat_templates').glob('*.jinja'))}
  if (folder / 'chat_template.jinja').is_file():
    named['default'] = read_text(folder / 'chat_template.jinja')
  if not named:
    template = config.get('chat_template')
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
      named = {str(entry.get('name')): entry.get('template', entry) for entry in template}
    elif template is not None:
      named = {'default': template}
  for template in (named.get('default'), named.get('tool_use')):
    if template is not None and not isinstance(template, str):
      raise ValueError(
        f'{folder / _CONFIG} has the chat_template {template!r}, expected a text, or a list of names with a text each; '
        'download it again.'
      )
  return Templates(named.get('default'), named.get('tool_use'))
