r"""Requests in and completions out as JSON lines: the contract of `--requests=FILE.jsonl`.

**In**, one JSON object a line; blank lines are skipped. Exactly one of these says what is to be continued:

| key                | value |
|--------------------|-------|
| `prompt_token_ids` | list of token ids, taken as they are |
| `prompt`           | text, tokenized without a chat template |
| `messages`         | list of `{"role": ..., "content": ...}`, put through the chat template |

and all of these may be left out:

| key              | value | default |
|------------------|-------|---------|
| `id`             | name, unique within the file | `request-0`, `request-1`, ... by row |
| `max_tokens`     | most tokens to generate | 128 |
| `temperature`    | 0 takes the likeliest token | 0 |
| `top_k`          | sample among the k likeliest; 0 means all | 0 |
| `top_p`          | sample among the likeliest that reach this probability | 1 |
| `min_p`          | sample among those at least this share as probable as the likeliest | 0 |
| `repetition_penalty` | divides the logits of tokens in prompt and output; 1 changes nothing | 1 |
| `presence_penalty` | taken off the logits of tokens in the output | 0 |
| `frequency_penalty` | taken off them once for each time they are there | 0 |
| `seed`           | fixes the request's random numbers | 0 |
| `stop`           | text, or list of texts, that end it and are not part of its text | `[]` |
| `stop_token_ids` | list of token ids that end it besides the model's own | `[]` |
| `ignore_eos`     | go on past the model's end-of-sequence tokens | `false` |
| `logprobs`       | tell each token's log probability, and those of so many likeliest tokens; 0 to 20 | `null` |
| `n`              | samples of the prompt | 1 |
| `arrival_s`      | seconds after the start of the run | 0 |

    {"prompt": "The capital of France is", "max_tokens": 8}
    {"messages": [{"role": "user", "content": "Tell me a joke."}], "temperature": 0.8, "seed": 7, "arrival_s": 1.5}

A malformed line stops the reading with its number. A well-formed line that asks for what cannot be (an empty
prompt, `max_tokens` of 0, a negative temperature) becomes a `Refused`, and the others are served.

**Out**, one JSON object for every request, refused ones included. One with `n` samples has `n` lines, the first with
its own id and the others with `id#1`, `id#2` and so on:

| key                | value |
|--------------------|-------|
| `id`               | as above |
| `prompt_token_ids` | the prompt as it was served |
| `output_token_ids` | the generated tokens, a stop token or what completed a stop string included |
| `text`             | the output as text, as below, up to a stop string; null where there is no tokenizer |
| `finish_reason`    | `stop`, `length`, `cancelled`, `rejected` or `error` |
| `error`            | what went wrong, or null |
| `arrival_s`        | seconds after the start of the run; null for a line that was refused |
| `ttft_s`           | from arrival to the first token; null if there was none |
| `e2el_s`           | from arrival to the last token; null unless it ended with `stop` or `length` |
| `token_times_s`    | when each token was delivered, seconds after the start of the run |
| `logprobs`         | for each token `{"logprob": ..., "top": [[token id, logprob], ...]}`; null if not asked for |

The text is what decoding prompt and output adds to decoding the prompt's last tokens, special tokens left out of both:
behind a prompt that ends with a word, the text of a next word begins with its space.
Log probabilities are those of the model's own distribution, before penalties, temperature and cuts.
"""

import dataclasses
import difflib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pdjax.types.request import Completion, Request, SamplingParams

_PROMPT_KEYS = ('prompt_token_ids', 'prompt', 'messages')
_SAMPLING_KEYS = tuple(field.name for field in dataclasses.fields(SamplingParams))
_KEYS = (*_PROMPT_KEYS, *_SAMPLING_KEYS, 'arrival_s', 'id')

Encode = Callable[[str], Sequence[int]]
EncodeMessages = Callable[[list[dict[str, str]]], Sequence[int]]


@dataclasses.dataclass(frozen=True, slots=True)
class Refused:
  """A well-formed line that asks for what cannot be; `error` says why."""

  id: str
  prompt_token_ids: tuple[int, ...]
  error: str


def read_requests(
  path: str | os.PathLike[str],
  encode: Encode | None = None,
  encode_chat: EncodeMessages | None = None,
  vocab_size: int | None = None,
) -> list[Request | Refused]:
  """Read a requests file; the module's docstring is its format.

  Args:
    path: The file.
    encode: Text to token ids, for lines with `prompt`.
    encode_chat: Messages to token ids by the chat template, for lines with `messages`.
    vocab_size: If given, a line with a token id beyond it is refused.

  Returns:
    What every line asks for, in the order of the file.

  Raises:
    ValueError: if a line is malformed, naming the file, the line and what is wrong.
  """
  rows: list[Request | Refused] = []
  line_of_id: dict[str, int] = {}
  with open(path, 'rb') as file:
    for number, line in enumerate(file, start=1):
      if not line.strip():
        continue
      try:
        fields = _parse(line)
        row_id = fields.get('id', f'request-{len(rows)}')
        row = _row(row_id, fields, encode, encode_chat, vocab_size)
        for name in (sample.id for sample in row.samples()) if isinstance(row, Request) else (row_id,):
          if name in line_of_id:
            raise _Malformed(f'the id {name!r} is that of line {line_of_id[name]} too, expected one of its own.')
          line_of_id[name] = number
        rows.append(row)
      except _Malformed as error:
        raise ValueError(f'{os.fspath(path)}, line {number}: {error}') from None
  return rows


def completion_row(outcome: Completion | Refused) -> dict[str, Any]:
  """What became of one request, as the object of its line."""
  if isinstance(outcome, Refused):
    return _output_row(outcome.id, outcome.prompt_token_ids, 'rejected', error=outcome.error)
  request, times_s = outcome.request, outcome.token_times_s
  ended_well = times_s and outcome.finish_reason in ('stop', 'length')
  return _output_row(
    request.id,
    request.prompt,
    outcome.finish_reason,
    output_token_ids=list(outcome.token_ids),
    text=outcome.text,
    error=outcome.error,
    arrival_s=request.arrival_s,
    ttft_s=times_s[0] - request.arrival_s if times_s else None,
    e2el_s=times_s[-1] - request.arrival_s if ended_well else None,
    token_times_s=list(times_s),
    logprobs=None if request.sampling.logprobs is None else list(map(dataclasses.asdict, outcome.logprobs)),
  )


def write_completions(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any] | Completion | Refused]) -> None:
  """Write one line for each row of `completion_row`, or for each completion or refusal."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('w', encoding='utf-8') as file:
    for row in rows:
      fields = completion_row(row) if isinstance(row, Completion | Refused) else dict(row)
      file.write(json.dumps(fields) + '\n')


# ---------------------------------------------------------------------------- one line


class _Malformed(Exception):
  """What is wrong with a line; the caller adds which line it is."""


def _parse(line: bytes) -> dict[str, Any]:
  """The line as an object whose keys and types are right."""
  try:
    fields = json.loads(line.decode('utf-8-sig'), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
  except (ValueError, RecursionError) as error:
    raise _Malformed(f'not JSON ({error}), expected one JSON object a line.') from None
  if not isinstance(fields, dict):
    raise _Malformed(f'found {_described(fields)}, expected a JSON object such as {{"prompt": "Hello"}}.')
  for key in fields:
    if key not in _KEYS:
      similar = difflib.get_close_matches(key, _KEYS, n=1)
      hint = f'did you mean {similar[0]!r}? ' if similar else ''
      raise _Malformed(f'unknown key {key!r}; {hint}The keys are {", ".join(_KEYS)}.')
  prompts = [key for key in _PROMPT_KEYS if key in fields]
  if len(prompts) != 1:
    found = ' and '.join(prompts) or 'none of them'
    raise _Malformed(f'found {found}, expected exactly one of {", ".join(_PROMPT_KEYS)}.')
  for key, value in fields.items():
    is_right, expected = _TYPES[key]
    if not is_right(value):
      raise _Malformed(f'{key} is {_described(value)}, expected {expected}.')
  return fields


def _row(
  row_id: str,
  fields: Mapping[str, Any],
  encode: Encode | None,
  encode_chat: EncodeMessages | None,
  vocab_size: int | None,
) -> Request | Refused:
  prompt: tuple[int, ...] = ()
  try:
    prompt = _prompt(fields, encode, encode_chat)
    for token in prompt:
      if token < 0 or (vocab_size is not None and token >= vocab_size):
        last = 'up' if vocab_size is None else f'to {vocab_size - 1}'
        raise ValueError(f'the prompt has token id {token}, expected ids from 0 {last}.')
    sampling = {key: fields[key] for key in _SAMPLING_KEYS if key in fields}
    if isinstance(sampling.get('stop'), str):
      sampling['stop'] = (sampling['stop'],)
    for key in ('stop', 'stop_token_ids'):
      if key in sampling:
        sampling[key] = tuple(sampling[key])
    arrival_s = fields.get('arrival_s', 0.0)
    if math.isinf(arrival_s):
      raise ValueError(f'arrival_s is {arrival_s}, expected a time that comes.')
    return Request(row_id, prompt, SamplingParams(**sampling), float(arrival_s))
  except (ValueError, OverflowError) as error:
    return Refused(row_id, prompt, str(error))


def _prompt(fields: Mapping[str, Any], encode: Encode | None, encode_chat: EncodeMessages | None) -> tuple[int, ...]:
  if 'prompt_token_ids' in fields:
    return tuple(fields['prompt_token_ids'])
  key = 'prompt' if 'prompt' in fields else 'messages'
  encoder: Callable[[Any], Sequence[int]] | None = encode if key == 'prompt' else encode_chat
  if encoder is None:
    raise _Malformed(
      f'{key} needs a tokenizer and the run has none; give the model a checkpoint with one, or use prompt_token_ids.'
    )
  return tuple(encoder(fields[key])) if fields[key] else ()  # without text, a tokenizer may still add special tokens


def _output_row(row_id: str, prompt: Sequence[int], finish_reason: str, **known: Any) -> dict[str, Any]:
  row: dict[str, Any] = {
    'id': row_id,
    'prompt_token_ids': list(prompt),
    'output_token_ids': [],
    'text': None,
    'finish_reason': finish_reason,
    'error': None,
    'arrival_s': None,
    'ttft_s': None,
    'e2el_s': None,
    'token_times_s': [],
    'logprobs': None,
  }
  return row | known


def _is_int(value: Any) -> bool:
  return type(value) is int  # a bool is an int to isinstance


def _is_number(value: Any) -> bool:
  return type(value) in (int, float)


def _is_text(value: Any) -> bool:
  return isinstance(value, str)


def _is_bool(value: Any) -> bool:
  return isinstance(value, bool)


def _is_name(value: Any) -> bool:
  return isinstance(value, str) and bool(value)


def _are_ints(value: Any) -> bool:
  return isinstance(value, list) and all(map(_is_int, value))


def _are_texts(value: Any) -> bool:
  return _is_text(value) or (isinstance(value, list) and all(map(_is_text, value)))


def _is_int_or_null(value: Any) -> bool:
  return value is None or _is_int(value)


def _are_messages(value: Any) -> bool:
  return isinstance(value, list) and all(
    isinstance(message, dict) and message.keys() == {'role', 'content'} and all(map(_is_text, message.values()))
    for message in value
  )


_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
  'prompt_token_ids': (_are_ints, 'a list of integers'),
  'prompt': (_is_text, 'text in quotes'),
  'messages': (_are_messages, 'a list of {"role": text, "content": text}'),
  'max_tokens': (_is_int, 'an integer'),
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
  'logprobs': (_is_int_or_null, 'an integer or null'),
  'n': (_is_int, 'an integer'),
  'arrival_s': (_is_number, 'a number of seconds'),
  'id': (_is_name, 'text in quotes, not empty'),
}


def _described(value: Any, width: int = 60) -> str:
  """The value as JSON, shortened."""
  text = json.dumps(value)
  return text if len(text) <= width else text[: width - 1] + '…'


def _refuse_constant(name: str) -> None:
  raise ValueError(f'{name} is not a JSON number')


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  fields = dict(pairs)
  if len(fields) < len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f'the key {next(name for name in names if names.count(name) > 1)!r} is there twice')
  return fields
