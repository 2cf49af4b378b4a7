"""Sequences as the host follows them, to find their ends and their text; on the devices they are rows of `Slots`."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from pdjax.engine.detokenize import Detokenizer, TextStream
from pdjax.model.sampling import Chosen
from pdjax.serving.events import Result
from pdjax.serving.orders import MAX_ORDERS, StepOrder
from pdjax.types.request import FinishReason, Request, TokenLogprob


@dataclasses.dataclass(slots=True)
class Progress:
  """A sequence as the host follows it.

  The device decides about stop tokens and the last token by the same rule; stop strings are found here alone.

  Attributes:
    left: Tokens that it may still get.
    stops: Tokens that end it.
    text: Its text so far, and its stop strings; None without a tokenizer.
    logprobs: Of how many of the likeliest tokens the log probabilities are told; None if none are.
  """

  left: int
  stops: frozenset[int]
  text: TextStream | None
  logprobs: int | None

  def take(self, tokens: Sequence[int]) -> tuple[int, FinishReason | None, str]:
    """Count tokens; how many of them are the sequence's, why it ends with the last of those or None, the text."""
    kept, text = len(tokens), ''
    if self.text is not None:
      text, completes_stop = self.text.take(tokens)
      if completes_stop is not None:
        return completes_stop, 'stop', text
    self.left -= kept
    if tokens[-1] not in self.stops and self.left > 0:
      return kept, None, text
    reason: FinishReason = 'stop' if tokens[-1] in self.stops else 'length'
    if self.text is not None:
      rest, completed = self.text.end()
      text, reason = text + rest, 'stop' if completed else reason
    return kept, reason, text


class Followed:
  """The sequences of one of a worker's incarnations that have not ended, by request.

  The thread that collects steps calls `result`, and lets go of requests that were left out; the one that dispatches
  steps calls all else.
  """

  def __init__(self, eos_token_ids: tuple[int, ...], detokenizer: Detokenizer | None):
    """Follow nobody yet.

    Args:
      eos_token_ids: Those of the model.
      detokenizer: Gives texts; without one there are none, and stop strings are never found.
    """
    self._eos_token_ids = eos_token_ids
    self._detokenizer = detokenizer
    self._progress: dict[str, Progress] = {}
    self._left_out: dict[str, int] = {}  # requests of which a step is missing, and how many may come in ignorance

  @property
  def ids(self) -> tuple[str, ...]:
    """The requests that are followed."""
    return tuple(self._progress)

  @property
  def left_out(self) -> tuple[str, ...]:
    """The requests that are not followed until they begin again, see `leave_out`."""
    return tuple(self._left_out)

  def expect(self, order: StepOrder) -> None:
    """A step is about to be dispatched: whoever begins in it is no longer left out."""
    if self._left_out:
      anew = {chunk.request.id for chunk in order.chunks if chunk.begins or chunk.start == 0}
      anew |= {join.request for join in order.joins if join.admission is not None}
      self._left_out = {name: left - 1 for name, left in self._left_out.items() if left and name not in anew}

  def follow(self, request: Request, tokens: Sequence[int], limit: int) -> None:
    """Follow a request from here on, unless it is left out.

    Args:
      request: It.
      tokens: Those that it has got already.
      limit: The most that it gets in all.
    """
    if request.id in self._left_out:
      return
    stops = request.stop_tokens(self._eos_token_ids)
    text = None
    if self._detokenizer is not None:
      text = TextStream(self._detokenizer, request.sampling.stop, prompt=request.prompt)
      text.take(tokens)
    self._progress[request.id] = Progress(limit - len(tokens), frozenset(stops), text, request.sampling.logprobs)

  def result(
    self,
    request: str,
    tokens: list[int],
    told: Callable[[int], tuple[TokenLogprob, ...]],
    error: str | None = None,
    *,
    leaves: bool = False,
  ) -> Result | None:
    """The outcome of a step for one request, or None if it has ended before.

    Args:
      request: Its id.
      tokens: Its tokens of the step.
      told: Gives their log probabilities, with so many of the likeliest.
      error: The message if the last of them is no token; the request ends with it, unless a token before ends it.
      leaves: Whether it decodes elsewhere.
    """
    progress = self._progress.get(request)
    if progress is None:
      return None
    if error is not None:
      tokens = tokens[:-1]
    kept, reason, text = progress.take(tokens) if tokens else (0, None, '')
    error = error if reason is None else None
    reason = reason if error is None else 'error'
    if leaves or reason is not None:
      self._drop((request,))
    logprobs = () if progress.logprobs is None else told(progress.logprobs)[:kept]
    return Result(request, tuple(tokens[:kept]), reason, text, logprobs, error)

  def forget(self, request: str) -> None:
    """Let go of a request that was ended from outside."""
    self._drop((request,))
    self._left_out.pop(request, None)

  def leave_out(self, requests: Sequence[str]) -> Callable[[], None]:
    """Follow none of these anew until they begin again, or until no more steps can come that were decided in ignorance.

    Returns:
      Lets go of them, which steps before may still bring tokens.
    """
    self._left_out |= dict.fromkeys(requests, MAX_ORDERS)
    return functools.partial(self._drop, requests)

  def _drop(self, requests: Iterable[str]) -> None:
    for request in requests:
      self._progress.pop(request, None)


def log_probabilities(chosen: Chosen, index: Any, most: int) -> tuple[TokenLogprob, ...]:
  """The log probabilities of the tokens at `index`, each with those of so many of the likeliest."""
  own, tops, likely = (np.asarray(array)[index] for array in (chosen.logprobs, chosen.top_tokens, chosen.top_logprobs))
  tops, likely = np.atleast_2d(tops)[:, :most].tolist(), np.atleast_2d(likely)[:, :most].tolist()
  return tuple(
    TokenLogprob(one, tuple(zip(tokens, logprobs, strict=True)))
    for one, tokens, logprobs in zip(np.atleast_1d(own).tolist(), tops, likely, strict=True)
  )
