"""Completions out of events: of samples that have ended, and of samples under way as far as they have come."""

import array
from collections.abc import Iterable, Sequence

from pdjax.metrics.columns import Read
from pdjax.metrics.token_times import Pieces, TokenTimes
from pdjax.serving.events import Arrived, Delivered, Done, Event, Failed, Finished, Result, Started
from pdjax.serving.orders import StepOrder
from pdjax.types.request import Completion, FinishReason, Request, TokenLogprob

_FEW_BYTES = 1 << 20


def complete(events: Iterable[Event], has_text: bool) -> tuple[Completion, ...]:
  """The completions of the samples that ended in a log, in the order of arrival; with text if there was a tokenizer."""
  drafts = Drafts(has_text)
  found: dict[str, Completion | None] = {}
  for event in events:
    if isinstance(event, Arrived):
      found.update(dict.fromkeys(sample.id for sample in event.request.samples()))
    if (one := drafts.note(event)) is not None:
      found[one.request.id] = one
  return tuple(one for one in found.values() if one is not None)


class Ended:
  """A sample that has ended, in as few bytes as can be: its completion is made of it when somebody reads it.

  Tokens that are all alike, as a simulation has them, are a number and a count; the times of tokens are pieces of those
  of steps, which its batch shares.

  Attributes:
    request: The sample.
    reason: The reason it ended.
  """

  __slots__ = ('_cached_tokens', '_error', '_logprobs', '_pieces', '_text', '_times', '_tokens', 'reason', 'request')

  def __init__(
    self,
    request: Request,
    tokens: Sequence[int],
    reason: FinishReason,
    error: str | None,
    text: str | None,
    logprobs: tuple[TokenLogprob, ...],
    pieces: Sequence[int],
    times: TokenTimes,
    cached_tokens: int,
  ):
    self.request = request
    self.reason = reason
    self._error = error
    self._cached_tokens = cached_tokens
    self._text = text
    self._logprobs = logprobs
    self._tokens: tuple[int, int] | array.array[int]
    self._tokens = (tokens[0], len(tokens)) if _are_alike(tokens) else array.array('i', tokens)
    self._pieces = array.array('q', pieces)
    self._times = times

  def completion(self) -> Completion:
    """Its completion."""
    tokens = (self._tokens[0],) * self._tokens[1] if isinstance(self._tokens, tuple) else tuple(self._tokens)
    times_s = self._times.times_s(self._pieces)[: len(tokens)]
    logprobs = self._logprobs[: len(tokens)]
    return Completion(
      self.request, tokens, self.reason, self._error, self._text, tuple(times_s.tolist()), logprobs, self._cached_tokens
    )  # fmt: skip


def _are_alike(tokens: Sequence[int]) -> bool:
  return len(tokens) > 0 and tokens.count(tokens[0]) == len(tokens)


class Completions(Read[Completion]):
  """Completions in the order of arrival, each made as it is read.

  Args:
    ended: Those that ended, or completions as they are.
  """

  def __init__(self, ended: Sequence[Ended | Completion]):
    self._ended = ended

  def __len__(self) -> int:
    return len(self._ended)

  def made(self, number: int) -> Completion:
    """The one of a number, in their order."""
    one = self._ended[number]
    return one.completion() if isinstance(one, Ended) else one


class Drafts:
  """Follows a run's events, and keeps the results of each sample under way.

  Args:
    has_text: Whether there is a tokenizer, so that an answer without text is an empty one.
  """

  def __init__(self, has_text: bool):
    self._has_text = has_text
    self._under_way: dict[str, _Draft] = {}
    self._times = TokenTimes()
    self._workers: dict[int, str] = {}  # of steps under way
    self._worker = ''  # of the last that ended
    self._most_bytes = _FEW_BYTES  # of times, before those of samples that have ended are let go
    self._placeholder = 0  # the token of steps that bring nothing else

  def note(self, event: Event) -> Completion | None:
    """Take notice of the next event; the completion of the sample that it ended, if it ended one."""
    ended = self.follow(event)
    if ended is None:
      return None
    self.forget(ended.request.id)
    completion = ended.completion()
    if self._times.nbytes > self._most_bytes:
      self._times.drop(draft.pieces for draft in self._under_way.values())
      self._most_bytes = 2 * self._times.nbytes + _FEW_BYTES
    return completion

  def follow(self, event: Event) -> Ended | None:
    """As `note`, in less memory: what has ended shares its times with others, all of which are kept from now on. It is
    known here until `forget`, so that the event may come once more."""
    match event:
      case Delivered():
        self._times.deliver(self._worker, event, self._under_way.__getitem__)
        self._add_results(event)
      case Started(_, StepOrder() as order):
        self._workers[order.id] = order.worker
      case Done():
        forget = self._workers.pop if event.to_come == 0 else self._workers.get
        self._worker = forget(event.order, '')
      case Failed():
        self._workers.pop(event.order, None)
      case Arrived(request):
        self._under_way.update((sample.id, _Draft(sample)) for sample in request.samples())
      case Finished(_, name) if draft := self._under_way.get(name):
        return self._ended(draft, event.tokens, event.finish_reason, event.error, event.cached_tokens)
    return None

  def forget(self, name: str) -> None:
    """Keep nothing more of a sample that has ended."""
    self._under_way.pop(name, None)

  def unfinished(self, sample: Request) -> Completion:
    """The completion of a sample that gets nothing more; its error says that it has not ended."""
    whole = Completion.unfinished(sample)
    draft = self._under_way.get(sample.id)
    return whole if draft is None else self._ended(draft, None, whole.finish_reason, whole.error).completion()

  def _add_results(self, event: Delivered) -> None:
    """Keep what a step brought beyond times; of placeholders there is nothing else."""
    for result in event.firsts:
      self._under_way[result.request].results.append(result)
    decoded = event.decoded
    if decoded is None:
      return
    if decoded.tokens.size and not any(decoded.tokens.strides) and not decoded.texts and not decoded.logprobs:
      self._placeholder = int(decoded.tokens[0, 0])
      return
    for row, result in decoded.results(event.batch):
      if row not in event.late_rows:
        self._under_way[result.request].results.append(result)

  def _ended(
    self,
    draft: '_Draft',
    tokens: tuple[int, ...] | None,
    reason: FinishReason,
    error: str | None,
    cached_tokens: int = 0,
  ) -> Ended:
    """A draft as one that has ended, with these tokens; None takes all that came."""
    self._times.settle(draft.pieces)
    if tokens is None:
      tokens = draft.tokens(self._placeholder)
    text = ''.join(result.text for result in draft.results) if self._has_text else None
    logprobs = tuple(logprob for result in draft.results for logprob in result.logprobs)
    return Ended(draft.sample, tokens, reason, error, text, logprobs, draft.pieces.flat, self._times, cached_tokens)


class _Draft:
  """A sample under way, with all its results so far."""

  def __init__(self, sample: Request):
    self.sample = sample
    self.results: list[Result] = []
    self.pieces = Pieces()

  def tokens(self, placeholder: int) -> tuple[int, ...]:
    """All that came; of those that no result tells, one number stands for each."""
    found = tuple(token for result in self.results for token in result.tokens)
    return found + (placeholder,) * (self.pieces.count - len(found))
