r"""Requests in and completions out as JSON lines: the contract of `--requests=FILE.jsonl`.

**In**, one JSON object a line; blank lines are skipped. Exactly one of these says what is to be continued:

| key                | value |
|--------------------|-------|
| `prompt_token_ids` | list of token ids, taken as they are |
| `prompt`           | text, tokenized without a chat template |
| `messages`         | list of `{"role": ..., "content": ...}`, put through the chat template |

and all of these may be left out, or null:

| key              | value | default |
|------------------|-------|---------|
| `id`             | name, unique within the file | `request-0`, `request-1`, ... by row, or the like that no line has |
| `max_tokens`     | most tokens to generate; `max_completion_tokens` is the same | 128 |
| `temperature`    | 0 takes the likeliest token | 0 |
| `top_k`          | sample among the k likeliest; 0 means all | 0 |
| `top_p`          | sample among the likeliest that reach this probability | 1 |
| `min_p`          | sample among those at least this share as probable as the likeliest | 0 |
| `repetition_penalty` | divides the logits of tokens in prompt and output; 1 changes nothing | 1 |
| `presence_penalty` | taken off the logits of tokens in the output | 0 |
| `frequency_penalty` | taken off them once for each time they are there | 0 |
| `seed`           | fixes the request's random numbers | drawn from `ServingConfig.seed` and the row |
| `stop`           | text, or list of texts, that end it and are not part of its text | `[]` |
| `stop_token_ids` | list of token ids that end it besides the model's own | `[]` |
| `ignore_eos`     | go on past the model's end-of-sequence tokens | `false` |
| `logprobs`       | tell each token's log probability, and those of so many likeliest tokens; 0 to 20 | `null` |
| `n`              | samples of the prompt | 1 |
| `tools`          | with `messages`: what the model may call, for the chat template | `null` |
| `arrival_s`      | seconds after the start of the run, at most 30 days | 0 |
| `tenant`         | the user or group that it is served for | `null` |
| `cache_salt`     | requests of another salt share no cached pages with it | `tenant` |
| `cache_prefix`   | use what is cached of the prompt, and leave its pages to others | `true` |
| `class_name`     | the kind of traffic it is of, such as `chat`; a report counts by it | `null` |
| `priority`       | an integer of 32 bits for policies that heed it; lower goes first | 0 |
| `deadline_s`     | seconds from its arrival to its last token, at most; a report counts who was in time | `null` |

    {"prompt": "The capital of France is", "max_tokens": 8}
    {"messages": [{"role": "user", "content": "Tell me a joke."}], "temperature": 0.8, "seed": 7, "arrival_s": 1.5}

Keys of OpenAI's API that say nothing of the answer (`user`, `metadata` and the like) are passed over.

The `content` of a message is text, a list of `{"type": "text", "text": ...}`, or null, as beside `tool_calls`; `name`
and what else it has goes to the chat template.

A line that cannot be served (no JSON, an unknown key, an id that another has, an empty prompt, a picture, more tokens
than the workers hold, what pdjax does not do, such as `logit_bias`) becomes a `Refused` whose error names the line, and
changes nothing for the others, which are served. Only a file that cannot be read stops the reading, and a run refuses
one without a line.
`python -m experiments.run` ends with 0 if every line was served, with 3 if some were, and with 1 if none was. A run
that is interrupted leaves the answers that it has, here and, as soon as they are complete, in `answers.jsonl` (see
`pdjax.answers`); a line that it did not come to the end of has an `error` that says so, and --resume=DIR serves it.

**Out**, one JSON object for every request, refused ones included. A served one with `n` samples has `n` lines, the
first with its own id and the others with `id#1`, `id#2` and so on:

| key                | value |
|--------------------|-------|
| `id`               | as above; `line-N` of a refused line without, or with that of another |
| `prompt_token_ids` | the prompt as it was served |
| `output_token_ids` | the generated tokens, a stop token or what completed a stop string included |
| `text`             | the output as text, as below, up to a stop string; null without a tokenizer, or simulated |
| `finish_reason`    | `stop`, `length`, `cancelled`, `rejected` or `error` |
| `error`            | what went wrong, or null |
| `arrival_s`        | seconds after the start of the run that served it; null for a line that was refused |
| `ttft_s`           | from arrival to the first token; null if there was none |
| `e2el_s`           | from arrival to the last token; null unless it ended with `stop` or `length` |
| `token_times_s`    | when each token was delivered, seconds after the start of the run |
| `seed`             | what the random numbers came from; null for a line that was refused |
| `cached_tokens`    | tokens of the prompt that were cached, and so not computed; of `n` samples the first has them |
| `logprobs`         | for each token `{"logprob": ..., "top": [[token id, logprob], ...]}`; null if not asked for |

The text is what decoding prompt and output adds to decoding the prompt's last tokens, special tokens left out of both:
behind a prompt that ends with a word, the text of a next word begins with its space. Log probabilities are those of the
model's own distribution, before penalties, temperature and cuts; one that is not finite is the text "NaN", "Infinity"
or "-Infinity".
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pdjax.types.json_text import json_text
from pdjax.types.request import Completion, Request, SamplingParams, TokenLogprob, drawn_seed
from pdjax.workload.request_fields import REQUEST_KEYS, SAMPLING_KEYS, Line, Refusal, described, read_lines

_LATEST_S = 30 * 24 * 3600  # a later arrival_s is a date, or a mistake: nobody would wait for it
_LONGEST = 500  # characters of a refusal: a number may have thousands of digits


Encode = Callable[[str], Sequence[int]]  # such as Tokenizer.encode
EncodeChat = Callable[..., Sequence[int]]  # messages, and tools by that name where a line has some


@dataclasses.dataclass(frozen=True, slots=True)
class Refused:
  """A line that cannot be served; `error` says which it is and why."""

  id: str
  prompt_token_ids: tuple[int, ...]
  error: str
  line: int = 0  # counted from 1


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
  """A line of a file: its request, or its refusal, and the id that a refusal has."""

  line: int  # counted from 1
  asked: Request | Refused
  refused_id: str

  def refused(self, error: str) -> Refused:
    """The line, which the cluster rejected, as one that cannot be served."""
    assert isinstance(self.asked, Request)
    return Refused(self.refused_id, tuple(self.asked.prompt), f'line {self.line}: {error}', self.line)


def read_requests(
  path: str | os.PathLike[str],
  encode: Encode | None = None,
  encode_chat: EncodeChat | None = None,
  vocab_size: int | None = None,
  *,
  seed: int = 0,
  chat_end_ids: Sequence[int] = (),
) -> list[Request | Refused]:
  """The request of each line of a requests file, or its refusal, in the order of the file; see `read_rows`."""
  rows = read_rows(path, encode, encode_chat, vocab_size, seed=seed, chat_end_ids=chat_end_ids)
  return [row.asked for row in rows]


def read_rows(
  path: str | os.PathLike[str],
  encode: Encode | None = None,
  encode_chat: EncodeChat | None = None,
  vocab_size: int | None = None,
  *,
  seed: int = 0,
  chat_end_ids: Sequence[int] = (),
) -> list[Row]:
  """Read a requests file; the module's docstring is its format.

  Args:
    path: The file.
    encode: Text to token ids, for lines with `prompt`.
    encode_chat: Messages to token ids by the chat template, for lines with `messages`.
    vocab_size: If given, a line with a token id beyond it is refused.
    seed: The run's, from which a line without a seed has its own, by its row: a refused line changes no other's.
    chat_end_ids: Tokens that end an answer to `messages`, besides the model's own.

  Returns:
    A row for every line that is not blank, in the order of the file.

  Raises:
    OSError: if the file cannot be read.
  """
  lines = read_lines(path)
  named = {line.id for line in lines if line.id is not None}
  named |= {name.rpartition('#')[0] for name in named}  # a sample of nobody else may be called so either
  reader = _Reader(encode, encode_chat, vocab_size, tuple(chat_end_ids))
  owners: dict[str, int] = {}  # the line of each sample that is to be served
  found: list[Request | Refusal] = []
  for index, line in enumerate(lines):
    try:
      request = reader.request(line, line.id or _free_name(f'request-{index}', named), drawn_seed(seed, index))
      names = [sample.id for sample in request.samples()]
      if taken := next((one for one in names if one in owners), None):
        raise Refusal(f'the id {taken!r} is that of line {owners[taken]} too, expected one of its own.', request.prompt)
      owners |= dict.fromkeys(names, line.number)
      named.add(request.id)
      found.append(request)
    except Refusal as refusal:
      found.append(refusal)
  rows = []
  for line, one in zip(lines, found, strict=True):
    own = line.id is not None and owners.setdefault(line.id, line.number) == line.number
    name = line.id if own and line.id else _free_name(f'line-{line.number}', named)
    if isinstance(one, Refusal):
      rows.append(Row(line.number, Refused(name, tuple(one.prompt), f'line {line.number}: {one}', line.number), name))
    else:
      rows.append(Row(line.number, one, name))
  return rows


def outcomes(rows: Iterable[Row], completions: Iterable[Completion]) -> list[Completion | Refused]:
  """The outcomes of the lines of a file: each refused one, and of each other one its samples.

  Args:
    rows: The lines.
    completions: Those of a run; one that the cluster rejected is a refusal like any other, and a line without any gets
      an error that says that the run ended before it.
  """
  by_id = {one.request.id: one for one in completions}
  found: list[Completion | Refused] = []
  for row in rows:
    if isinstance(row.asked, Refused):
      found.append(row.asked)
      continue
    for sample in row.asked.samples():
      one = by_id.get(sample.id) or Completion.unfinished(sample)
      if one.finish_reason == 'rejected':
        found.append(row.refused(one.error or ''))
        break
      found.append(one)
  return found


def completion_row(outcome: Completion | Refused) -> dict[str, Any]:
  """The outcome of one request, as the object of its line."""
  if isinstance(outcome, Refused):
    return _output_row(outcome.id, outcome.prompt_token_ids, 'rejected', error=outcome.error)
  request, times_s = outcome.request, outcome.token_times_s
  return _output_row(
    request.id,
    request.prompt,
    outcome.finish_reason,
    output_token_ids=list(outcome.token_ids),
    text=outcome.text,
    error=outcome.error,
    arrival_s=request.arrival_s,
    ttft_s=times_s[0] - request.arrival_s if times_s else None,
    e2el_s=times_s[-1] - request.arrival_s if times_s and outcome.served else None,
    token_times_s=list(times_s),
    seed=request.sampling.seed,
    cached_tokens=outcome.cached_tokens,
    logprobs=None if request.sampling.logprobs is None else [_told(one) for one in outcome.logprobs],
  )


def write_completions(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any] | Completion | Refused]) -> None:
  """Write one line for each row of `completion_row`, or for each completion or refusal."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('w', encoding='utf-8') as file:
    for row in rows:
      fields = completion_row(row) if isinstance(row, Completion | Refused) else row
      file.write(json_text(fields) + '\n')


@dataclasses.dataclass(frozen=True)
class _Reader:
  """Makes requests of fields that are right."""

  encode: Encode | None
  encode_chat: EncodeChat | None
  vocab_size: int | None
  chat_end_ids: tuple[int, ...]

  def request(self, line: Line, name: str, seed: int) -> Request:
    """The request of a line, with this `name`, and this `seed` if it has none of its own."""
    if isinstance(line.fields, Refusal):
      raise line.fields
    fields = line.fields
    sampling = {'seed': seed} | {key: fields[key] for key in SAMPLING_KEYS if key in fields}
    if isinstance(sampling.get('stop'), str):
      sampling['stop'] = (sampling['stop'],)
    for key in ('stop', 'stop_token_ids'):
      if key in sampling:
        sampling[key] = tuple(sampling[key])
    ends = self.chat_end_ids if 'messages' in fields else ()
    prompt = self._prompt(fields)
    if not prompt:
      raise Refusal('the prompt is empty, expected at least one token; give it some text.')
    try:
      arrival_s = fields.get('arrival_s', 0.0)
      if arrival_s > _LATEST_S:
        found = arrival_s if isinstance(arrival_s, float) else described(arrival_s)
        raise ValueError(
          f'arrival_s is {found}, expected seconds after the start of the run, at most {_LATEST_S} (30 days).'
        )
      arrival_s = float(arrival_s)
      others = {key: fields[key] for key in REQUEST_KEYS if key in fields}
      return Request(name, prompt, SamplingParams(**sampling), arrival_s, end_token_ids=ends, **others)
    except (ValueError, OverflowError) as error:
      why = str(error).replace(repr(name), repr(line.id or f'line-{line.number}')).replace('SamplingParams.', '')
      raise Refusal(why if len(why) <= _LONGEST else why[:_LONGEST] + '…', prompt) from error

  def _prompt(self, fields: Mapping[str, Any]) -> tuple[int, ...]:
    if 'prompt_token_ids' in fields:
      prompt = tuple(fields['prompt_token_ids'])
      last = 2**31 - 1 if self.vocab_size is None else self.vocab_size - 1
      if outside := [token for token in prompt if not 0 <= token <= last]:
        raise Refusal(f'the prompt has token id {outside[0]}, expected ids from 0 to {last}.', prompt)
      return prompt
    key = 'prompt' if 'prompt' in fields else 'messages'
    encoder = self.encode if key == 'prompt' else self.encode_chat
    if encoder is None:
      raise Refusal(
        f'{key} needs a tokenizer and the run has none; give the model a checkpoint with one, or use prompt_token_ids.'
      )
    if not fields[key]:
      return ()  # without text, a tokenizer may still add special tokens
    tools = {'tools': fields['tools']} if fields.get('tools') else {}
    try:
      return tuple(encoder(fields[key], **tools))
    except ValueError as error:
      raise Refusal(str(error)) from error
    except Exception as error:  # a tokenizer or a template is a program of someone else: it may raise anything
      what = f'{type(error).__name__}: {error}'
      raise Refusal(f'{key} cannot become tokens ({what}), expected what the tokenizer takes; correct it.') from error


def _free_name(name: str, taken: set[str]) -> str:
  """The name, with a number behind it if another line has it."""
  if name not in taken:
    return name
  return next(other for index in itertools.count(2) if (other := f'{name}-{index}') not in taken)


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
    'seed': None,
    'cached_tokens': 0,
    'logprobs': None,
  }
  return row | known


def _told(logprob: TokenLogprob) -> dict[str, Any]:
  return {'logprob': logprob.logprob, 'top': logprob.top}
