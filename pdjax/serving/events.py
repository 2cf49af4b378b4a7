"""Events: what happened to requests, orders and workers; the log is made of these."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from pdjax.serving.batch import NOBODY, Batch
from pdjax.serving.cache_events import AllBlocksCleared as AllBlocksCleared
from pdjax.serving.cache_events import BlockRemoved as BlockRemoved
from pdjax.serving.cache_events import BlockStored as BlockStored
from pdjax.serving.cache_events import HitSide as HitSide
from pdjax.serving.cache_events import PrefixHit as PrefixHit
from pdjax.serving.orders import Order
from pdjax.types.request import FinishReason, Request, TokenLogprob
from pdjax.types.worker import Role


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
  """The loop read the clock; all that follows up to the next turn was decided at this time."""

  now_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Arrived:
  """A request came in; `request.arrival_s` says when. It stands for all its samples, `request.samples()`."""

  request: Request


@dataclasses.dataclass(frozen=True, slots=True)
class Withdrawn:
  """The user no longer wants a request with all its samples, or one further sample of a request."""

  request: str


@dataclasses.dataclass(frozen=True, slots=True)
class Started:
  """An order was handed to the backend."""

  now_s: float
  order: Order


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
  """The outcome of one step for one request.

  Attributes:
    request: Its id.
    tokens: The tokens, up to one that ended it.
    finish_reason: The reason it ended with them, or None; 'error' where no further one could be chosen.
    text: The text that is sure now, and was not before: some of it is held back while a character is unfinished or a
      stop string may have begun, so the text and the tokens of one result need not belong together. Empty where there
      is no tokenizer.
    logprobs: The log probabilities of each token, if the request asks for them.
    error: The error it ended with, if any.
  """

  request: str
  tokens: tuple[int, ...]
  finish_reason: FinishReason | None = None
  text: str = ''
  logprobs: tuple[TokenLogprob, ...] = ()
  error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
  """The end of a sequence of a batch.

  Attributes:
    row: Its row.
    finish_reason: The reason; 'error' where no further token could be chosen.
    error: The error it ended with, if any.
  """

  row: int
  finish_reason: FinishReason
  error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Decoded:
  """The outcome of decode steps for their batch, a column for each row of it.

  Attributes:
    tokens: `[T, B]` int32; those of a sequence stand first in its column.
    counts: `[B]` of how many each sequence got; 0 of one that had ended before.
    ended: Those that ended with these tokens.
    texts: `[B]` texts as in `Result`; none where there is no tokenizer.
    logprobs: The log probabilities of each token, by row, of those that ask for them.
    ends_s: The time each step ended, where several are told at once; then a sequence got one token of each.
  """

  tokens: np.ndarray
  counts: np.ndarray
  ended: tuple[Ended, ...] = ()
  texts: tuple[str, ...] = ()
  logprobs: Mapping[int, tuple[TokenLogprob, ...]] = dataclasses.field(default_factory=dict)
  ends_s: tuple[float, ...] = ()

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Decoded):
      return NotImplemented
    arrays = np.array_equal(self.tokens, other.tokens) and np.array_equal(self.counts, other.counts)
    told = (self.ended, self.texts, self.logprobs, self.ends_s)
    return arrays and told == (other.ended, other.texts, other.logprobs, other.ends_s)

  def num_tokens(self) -> int:
    """Tokens of all sequences."""
    return int(self.counts.sum())

  def results(self, batch: Batch) -> list[tuple[int, Result]]:
    """The result of each sequence that got something, with its row."""
    ends = {one.row: one for one in self.ended}
    columns, found = self.tokens.T.tolist(), []
    for row, count in enumerate(self.counts.tolist()):
      end, text = ends.get(row), self.texts[row] if self.texts else ''
      if count or end is not None or text:
        reason, error = (None, None) if end is None else (end.finish_reason, end.error)
        tokens = tuple(columns[row][:count])
        found.append((row, Result(batch.requests[row], tokens, reason, text, self.logprobs.get(row, ()), error)))
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Trip:
  """The times of a transfer's pieces on the wire.

  Attributes:
    wire_began_s: The time the first left its device.
    arrived_s: The time the last was on the target's devices.
    pieces: The number of pieces, each an array.
  """

  wire_began_s: float
  arrived_s: float
  pieces: int


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
  """An order ended well.

  Attributes:
    order: Its id.
    began_s: The time the worker or link turned to it: after it was handed over and after all that stood before it; a
      link turns to a transfer once what it moves is computed.
    ended_s: The time its outcome was on the host; of a transfer, that from which steps of the target find its pages.
    results: The first tokens of prompts that a step ended; `Delivered` says who got them.
    decoded: A step's tokens for its batch.
    to_come: Steps of a standing order that are still to end; None if it goes on until something changes.
    wasted_tokens: Tokens computed past a request's end and thrown away.
    wire_bytes: Bytes that a transfer put onto target devices.
    trip: The times of a transfer between those two.
  """

  order: int
  began_s: float
  ended_s: float
  results: tuple[Result, ...] = ()
  decoded: Decoded | None = None
  to_come: int | None = 0
  wasted_tokens: int = 0
  wire_bytes: int = 0
  trip: Trip | None = None

  def ended(self, batch: Batch) -> list[str]:
    """The requests that ended with what a step brought, given the batch that it decoded."""
    firsts = [one.request for one in self.results if one.finish_reason is not None]
    return firsts if self.decoded is None else [*firsts, *(batch.requests[one.row] for one in self.decoded.ended)]

  @property
  def num_steps(self) -> int:
    """Steps that it tells of."""
    return max(len(self.decoded.ends_s), 1) if self.decoded is not None else 1

  def begin_s(self, step: int) -> float:
    """The time at which one of these steps began, the first of which is 0."""
    ends_s = () if self.decoded is None else self.decoded.ends_s
    return ends_s[step - 1] if ends_s and step > 0 else self.began_s


@dataclasses.dataclass(frozen=True, slots=True)
class Delivered:
  """The results of a step for requests that still wanted them; this alone says what requests really got.

  It comes right behind the `Done` of a step that brought anything, and before the ends that this brings.

  Attributes:
    now_s: The time of the turn.
    order: The step.
    firsts: Results of prompts that the step ended, those that were delivered.
    late_firsts: Those for requests that had ended, or were being ended; they are thrown away.
    batch: The sequences that the step decoded.
    decoded: Their tokens.
    late_rows: The rows of those that had ended, or were being ended.
  """

  now_s: float
  order: int
  firsts: tuple[Result, ...] = ()
  late_firsts: tuple[Result, ...] = ()
  batch: Batch = NOBODY
  decoded: Decoded | None = None
  late_rows: frozenset[int] = frozenset()

  @property
  def results(self) -> tuple[Result, ...]:
    """The results that were delivered, one for each request, in the order of the step; made when they are read."""
    decoded = () if self.decoded is None else self.decoded.results(self.batch)
    return (*self.firsts, *(result for row, result in decoded if row not in self.late_rows))

  @property
  def late(self) -> tuple[Result, ...]:
    """The results that came too late."""
    decoded = self.decoded.results(self.batch) if self.decoded is not None and self.late_rows else ()
    return (*self.late_firsts, *(result for row, result in decoded if row in self.late_rows))

  @property
  def num_tokens(self) -> int:
    """Tokens that were delivered."""
    decoded = 0 if self.decoded is None else self.decoded.num_tokens()
    late_rows = 0 if self.decoded is None else sum(int(self.decoded.counts[row]) for row in self.late_rows)
    return sum(len(result.tokens) for result in self.firsts) + decoded - late_rows

  @property
  def num_late_tokens(self) -> int:
    """Tokens that came too late."""
    return sum(len(result.tokens) for result in self.late)

  def times_s(self, count: int) -> tuple[float, ...]:
    """The time at which each of a request's `count` tokens was delivered."""
    if self.decoded is not None and self.decoded.ends_s:
      return self.decoded.ends_s[:count]
    return (self.now_s,) * count


@dataclasses.dataclass(frozen=True, slots=True)
class Failed:
  """An order did not end well, and no page of it is read or written any more.

  `FaultSpec` says what becomes of the requests of a step, or of that of a transfer. Of a request in such a step nothing
  comes any more, from steps behind it either, until one begins it again: with its first chunk, or by an admission.

  Attributes:
    order: Its id.
    ended_s: The time that was known.
    error: The error, in a line.
    corrupt: Whether a transfer brought other pages than were sent; none of them was written.
  """

  order: int
  ended_s: float
  error: str
  corrupt: bool = False


TimerName = Literal['deadline', 'retry', 'patience', 'wake']


@dataclasses.dataclass(frozen=True, slots=True)
class TimerDue:
  """A timer of the books has run out.

  Attributes:
    due_s: The time it was set for.
    timer: Its name: 'deadline' of a transfer that has not ended, 'retry' of one that failed, 'patience' with a lost
      worker, 'wake' of a policy that named this time.
    about: The id of the transfer's order, or the name of the worker; 'policy' if that is woken.
  """

  due_s: float
  timer: TimerName
  about: int | str


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerLost:
  """A worker's pages are gone, and orders that name it are over; it may come back.

  `FaultSpec` says what becomes of the requests that had pages there. The event comes once more when trying to bring the
  worker back has failed, so that nobody waits longer than their patience; it may be back later all the same.

  Attributes:
    worker: The worker.
    ended_s: The time that was known.
    error: The reason it is lost, or does not come back.
    returning: Whether the backend is bringing it back, however long that takes: patience does not run meanwhile.
  """

  worker: str
  ended_s: float
  error: str
  returning: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Comeback:
  """The parts of a worker's return in a new process.

  Attributes:
    tries: Processes that were begun, the one that came back among them.
    failed_s: Seconds of the tries that failed.
    start_s: Seconds until the process was there with its devices.
    load_s: Seconds to load the weights.
    compile_s: Seconds until every program was compiled, or taken from those that were kept.
    connect_s: Seconds until the ways to other workers were ready.
  """

  tries: int
  failed_s: float
  start_s: float
  load_s: float
  compile_s: float
  connect_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerBack:
  """A lost worker takes orders again, its pages and slots empty, in another incarnation, which orders name.

  Attributes:
    worker: The worker.
    ended_s: The time of that.
    incarnation: The number of that incarnation.
    comeback: The parts of its return, if it has another process.
  """

  worker: str
  ended_s: float
  incarnation: int
  comeback: Comeback | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Preempted:
  """A policy took a request's pages and slot; it waits again.

  Attributes:
    now_s: The time of the turn.
    request: The request.
    worker: The worker on which it decoded.
    tokens: Tokens that its pages hold, those of steps under way not counted: they are computed anew when it begins
      again, but for those that the prefix cache still has.
  """

  now_s: float
  request: str
  worker: str
  tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class RoleChanged:
  """A worker was empty and has the role now that a policy asked for.

  Attributes:
    now_s: The time of the turn.
    worker: The worker.
    role: Its role from now on.
    before: The role that it had.
    asked_s: The time from which on it took nothing new.
  """

  now_s: float
  worker: str
  role: Role
  before: Role
  asked_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
  """A request ended.

  Attributes:
    now_s: The time of the turn.
    request: The request.
    finish_reason: The reason.
    tokens: All tokens it got.
    error: The error it ended with, if any.
    cached_tokens: Tokens of its prompt that were cached and so not computed, as it was begun first; of several samples
      the one that carried the prompt has them.
  """

  now_s: float
  request: str
  finish_reason: FinishReason
  tokens: tuple[int, ...]
  error: str | None = None
  cached_tokens: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerUse:
  """The use of a worker.

  Attributes:
    worker: The worker.
    pages: Pages that somebody holds.
    decoding: Sequences in its decode slots.
    cached: Pages that nobody holds and whose content is found again; they count as free.
  """

  worker: str
  pages: int
  decoding: int
  cached: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Occupancy:
  """The use of the cluster at the end of a turn that changed it; before the first of these everything is empty.

  Attributes:
    now_s: The time of the turn.
    waiting: Prompts of which nothing was started.
    workers: Those whose figures are not what they were.
  """

  now_s: float
  waiting: int
  workers: tuple[WorkerUse, ...]


Event = (
  Turn
  | Arrived
  | Withdrawn
  | Started
  | Done
  | Delivered
  | Failed
  | TimerDue
  | WorkerLost
  | WorkerBack
  | Preempted
  | RoleChanged
  | BlockStored
  | BlockRemoved
  | AllBlocksCleared
  | PrefixHit
  | Finished
  | Occupancy
)
