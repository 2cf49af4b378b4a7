"""The answers of a policy: one step of a worker, a move, an end, another role; plans, without numbers."""

import dataclasses
import enum
from typing import TYPE_CHECKING, Literal

from pdjax.types.worker import Role

if TYPE_CHECKING:
  from pdjax.serving.block_making import Blocks


class All(enum.Enum):
  """Stands for every sequence that can decode on the worker."""

  ALL = 'all'


ALL = All.ALL


class Standing(enum.Enum):
  """Stands for as many decode steps as there are until something about the worker changes."""

  STANDING = 'standing'


STANDING = Standing.STANDING


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
  """Prompt tokens `start` to `start + length` of a request.

  With `send_to`, the pages that the chunk completes travel to that worker as soon as they are computed.
  """

  request: str
  start: int
  length: int
  send_to: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
  """One step of a worker over some prompt chunks, some decoding sequences, or both.

  `steps` decode steps run on the device between two decisions; with chunks there is just one. With `STANDING` the
  worker steps, its tokens delivered one by one, until something about it changes: one of the sequences ends or leaves,
  one lacks a page, or the worker is given another step. The policy is asked then, and not at the steps between.
  """

  worker: str
  chunks: tuple[Chunk, ...] = ()
  decodes: tuple[str, ...] | All = ()
  steps: int | Standing = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Transfer:
  """Move a request to where it will decode, or copy cached blocks from place to place.

  A request whose prompt is computed is moved with all its KV, and decodes at `target`. So is one that decodes already:
  it leaves its batch, its KV travels once steps in flight have ended, and it goes on at `target`. If there is no room
  by then, it waits in `view.prefilled` like one whose prompt was just computed, and may also go on where it is.

  Of `Blocks` (`view.blocks`) the target gets what it lacks of those that the source holds, as far as it has free pages;
  they are cached there once they have arrived. Nobody waits for that: a chunk may start behind them from then on.

  Attributes:
    request: The id of a request, or blocks.
    target: The place that it goes to.
    source: The place that it comes from; a request is where it is, so that only blocks need one.
  """

  request: 'str | Blocks'
  target: str
  source: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Cancel:
  """End a request with all its samples, or one further sample of a request; what it holds is released."""

  request: str
  reason: str = 'cancelled'


@dataclasses.dataclass(frozen=True, slots=True)
class Reject:
  """Refuse a request that has not started."""

  request: str
  reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Preempt:
  """Take pages and slot from a request that decodes: it waits again, in its old place, with the tokens it has.

  With 'recompute' its cached tokens are computed anew when it begins again. That counts as no fault; how often one
  request may be preempted, `ServingConfig.max_preemptions` says.
  """

  request: str
  how: Literal['recompute'] = 'recompute'


@dataclasses.dataclass(frozen=True, slots=True)
class SwitchRole:
  """Give a worker another of its roles (`WorkerSpec.may_become`).

  It drains first: it takes no new request, and those it has stay until they end or have moved on. Once it is empty, its
  role changes. Named again meanwhile, it becomes that role instead; its present role calls the change off.
  """

  worker: str
  role: Role


@dataclasses.dataclass(frozen=True, slots=True)
class Abandon:
  """Give up a transfer under way, by the id of its order. The state itself asks for it; a policy need not."""

  transfer: int


@dataclasses.dataclass(frozen=True, slots=True)
class Resend:
  """Try a transfer that failed once more, by the id of its order. Only the state itself asks for it."""

  transfer: int


@dataclasses.dataclass(frozen=True, slots=True)
class SendOn:
  """Send more of a copy that staging had no room for, by its number. Only the state itself asks for it."""

  copy: int


@dataclasses.dataclass(frozen=True, slots=True)
class Leave:
  """Tell a worker that a sequence has left its batch, which ends a standing step. Only the state itself asks for it."""

  request: str
  worker: str


@dataclasses.dataclass(frozen=True, slots=True)
class WakeAt:
  """Ask the policy again at `at_s`, whatever happens until then; nothing is started.

  Of the times that a policy named since it was last woken, the earliest counts: woken, it looks again and names the
  next. A policy that answers with nothing else is not asked again in this turn.
  """

  at_s: float


Action = Step | Transfer | Cancel | Reject | Preempt | SwitchRole | Abandon | Resend | SendOn | Leave | WakeAt
