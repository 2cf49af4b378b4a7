"""What happened: to requests, to orders, to workers; the log is made of these."""

import dataclasses
from typing import Literal

from pdjax.serving.orders import Order
from pdjax.types.request import FinishReason, Request, TokenLogprob


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
  """What one pass brought one request.

  Attributes:
    request: Its id.
    tokens: The tokens, up to one that ended it.
    finish_reason: Why it ended with them, or None; 'error' where no further one could be chosen.
    text: The text that is sure now, and was not before: some of it is held back while a character is unfinished or a
      stop string may have begun, so the text and the tokens of one result need not belong together. Empty where there
      is no tokenizer.
    logprobs: How likely each token was, if the request asks for it.
    error: What went wrong, if it ended with an error.
  """

  request: str
  tokens: tuple[int, ...]
  finish_reason: FinishReason | None = None
  text: str = ''
  logprobs: tuple[TokenLogprob, ...] = ()
  error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Trip:
  """When the pieces of a transfer were where.

  Attributes:
    wire_began_s: When the first left its device.
    arrived_s: When the last was on the target's devices.
    pieces: How many arrays there were.
  """

  wire_began_s: float
  arrived_s: float
  pieces: int


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
  """An order ended well.

  Attributes:
    order: Its id.
    began_s: When the worker or link turned to it: after it was handed over and after all that stood before it; a link
      turns to a transfer once what it moves is computed.
    ended_s: When its outcome was on the host; of a transfer, when passes of the target find what it moved.
    results: A step's tokens, for each request that it had any for; `Delivered` says who got them.
    wasted_tokens: Tokens computed past a request's end and thrown away.
    wire_bytes: Bytes that a transfer put onto target devices.
    trip: How a transfer went, between those two times.
  """

  order: int
  began_s: float
  ended_s: float
  results: tuple[Result, ...] = ()
  wasted_tokens: int = 0
  wire_bytes: int = 0
  trip: Trip | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Delivered:
  """What a step brought those who still wanted it; this alone says what requests really got.

  It comes right behind the `Done` of a step that brought anything, and before the ends that this brings.

  Attributes:
    now_s: The time of the turn.
    order: The step.
    results: What was delivered, in the order of the step.
    late: What came for requests that had ended, or were being ended; it is thrown away.
  """

  now_s: float
  order: int
  results: tuple[Result, ...]
  late: tuple[Result, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Failed:
  """An order did not end well, and no page of it is read or written any more.

  What becomes of the requests of a pass, or that of a transfer, `FaultSpec` says. Of a request in such a pass nothing
  comes any more, from passes behind it either, until one begins it again: with its first chunk, or by an admission.

  Attributes:
    order: Its id.
    ended_s: When that was known.
    error: What went wrong, in a line.
    corrupt: Whether a transfer brought other pages than were sent; none of them was written.
  """

  order: int
  ended_s: float
  error: str
  corrupt: bool = False


TimerName = Literal['deadline', 'retry', 'patience', 'wake']


@dataclasses.dataclass(frozen=True, slots=True)
class TimerDue:
  """The time has come for what the books waited with.

  Attributes:
    due_s: When that was.
    timer: 'deadline' of a transfer that has not ended, 'retry' of one that failed, 'patience' with a lost worker,
      'wake' of a policy that named this time.
    about: The id of the transfer's order, or the name of the worker; 'policy' if that is woken.
  """

  due_s: float
  timer: TimerName
  about: int | str


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerLost:
  """A worker's pages are gone, and orders that name it are over; it may come back.

  What becomes of the requests that had pages there, `FaultSpec` says. It is told once more when trying to bring the
  worker back has failed, so that nobody waits longer than their patience; it may be back later all the same.

  Attributes:
    worker: The worker.
    ended_s: When that was known.
    error: Why it is lost, or why it does not come back.
    returning: Whether the backend is bringing it back, however long that takes: patience does not run meanwhile.
  """

  worker: str
  ended_s: float
  error: str
  returning: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Comeback:
  """What the return of a worker in a new process was made of.

  Attributes:
    tries: How many processes were begun, the one that came back among them.
    failed_s: Seconds of the tries that failed.
    start_s: Seconds until the process was there with its devices.
    load_s: Seconds to load the weights.
    compile_s: Seconds until every pass was compiled, or taken from those that were kept.
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
  """A lost worker takes orders again, its pages and slots empty, in another life that orders name.

  Attributes:
    worker: The worker.
    ended_s: When that was.
    incarnation: The life.
    comeback: What took the time, if it has another process.
  """

  worker: str
  ended_s: float
  incarnation: int
  comeback: Comeback | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
  """A request ended, for whatever reason; `tokens` are all it got."""

  now_s: float
  request: str
  finish_reason: FinishReason
  tokens: tuple[int, ...]
  error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerUse:
  """How full a worker is: pages that are not free, and sequences in its decode slots."""

  worker: str
  pages: int
  decoding: int


@dataclasses.dataclass(frozen=True, slots=True)
class Occupancy:
  """How full the cluster is at the end of a turn that changed it; before the first of these everything is empty.

  Attributes:
    now_s: The time of the turn.
    waiting: Prompts that nothing was started of.
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
  | Finished
  | Occupancy
)
