"""Text and chats to tokens and back, by the rules that a checkpoint carries."""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from pdjax.model.chat import render_chat, texts_behind_an_answer
from pdjax.model.decoding import Decoding
from pdjax.model.end_tokens import EndTokens
from pdjax.model.gguf_vocabulary import GGUFVocabulary, build_backend
from pdjax.model.tokenizer_files import read_config, read_names, read_templates
from pdjax.types.checks import check_text
from pdjax.types.json_text import json_text

_MARK = re.compile(r'<[^/\s<>]{2,}>|\[[^/\s\[\]]{2,}\]')  # how ends of turns are spelled


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """A checkpoint's tokenizer and its chat template.

  Text that spells a special token (`<|im_end|>`) becomes that token, in raw text and in chats alike, as in the
  models' own tokenizers. Keep such text out of untrusted prompts if that matters.

  Attributes:
    backend: The tokenizer proper; its post-processor adds what the checkpoint wants around raw text.
    chat_template: Jinja source that renders a chat, or None.
    special_tokens: Those that templates may call by name: `bos_token`, `eos_token` and others.
    eos_token_ids: Tokens that end a sequence.
    source: The file or folder it came from, for error messages.
    tool_template: Jinja source for chats with tools, if that is another.
    own_ends: The tokens that its own files name as the end of a sequence.
  """

  backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
  chat_template: str | None = dataclasses.field(default=None, repr=False)
  special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
  eos_token_ids: tuple[int, ...] = ()
  source: str = 'the tokenizer'
  tool_template: str | None = dataclasses.field(default=None, repr=False)
  own_ends: EndTokens = dataclasses.field(default_factory=EndTokens)

  @property
  def vocab_size(self) -> int:
    """Tokens it can give, special ones included; a model's V may be padded beyond it."""
    return self.backend.get_vocab_size(with_added_tokens=True)

  @functools.cached_property
  def turn_end_ids(self) -> tuple[int, ...]:
    """The token that the chat template puts behind an assistant's message; ordinary text ends no turn.

    It is the first token behind the message that is spelled like `<|im_end|>` or was added to the vocabulary. Only a
    special one counts behind further text, and before a closing tag such as `</think>`, which is part of the message.
    """
    if self.chat_template is None:
      return ()
    for text in texts_behind_an_answer(self.chat_template, self.special_tokens):
      mark = _MARK.match(text.lstrip())
      token = None if mark is None else self.backend.token_to_id(mark[0])
      token = self._first_end(text) if token is None else token
      if token is not None:
        return (token,)
    return ()

  def _first_end(self, text: str) -> int | None:
    added = self.backend.get_added_tokens_decoder()
    closing, behind_text = None, False
    for token in self.backend.encode(text, add_special_tokens=False).ids:
      if token in added and added[token].special:
        return token
      spelled = self.backend.decode([token], skip_special_tokens=False)
      if token in added and spelled.strip() and not behind_text:
        if not spelled.startswith('</'):
          return token
        closing = token if closing is None else closing
      elif spelled.strip():
        behind_text = True
    return closing

  def encode(self, text: str) -> list[int]:
    """Token ids of raw text, with a beginning or end token only where the checkpoint itself adds one.

    Raises:
      ValueError: if the text holds half a surrogate pair, which is no character.
    """
    return self.backend.encode(check_text(text, 'the text')).ids

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """The text of these tokens; bytes that are no valid UTF-8 become U+FFFD and leave those beside them alone.

    Args:
      ids: Token ids; those beyond the vocabulary stand for no text.
      skip_special: Leave out control tokens such as the end of a sequence.
    """
    return self.decoding.decode(ids, skip_special)

  @functools.cached_property
  def decoding(self) -> Decoding:
    """The decoder of tokens to text, for whole lists as for one token at a time."""
    return Decoding(self.backend)

  def apply_chat_template(
    self,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
  ) -> list[int]:
    """Token ids of a chat, as the model was trained to see it; see `render_chat`.

    Args:
      messages: Mappings with `role` (`system`, `user`, `assistant`, `tool`) and `content`, a text or a list of parts
        like `{'type': 'text', 'text': 'Hello'}`, in order. A key that is None is as good as left out.
      add_generation_prompt: End with what opens an answer of the model.
      tools: JSON schemas of the functions that the model may call.

    Raises:
      ValueError: if there is no template, the messages are not such mappings or hold what is no text, the template
        refuses them, or it does not use the tools.
    """
    with_tools = tools is not None and self.tool_template is not None
    template = self.tool_template if with_tools else self.chat_template
    if template is None:
      raise ValueError(
        f'{self.source} has no chat template, expected one to render a chat; '
        'give the prompt as raw text to encode(), or use an instruction-tuned checkpoint.'
      )
    text = render_chat(template, messages, tools, add_generation_prompt, self.special_tokens, self.source)
    # The template writes its own beginning token.
    return self.backend.encode(check_text(text, 'the rendered chat'), add_special_tokens=False).ids

  @classmethod
  def from_gguf_metadata(cls, metadata: Mapping[str, Any], source: str = 'the GGUF metadata') -> 'Tokenizer':
    """Build the tokenizer that a GGUF file describes.

    Args:
      metadata: The file's `tokenizer.*` keys with plain Python values.
      source: The file, for error messages.

    Raises:
      ValueError: if it is of a kind that is not known here, or incomplete.
    """
    described = GGUFVocabulary(metadata, source)
    ends = described.end_tokens()
    return cls(
      backend=build_backend(described),
      chat_template=described.checked('tokenizer.chat_template', str, None),
      special_tokens=described.special_tokens(),
      eos_token_ids=ends.ids,
      source=source,
      tool_template=described.checked('tokenizer.chat_template.tool_use', str, None),
      own_ends=ends,
    )

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Write the files that `from_folder` reads."""
    folder = pathlib.Path(folder)
    self.backend.save(str(folder / 'tokenizer.json'))
    config = {name: token for name, token in self.special_tokens.items() if name.endswith('_token')}
    others = {name: token for name, token in self.special_tokens.items() if name not in config}
    if others:
      config['extra_special_tokens'] = others  # type: ignore[assignment]
    text = json_text(config, indent=2)
    (folder / 'tokenizer_config.json').write_text(text, encoding='utf-8')
    if self.chat_template is not None:
      (folder / 'chat_template.jinja').write_text(self.chat_template, encoding='utf-8')
    if self.tool_template is not None:
      (folder / 'additional_chat_templates').mkdir(exist_ok=True)
      (folder / 'additional_chat_templates' / 'tool_use.jinja').write_text(self.tool_template, encoding='utf-8')

  @classmethod
  def from_folder(
    cls, folder: str | os.PathLike[str], eos_token_ids: Sequence[int] = (), adds_tokens: bool = True
  ) -> 'Tokenizer':
    """Read tokenizer.json and what stands beside it, as transformers 5 does.

    That is tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja and the folder
    additional_chat_templates, where they exist. Special tokens that they name and tokenizer.json lacks are added.

    Args:
      folder: The folder with the files.
      eos_token_ids: Tokens that end a sequence by the model's configuration; the tokenizer's own counts besides.
      adds_tokens: False for a folder that `save` wrote: its tokenizer.json lacks nothing.

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
    config = read_config(folder)
    named = read_names(folder, config, backend, adds_tokens)
    if unknown := [token for token in eos_token_ids if not 0 <= token < 2**32 or backend.id_to_token(token) is None]:
      raise ValueError(
        f'{path} lacks a token of id {unknown[0]}, expected it because the configuration of the model names it as the '
        'end of a sequence; the two do not belong together: download both again.'
      )
    templates = read_templates(folder, config)
    found = {file: backend.token_to_id(token) for file, token in named.ends.items()}
    ends = EndTokens(tuple((file, (token_id,)) for file, token_id in found.items() if token_id is not None))
    return cls(
      backend=backend,
      chat_template=templates.default,
      special_tokens=named.special,
      eos_token_ids=tuple(dict.fromkeys((*eos_token_ids, *ends.ids))),
      source=str(folder),
      tool_template=templates.tools,
      own_ends=ends,
    )
