"""What policies look at: each request's phase, each worker's room, and what is free."""

import dataclasses
import enum
import math
from collections import deque
from collections.abc import Sequence

from pdjax.serving.orders import MAX_ORDERS, StepOrder
from pdjax.serving.page_allocator import PageAllocator, Staging
from pdjax.types.cluster import TransferSpec, WorkerSpec, ways, wire_dtype
from pdjax.types.model import ModelSpec
from pdjax.types.request import Request


class Phase(enum.Enum):
  """Where a request stands."""

  WAITING = 'waiting'  # nothing started
  PREFILLING = 'prefilling'  # some chunk started, more to come or to end
  PREFILLED = 'prefilled'  # first token delivered, its KV on a worker where it will not decode
  MOVING = 'moving'  # its KV on the way, the prompt all computed
  DECODING = 'decoding'  # in a slot
  FOLLOWING = 'following'  # a further sample of a prompt whose KV is not yet where it will decode
  RESTARTING = 'restarting'  # to begin again, once orders about it have ended
  ENDING = 'ending'  # cancelled or rejected, to be confirmed
  FINISHED = 'finished'


@dataclasses.dataclass(slots=True)
class RequestState:
  """What the cluster knows of one request. Read it in a policy, change it only in `ClusterState`.

  Attributes:
    request: The request.
    limit: Most tokens it may generate: its own `max_tokens`, or what is left of the model's context.
    phase: Where it stands.
    worker: Where it is prefilled.
    target: Where it decodes; the same as `worker` when nothing moves.
    started: Prompt tokens handed to the worker.
    tokens: Tokens generated and delivered.
    steps_in_flight: Most tokens that orders under way can bring it.
    transfers: Transfers of its pages under way or to be tried again.
    pages: Pages it holds, by worker.
    slot: Its slot on `target`.
    tokens_due: Tokens of its prompt that can be sent on, those under way to be computed counted.
    tokens_sent: Tokens of its prompt that were sent on.
    last_step: The order that computes the last of those due.
    computed: Whether its whole prompt is computed.
    admitted: Whether a pass has put it into its slot.
    copy: The page that it begins by copying and its own that it copies it into, if it is a further sample of a prompt.
    samples: The samples of its prompt, if there are several.
    delivered: The tokens it had when it was last begun again.
    attempts: How often it was begun.
    number: Its place in the order of arrival.
  """

  request: Request
  limit: int
  phase: Phase = Phase.WAITING
  worker: str | None = None
  target: str | None = None
  started: int = 0
  tokens: list[int] = dataclasses.field(default_factory=list)
  steps_in_flight: int = 0
  transfers: int = 0
  pages: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  slot: int | None = None
  tokens_due: int = 0
  tokens_sent: int = 0
  last_step: int | None = None
  computed: bool = False
  admitted: bool = False
  copy: tuple[int, int] | None = None
  samples: 'Samples | None' = dataclasses.field(default=None, repr=False)
  delivered: tuple[int, ...] = ()
  attempts: int = 1
  number: int = 0

  @property
  def prefill_len(self) -> int:
    """Tokens to compute before it can decode: its prompt and, begun again, what was delivered but the last token."""
    return self.request.prompt_len + max(len(self.delivered) - 1, 0)

  @property
  def prompt_left(self) -> int:
    """Tokens of these that no pass was given yet."""
    return self.prefill_len - self.started

  @property
  def tokens_left(self) -> int:
    """Tokens that may still be asked for, those under way not counted."""
    return self.limit - len(self.tokens) - self.steps_in_flight


@dataclasses.dataclass(slots=True)
class Samples:
  """The samples of one prompt.

  One of them carries the prompt: its phase and its pages are the prompt's, and policies see it as a request like any
  other. The others follow: they hold nothing until the carrier has a place to decode, where pages and slots of all are
  reserved at once, and begin once the whole prompt is there. They share the carrier's full pages, and begin by copying
  its page with the prompt's last token. A carrier that ends before that hands the prompt on to a follower.

  Attributes:
    ids: All of them; the first is the request's own and stands for all where one is withdrawn or cancelled.
    living: Those that have not ended, by id.
    carrier: The one that carries the prompt, or did.
    following: Those that have not begun, by id.
  """

  ids: tuple[str, ...]
  living: dict[str, RequestState]
  carrier: RequestState
  following: dict[str, RequestState]


class WorkerState:
  """What the cluster knows of one worker.

  Attributes:
    page_size: Tokens per page.
    allocator: Its pages.
    staging_out: Bytes for what is on its way from here.
    staging_in: Bytes for what is on its way to here.
    free_slots: Places free among the sequences that decode at once.
    orders: Passes in flight, oldest first.
    prefilling: Prompts begun here with tokens left to hand over, in order.
    decoding: Sequences in its slots.
    queued_tokens: Prompt tokens of requests begun here that are not computed yet.
    incarnation: Which of its lives this is; the backend says when another begins.
    up: Whether it takes orders: it was not lost, or is back.
    lost: Why it is not up.
    given_up: Whether nobody waits for it to come back any more.
  """

  def __init__(self, spec: WorkerSpec, num_pages: int, page_size: int, staging_bytes: int):
    self.spec = spec
    self.name = spec.name
    self.page_size = page_size
    self.role = spec.role
    self.allocator = PageAllocator(num_pages)
    self.staging_out, self.staging_in = Staging(staging_bytes), Staging(staging_bytes)
    self.free_slots = deque(range(spec.max_sequences))
    self.orders: deque[StepOrder] = deque()
    self.prefilling: dict[str, RequestState] = {}
    self.decoding: dict[str, RequestState] = {}
    self.queued_tokens = 0
    self.incarnation = 1
    self.up = True
    self.lost = ''
    self.given_up = False

  @property
  def num_pages(self) -> int:
    """Pages in all, free or not."""
    return self.allocator.num_pages

  def decodable(self) -> list[str]:
    """Sequences that another decode step can bring a token."""
    return [name for name, entry in self.decoding.items() if entry.tokens_left > 0]


class Room:
  """A scratch view of what is free, so that one part of a decision cannot promise what another took."""

  def __init__(self, view: 'ClusterView'):
    self._view = view
    self._pages: dict[str, int] = {}
    self._slots: dict[str, int] = {}
    self._tokens: dict[str, int] = {}

  def pages(self, worker: str) -> int:
    """Free pages."""
    return self._view.workers[worker].allocator.num_free - self._pages.get(worker, 0)

  def slots(self, worker: str) -> int:
    """Free places among the sequences that decode at once."""
    return len(self._view.workers[worker].free_slots) - self._slots.get(worker, 0)

  def orders(self, worker: str) -> int:
    """Passes that may still be handed over; none to a worker that is lost."""
    place = self._view.workers[worker]
    return MAX_ORDERS - len(place.orders) if place.up else 0

  def queued_tokens(self, worker: str) -> int:
    """Prompt tokens the worker was given and has not finished."""
    return self._view.workers[worker].queued_tokens + self._tokens.get(worker, 0)

  def fits(self, request: str, worker: str, *, decodes: bool) -> bool:
    """Whether the worker has pages (and slots, if it decodes there) for the request and its further samples now."""
    if not self._view.workers[worker].up:
      return False
    needed = self._view.pages_needed(request, worker, decodes=decodes)
    return needed <= self.pages(worker) and (not decodes or self._view.slots_needed(request) <= self.slots(worker))

  def take(self, request: str, worker: str, *, decodes: bool) -> None:
    """Count the request's pages, and its slots if it decodes there, as taken."""
    self._pages[worker] = self._pages.get(worker, 0) + self._view.pages_needed(request, worker, decodes=decodes)
    if decodes:
      self._slots[worker] = self._slots.get(worker, 0) + self._view.slots_needed(request)

  def take_tokens(self, worker: str, tokens: int) -> None:
    """Count prompt tokens as given to the worker."""
    self._tokens[worker] = self._tokens.get(worker, 0) + tokens


class ClusterView:
  """The cluster as a policy may look at it.

  Attributes:
    model: The model served.
    transfer: How KV travels.
    workers: Each worker by name, in the order of the config.
    prefill_workers: Those that prefill.
    decode_workers: Those that decode.
    requests: Each unfinished request by id.
    waiting: Those that nothing was started of, in order of arrival.
    prefilled: Those whose prompt is computed and whose KV has nowhere to go yet, in order.
  """

  def __init__(self, model: ModelSpec, workers: Sequence[WorkerSpec], page_size: int, transfer: TransferSpec):
    """Start with every page free; see `ClusterState`."""
    self.model = model
    self.transfer = transfer
    self.workers: dict[str, WorkerState] = {}
    for spec in workers:
      if spec.name in self.workers:
        raise ValueError(f'two workers are named {spec.name!r}; give each a name of its own.')
      if not isinstance(spec.num_pages, int):
        raise ValueError(f"worker {spec.name!r} has num_pages='auto'; a backend replaces that by a count first.")
      self.workers[spec.name] = WorkerState(spec, spec.num_pages, spec.page_size or page_size, transfer.staging_bytes)
    self.prefill_workers = [worker for worker in self.workers.values() if worker.role.prefills]
    self.decode_workers = [worker for worker in self.workers.values() if worker.role.decodes]
    if not self.prefill_workers or not self.decode_workers:
      missing = 'prefills' if not self.prefill_workers else 'decodes'
      raise ValueError(f'no worker {missing}; give the cluster at least one that does, or one with role "both".')
    self._check_staging()
    self.requests: dict[str, RequestState] = {}
    self.waiting: dict[str, RequestState] = {}
    self.prefilled: dict[str, RequestState] = {}

  def _check_staging(self) -> None:
    for pair in ways([worker.spec for worker in self.workers.values()]):
      source, target = (self.workers[spec.name] for spec in pair)
      if (needed := self.unit_bytes(source, target)) > self.transfer.staging_bytes:
        raise ValueError(
          f'staging_bytes is {self.transfer.staging_bytes}, but one unit of {self.unit(source, target)} tokens from '
          f'{source.name!r} to {target.name!r} has {needed} bytes; raise TransferSpec.staging_bytes.'
        )

  def room(self) -> Room:
    """A fresh scratch view of what is free."""
    return Room(self)

  def pages_needed(self, request: str, worker: str, *, decodes: bool) -> int:
    """Pages of a worker for the prompt, and with `decodes` for all the tokens it may generate but the last.

    With further samples that follow it, theirs too: all but those of the prompt's full pages.
    """
    entry, place = self.requests[request], self.workers[worker]
    whole = self.whole_pages(entry, place, decodes=decodes)
    return whole + (self.slots_needed(request) - 1) * (whole - self.shared_pages(entry, place)) if decodes else whole

  def slots_needed(self, request: str) -> int:
    """Slots where it decodes: one, and one for each further sample that follows it."""
    samples = self.requests[request].samples
    return 1 if samples is None or samples.carrier.request.id != request else 1 + len(samples.following)

  def whole_pages(self, entry: RequestState, worker: WorkerState, *, decodes: bool) -> int:
    """Pages of a worker for one sequence."""
    tokens = entry.request.prompt_len + entry.limit - 1 if decodes else entry.prefill_len
    return -(-tokens // worker.page_size)

  def shared_pages(self, entry: RequestState, worker: WorkerState) -> int:
    """Pages that samples share: all before the one of the prompt's last token, which each of them writes."""
    return (entry.request.prompt_len - 1) // worker.page_size

  def unit(self, source: WorkerState, target: WorkerState) -> int:
    """Tokens of the largest piece that pages of both are made of."""
    return math.gcd(source.page_size, target.page_size)

  def unit_bytes(self, source: WorkerState, target: WorkerState) -> int:
    """Bytes of such a piece while it travels."""
    ours, theirs = (worker.spec.kv_dtype or 'float32' for worker in (source, target))
    return self.unit(source, target) * self.model.cached_token_bytes(wire_dtype(ours, theirs))
