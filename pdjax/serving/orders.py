"""Orders, which a backend carries out: actions with every number filled in."""

import dataclasses
from collections.abc import Mapping, Sequence

from pdjax.serving.batch import NOBODY, Batch
from pdjax.types.request import FinishReason, Request
from pdjax.types.span import Span

PageNumbers = Mapping[str, tuple[int, ...]]  # by cache kind
PageCopies = Mapping[str, tuple[tuple[int, int], ...]]  # (from, into) by cache kind
PageGrowth = Mapping[str, tuple[int, tuple[int, ...]]]  # (place of the first in the sequence, numbers) by cache kind

MAX_ORDERS = 2  # steps in flight on one worker: one that runs, one that is ready


@dataclasses.dataclass(frozen=True, slots=True)
class ChunkOrder:
  """A chunk with the pages of its sequence on the worker, by cache kind.

  Of a kind that keeps all tokens, page `i` holds tokens `i·page_size` and up.
  `limit` is the most tokens that the request generates, wherever it does.
  `slot` is where the sequence goes on decoding on this worker; None if it is not the last chunk or it moves away.
  `copies` says by cache kind which pages are copied over which of its own before that: a cached page of which it has
  only the beginning in common.
  `delivered` are the tokens that a request begun again has got already: all but the last are computed behind its
  prompt, as if they were part of it, and no token comes of that; the sequence is admitted with them.
  `begins` says whether it is the first of its request since that was begun, or begun again, wherever it starts.
  """

  request: Request
  start: int
  length: int
  pages: PageNumbers
  limit: int
  slot: int | None = None
  delivered: tuple[int, ...] = ()
  copies: PageCopies = dataclasses.field(default_factory=dict)
  begins: bool = False

  @property
  def is_last(self) -> bool:
    """Whether the chunk ends its prompt, so that the first token comes of it."""
    return not self.delivered and self.start + self.length == self.request.prompt_len

  @property
  def restores(self) -> bool:
    """Whether all that a request begun again had cached is there once the chunk is computed."""
    return bool(self.delivered) and self.start + self.length == self.request.prompt_len + len(self.delivered) - 1

  @property
  def token_ids(self) -> Sequence[int]:
    """The tokens to compute."""
    prompt, end = self.request.prompt, self.start + self.length
    if end <= len(prompt):
      return prompt[self.start : end]
    return (*prompt[self.start :], *self.delivered[max(self.start - len(prompt), 0) :])[: self.length]


@dataclasses.dataclass(frozen=True, slots=True)
class Admission:
  """A sequence that arrives in a slot: its pages here, the tokens generated so far, and the most that there can be.

  A further sample of a prompt has no tokens yet: it begins with the prompt's last token, in a page of its own. `copies`
  says by cache kind which pages to copy into which of its own before that; none if all its pages are filled already.
  """

  request: Request
  pages: PageNumbers
  tokens: tuple[int, ...]
  limit: int
  copies: PageCopies = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Join:
  """A sequence that joins the batch of a worker.

  Attributes:
    request: The request.
    slot: Its slot.
    context: The most tokens it has cached when the step begins.
    left: The most tokens that it gets from there on.
    reach: Tokens for which it has pages; None if it has all that it may ever need.
    admission: The content of the slot, if it is new there.
  """

  request: str
  slot: int
  context: int
  left: int
  reach: int | None = None
  admission: Admission | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Growth:
  """Pages that a sequence of the batch got, or one that joins it again, and the tokens for which it has pages now.

  `reach` is None if these are all that it may ever need.
  """

  slot: int
  pages: PageGrowth
  reach: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class StepOrder:
  """`Step`, ready to run, by that incarnation of the worker whose pages it names.

  The sequences that a worker decodes are a batch that stands from order to order, on both sides; an order names what
  changes in it. Those that join stand behind those that stay.

  Attributes:
    id: Its id.
    worker: The worker.
    chunks: Its prompt chunks.
    joins: The sequences that join the batch.
    leaves: The slots of those that left it, taken out before others join.
    growth: The pages that sequences of the batch got.
    decodes: Whether the batch is decoded.
    steps: Decode steps; of a standing order, those that are run at once.
    standing: Whether steps follow one another until one of the sequences ends, be it with a step before them, one
      lacks a page, none gets more tokens, or another order for the worker comes. Steps that are with the worker by
      then, at most `LOOKAHEAD`, are run all the same.
    incarnation: The incarnation of the worker that is to run it.
    layer_groups: The groups of layers it runs in, as (first, one after the last); none on workers whose steps run
      whole.
    batch: The sequences that it decodes: what both sides know, and no message need say.
  """

  id: int
  worker: str
  chunks: tuple[ChunkOrder, ...] = ()
  joins: tuple[Join, ...] = ()
  leaves: tuple[int, ...] = ()
  growth: tuple[Growth, ...] = ()
  decodes: bool = False
  steps: int = 1
  standing: bool = False
  incarnation: int = 1
  layer_groups: tuple[tuple[int, int], ...] = ()
  batch: Batch = dataclasses.field(default=NOBODY, repr=False, compare=False)

  @property
  def requests(self) -> tuple[str, ...]:
    """The ids of the requests in the step, chunks first."""
    return (*(chunk.request.id for chunk in self.chunks), *self.batch.requests)

  def has(self, request: str) -> bool:
    """Whether it computes something of a request."""
    return any(chunk.request.id == request for chunk in self.chunks) or request in self.batch.requests


@dataclasses.dataclass(frozen=True, slots=True)
class TransferOrder:
  """Copy what a sequence has in the cache, of one kind, to another worker; begins once order `after` has ended.

  Attributes:
    id: Its id.
    request: The request whose tokens they are.
    source: The worker that has them.
    target: The worker that gets them.
    span: The kind, the tokens, and the pages of either worker that hold them.
    after: The order that computes the last of them, if it has not ended.
    incarnations: Those of source and target whose pages these are.
    num_bytes: Bytes that travel; of the staging memory of either side it takes as many while it is under way.
    copy: The number of the copy of cached blocks that it is a part of; None if the request itself needs it.
  """

  id: int
  request: str
  source: str
  target: str
  span: Span
  after: int | None = None
  incarnations: tuple[int, int] = (1, 1)
  num_bytes: int = 0
  copy: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class EndOrder:
  """End a request without running it further: cancelled or rejected."""

  id: int
  request: str
  finish_reason: FinishReason
  reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class AbandonOrder:
  """Give up a transfer under way.

  Its `Done` says that no page of the transfer is read or written any more, now or later, and comes soon whatever has
  become of the transfer. Pages that the transfer brought before that count, if its own `Done` comes first.
  """

  id: int
  transfer: int
  source: str
  target: str


@dataclasses.dataclass(frozen=True, slots=True)
class LeaveOrder:
  """A sequence has left the batch of a worker, which lets go of it: steps in flight may bring it nothing more.

  No more steps of the worker's standing order follow; it ends with those that are with the worker.
  """

  id: int
  request: str
  worker: str


Order = StepOrder | TransferOrder | EndOrder | AbandonOrder | LeaveOrder
