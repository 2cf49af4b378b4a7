r"""The answers of a run, kept as requests end, in memory and in `answers.jsonl`, and the rest for a resumed run.

`answers.jsonl` has a line for every answer that has ended, each sample its own, in the order of their ends and less
than a second after them, whatever becomes of the run later. A line is what `requests.jsonl` has (see
`pdjax.workload.requests_file`) and by what the request is known again:

| key           | value |
|---------------|-------|
| `prompt_hash` | SHA-256 of the prompt's token ids, written as `3,14,15` |
| `sampling`    | how tokens were chosen, where that differs from the defaults; its seed is the line's own |

A request is answered if a line with its id, prompt hash, seed and sampling has finish reason `stop` or `length`. Any
other is asked again; then the file has two lines of it, of which the later one counts.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pdjax.completions import Completions, Drafts, Ended
from pdjax.metrics.lines_file import LinesFile
from pdjax.serving.events import Arrived, Event, Finished, Withdrawn
from pdjax.serving.loop import Arrivals
from pdjax.types.json_text import json_text
from pdjax.types.request import SERVED, Completion, Request, SamplingParams, TokenLogprob
from pdjax.workload.requests_file import completion_row

_DEFAULTS = SamplingParams()
_KEYS = {
  'id', 'output_token_ids', 'text', 'finish_reason', 'arrival_s', 'token_times_s', 'seed', 'logprobs', 'prompt_hash',
  'sampling',
}  # fmt: skip
_Identity = tuple[str, str, int | None, str]


class Answers:
  """Follows a run's events and keeps what each request got, from its end on, whatever becomes of the run.

      answers = Answers(has_text=True, path=folder / 'answers.jsonl')
      for event in serve(...):
        answers.note(event)

  Args:
    has_text: Whether there is a tokenizer, so that an answer without text is an empty one.
    path: File that gets a line an answer, behind those that it has; None keeps answers in memory only.
    earlier: Lines of `read_answers` if the run goes on with another: what they answer is not served again, see `left`.
    closed: Called by `close` with `everyone`, once all lines are on disk; answers what it could not write, if anything.

  Attributes:
    num_earlier: Samples known by now that were answered earlier.
    unwritten: The failures of `closed` to write something, in sentences.

  Raises:
    OSError: if the file cannot be opened.
  """

  def __init__(
    self,
    has_text: bool,
    path: str | os.PathLike[str] | None = None,
    earlier: Iterable[Mapping[str, Any]] | None = None,
    closed: Callable[[Sequence[Completion]], str | None] = lambda everyone: None,
  ):
    self._has_text = has_text
    self._drafts = Drafts(has_text)
    self._closed = closed
    self._file = None if path is None else LinesFile(path, behind=True, insist=True)
    self._is_closed = False
    self._goes_on = earlier is not None
    self._earlier = {identity: row for row in earlier or () if (identity := _identity_of_row(row)) is not None}
    self._earlier_ids = {identity[0] for identity in self._earlier}
    self._expected: dict[str, None] = {}
    self._requests: dict[str, Request] = {}  # each sample that came, or is known to have come earlier, in that order
    self._ended: dict[str, Ended | Completion] = {}  # completions, if they were there earlier
    self._now_s = 0.0
    self.num_earlier = 0
    self.unwritten: tuple[str, ...] = ()

  # -------------------------------------------------------------------------- as a run goes on

  def expect(self, requests: Iterable[Request]) -> None:
    """Take these to come in this order, each with a seed; what they got earlier is known from now on."""
    for request in requests:
      for sample in request.samples():
        self._expected[sample.id] = None
        self._recall(sample)

  def left(self, arrivals: Arrivals) -> Arrivals:
    """The requests of a source, each with a seed, that are not answered yet.

    In a run that goes on, the first comes at 0 s and the others as long after it as in the source. The source hears
    that those answered earlier have ended as they come, with the tokens that they got: a chat goes on where it was. If
    some samples of a request are answered, the others come one by one under their own names.
    """
    return _Left(arrivals, self._recall) if self._goes_on else arrivals

  def note(self, event: Event) -> None:
    """Take notice of what happened next."""
    if isinstance(event, Arrived):
      self._requests |= {sample.id: sample for sample in event.request.samples()}
    if (one := self._drafts.follow(event)) is not None:
      assert isinstance(event, Finished)
      self._now_s = event.now_s
      self._keep(one, event.now_s)
      self._drafts.forget(event.request)

  def catch_up(self, events: Iterable[Event]) -> None:
    """Keep the missing answers of a log: an exception, such as that of a signal, may come in the middle of `note`."""
    missed = Answers(self._has_text)
    for event in events:
      missed.note(event)
    self._requests |= missed._requests
    for name in missed._names():
      if name in missed._ended and name not in self._ended:
        self._keep(missed._ended[name], self._now_s)

  def note_again(self, event: Event) -> None:
    """As `catch_up`, where the last event is all that there is of a log."""
    if isinstance(event, Arrived) and event.request.id not in self._requests:
      self.note(event)
    if isinstance(event, Finished) and event.request not in self._ended:
      self.note(event)

  def close(self) -> None:
    """Have the last lines on disk."""
    self.give_up()
    if not self._is_closed:
      self._is_closed, problem = True, self._closed(self.everyone)
      self.unwritten = () if problem is None else (problem,)

  def give_up(self) -> None:
    """Close the file alone, for a run that does not begin; after `close` this does nothing."""
    if self._file is not None:
      self._file.close()

  # -------------------------------------------------------------------------- what came of it

  @property
  def has_text(self) -> bool:
    """Whether an answer without text is an empty one."""
    return self._has_text

  @property
  def has_earlier(self) -> bool:
    """Whether there were answers before."""
    return bool(self._earlier)

  @property
  def num_unasked(self) -> int:
    """Answers from before that nobody known by now asks for any more."""
    return len(self._earlier) - self.num_earlier

  @property
  def began(self) -> bool:
    """Whether anything was asked in this run."""
    return len(self._requests) > self.num_earlier

  @property
  def completions(self) -> Completions:
    """The completions of all samples that have ended, earlier ones included, in the order in which they came."""
    return Completions([self._ended[name] for name in self._names() if name in self._ended])

  @property
  def everyone(self) -> Completions:
    """The same with those that have not ended, whose error says so, with the tokens that they had by then."""
    names = self._names()
    return Completions([self._ended.get(name) or self._drafts.unfinished(self._requests[name]) for name in names])

  @property
  def notes(self) -> tuple[str, ...]:
    """Sentences that a reader of the report should know."""
    notes = []
    if self.num_earlier:
      noun = 'answer was' if self.num_earlier == 1 else 'answers were'
      notes.append(f'{self.num_earlier} {noun} there before; the figures are those of the rest, served in this run.')
    return *notes, *(() if self._file is None else self._file.notes)

  # -------------------------------------------------------------------------- inside

  def _names(self) -> list[str]:
    """The names of the samples that came: those that were expected in that order, then the others as they came."""
    return [
      *(name for name in self._expected if name in self._requests),
      *(name for name in self._requests if name not in self._expected),
    ]

  def _keep(self, one: Ended | Completion, now_s: float) -> None:
    if self._file is not None:  # the text is made on the thread that writes: a long answer takes milliseconds
      whole = one.completion() if isinstance(one, Ended) else one
      self._file.add(functools.partial(answer_line, whole), now_s)
    self._ended[one.request.id] = one  # last: what `catch_up` finds here is in the file

  def _recall(self, sample: Request) -> Completion | None:
    """The earlier completion of a sample, counted from now on as an answer of this run; None if there is none."""
    row = self._earlier.get(_identity(sample)) if sample.id in self._earlier_ids else None
    if row is None:
      return None
    if sample.id not in self._requests:
      self.num_earlier += 1
      earlier = _completion(sample, row)
      self._ended[sample.id] = earlier
      self._requests[sample.id] = earlier.request
    found = self._ended[sample.id]
    return found.completion() if isinstance(found, Ended) else found


# ---------------------------------------------------------------------------- the file


def read_answers(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The lines of an `answers.jsonl`, in their order; none if there is no such file.

  A line that cannot be read, as the last of a process that was killed may be, is left out: its request is served again.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    return []
  rows = []
  with path.open('rb') as file:
    for line in file:
      try:
        row = json.loads(line)
      except ValueError:
        continue
      if isinstance(row, dict):
        rows.append(row)
  return rows


def answer_row(one: Completion) -> dict[str, Any]:
  """The completion of one request, as the object of its line in `answers.jsonl`."""
  request = one.request
  return {**completion_row(one), 'prompt_hash': prompt_hash(request.prompt), 'sampling': _sampling(request)}


def prompt_hash(prompt: Sequence[int]) -> str:
  """SHA-256 of token ids, written as `3,14,15`."""
  return hashlib.sha256(','.join(str(int(token)) for token in prompt).encode()).hexdigest()


def answer_line(one: Completion) -> str:
  """The line of one request, without its end."""
  return json_text(answer_row(one))


def _sampling(request: Request) -> dict[str, Any]:
  asked = {field.name: getattr(request.sampling, field.name) for field in dataclasses.fields(SamplingParams)}
  return {name: value for name, value in asked.items() if name != 'seed' and value != getattr(_DEFAULTS, name)}


def _identity(sample: Request) -> _Identity:
  seed = sample.sampling.seed
  asked = json_text(_sampling(sample))
  return sample.id, prompt_hash(sample.prompt), None if seed is None else int(seed), asked


def _identity_of_row(row: Mapping[str, Any]) -> _Identity | None:
  """The identity of the sample that a line answers; None if it answers none, or has another format."""
  if not row.keys() >= _KEYS or row['finish_reason'] not in SERVED or not isinstance(row['id'], str):
    return None
  return row['id'], str(row['prompt_hash']), row['seed'], json_text(row['sampling'])


def _completion(sample: Request, row: Mapping[str, Any]) -> Completion:
  """The completion that a line has for a sample, at the times of that run."""
  logprobs = (
    TokenLogprob(float(one['logprob']), tuple((token, float(value)) for token, value in one['top']))
    for one in row['logprobs'] or ()
  )
  return Completion(
    dataclasses.replace(sample, arrival_s=row['arrival_s']),
    tuple(row['output_token_ids']),
    row['finish_reason'],
    text=row['text'],
    token_times_s=tuple(row['token_times_s']),
    logprobs=tuple(logprobs),
    cached_tokens=row.get('cached_tokens') or 0,
  )


# ---------------------------------------------------------------------------- what is left


class _Left:
  """Of a source, the requests that were not answered earlier, the first of them at 0 s."""

  def __init__(self, arrivals: Arrivals, recall: Callable[[Request], Completion | None]):
    self._arrivals = arrivals
    self._recall = recall
    self._first: list[Arrived | Withdrawn] = []
    self._offset_s = 0.0
    while not self._first and not arrivals.closed and math.isfinite(next_s := arrivals.next_s()):
      self._offset_s = next_s
      self._first = self._ask(next_s, ())

  @property
  def closed(self) -> bool:
    return self._arrivals.closed and not self._first

  def next_s(self) -> float:
    return 0.0 if self._first else max(self._arrivals.next_s() - self._offset_s, 0.0)

  def due(self, now_s: float, finished: Sequence[Finished] = ()) -> list[Arrived | Withdrawn]:
    first, self._first = self._first, []
    source_s = now_s + self._offset_s
    if self.next_s() <= now_s:  # the sum may be rounded to less than the difference was made of
      source_s = max(source_s, self._arrivals.next_s())
    ends = [dataclasses.replace(end, now_s=end.now_s + self._offset_s) for end in finished]
    return [*first, *self._ask(source_s, ends)]

  def output_len(self, request_id: str) -> int | None:
    return self._arrivals.output_len(request_id)

  def _ask(self, source_s: float, finished: Sequence[Finished]) -> list[Arrived | Withdrawn]:
    """The events of the source up to its own time `source_s`; it is told at once of requests answered earlier."""
    events: list[Arrived | Withdrawn] = []
    while True:
      found = self._arrivals.due(source_s, finished)
      finished = []
      for event in found:
        if isinstance(event, Arrived):
          events += self._left_of(event.request)
          finished += self._ends_of(event.request, source_s)
        else:
          events.append(event)
      if not finished:
        return events

  def _left_of(self, request: Request) -> list[Arrived]:
    samples = request.samples()
    left = [sample for sample in samples if self._recall(sample) is None]
    asked = [request] if len(left) == len(samples) else left
    arrival_s = max(request.arrival_s - self._offset_s, 0.0)
    return [Arrived(dataclasses.replace(one, arrival_s=arrival_s)) for one in asked]

  def _ends_of(self, request: Request, source_s: float) -> list[Finished]:
    told = filter(None, map(self._recall, request.samples()))
    return [Finished(source_s, one.request.id, one.finish_reason, one.token_ids, one.error) for one in told]
