"""The workload of a config: its protocol, the facts of the model that it is given, and ready requests."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

from pdjax.serving.loop import Arrivals
from pdjax.types.checked import check_fields
from pdjax.types.request import Request
from pdjax.workload.arrivals import Listed


@dataclasses.dataclass(frozen=True, slots=True)
class WorkloadContext:
  """The facts of the model that a workload needs.

  Attributes:
    vocab_size: Random prompts draw from tokens `0` to `vocab_size - 1`.
    context_len: Most tokens of a prompt and its output together.
    encode_chat: Turns a message of a user into a prompt, chat template included; None where there is no tokenizer.
    chat_end_ids: Tokens that end an answer in a chat, besides the model's own.
  """

  vocab_size: int
  context_len: int
  encode_chat: Callable[[str], Sequence[int]] | None = None
  chat_end_ids: tuple[int, ...] = ()

  def encode(self, text: str) -> tuple[int, ...]:
    """The prompt of a user who says `text`.

    Raises:
      ValueError: if there is no tokenizer.
    """
    if self.encode_chat is None:
      raise ValueError(
        f'the workload has the text prompt {_shortened(text)!r} but the run has no tokenizer; '
        'give the model a checkpoint with one, or set prompts=None for random tokens.'
      )
    return tuple(self.encode_chat(text))


class Workload(Protocol):
  """All that a config says about the requests of a run; the figures go into the report.

  One of which no prompt begins like another may say so with an attribute `repeats = False`; then a `prefix_cache` of
  'auto' keeps none.
  """

  @property
  def num_requests(self) -> int:
    """Requests that come, at most."""

  @property
  def request_rate(self) -> float | None:
    """Requests per second; infinite if they do not come at times of their own, None where it has no meaning."""

  @property
  def burstiness(self) -> float | None:
    """Shape of the gamma distribution of the gaps between arrivals; None where it has no meaning."""

  @property
  def max_concurrency(self) -> int | None:
    """Most requests in flight that the workload allows; None if it does not ask."""

  @property
  def seed(self) -> int | None:
    """The seed of all that it draws; None if it draws nothing."""

  def arrivals(self, context: WorkloadContext) -> Arrivals:
    """A fresh source of these requests, the same every time."""


class _Ready:
  """Requests that are there already: nothing is drawn, and no number in flight is asked for."""

  __slots__ = ()

  @property
  def burstiness(self) -> None:
    return None

  @property
  def max_concurrency(self) -> None:
    return None

  @property
  def seed(self) -> None:
    return None


@dataclasses.dataclass(frozen=True, slots=True)
class Given(_Ready):
  """Ready requests, at the times they name."""

  requests: tuple[Request, ...]

  def __post_init__(self):
    check_fields(self)

  @property
  def num_requests(self) -> int:
    return len(self.requests)

  @property
  def request_rate(self) -> float:
    """Requests per second between the first and the last; infinite if all come at once."""
    return mean_rate([request.arrival_s for request in self.requests])

  def arrivals(self, context: WorkloadContext) -> Listed:
    return Listed(self.requests)


@dataclasses.dataclass(frozen=True, slots=True)
class Submitted(_Ready):
  """Requests that came as somebody submitted them, of which no more is known than a report says.

  Attributes:
    num_requests: The number of them.
    request_rate: Requests per second between the first and the last; infinite if all came at once.
  """

  num_requests: int
  request_rate: float

  def arrivals(self, context: WorkloadContext) -> Arrivals:
    raise ValueError('requests that were submitted do not come again; give them as Given(requests).')


def mean_rate(times_s: Sequence[float]) -> float:
  """Requests per second between the first and the last of some arrivals; infinite if all come at once."""
  span_s = max(times_s, default=0.0) - min(times_s, default=0.0)
  return (len(times_s) - 1) / span_s if span_s else math.inf


def _shortened(text: str, width: int = 40) -> str:
  return text if len(text) <= width else text[: width - 1] + '…'
