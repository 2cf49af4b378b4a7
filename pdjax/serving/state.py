"""ClusterState: each request's phase and each worker's room, advanced by events and by the orders that start."""

import dataclasses
import enum
import math
from collections import deque
from collections.abc import Sequence

from pdjax.serving.messages import (
  Abandon,
  AbandonOrder,
  Action,
  Admission,
  All,
  Arrived,
  Cancel,
  Chunk,
  ChunkOrder,
  DecodeOrder,
  Done,
  EndOrder,
  Event,
  Failed,
  Finished,
  Occupancy,
  Order,
  Reject,
  Resend,
  Step,
  StepOrder,
  TimerDue,
  Transfer,
  TransferOrder,
  Withdrawn,
  WorkerBack,
  WorkerLost,
  WorkerUse,
)
from pdjax.serving.page_allocator import PageAllocator, Staging
from pdjax.serving.timers import Timers
from pdjax.serving.transfers import Transfers
from pdjax.types.cluster import TransferSpec, WorkerSpec, wire_dtype
from pdjax.types.faults import FaultSpec
from pdjax.types.model import ModelSpec
from pdjax.types.request import MAX_STOP_TOKENS, FinishReason, Request

MAX_ORDERS = 2  # passes in flight on one worker: one that runs, one that is ready


class PolicyError(RuntimeError):
  """A policy asked for what the cluster cannot do; the message names the action and what is short."""


class StuckError(RuntimeError):
  """Requests wait for what can never come."""


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

  def __init__(self, state: 'ClusterState'):
    self._state = state
    self._pages: dict[str, int] = {}
    self._slots: dict[str, int] = {}
    self._tokens: dict[str, int] = {}

  def pages(self, worker: str) -> int:
    """Free pages."""
    return self._state.workers[worker].allocator.num_free - self._pages.get(worker, 0)

  def slots(self, worker: str) -> int:
    """Free places among the sequences that decode at once."""
    return len(self._state.workers[worker].free_slots) - self._slots.get(worker, 0)

  def orders(self, worker: str) -> int:
    """Passes that may still be handed over; none to a worker that is lost."""
    place = self._state.workers[worker]
    return MAX_ORDERS - len(place.orders) if place.up else 0

  def queued_tokens(self, worker: str) -> int:
    """Prompt tokens the worker was given and has not finished."""
    return self._state.workers[worker].queued_tokens + self._tokens.get(worker, 0)

  def fits(self, request: str, worker: str, *, decodes: bool) -> bool:
    """Whether the worker has pages (and slots, if it decodes there) for the request and its further samples now."""
    if not self._state.workers[worker].up:
      return False
    needed = self._state.pages_needed(request, worker, decodes=decodes)
    return needed <= self.pages(worker) and (not decodes or self._state.slots_needed(request) <= self.slots(worker))

  def take(self, request: str, worker: str, *, decodes: bool) -> None:
    """Count the request's pages, and its slots if it decodes there, as taken."""
    self._pages[worker] = self._pages.get(worker, 0) + self._state.pages_needed(request, worker, decodes=decodes)
    if decodes:
      self._slots[worker] = self._slots.get(worker, 0) + self._state.slots_needed(request)

  def take_tokens(self, worker: str, tokens: int) -> None:
    """Count prompt tokens as given to the worker."""
    self._tokens[worker] = self._tokens.get(worker, 0) + tokens


class ClusterState:
  """Everything a policy may look at.

  Attributes:
    model: The model served.
    workers: Each worker by name, in the order of the config.
    requests: Each unfinished request by id.
    waiting: Those that nothing was started of, in order of arrival.
    prefilled: Those whose prompt is computed and whose KV has nowhere to go yet, in order.
  """

  def __init__(
    self,
    model: ModelSpec,
    workers: Sequence[WorkerSpec],
    page_size: int,
    transfer: TransferSpec = TransferSpec(),
    *,
    finds_stops: bool = True,
    faults: FaultSpec = FaultSpec(),
  ):
    """Start with every page free.

    Args:
      model: The model served.
      workers: The cluster, `num_pages` filled in.
      page_size: Tokens per page of workers that have no page size of their own.
      transfer: How KV travels; with `granularity='auto'` and no `layers_from`, chunk by chunk.
      finds_stops: Whether the backend finds stop strings; requests that have some are refused otherwise.
      faults: What is done when something fails.

    Raises:
      ValueError: if a worker's pages are still 'auto', names repeat, a phase has no worker, or the staging memory holds
        no page of a prefill worker.
    """
    self.model = model
    self.transfer = transfer
    self._finds_stops = finds_stops
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
    self._samples: dict[str, Samples] = {}  # by the id of each, ended or not
    self.waiting: dict[str, RequestState] = {}
    self.prefilled: dict[str, RequestState] = {}
    self._in_flight: dict[int, Order] = {}
    self._must: dict[str, Action] = {}
    self._due: dict[str, RequestState] = {}  # those with tokens to send on that staging had no room for
    self._staging_freed = False
    self._finished: list[Finished] = []
    self._tasks: list[Abandon | Resend] = []
    self._now_s = 0.0
    self._faults = faults
    self._timers = Timers()
    self._transfers = Transfers(self._timers, transfer.deadline_s, faults)
    self._next_order = 0
    self._next_number = 0
    self._uses = dict.fromkeys(self.workers, (0, 0))
    self._num_waiting = 0

  def _check_staging(self) -> None:
    for source in self.prefill_workers:
      for target in self.decode_workers:
        if source is not target and (needed := self._unit_bytes(source, target)) > self.transfer.staging_bytes:
          raise ValueError(
            f'staging_bytes is {self.transfer.staging_bytes}, but one unit of {self._unit(source, target)} tokens from '
            f'{source.name!r} to {target.name!r} has {needed} bytes; raise TransferSpec.staging_bytes.'
          )

  # -------------------------------------------------------------------------- what policies ask

  @property
  def unfinished(self) -> bool:
    """Whether any request or order is left."""
    return bool(self.requests or self._in_flight)

  def room(self) -> Room:
    """A fresh scratch view of what is free."""
    return Room(self)

  def pages_needed(self, request: str, worker: str, *, decodes: bool) -> int:
    """Pages of a worker for the prompt, and with `decodes` for all the tokens it may generate but the last.

    With further samples that follow it, theirs too: all but those of the prompt's full pages.
    """
    entry, place = self.requests[request], self.workers[worker]
    whole = self._whole_pages(entry, place, decodes=decodes)
    return whole + (self.slots_needed(request) - 1) * (whole - self._shared_pages(entry, place)) if decodes else whole

  def slots_needed(self, request: str) -> int:
    """Slots where it decodes: one, and one for each further sample that follows it."""
    samples = self.requests[request].samples
    return 1 if samples is None or samples.carrier.request.id != request else 1 + len(samples.following)

  def _whole_pages(self, entry: RequestState, worker: WorkerState, *, decodes: bool) -> int:
    tokens = entry.request.prompt_len + entry.limit - 1 if decodes else entry.prefill_len
    return -(-tokens // worker.page_size)

  def _shared_pages(self, entry: RequestState, worker: WorkerState) -> int:
    """Pages that samples share: all before the one of the prompt's last token, which each of them writes."""
    return (entry.request.prompt_len - 1) // worker.page_size

  def must(self) -> list[Action]:
    """What has to be done whatever the policy: refuse what can never run, end what was withdrawn, mend what failed,
    send what is due.
    """
    actions = [*self._take_tasks(), *self._must.values()]
    self._must = {}
    if self._staging_freed and not actions:
      self._staging_freed = False
      return [Transfer(name, entry.target) for name, entry in self._due.items() if entry.target is not None]
    return actions

  def _take_tasks(self) -> list[Action]:
    """Transfers to give up, and else one to try again if staging has room for it; then this is asked again."""
    tasks: list[Action] = []
    wait: list[Abandon | Resend] = []
    for task in self._tasks:
      if isinstance(task, Abandon):
        tasks += [task] if self._transfers.get(task.transfer) else []
      elif (attempt := self._transfers.get_again(task.transfer)) is not None:
        order = attempt.order
        room = self.workers[order.source].staging_out, self.workers[order.target].staging_in
        if tasks or min(one.free_bytes for one in room) < order.staging_bytes:
          wait.append(task)
        else:
          tasks.append(task)
    self._tasks = wait
    return tasks

  @property
  def next_timer_s(self) -> float:
    """When something is due that no backend tells of; infinity if nothing is."""
    return self._timers.next_s

  def timers_due(self, now_s: float) -> list[TimerDue]:
    """What is due by now; ask once a turn, when all that ended up to now was applied."""
    self._now_s = now_s
    return self._timers.take(now_s)

  def take_finished(self) -> tuple[Finished, ...]:
    """The requests that ended since the last call."""
    finished, self._finished = tuple(self._finished), []
    return finished

  def take_occupancy(self, now_s: float) -> Occupancy | None:
    """How full the cluster is, if that changed since the last call."""
    changed = []
    for name, worker in self.workers.items():
      use = worker.num_pages - worker.allocator.num_free, len(worker.decoding)
      if use != self._uses[name]:
        self._uses[name] = use
        changed.append(WorkerUse(name, *use))
    if not changed and len(self.waiting) == self._num_waiting:
      return None
    self._num_waiting = len(self.waiting)
    return Occupancy(now_s, self._num_waiting, tuple(changed))

  def check_progress(self) -> None:
    """Raise if requests are left although nothing is under way, so that nothing can ever change.

    Raises:
      StuckError: naming the requests and the pages they need.
    """
    if self._in_flight or not self.requests:
      return
    if not all(worker.up or worker.given_up for worker in self.workers.values()):
      return
    waits = ', '.join(
      f'{name} ({entry.phase.value}, {self.pages_needed(name, self.decode_workers[0].name, decodes=True)} pages)'
      for name, entry in list(self.requests.items())[:8]
    )
    free = ', '.join(
      f'{worker.name} {worker.allocator.num_free}/{worker.num_pages}' for worker in self.workers.values()
    )
    raise StuckError(
      f'{len(self.requests)} requests wait and no order is under way, so nothing can change: {waits}. '
      f'Free pages: {free}. The policy must start, move, reject or cancel them.'
    )

  # -------------------------------------------------------------------------- events

  def apply(self, event: Event, now_s: float) -> bool:
    """Take note of what happened; whether it counts: of an order that is over, nothing counts any more."""
    self._now_s = now_s
    match event:
      case Arrived(request):
        self._arrive(request, now_s)
      case Done():
        return self._done(event, now_s)
      case Failed():
        return self._fail(event, now_s)
      case TimerDue():
        return self._timer_due(event, now_s)
      case WorkerLost(name, _, error):
        self._lose(name, error, now_s)
      case WorkerBack(name, _, incarnation):
        return self._return(name, incarnation, now_s)
      case Withdrawn(request):
        self._withdraw(request)
    return True

  def _arrive(self, request: Request, now_s: float) -> None:
    limit = max(request.token_limit(self.model.context_len), 1)
    entries = {sample.id: RequestState(sample, limit) for sample in request.samples()}
    for name in entries:
      if name in self.requests or name in self._samples:
        raise ValueError(f'request {name!r} is being served already; ids must be unique.')
    for one in entries.values():
      one.number, self._next_number = self._next_number, self._next_number + 1
    self.requests |= entries
    entry = entries[request.id]
    if len(entries) > 1:
      following = {name: one for name, one in entries.items() if one is not entry}
      samples = Samples(tuple(entries), entries, entry, following)
      self._samples |= dict.fromkeys(entries, samples)
      for one in entries.values():
        one.samples = samples
      for one in samples.following.values():
        one.phase = Phase.FOLLOWING
    problem = self._unfit_for(entry)
    if problem:
      self._must[request.id] = Reject(request.id, problem)
    else:
      self.waiting[request.id] = entry

  def _unfit_for(self, entry: RequestState) -> str | None:
    """Why the request can never be served here, or None."""
    request, model = entry.request, self.model
    if request.prompt_len > model.context_len:
      return (
        f'the prompt has {request.prompt_len} tokens, but the context of {model.name} is {model.context_len}; '
        'shorten the prompt.'
      )
    stops = len({*request.sampling.stop_token_ids, *(() if request.sampling.ignore_eos else model.eos_token_ids)})
    if stops > MAX_STOP_TOKENS:
      return (
        f"{stops} stop tokens asked for, the model's own included, but at most {MAX_STOP_TOKENS} are kept; name fewer."
      )
    if request.sampling.stop and not self._finds_stops:
      return (
        f'stop strings {", ".join(map(repr, request.sampling.stop))} asked for, but there is no tokenizer to find them '
        'with; serve a checkpoint that has one, or use stop_token_ids.'
      )
    bad = first_outside(request.prompt, model.vocab_size)
    if bad is not None:
      return (
        f'token id {bad} in the prompt, but the ids of {model.name} are 0 to {model.vocab_size - 1}; use its tokenizer.'
      )
    slots = self.slots_needed(request.id)
    places = [] if entry.computed else [(self.prefill_workers, False)]
    if entry.limit > 1 or slots > 1:
      places.append((self.decode_workers, True))
    for there, decodes in places:
      workers = [worker for worker in there if not worker.given_up]
      if not workers:
        lost = ', '.join(f'{worker.name!r} ({worker.lost})' for worker in there)
        return f'every worker that {"decodes" if decodes else "prefills"} is lost: {lost}.'
      needs = {w.name: self.pages_needed(request.id, w.name, decodes=decodes) for w in workers}
      roomy = [worker for worker in workers if needs[worker.name] <= worker.num_pages]
      if not roomy:
        largest = max(workers, key=lambda worker: worker.num_pages * worker.page_size)
        return (
          f'{request.prompt_len} prompt tokens{f", {len(entry.delivered)} delivered ones" if entry.delivered else ""} '
          f'and up to {entry.limit} generated ones'
          f'{f" of each of {slots} samples" if slots > 1 else ""} need {needs[largest.name]} pages of '
          f'{largest.page_size} tokens, but the largest worker that {"decodes" if decodes else "prefills"}, '
          f'{largest.name!r}, has {largest.num_pages} in all; raise num_pages, shorten the prompt or lower '
          f'{"n or " if decodes and slots > 1 else ""}max_tokens.'
        )
      if decodes and not any(worker.spec.max_sequences >= slots for worker in roomy):
        found = ', '.join(f'{w.name} {w.spec.max_sequences} and {w.num_pages}' for w in workers)
        return (
          f'{slots} samples need {slots} sequences and {needs[roomy[0].name]} pages on one worker that decodes, but '
          f'these have {found}; raise max_sequences or lower n.'
        )
    return None

  def _done(self, event: Done, now_s: float) -> bool:
    order = self._in_flight.pop(event.order, None)
    match order:
      case StepOrder():
        self._step_ended(order)
        for result in event.results:
          self._got(result.request, result.tokens, result.finish_reason, now_s)
        for chunk in order.chunks:
          entry = self.requests.get(chunk.request.id)
          if entry is not None and (chunk.restores or entry.phase is Phase.RESTARTING):
            entry.computed = entry.computed or chunk.restores
            self._settle(entry)
      case TransferOrder():
        if entry := self._transfer_ended(order):
          self._settle(entry)
      case EndOrder():
        if entry := self.requests.get(order.request):
          self._finish(entry, order.finish_reason, now_s, order.reason if order.finish_reason == 'rejected' else None)
      case AbandonOrder(_, transfer):
        if attempt := self._transfers.get(transfer):
          del self._in_flight[transfer]
          self._transfer_failed(attempt.order, attempt.error, False, now_s)
    return order is not None

  def _step_ended(self, order: StepOrder) -> None:
    worker = self.workers[order.worker]
    first = worker.orders.popleft()
    assert first.id == order.id, f'order {order.id} of {worker.name!r} ended before order {first.id}'
    self._transfers.pass_ended(order.id, self._now_s)
    for chunk in order.chunks:
      worker.queued_tokens -= chunk.length
      if chunk.is_last and (entry := self.requests.get(chunk.request.id)):
        entry.steps_in_flight -= 1
    for decode in order.decodes:
      if entry := self.requests.get(decode.request):
        entry.steps_in_flight -= order.steps

  def _transfer_ended(self, order: TransferOrder) -> RequestState | None:
    """Let go of what a transfer held; who needed it, if anybody still does."""
    source, target = self.workers[order.source], self.workers[order.target]
    source.allocator.drop(order.source_pages)
    target.allocator.drop(order.target_pages)
    source.staging_out.give_back(order.staging_bytes)
    target.staging_in.give_back(order.staging_bytes)
    self._staging_freed = bool(self._due)
    entry = self.requests.get(self._transfers.end(order.id).request)
    if entry is not None:
      entry.transfers -= 1
    return entry

  def _got(self, request: str, tokens: Sequence[int], reason: FinishReason | None, now_s: float) -> None:
    entry = self.requests.get(request)
    if entry is None or entry.phase is Phase.ENDING:
      return
    entry.tokens.extend(tokens)
    entry.computed = True
    if reason is not None:
      self._finish(entry, reason, now_s)
    else:
      self._settle(entry)

  def _settle(self, entry: RequestState) -> None:
    """Put a request whose prompt is computed where it belongs now."""
    if entry.phase is Phase.RESTARTING:
      self._begin_again(entry)
      return
    followed = entry.samples is not None and entry.samples.carrier is entry and bool(entry.samples.following)
    if entry.phase is Phase.DECODING and not followed:
      return
    if not entry.computed or entry.phase in (Phase.ENDING, Phase.FINISHED):
      return
    if entry.target is None:
      entry.phase = Phase.PREFILLED
      if not any(worker.given_up for worker in self.decode_workers) or not self._refuse_unfit(entry, self._now_s):
        self._file(self.prefilled, entry)
    elif entry.transfers or entry.request.id in self._due:
      entry.phase = Phase.MOVING
    else:
      self._begin_decoding(entry)
      if entry.samples is not None and followed:
        for other in entry.samples.following.values():
          self._begin_decoding(other)
        entry.samples.following.clear()

  def _begin_decoding(self, entry: RequestState) -> None:
    assert entry.target is not None
    if entry.phase is not Phase.DECODING:
      entry.phase = Phase.DECODING
      self.workers[entry.target].decoding[entry.request.id] = entry
    if entry.worker is not None and entry.worker != entry.target and entry.worker in entry.pages:
      self.workers[entry.worker].allocator.drop(entry.pages.pop(entry.worker))

  def _finish(self, entry: RequestState, reason: FinishReason, now_s: float, error: str | None = None) -> None:
    name = entry.request.id
    self._unschedule(entry)
    if entry.samples is None or name != entry.samples.ids[0]:
      self._must.pop(name, None)
    for place, pages in entry.pages.items():
      self.workers[place].allocator.drop(pages)
    self._release_copied(entry)
    if entry.slot is not None:
      assert entry.target is not None
      self.workers[entry.target].free_slots.append(entry.slot)
    entry.pages, entry.slot, entry.phase = {}, None, Phase.FINISHED
    del self.requests[name]
    self._transfers.forget(name)
    if reason in ('cancelled', 'error'):
      self._give_up(name, error or reason)
    if entry.samples is not None:
      self._sample_ended(name, entry.samples)
    self._finished.append(Finished(now_s, name, reason, tuple(entry.tokens), error))

  def _sample_ended(self, name: str, samples: Samples) -> None:
    del samples.living[name]
    if not samples.living:
      for one in samples.ids:
        del self._samples[one]
      self._must.pop(samples.ids[0], None)

  def _meant_by(self, name: str) -> list[RequestState]:
    """The request of this id, or all its samples, that have not ended."""
    samples = self._samples.get(name)
    if samples is not None and name == samples.ids[0]:
      return list(samples.living.values())
    return [self.requests[name]] if name in self.requests else []

  def _withdraw(self, request: str) -> None:
    samples = self._samples.get(request)
    entries = [entry for entry in self._meant_by(request) if entry.phase is not Phase.ENDING]
    if not entries or (request if samples is None else samples.ids[0]) in self._must:
      return
    self._unschedule_all(entries)
    for entry in entries:
      self._must.pop(entry.request.id, None)
    self._must[request] = Cancel(request)

  def _unschedule_all(self, entries: Sequence[RequestState]) -> None:
    """As `_unschedule`, the carrier of a prompt last, so that nobody is left to hand it on to."""
    for entry in reversed(entries):
      self._unschedule(entry)

  def _unschedule(self, entry: RequestState) -> None:
    """Take a request out of every queue a policy looks at; a prompt that others wait for is handed on to one."""
    name = entry.request.id
    samples = entry.samples
    if samples is not None:
      samples.following.pop(name, None)
      if samples.carrier is entry and samples.following and entry.computed:
        self._hand_on(entry, samples)
    self.waiting.pop(name, None)
    self.prefilled.pop(name, None)
    self._due.pop(name, None)
    if entry.worker is not None and name in self.workers[entry.worker].prefilling:
      del self.workers[entry.worker].prefilling[name]
      self.workers[entry.worker].queued_tokens -= entry.prompt_left
    if entry.target is not None:
      self.workers[entry.target].decoding.pop(name, None)

  def _hand_on(self, entry: RequestState, samples: Samples) -> None:
    """Let the first follower carry the computed prompt in place of one that ends."""
    heir = next(iter(samples.following.values()))
    del samples.following[heir.request.id]
    samples.carrier = heir
    heir.worker, heir.started, heir.tokens_sent = entry.worker, entry.started, entry.tokens_sent
    heir.computed, heir.transfers, heir.tokens_due = True, entry.transfers, entry.tokens_due
    self._transfers.hand_on(entry.request.id, heir.request.id)
    if entry.request.id in self._due:
      self._due[heir.request.id] = heir
    if entry.worker is not None and entry.worker != entry.target:
      heir.pages[entry.worker] = entry.pages.pop(entry.worker)
    self._settle(heir)

  def _finish_all(self, entry: RequestState, error: str, now_s: float) -> None:
    """End a request with an error, and those with it that wait for its prompt."""
    if entry.samples is not None and entry.samples.carrier is entry:
      for other in reversed(list(entry.samples.following.values())):
        self._finish(other, 'error', now_s, error)
    self._finish(entry, 'error', now_s, error)

  def _fail(self, event: Failed, now_s: float) -> bool:
    order = self._in_flight.pop(event.order, None)
    names = []
    match order:
      case StepOrder():
        self._step_ended(order)
        names = [chunk.request.id for chunk in order.chunks] + [decode.request for decode in order.decodes]
      case TransferOrder():
        self._transfer_failed(order, event.error, event.corrupt, now_s)
      case EndOrder():
        names = [order.request]
      case AbandonOrder():
        raise AssertionError(f'{order} failed ({event.error}); it must not, for its pages cannot be given to others')
    for name in names:
      if entry := self.requests.get(name):
        self._finish_all(entry, event.error, now_s)
    return order is not None

  # -------------------------------------------------------------------------- faults

  def _timer_due(self, event: TimerDue, now_s: float) -> bool:
    match event:
      case TimerDue(_, 'deadline', int(order)):
        return self._abandon(order, f'the transfer did not end within {self.transfer.deadline_s:g} s')
      case TimerDue(_, 'retry', int(order)):
        self._tasks.append(Resend(order))
      case TimerDue(_, 'patience', str(name)):
        self.workers[name].given_up = True
        for entry in [*self.waiting.values(), *self.prefilled.values()]:
          self._refuse_unfit(entry, now_s)
    return True

  def _refuse_unfit(self, entry: RequestState, now_s: float) -> bool:
    """End a request with an error if nobody is left who can serve it; whether it was."""
    problem = self._unfit_for(entry)
    if problem is not None:
      self._finish_all(entry, problem, now_s)
    return problem is not None

  def _abandon(self, order: int, error: str) -> bool:
    """Ask for a transfer's end; whether it was not asked for before."""
    attempt = self._transfers.abandon(order)
    if attempt is None:
      return False
    attempt.error = error
    self._tasks.append(Abandon(order))
    return True

  def _give_up(self, request: str, error: str) -> None:
    """No transfer of a request is needed any more."""
    self._transfers.forget(request)
    for attempt in self._transfers.of(request):
      self._abandon(attempt.order.id, error)

  def _transfer_failed(self, order: TransferOrder, error: str, corrupt: bool, now_s: float) -> None:
    attempt = self._transfers.get(order.id)
    entry = self._transfer_ended(order)
    if entry is None or entry.phase is Phase.ENDING:
      return
    if entry.phase is Phase.RESTARTING:
      self._begin_again(entry)
      return
    assert attempt is not None
    answer = self._faults.corruption if corrupt else self._faults.transfer
    if answer == 'fail':
      self._finish_all(entry, error, now_s)
    elif answer == 'retry' and self._transfers.try_again(attempt, now_s):
      entry.transfers += 1
    else:
      self._restart(entry, error, now_s)

  def _lose(self, worker: str, error: str, now_s: float) -> None:
    place = self.workers[worker]
    place.up, place.lost = False, error
    self._timers.set('patience', worker, now_s + self._faults.patience_s)
    for order in [order for order in self._in_flight.values() if worker in _places(order)]:
      del self._in_flight[order.id]
      if isinstance(order, StepOrder):
        self._step_ended(order)
      elif isinstance(order, TransferOrder):
        self._transfer_ended(order)
    for attempt in self._transfers.forget_worker(worker):
      self.requests[attempt.request].transfers -= 1
    for entry in [entry for entry in self.requests.values() if worker in entry.pages]:
      if entry.phase in (Phase.FINISHED, Phase.WAITING, Phase.ENDING, Phase.FOLLOWING):
        continue  # it ended, or was begun again, with one before it; the end of the others is under way
      if entry.phase is Phase.RESTARTING:
        self._begin_again(entry)
      elif self._faults.worker == 'fail':
        self._finish_all(entry, error, now_s)
      elif entry.target == worker and self._is_whole(entry):
        self._lose_target(entry, error, now_s)
      else:
        self._restart(entry, error, now_s)

  def _return(self, name: str, incarnation: int, now_s: float) -> bool:
    worker = self.workers[name]
    if incarnation <= worker.incarnation:
      return False  # told late, of a life that is over or known
    if worker.up:  # so that nobody waits for the one before it
      self._lose(name, f'worker {name!r} began another life', now_s)
    worker.incarnation, worker.up, worker.lost, worker.given_up = incarnation, True, '', False
    self._timers.cancel('patience', name)
    return True

  def _is_whole(self, entry: RequestState) -> bool:
    """Whether all that was computed of a prompt is still where it was, and can be sent from there."""
    if entry.worker is None or entry.phase not in (Phase.PREFILLING, Phase.MOVING):
      return False
    source = self.workers[entry.worker]
    return source.up and not source.role.decodes and entry.worker in entry.pages

  def _lose_target(self, entry: RequestState, error: str, now_s: float) -> None:
    """Keep a prompt where it is computed; what was to become of it elsewhere is to be decided anew."""
    if not self._count_attempt(entry):
      self._finish_all(entry, error, now_s)
      return
    carries = entry.samples is not None and entry.samples.carrier is entry
    for one in [entry, *(entry.samples.following.values() if entry.samples is not None and carries else ())]:
      self._leave(one, one.target)
    self._due.pop(entry.request.id, None)
    entry.tokens_due = entry.tokens_sent = 0
    if entry.phase is Phase.MOVING:
      self._settle(entry)

  def _leave(self, entry: RequestState, worker: str | None) -> None:
    """Let go of what a request holds on a worker."""
    if worker == entry.target and worker is not None:
      self._release_copied(entry)
      if entry.slot is not None:
        self.workers[worker].free_slots.append(entry.slot)
      entry.target = entry.slot = None
    if worker in entry.pages:
      self.workers[worker].allocator.drop(entry.pages.pop(worker))

  def _count_attempt(self, entry: RequestState) -> bool:
    """Whether a request may be begun once more."""
    entry.attempts += 1
    return entry.attempts <= self._faults.max_attempts

  def _restart(self, entry: RequestState, error: str, now_s: float) -> None:
    """Begin a request again, and each of those that wait for its prompt by itself."""
    group = [entry]
    if entry.samples is not None and entry.samples.carrier is entry:
      group += entry.samples.following.values()
      entry.samples.following.clear()
    for one in group:
      if not self._count_attempt(one):
        self._finish(one, 'error', now_s, error)
        continue
      self._unschedule(one)
      one.phase = Phase.RESTARTING
      self._give_up(one.request.id, error)
      one.transfers = len(self._transfers.of(one.request.id))
      self._begin_again(one)

  def _begin_again(self, entry: RequestState) -> None:
    """Let a request wait like one that has just come, in its old place, once no order is about it any more."""
    name = entry.request.id
    if entry.transfers or any(
      isinstance(order, StepOrder) and _is_in(name, order) for order in self._in_flight.values()
    ):
      return
    self._leave(entry, entry.target)
    for place in list(entry.pages):
      self._leave(entry, place)
    entry.worker, entry.started, entry.tokens_due, entry.tokens_sent, entry.steps_in_flight = None, 0, 0, 0, 0
    entry.computed = entry.admitted = False
    entry.delivered = tuple(entry.tokens)
    entry.phase = Phase.WAITING
    if not self._refuse_unfit(entry, self._now_s):
      self._file(self.waiting, entry)

  def _file(self, queue: dict[str, RequestState], entry: RequestState) -> None:
    """Put a request into a queue; one that was begun again before those that came after it."""
    later = [] if entry.attempts == 1 else [other for other in queue.values() if other.number > entry.number]
    queue[entry.request.id] = entry
    for other in later:
      queue[other.request.id] = queue.pop(other.request.id)

  # -------------------------------------------------------------------------- actions

  def start(self, action: Action) -> tuple[Order, ...]:
    """Reserve what an action needs and turn it into orders with every number filled in.

    Raises:
      PolicyError: if the cluster cannot do it; nothing is reserved then.
    """
    match action:
      case Step():
        orders = self._start_step(action)
      case Transfer():
        orders = self._start_transfer(action)
      case Cancel():
        orders = self._start_end(action, 'cancelled')
      case Reject():
        orders = self._start_end(action, 'rejected')
      case Abandon():
        orders = (self._start_abandon(action),)
      case Resend():
        orders = (self._start_resend(action),)
      case _:
        raise PolicyError(f'{action!r} is no action; answer with Step, Transfer, Cancel or Reject.')
    for order in orders:
      self._in_flight[order.id] = order
      if isinstance(order, TransferOrder) and self._transfers.get(order.id) is None:
        self._transfers.begin(order, 1, self._now_s, waits=order.after in self._in_flight)
    return orders

  def _order_id(self) -> int:
    self._next_order += 1
    return self._next_order - 1

  def _find(self, action: Action, request: str) -> RequestState:
    entry = self.requests.get(request)
    if entry is None:
      raise PolicyError(f'{action!r}: request {request!r} is unknown or finished.')
    return entry

  def _find_worker(self, action: Action, name: str) -> WorkerState:
    worker = self.workers.get(name)
    if worker is None:
      raise PolicyError(f'{action!r}: worker {name!r} is unknown; the workers are {", ".join(self.workers)}.')
    return worker

  def _start_end(self, action: Cancel | Reject, reason: FinishReason) -> tuple[EndOrder, ...]:
    entries = self._meant_by(action.request) or [self._find(action, action.request)]
    entries = [entry for entry in entries if entry.phase is not Phase.ENDING]
    if not entries:
      raise PolicyError(f'{action!r}: the request is being ended already.')
    if isinstance(action, Reject) and entries[0].phase is not Phase.WAITING:
      raise PolicyError(
        f'{action!r}: the request is {entries[0].phase.value}; only a waiting one can be rejected, cancel it.'
      )
    self._unschedule_all(entries)
    for entry in entries:
      entry.phase = Phase.ENDING
      self._give_up(entry.request.id, reason)
    return tuple(EndOrder(self._order_id(), entry.request.id, reason, action.reason) for entry in entries)

  def _start_abandon(self, action: Abandon) -> AbandonOrder:
    attempt = self._transfers.get(action.transfer)
    if attempt is None:
      raise PolicyError(f'{action!r}: no transfer of that id is under way.')
    self._transfers.abandon(action.transfer)
    return AbandonOrder(self._order_id(), action.transfer, attempt.order.source, attempt.order.target)

  def _start_resend(self, action: Resend) -> TransferOrder:
    attempt = self._transfers.take_again(action.transfer)
    if attempt is None:
      raise PolicyError(f'{action!r}: no transfer of that id is to be tried again.')
    before = attempt.order
    after = before.after if before.after in self._in_flight else None
    order = dataclasses.replace(before, id=self._order_id(), request=attempt.request, after=after)
    source, target = self.workers[order.source], self.workers[order.target]
    source.allocator.hold(order.source_pages)
    target.allocator.hold(order.target_pages)
    source.staging_out.take(order.staging_bytes)
    target.staging_in.take(order.staging_bytes)
    self._transfers.begin(order, attempt.number + 1, self._now_s, waits=after is not None)
    return order

  def _start_step(self, step: Step) -> tuple[Order, ...]:
    worker = self._find_worker(step, step.worker)
    decodes = self._check_step(step, worker)
    for chunk in step.chunks:
      self._check_chunk(step, chunk, worker)
    self._check_room(step, worker)
    step_id = self._order_id()
    chunk_orders = []
    transfers = []
    for chunk in step.chunks:
      chunk_orders.append(self._start_chunk(chunk, worker))
      transfers += self._send_chunk(chunk, worker, step_id)
    groups = () if all(order.layers is None for order in transfers) else self.transfer.groups(self.model.num_layers)
    steps = min(step.steps, max((entry.tokens_left for entry in decodes), default=1))
    decode_orders = self._start_decodes(decodes, steps)
    order = StepOrder(step_id, worker.name, tuple(chunk_orders), decode_orders, steps, worker.incarnation, groups)
    worker.orders.append(order)
    return order, *transfers

  def _check_step(self, step: Step, worker: WorkerState) -> list[RequestState]:
    """The sequences a step decodes; raise for what is wrong with the step as a whole."""
    if not worker.up:
      raise PolicyError(f'{step!r}: worker {worker.name!r} is lost; wait until it is back.')
    if len(worker.orders) >= MAX_ORDERS:
      raise PolicyError(
        f'{step!r}: worker {worker.name!r} has {MAX_ORDERS} passes in flight already; wait for one to end.'
      )
    most = 1 if step.chunks else worker.spec.max_fused_steps
    if not 1 <= step.steps <= most:
      raise PolicyError(
        f'{step!r}: steps={step.steps}, but worker {worker.name!r} takes 1 to {most}'
        f'{" beside chunks" if step.chunks else ""}; lower it or raise max_fused_steps.'
      )
    if isinstance(step.decodes, All):
      decodes = [worker.decoding[name] for name in worker.decodable()]
    else:
      decodes = [self._find(step, name) for name in step.decodes]
      for name, entry in zip(step.decodes, decodes, strict=True):
        if name not in worker.decoding or entry.tokens_left < 1:
          raise PolicyError(f'{step!r}: request {name!r} has nothing to decode on worker {worker.name!r}.')
    if not step.chunks and not decodes:
      raise PolicyError(f'{step!r}: nothing to do; give it chunks or sequences that can decode.')
    if len({chunk.request for chunk in step.chunks}) != len(step.chunks) or len(decodes) != len(set(map(id, decodes))):
      raise PolicyError(f'{step!r}: a request stands in it twice.')
    spec = worker.spec
    tokens = sum(chunk.length for chunk in step.chunks)
    if len(step.chunks) > spec.max_chunks or tokens > spec.max_step_tokens:
      raise PolicyError(
        f'{step!r}: {len(step.chunks)} chunks with {tokens} tokens, but worker {worker.name!r} takes '
        f'{spec.max_chunks} chunks and {spec.max_step_tokens} tokens in one pass.'
      )
    if step.chunks and not spec.role.prefills:
      raise PolicyError(f'{step!r}: worker {worker.name!r} has role {spec.role.value}, so it takes no chunks.')
    return decodes

  def _check_chunk(self, step: Step, chunk: Chunk, worker: WorkerState) -> None:
    entry = self._find(step, chunk.request)
    if entry.phase not in (Phase.WAITING, Phase.PREFILLING):
      raise PolicyError(f'{step!r}: request {chunk.request!r} is {entry.phase.value}, so it takes no chunk.')
    if entry.worker not in (None, worker.name):
      raise PolicyError(f'{step!r}: request {chunk.request!r} is being prefilled on {entry.worker!r}.')
    if chunk.start != entry.started or not 1 <= chunk.length <= entry.prompt_left:
      raise PolicyError(
        f'{step!r}: the next chunk of {chunk.request!r} starts at {entry.started} and has 1 to {entry.prompt_left} '
        'tokens.'
      )
    sent_to = None if entry.target == worker.name else entry.target
    if entry.started and chunk.send_to != sent_to:
      raise PolicyError(
        f'{step!r}: earlier chunks of {chunk.request!r} were sent to {sent_to!r}; treat this one alike.'
      )
    if chunk.send_to is not None:
      target = self._find_worker(step, chunk.send_to)
      if not target.role.decodes or target is worker:
        raise PolicyError(
          f'{step!r}: {chunk.request!r} cannot be sent to {chunk.send_to!r}; name another worker that decodes.'
        )

  def _check_room(self, step: Step, worker: WorkerState) -> None:
    """Raise unless every worker has the pages and slots that the step's new requests need."""
    room = self.room()
    for chunk in step.chunks:
      if self.requests[chunk.request].started:
        continue
      stays = worker.role.decodes and chunk.send_to is None
      places = [(worker.name, stays)] + ([(chunk.send_to, True)] if chunk.send_to else [])
      for place, decodes in places:
        if not room.fits(chunk.request, place, decodes=decodes):
          needs = self._needs(chunk.request, place, decodes=decodes)
          raise PolicyError(
            f'{step!r}: request {chunk.request!r} needs {needs} on {place!r}, which has {room.pages(place)} pages and '
            f'{room.slots(place)} slots left.'
          )
        room.take(chunk.request, place, decodes=decodes)

  def _reserve(self, entry: RequestState, worker: WorkerState, *, decodes: bool) -> None:
    allocator, whole = worker.allocator, self._whole_pages(entry, worker, decodes=decodes)
    pages = entry.pages[worker.name] = allocator.take(whole)
    if not decodes:
      return
    entry.target, entry.slot = worker.name, worker.free_slots.popleft()
    if entry.samples is None or entry.samples.carrier is not entry:
      return
    whole_pages = self._shared_pages(entry, worker)
    shared, last = pages[:whole_pages], pages[whole_pages]
    for other in entry.samples.following.values():
      own = allocator.take(whole - len(shared))
      allocator.hold((*shared, last))  # the last until it is copied, whatever becomes of its holder
      other.pages[worker.name], other.copy = (*shared, *own), (last, own[0])
      other.target, other.slot = worker.name, worker.free_slots.popleft()

  def _release_copied(self, entry: RequestState) -> None:
    """Let go of the page that a sample begins by copying."""
    if entry.copy is not None:
      assert entry.target is not None
      self.workers[entry.target].allocator.drop(entry.copy[:1])
      entry.copy = None

  def _needs(self, request: str, worker: str, *, decodes: bool) -> str:
    pages, slots = self.pages_needed(request, worker, decodes=decodes), self.slots_needed(request)
    return f'{pages} pages{"" if not decodes else " and a slot" if slots == 1 else f" and {slots} slots"}'

  def _start_chunk(self, chunk: Chunk, worker: WorkerState) -> ChunkOrder:
    entry = self.requests[chunk.request]
    if entry.phase is Phase.WAITING:
      del self.waiting[chunk.request]
      entry.phase, entry.worker = Phase.PREFILLING, worker.name
      worker.prefilling[chunk.request] = entry
      worker.queued_tokens += entry.prompt_left
      self._reserve(entry, worker, decodes=worker.role.decodes and chunk.send_to is None)
      if chunk.send_to is not None:
        self._reserve(entry, self.workers[chunk.send_to], decodes=True)
    stays = entry.target == worker.name
    entry.started += chunk.length
    slot = None
    if entry.prompt_left == 0:
      del worker.prefilling[chunk.request]
      entry.steps_in_flight += not entry.delivered
      if stays and not entry.delivered:  # its next token can be computed before its first is known: both stay there
        entry.phase, entry.admitted, slot = Phase.DECODING, True, entry.slot
        worker.decoding[chunk.request] = entry
    return ChunkOrder(entry.request, chunk.start, chunk.length, entry.pages[worker.name], slot, entry.delivered)

  # -------------------------------------------------------------------------- sending on

  def _send_chunk(self, chunk: Chunk, worker: WorkerState, step: int) -> list[TransferOrder]:
    """The transfers of what a chunk completes: pages of the smaller of both sizes, once they are to travel."""
    if chunk.send_to is None:
      return []
    entry, target = self.requests[chunk.request], self.workers[chunk.send_to]
    unit = self._unit(worker, target)
    if not entry.prompt_left:
      entry.tokens_due = entry.started
    elif self.transfer.granularity != 'request':
      entry.tokens_due = entry.started // unit * unit
    entry.last_step = step
    return self._send_due(entry, step, layered=self._goes_by_layers(chunk, worker))

  def _goes_by_layers(self, chunk: Chunk, worker: WorkerState) -> bool:
    """Whether a chunk that begins now is to travel layer by layer."""
    layered_from, is_last = self.transfer.layered_from, self.requests[chunk.request].prompt_left == 0
    if layered_from is None or worker.role.decodes:  # a pass that may have decodes in it runs whole
      return False
    return chunk.length >= layered_from and (is_last or self.transfer.granularity == 'layers')

  def _send_due(self, entry: RequestState, after: int | None, *, layered: bool = False) -> list[TransferOrder]:
    """Transfers of what can be sent on, as far as staging has room; the rest is due until some is freed."""
    assert entry.worker is not None and entry.target is not None
    source, target = self.workers[entry.worker], self.workers[entry.target]
    unit, unit_bytes = self._unit(source, target), self._unit_bytes(source, target)
    # Half of it at most, so that one part is gathered while another is on the wire.
    most = max(unit_bytes, self.transfer.staging_bytes // 2)
    left = entry.tokens_due - entry.tokens_sent
    orders: list[TransferOrder] = []
    while left > 0:
      room = min(source.staging_out.free_bytes, target.staging_in.free_bytes, most)
      units = min(-(-left // unit), room // unit_bytes)
      if not units:
        break
      tokens = min(units * unit, left)
      groups: Sequence[tuple[int, int] | None] = self.transfer.groups(self.model.num_layers) if layered else (None,)
      orders += [self._move(entry, source, target, tokens, after, layers) for layers in groups]
      entry.tokens_sent += tokens
      left -= tokens
    if left > 0:
      self._due[entry.request.id] = entry
    else:
      self._due.pop(entry.request.id, None)
    return orders

  def _unit(self, source: WorkerState, target: WorkerState) -> int:
    """Tokens of the largest piece that pages of both are made of."""
    return math.gcd(source.page_size, target.page_size)

  def _unit_bytes(self, source: WorkerState, target: WorkerState) -> int:
    ours, theirs = (worker.spec.kv_dtype or 'float32' for worker in (source, target))
    return self._unit(source, target) * self.model.cached_token_bytes(wire_dtype(ours, theirs))

  def _move(
    self,
    entry: RequestState,
    source: WorkerState,
    target: WorkerState,
    tokens: int,
    after: int | None,
    layers: tuple[int, int] | None,
  ) -> TransferOrder:
    """The transfer of the next so many tokens of a prompt, up to a whole unit."""
    start, unit = entry.tokens_sent, self._unit(source, target)
    end = -(-(start + tokens) // unit) * unit
    source_pages, target_pages = (
      entry.pages[place.name][start // place.page_size : -(-end // place.page_size)] for place in (source, target)
    )
    source.allocator.hold(source_pages)
    target.allocator.hold(target_pages)
    num_bytes = (end - start) // unit * self._unit_bytes(source, target)
    if layers is not None:
      num_bytes = num_bytes * (layers[1] - layers[0]) // self.model.num_layers
    source.staging_out.take(num_bytes)
    target.staging_in.take(num_bytes)
    entry.transfers += 1
    return TransferOrder(
      self._order_id(), entry.request.id, source.name, target.name, source_pages, target_pages, start, end - start,
      after, (source.incarnation, target.incarnation), layers, num_bytes,
    )  # fmt: skip

  def _start_transfer(self, action: Transfer) -> tuple[TransferOrder, ...]:
    entry = self._find(action, action.request)
    target = self._find_worker(action, action.target)
    if action.request in self._due and entry.target == action.target:
      return tuple(self._send_due(entry, entry.last_step if entry.last_step in self._in_flight else None))
    if entry.phase is not Phase.PREFILLED:
      raise PolicyError(f'{action!r}: the request is {entry.phase.value}; only a prefilled one can be moved.')
    if not target.role.decodes:
      raise PolicyError(f'{action!r}: worker {target.name!r} has role {target.role.value}; name one that decodes.')
    room = self.room()
    if not room.fits(action.request, target.name, decodes=True):
      raise PolicyError(
        f'{action!r}: it needs {self._needs(action.request, target.name, decodes=True)} on {target.name!r}, '
        f'which has {room.pages(target.name)} pages and {room.slots(target.name)} slots left.'
      )
    del self.prefilled[action.request]
    entry.phase, entry.tokens_due = Phase.MOVING, entry.prefill_len
    self._reserve(entry, target, decodes=True)
    return tuple(self._send_due(entry, None))

  def _start_decodes(self, decodes: list[RequestState], steps: int) -> tuple[DecodeOrder, ...]:
    orders = []
    for entry in decodes:
      assert entry.slot is not None and entry.target is not None
      admission = None
      if not entry.admitted:
        entry.admitted = True
        admission = Admission(entry.request, entry.pages[entry.target], tuple(entry.tokens), entry.copy)
        self._release_copied(entry)  # whatever is written there from now on is written after the copy
      context = entry.request.prompt_len + len(entry.tokens) + entry.steps_in_flight - 1
      orders.append(DecodeOrder(entry.request.id, entry.slot, context, admission))
      entry.steps_in_flight += steps
    return tuple(orders)


def _places(order: Order) -> tuple[str, ...]:
  """The workers that an order needs."""
  match order:
    case StepOrder():
      return (order.worker,)
    case TransferOrder() | AbandonOrder():
      return order.source, order.target
  return ()


def _is_in(request: str, order: StepOrder) -> bool:
  """Whether a pass computes something of a request."""
  return any(chunk.request.id == request for chunk in order.chunks) or any(
    decode.request == request for decode in order.decodes
  )


def first_outside(prompt: Sequence[int], vocab_size: int) -> int | None:
  """The first token id that is not in the vocabulary, or None; prompts that say so themselves are not walked."""
  if getattr(prompt, 'vocab_size', vocab_size + 1) <= vocab_size:
    return None
  return next((token for token in prompt if not 0 <= token < vocab_size), None)
