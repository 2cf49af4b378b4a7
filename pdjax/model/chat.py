"""Renders chats by the Jinja templates that checkpoints carry, from messages as clients of OpenAI's API write them."""

import dataclasses
import datetime
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from jinja2 import nodes

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
  filled from `thinking` or `reasoning`. Text in parts is joined, unless the template goes through the parts itself.

  Args:
    template: Jinja source.
    messages: Mappings with `role`, in order.
    tools: JSON schemas of the functions that the model may call, or None.
    add_generation_prompt: End with what opens an answer of the model.
    special_tokens: What the template may call by name.
    source: Whose template it is, for error messages.

  Raises:
    ValueError: if the messages or tools are of another form, hold what is no text, or the template refuses them.
  """
  plain = _plain_messages(messages)
  functions = _plain_tools(tools)
  _check_texts(plain, 'messages')
  _check_texts(functions, 'tools')
  parts_in = [place for place, message in enumerate(plain) if isinstance(message.get('content'), list)]
  checked = {place: _text_parts(plain[place]['content'], place) for place in parts_in}
  try:
    reads = _reads(template)
    if functions and not reads.tools:
      raise _ToolsError
    for place, parts in checked.items():
      plain[place]['content'] = parts if reads.parts else ''.join(part['text'] for part in parts)
    return _compile(template).render(
      messages=plain,
      add_generation_prompt=add_generation_prompt,
      tools=functions,
      documents=None,
      **special_tokens,
    )
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


# A word that no template writes and none takes apart.
_ANSWER = 'Xq7answer4Kz'


def texts_behind_an_answer(template: str, special_tokens: Mapping[str, str]) -> Iterator[str]:
  """What the template puts behind an assistant's message: the last of a chat, then one that a user answers.

  A template that refuses such a chat gives nothing.
  """
  user = {'role': 'user', 'content': 'Hi'}
  answer: dict[str, Any] = {'role': 'assistant', 'content': _ANSWER}
  in_parts: dict[str, Any] = {'role': 'assistant', 'content': [{'type': 'text', 'text': _ANSWER}]}
  for behind in ([], [user]):
    for message in (answer, in_parts):  # in parts for a template that knows no other contents
      try:
        text = render_chat(template, [user, message, *behind], None, False, special_tokens, '')
      except ValueError:
        continue
      if _ANSWER in text:
        yield text.rpartition(_ANSWER)[2]
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


@dataclasses.dataclass(frozen=True)
class _Reads:
  """What a template makes of its chat: whether it uses tools, and goes through the parts of a content."""

  tools: bool
  parts: bool


@functools.lru_cache(maxsize=16)
def _reads(source: str) -> _Reads:
  tree = _environment().parse(source)
  return _Reads(tools='tools' in jinja2.meta.find_undeclared_variables(tree), parts=_Contents(tree).are_gone_through())


# Filters that go through a list of parts, and those that make a text of whatever they are given.
_GOING_THROUGH = {'map', 'select', 'selectattr', 'reject', 'rejectattr'}
_MAKING_TEXT = {
  'capitalize', 'count', 'e', 'escape', 'indent', 'join', 'length', 'lower', 'replace', 'string', 'striptags', 'title',
  'tojson', 'trim', 'upper', 'wordcount', 'wordwrap',
}  # fmt: skip


class _Contents:
  """Follows the contents of messages through a template: to variables, into macros, through filters."""

  def __init__(self, tree: nodes.Template):
    self._tree = tree
    self._names: set[str] = set()  # of variables that may hold a content
    macros = {macro.name: [argument.name for argument in macro.args] for macro in tree.find_all(nodes.Macro)}
    known = -1
    while known < len(self._names):
      known = len(self._names)
      for assign in tree.find_all(nodes.Assign):
        if self._is_content(assign.node) and (name := _variable(assign.target)):
          self._names.add(name)
      for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in macros:
          given = dict(zip(macros[call.node.name], call.args, strict=False)) | {
            one.key: one.value for one in call.kwargs
          }
          self._names |= {name for name, value in given.items() if self._is_content(value)}

  def are_gone_through(self) -> bool:
    """Whether some loop, filter or index takes a content for a list of parts."""
    return (
      any(self._is_content(loop.iter) for loop in self._tree.find_all(nodes.For))
      or any(one.name in _GOING_THROUGH and self._is_content(one.node) for one in self._tree.find_all(nodes.Filter))
      or any(self._is_text_of_part(one) for one in self._tree.find_all(nodes.Getattr))
      or any(self._is_text_of_part(one) for one in self._tree.find_all(nodes.Getitem))
    )

  def _is_content(self, node: nodes.Node | None) -> bool:
    if isinstance(node, nodes.Name):
      return node.name in self._names
    if isinstance(node, nodes.Getattr | nodes.Getitem):
      sliced = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
      return _key(node) == 'content' or _variable(node) in self._names or (sliced and self._is_content(node.node))
    if isinstance(node, nodes.Filter):
      return node.name not in _MAKING_TEXT and self._is_content(node.node)
    if isinstance(node, nodes.CondExpr):
      return self._is_content(node.expr1) or self._is_content(node.expr2)
    if isinstance(node, nodes.Or | nodes.And):
      return self._is_content(node.left) or self._is_content(node.right)
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == 'get' and node.args:
      return isinstance(node.args[0], nodes.Const) and node.args[0].value == 'content'
    return False

  def _is_text_of_part(self, node: nodes.Getattr | nodes.Getitem) -> bool:
    """As in `message.content[0].text`."""
    part = node.node
    return _key(node) == 'text' and isinstance(part, nodes.Getitem) and self._is_content(part.node)


def _key(node: nodes.Getattr | nodes.Getitem) -> Any:
  if isinstance(node, nodes.Getattr):
    return node.attr
  return node.arg.value if isinstance(node.arg, nodes.Const) else None


def _variable(node: nodes.Node) -> str:
  """A name for what is assigned to, or read: a variable, or an attribute of a namespace."""
  if isinstance(node, nodes.Name):
    return node.name
  if isinstance(node, nodes.NSRef):
    return f'{node.name}.{node.attr}'
  if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
    return f'{node.node.name}.{node.attr}'
  return ''
