"""Renders chats by the Jinja templates that checkpoints carry, from messages as clients of OpenAI's API write them."""

import datetime
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from pdjax.types.checks import check_text


def render_chat(
  template: str,
  messages: Sequence[Mapping[str, Any]],
  tools: Sequence[Mapping[str, Any]] | None,
  add_generation_prompt: bool,
  special_tokens: Mapping[str, str],
  source: str,
) -> str:
  """The text of a chat, as the model was trained to see it.

  Messages are read as transformers 5 reads them: a key that is None is as good as left out, and `reasoning_content` is
  filled from `thinking` or `reasoning`. Text in parts is joined, unless the template goes through the parts itself. A
  message without content, such as one of tool calls, has an empty one where the template cannot do without.

  Args:
    template: Jinja source.
    messages: Mappings with `role`, in order.
    tools: JSON schemas of the functions that the model may call, or None.
    add_generation_prompt: End with what opens an answer of the model.
    special_tokens: Those that the template may call by name.
    source: The owner of the template, for error messages.

  Raises:
    ValueError: if the messages or tools are of another form, hold what is no text, or the template refuses them.
  """
  plain = _plain_messages(messages)
  functions = _plain_tools(tools)
  _check_texts(plain, 'messages')
  _check_texts(functions, 'tools')
  parts = {
    place: _text_parts(message['content'], place)
    for place, message in enumerate(plain)
    if isinstance(message.get('content'), list)
  }

  def render(contents: dict[int, Any]) -> str:
    return _compile(template).render(
      messages=[one | {'content': contents[place]} if place in contents else one for place, one in enumerate(plain)],
      add_generation_prompt=add_generation_prompt,
      tools=functions,
      documents=None,
      **special_tokens,
    )

  try:
    if functions and not _uses_tools(template):
      raise _ToolsError
    try:
      return _render_parts(render, parts)
    except Exception:  # perhaps of a template that takes a content for granted
      lacking = {place: '' for place, message in enumerate(plain) if 'content' not in message}
      if not lacking:
        raise
      return _render_parts(lambda contents: render(lacking | contents), parts)
  except _ToolsError:
    raise ValueError(
      f'tools are given, but the chat template of {source} does not use any, so the model would not see them; '
      'leave tools out, or use a model that was trained to call functions.'
    ) from None
  except Exception as error:  # a template is a program of someone else: it may raise anything
    raise ValueError(
      f'the chat template of {source} refuses these messages ({type(error).__name__}: {error}); '
      'check their roles, order and contents against what the model expects.'
    ) from error


def _render_parts(render: Callable[[dict[int, Any]], str], parts: Mapping[int, list[dict[str, Any]]]) -> str:
  """Render with contents in parts where the template reads their texts, and with the joined text where it does not."""
  as_text: set[int] = set()
  while True:
    read: set[int] = set()
    contents: dict[int, Any] = {
      place: ''.join(part['text'] for part in own)
      if place in as_text
      else [_Part(part, functools.partial(read.add, place)) for part in own]
      for place, own in parts.items()
    }
    unread = [place for place in parts if place not in as_text]
    try:
      text = render(contents)
    except Exception:
      unread = [place for place in unread if place not in read][:1]  # templates go in order: it is the next that failed
      if not unread:
        raise
    else:
      unread = [place for place in unread if place not in read]
      if not unread:
        return text
    as_text.update(unread)


class _Part(dict):
  """A part of a content, which tells when its text is read."""

  def __init__(self, fields: Mapping[str, Any], tell: Callable[[], None]):
    super().__init__(fields)
    self._tell = tell

  def __getitem__(self, key: Any) -> Any:
    if key == 'text':
      self._tell()
    return super().__getitem__(key)

  def get(self, key: Any, default: Any = None) -> Any:
    if key == 'text':
      self._tell()
    return super().get(key, default)

  def __iter__(self) -> Any:
    return super().__iter__()  # with one of its own, a mapping is copied by its keys and not behind its back

  def copy(self) -> Any:
    return dict(self)

  def items(self) -> Any:
    self._tell()
    return super().items()

  def values(self) -> Any:
    self._tell()
    return super().values()


# Words that no template writes and none takes apart.
_ANSWER, _QUESTION = 'Xq7answer4Kz', 'Xq7question4Kz'


def texts_behind_an_answer(template: str, special_tokens: Mapping[str, str]) -> Iterator[str]:
  """The texts that the template puts behind an assistant's message: the last one, then one that a user answers.

  A template that refuses such a chat gives nothing.
  """
  system, user = {'role': 'system', 'content': 'Hi'}, {'role': 'user', 'content': 'Hi'}
  answer: dict[str, Any] = {'role': 'assistant', 'content': _ANSWER}
  in_parts: dict[str, Any] = {'role': 'assistant', 'content': [{'type': 'text', 'text': _ANSWER}]}
  for behind in ([], [{'role': 'user', 'content': _QUESTION}]):
    # In parts for a template that knows no other contents, behind a system's message for one that asks for it.
    for chat in ([user, answer], [user, in_parts], [system, user, answer]):
      try:
        text = render_chat(template, [*chat, *behind], None, False, special_tokens, '')
      except ValueError:
        continue
      if _ANSWER in text:
        yield text.rpartition(_ANSWER)[2].partition(_QUESTION)[0]
        break


# Messages


def _plain_messages(messages: Any) -> list[dict[str, Any]]:
  """Messages as dictionaries of our own, without the keys that are None, their reasoning by its usual names."""
  listed = list(messages) if isinstance(messages, Sequence) and not isinstance(messages, str) else []
  plain = []
  for message in listed:
    if not isinstance(message, Mapping):
      break
    kept = {key: _plain(value) for key, value in message.items() if value is not None}
    if 'role' not in kept:
      break
    named = (kept[name] for name in ('reasoning_content', 'thinking', 'reasoning') if name in kept)
    if (reasoning := next(named, None)) is not None:
      kept = {'thinking': reasoning} | kept | {'reasoning_content': reasoning}
    plain.append(kept)
  if not plain or len(plain) < len(listed):
    raise ValueError(f"messages are {messages!r}, expected a list like [{{'role': 'user', 'content': 'Hello'}}].")
  return plain


def _plain_tools(tools: Any) -> list[dict[str, Any]] | None:
  if tools is None:
    return None
  if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
    raise ValueError(
      f"tools are {tools!r}, expected a list of JSON schemas like [{{'type': 'function', 'function': {{...}}}}]."
    )
  return [_plain(tool) for tool in tools]


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _plain(one) for key, one in value.items()}
  return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _check_texts(value: Any, place: str) -> None:
  if isinstance(value, str):
    check_text(value, place)
  elif isinstance(value, dict):
    for key, one in value.items():
      _check_texts(key, f'a key of {place}')
      _check_texts(one, f'{place}[{key!r}]')
  elif isinstance(value, list):
    for index, one in enumerate(value):
      _check_texts(one, f'{place}[{index}]')


def _text_parts(content: Sequence[Any], message: int) -> list[dict[str, Any]]:
  """The parts of a message, each as a dictionary with its type and text."""
  parts = []
  for index, part in enumerate(content):
    place = f"messages[{message}]['content'][{index}]"
    if isinstance(part, str):
      part = {'type': 'text', 'text': part}
    if not isinstance(part, dict):
      raise ValueError(f"{place} is {part!r}, expected a part like {{'type': 'text', 'text': 'Hello'}}.")
    kind = part.get('type', 'text')
    if kind != 'text':
      raise ValueError(f"{place} is of type {kind!r}, expected 'text'; pdjax serves text only: say it in words.")
    if not isinstance(part.get('text'), str):
      raise ValueError(f"{place} is of type 'text' with the text {part.get('text')!r}, expected a string.")
    parts.append({'type': 'text'} | part)
  return parts


# Templates


class _ToolsError(Exception):
  """Tools for a template that would not show them."""


class _GenerationTag(jinja2.ext.Extension):
  """`{% generation %}`, which marks an assistant's words for training, renders what is inside."""

  tags = {'generation'}  # noqa: RUF012 (jinja2's own way)

  def parse(self, parser):
    next(parser.stream)
    return parser.parse_statements(('name:endgeneration',), drop_needle=True)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
  """The template, in a sandbox with what templates of Hugging Face rely on."""
  return _environment().from_string(source)


@functools.cache
def _environment() -> jinja2.Environment:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _raise_exception
  environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  return environment


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str):
  raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=16)
def _uses_tools(source: str) -> bool:
  return 'tools' in jinja2.meta.find_undeclared_variables(_environment().parse(source))
