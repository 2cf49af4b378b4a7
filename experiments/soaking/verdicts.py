"""Whether a reader got what an undisturbed cluster answers, and nothing else: tokens, text, the end, and after it."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from experiments.soaking.answers import Answers
from experiments.soaking.readers import Reading
from pdjax.session import RequestError, SessionError
from pdjax.types import Completion, Request, TokenLogprob

Wrong = Literal['wrong tokens', 'stream differs', 'log probabilities', 'wrong end', 'leak', 'log', 'breakdown']
_SAME_LOGPROB = 1e-4  # batches of another size add up in another order


@dataclasses.dataclass(frozen=True)
class Problem:
  """Something that must not be.

  Attributes:
    kind: The kind of problem.
    what: The problem itself, in a sentence.
    count: The number of times that it counts.
  """

  kind: Wrong
  what: str
  count: int = 1


def judge(reading: Reading, answers: Answers, may_fail: Callable[[str], bool]) -> list[Problem]:
  """All that is wrong with what a reader got.

  Args:
    reading: The stream as they saw it, once it is over.
    answers: The right answers, which have learnt the request.
    may_fail: Whether a request may end with such an error.
  """
  name = reading.visit.name
  if isinstance(reading.raised, SessionError):
    return []  # of the session, not of this reader
  samples = reading.visit.request.samples()
  if len(reading.completions) != len(samples):
    return [Problem('wrong end', f'{name} asked for {len(samples)} samples and got {len(reading.completions)}.')]
  problems = []
  for index, (sample, got) in enumerate(zip(samples, reading.completions, strict=True)):
    deltas = [delta for delta in reading.deltas if delta.sample == index]
    delivered = tuple(token for delta in deltas for token in delta.tokens)
    text = ''.join(delta.text for delta in deltas)
    problems += _judge_sample(sample.id, delivered, text, got, answers.of(sample))
    problems += _judge_logprobs(sample, [one for delta in deltas for one in delta.logprobs], got, answers.of(sample))
    problems += _judge_end(sample.id, reading.cancelled is not None, got, answers.of(sample), may_fail)
  failed = any(one.error is not None for one in reading.completions)
  if failed != isinstance(reading.raised, RequestError):
    problems.append(
      Problem('wrong end', f'{name} ended with {reading.completions}, and its stream {reading.raised!r}.')
    )
  return problems


def judge_after_the_end(reading: Reading) -> list[Problem]:
  """A problem if a stream goes on after its end, once the session is closed."""
  late: list[object] = []
  with contextlib.suppress(RequestError, SessionError):  # it was told before
    for delta in reading.stream:
      late.append(delta)
  return [Problem('stream differs', f'{reading.visit.name} got {late} after its end.')] if late else []


def _judge_sample(
  name: str, delivered: tuple[int, ...], text: str, got: Completion, right: Completion
) -> list[Problem]:
  problems = []
  if delivered != got.token_ids or text != got.text:
    problems.append(
      Problem(
        'stream differs',
        f'the deltas of {name} are {delivered} and {text!r}, its completion {got.token_ids} and {got.text!r} '
        f'({got.finish_reason}, {got.error}).',
      )
    )
  wrong = max(_num_wrong(tokens, right.token_ids) for tokens in (delivered, got.token_ids))
  if wrong:
    longest = max(delivered, got.token_ids, key=len)
    problems.append(
      Problem('wrong tokens', f'{name} got {longest}, not {right.token_ids} ({got.finish_reason}, {got.error}).', wrong)
    )
  return problems


def _num_wrong(tokens: Sequence[int], right: Sequence[int]) -> int:
  """The number of tokens that do not belong in their places."""
  return sum(place >= len(right) or token != right[place] for place, token in enumerate(tokens))


def _judge_logprobs(
  sample: Request, delivered: Sequence[TokenLogprob], got: Completion, right: Completion
) -> list[Problem]:
  why = None
  expected = 0 if sample.sampling.logprobs is None else len(got.token_ids)
  if tuple(delivered) != got.logprobs:
    why = f'those of its deltas are {delivered}, and of its completion {got.logprobs}'
  elif len(got.logprobs) != expected:
    why = f'there are {len(got.logprobs)} of {len(got.token_ids)} tokens'
  else:
    for place, (one, other) in enumerate(zip(got.logprobs, right.logprobs, strict=False)):
      if not _is_same(one, other):
        why = f'that of token {place} is {one}, expected {other}'
        break
  return [] if why is None else [Problem('log probabilities', f'{sample.id}: {why} ({got.finish_reason}).')]


def _is_same(one: TokenLogprob, other: TokenLogprob) -> bool:
  """Whether two log probabilities are the same but for rounding, after which others may be the likeliest."""
  ours, theirs = (one.logprob, *(value for _, value in one.top)), (other.logprob, *(value for _, value in other.top))
  known = dict(other.top)
  pairs = [*zip(ours, theirs, strict=False), *((value, known.get(token, value)) for token, value in one.top)]
  return len(ours) == len(theirs) and all(abs(mine - right) <= _SAME_LOGPROB for mine, right in pairs)


def _judge_end(
  name: str, cancelled: bool, got: Completion, right: Completion, may_fail: Callable[[str], bool]
) -> list[Problem]:
  """Problems with the end of a sample; wrong tokens are told elsewhere."""
  why = None
  assert got.text is not None and right.text is not None
  if got.served:
    ours, theirs = ((one.finish_reason, len(one.token_ids), one.text) for one in (got, right))
    if ours != theirs:
      why = f'reason, tokens and text are {ours}, expected {theirs}'
  elif not right.text.startswith(got.text):
    why = f'the text {got.text!r} does not begin {right.text!r}'
  elif got.finish_reason == 'cancelled':
    why = None if cancelled else 'it was cancelled, and nobody asked for that'
  elif not may_fail(got.error or ''):
    why = f'{got.finish_reason} with {got.error!r}, which the fault settings do not allow'
  return [] if why is None else [Problem('wrong end', f'{name}: {why}.')]
