"""Completions out of events: of samples that have ended, and of samples under way as far as they have come."""

from collections.abc import Iterable, Sequence

from pdjax.serving.events import Arrived, Delivered, Event, Finished, Result
from pdjax.types.request import Completion, FinishReason, Request


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


class Drafts:
  """Follows a run's events, and keeps the results of each sample under way.

  Args:
    has_text: Whether there is a tokenizer, so that an answer without text is an empty one.
  """

  def __init__(self, has_text: bool):
    self._has_text = has_text
    self._under_way: dict[str, _Draft] = {}

  def note(self, event: Event) -> Completion | None:
    """Take notice of the next event; the completion of the sample that it ended, if it ended one."""
    match event:
      case Delivered():
        for result in event.results:
          self._under_way[result.request].add(result, event.times_s(len(result.tokens)))
      case Arrived(request):
        self._under_way.update((sample.id, _Draft(sample)) for sample in request.samples())
      case Finished(_, name):
        if draft := self._under_way.pop(name, None):
          return draft.completion(event.tokens, event.finish_reason, event.error, self._has_text)
    return None

  def unfinished(self, sample: Request) -> Completion:
    """The completion of a sample that gets nothing more; its error says that it has not ended."""
    whole = Completion.unfinished(sample)
    draft = self._under_way.get(sample.id)
    return whole if draft is None else draft.completion(None, whole.finish_reason, whole.error, self._has_text)


class _Draft:
  """A sample under way, with all its results so far."""

  def __init__(self, sample: Request):
    self._sample = sample
    self._results: list[Result] = []
    self._times_s: list[float] = []

  def add(self, result: Result, times_s: Sequence[float]) -> None:
    self._results.append(result)
    self._times_s += times_s

  def completion(
    self, tokens: tuple[int, ...] | None, reason: FinishReason, error: str | None, has_text: bool
  ) -> Completion:
    """Its completion with these tokens; None takes all that came."""
    if tokens is None:
      tokens = tuple(token for result in self._results for token in result.tokens)
    return Completion(
      self._sample,
      tokens,
      reason,
      error,
      ''.join(result.text for result in self._results) if has_text else None,
      tuple(self._times_s[: len(tokens)]),
      tuple(logprob for result in self._results for logprob in result.logprobs)[: len(tokens)],
    )
