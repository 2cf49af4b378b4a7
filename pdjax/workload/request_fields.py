"""The fields of each line of a requests file, if all keys and types are right, or the reason they cannot be taken."""

import codecs
import dataclasses
import difflib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from pdjax.types.checks import is_whole
from pdjax.types.request import SamplingParams

_PROMPT_KEYS = ('prompt_token_ids', 'prompt', 'messages')
SAMPLING_KEYS = tuple(field.name for field in dataclasses.fields(SamplingParams))
REQUEST_KEYS = ('tenant', 'cache_salt', 'cache_prefix', 'class_name', 'priority', 'deadline_s')
_KEYS = (*_PROMPT_KEYS, *SAMPLING_KEYS, *REQUEST_KEYS, 'max_completion_tokens', 'tools', 'arrival_s', 'id')


class Refusal(Exception):
  """The reason a line cannot be served, with its prompt if that is known; the caller adds the number of the line."""

  def __init__(self, why: str, prompt: Sequence[int] = ()):
    super().__init__(why)
    self.prompt = prompt


@dataclasses.dataclass(frozen=True)
class Line:
  """A line with its fields, or the reason they cannot be taken, and its own id, if that will do."""

  number: int  # counted from 1
  fields: dict[str, Any] | Refusal
  id: str | None


def read_lines(path: str | os.PathLike[str]) -> list[Line]:
  """The lines of a file that are not blank.

  Raises:
    OSError: if the file cannot be read.
  """
  lines = []
  with open(path, 'rb') as file:
    for number, raw in enumerate(file, start=1):
      if raw.removeprefix(codecs.BOM_UTF8).strip():
        fields: dict[str, Any] | Refusal
        name = None
        try:
          fields = _parse(raw)
          name = fields['id'] if _is_name(fields.get('id')) else None
          fields = _checked(fields)
        except Refusal as refusal:
          fields = refusal
        lines.append(Line(number, fields, name))
  return lines


def _parse(raw: bytes) -> dict[str, Any]:
  """The line as an object without the keys that are null."""
  try:
    fields = json.loads(raw.decode('utf-8-sig'), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
  except json.JSONDecodeError as error:  # which counts lines and columns within this one
    raise Refusal(f'not JSON ({error.msg}: character {error.pos}), expected one JSON object a line.') from None
  except (ValueError, RecursionError) as error:
    raise Refusal(f'not JSON ({error}), expected one JSON object a line.') from None
  if not isinstance(fields, dict):
    raise Refusal(f'found {described(fields)}, expected a JSON object such as {{"prompt": "Hello"}}.')
  return {key: value for key, value in fields.items() if value is not None}


def _checked(fields: dict[str, Any]) -> dict[str, Any]:
  """The fields, if all keys and types are right and can be honoured."""
  for key, value in fields.items():
    if key in _NOT_DONE and not any(type(value) is type(one) and value == one for one in _NOT_DONE[key][1]):
      raise Refusal(f'{key} is {described(value)}, which pdjax cannot honour ({_NOT_DONE[key][0]}); leave it out.')
    if key not in _KEYS and key not in _NOT_DONE and key not in _NOT_ASKED:
      similar = difflib.get_close_matches(key, _KEYS, n=1)
      hint = f'did you mean {similar[0]!r}? ' if similar else ''
      raise Refusal(f'unknown key {key!r}; {hint}The keys are {", ".join(_KEYS)}.')
  prompts = [key for key in _PROMPT_KEYS if key in fields]
  if len(prompts) != 1:
    found = ' and '.join(prompts) or 'none of them'
    raise Refusal(f'found {found}, expected exactly one of {", ".join(_PROMPT_KEYS)}.')
  fields = {key: value for key, value in fields.items() if key not in _NOT_DONE and key not in _NOT_ASKED}
  for key, value in fields.items():
    is_right, expected = _TYPES[key]
    if not is_right(value):
      raise Refusal(f'{key} is {described(value)}, expected {expected}.')
  if 'max_completion_tokens' in fields:
    most = fields.pop('max_completion_tokens')
    if fields.setdefault('max_tokens', most) != most:
      raise Refusal(f'max_tokens is {fields["max_tokens"]} and max_completion_tokens {most}, expected one of them.')
  if fields.get('tools') and 'messages' not in fields:
    raise Refusal(f'tools is there with {prompts[0]}, but only the chat template of messages takes it; leave it out.')
  return fields


def _is_int(value: Any) -> bool:
  return type(value) is int  # a bool is an int to isinstance


def _is_number(value: Any) -> bool:
  return type(value) is float or _is_int(value)


def _is_text(value: Any) -> bool:
  return isinstance(value, str)


def _is_bool(value: Any) -> bool:
  return isinstance(value, bool)


def _is_name(value: Any) -> bool:
  return isinstance(value, str) and bool(value) and is_whole(value)


def _are_ints(value: Any) -> bool:
  return isinstance(value, list) and {*map(type, value)} <= {int}  # prompts are long


def _are_texts(value: Any) -> bool:
  return _is_text(value) or (isinstance(value, list) and all(map(_is_text, value)))


def _are_objects(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _are_messages(value: Any) -> bool:
  return _are_objects(value) and all(
    _is_text(message.get('role'))
    and isinstance(message.get('content'), str | list | None)
    and ('content' in message or 'tool_calls' in message)
    for message in value
  )


_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
  'prompt_token_ids': (_are_ints, 'a list of integers'),
  'prompt': (_is_text, 'text in quotes'),
  'messages': (_are_messages, 'a list of {"role": text, "content": text or a list of parts or null}'),
  'max_tokens': (_is_int, 'an integer'),
  'max_completion_tokens': (_is_int, 'an integer'),
  'tools': (_are_objects, 'a list of objects'),
  'temperature': (_is_number, 'a number'),
  'top_k': (_is_int, 'an integer'),
  'top_p': (_is_number, 'a number'),
  'min_p': (_is_number, 'a number'),
  'repetition_penalty': (_is_number, 'a number'),
  'presence_penalty': (_is_number, 'a number'),
  'frequency_penalty': (_is_number, 'a number'),
  'seed': (_is_int, 'an integer'),
  'stop': (_are_texts, 'text in quotes or a list of texts'),
  'stop_token_ids': (_are_ints, 'a list of integers'),
  'ignore_eos': (_is_bool, 'true or false'),
  'logprobs': (_is_int, 'an integer or null'),
  'n': (_is_int, 'an integer'),
  'arrival_s': (_is_number, 'a number of seconds'),
  'tenant': (_is_name, 'text in quotes, not empty and without half a surrogate pair'),
  'cache_salt': (_is_name, 'text in quotes, not empty and without half a surrogate pair'),
  'cache_prefix': (_is_bool, 'true or false'),
  'class_name': (_is_name, 'text in quotes, not empty and without half a surrogate pair'),
  'priority': (_is_int, 'an integer'),
  'deadline_s': (_is_number, 'a number of seconds'),
  'id': (_is_name, 'text in quotes, not empty and without half a surrogate pair'),
}

# Keys that other servers know and pdjax does not: why, and the values that ask for nothing.
_NOT_DONE: dict[str, tuple[str, tuple[Any, ...]]] = {
  'logit_bias': ('it changes no single logits', ({},)),
  'response_format': ('it holds no answer to a form', ({'type': 'text'},)),
  'structured_outputs': ('it holds no answer to a form', ({},)),
  'guided_json': ('it holds no answer to a form', ()),
  'guided_regex': ('it holds no answer to a form', ()),
  'guided_choice': ('it holds no answer to a form', ()),
  'tool_choice': ('the model alone chooses among tools', ('auto', 'none')),
  'functions': ('they are called tools', ([],)),
  'function_call': ('the model alone chooses among tools', ('auto', 'none')),
  'modalities': ('it writes text', (['text'],)),
  'audio': ('it writes text', ()),
  'min_tokens': ('use ignore_eos to go on', (0,)),
  'bad_words': ('it forbids no tokens', ([],)),
  'allowed_token_ids': ('it forbids no tokens', ()),
  'best_of': ('it ranks no samples; use n', (1,)),
  'use_beam_search': ('it samples', (False,)),
  'echo': ('prompt_token_ids are told anyway', (False,)),
  'suffix': ('it continues prompts', ('',)),
  'prompt_logprobs': ('it tells those of the output', ()),
  'top_logprobs': ('logprobs is the number of the likeliest', (0,)),
  'stream': ('answers are written whole', (False,)),
  'model': ('the config names the model', ()),
  'parallel_tool_calls': ('the model alone chooses among tools', (True,)),
}
# Keys of OpenAI's API that say nothing of the answer.
_NOT_ASKED = ('user', 'metadata', 'store', 'service_tier', 'safety_identifier', 'prompt_cache_key')


def described(value: Any, width: int = 60) -> str:
  """The value as JSON, shortened."""
  try:
    text = json.dumps(value)
  except RecursionError:  # nested as deep as can just be read
    text = str(type(value).__name__)
  return text if len(text) <= width else text[: width - 1] + '…'


def _refuse_constant(name: str) -> None:
  raise ValueError(f'{name} is not a JSON number')


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  fields = dict(pairs)
  if len(fields) < len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f'the key {next(name for name in names if names.count(name) > 1)!r} is there twice')
  return fields
