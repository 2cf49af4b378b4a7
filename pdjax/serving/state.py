"""ClusterState: each request's phase and each worker's room, advanced by events and by the orders that start."""

import dataclasses
from collections.abc import Sequence

from pdjax.serving.actions import Abandon, Action, Cancel, Chunk, Reject, Resend, Step, Transfer
from pdjax.serving.checks import PolicyError, check_step, check_up, describe_needs, find_request, find_worker, why_unfit
from pdjax.serving.events import (
  Arrived,
  Done,
  Event,
  Failed,
  Finished,
  Occupancy,
  Result,
  TimerDue,
  Withdrawn,
  WorkerBack,
  WorkerLost,
  WorkerUse,
)
from pdjax.serving.orders import (
  AbandonOrder,
  Admission,
  ChunkOrder,
  DecodeOrder,
  EndOrder,
  Order,
  StepOrder,
  TransferOrder,
)
from pdjax.serving.place import WorkerState
from pdjax.serving.requests import Phase, RequestState, Samples, enter
from pdjax.serving.timers import Timers
from pdjax.serving.transfers import Transfers
from pdjax.serving.view import ClusterView
from pdjax.types.cluster import TransferSpec, WorkerSpec
from pdjax.types.faults import FaultSpec
from pdjax.types.model import ModelSpec
from pdjax.types.request import FinishReason, Request
from pdjax.types.span import Span


class StuckError(RuntimeError):
  """Requests wait for what can never come."""


class ClusterState(ClusterView):
  """The cluster, advanced by events and by the orders that start; a policy looks at what `ClusterView` has."""

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
    super().__init__(model, workers, page_size, transfer)
    self._finds_stops = finds_stops
    self._samples: dict[str, Samples] = {}  # by the id of each, ended or not
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

  # -------------------------------------------------------------------------- what the loop asks

  @property
  def unfinished(self) -> bool:
    """Whether any request or order is left."""
    return bool(self.requests or self._in_flight)

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
    if len(wait) < len(self._tasks) and self._due:
      self._staging_freed = True  # what was kept free for a transfer may be taken
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
      case WorkerLost(name, _, error, returning):
        self._lose(name, error, returning, now_s)
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
        enter(one, Phase.FOLLOWING)
    problem = why_unfit(self, entry, finds_stops=self._finds_stops)
    if problem:
      self._must[request.id] = Reject(request.id, problem)
    else:
      self.waiting[request.id] = entry

  def _done(self, event: Done, now_s: float) -> bool:
    order = self._in_flight.pop(event.order, None)
    match order:
      case StepOrder():
        self._step_ended(order)
        for result in event.results:
          self._got(result, now_s)
        for chunk in order.chunks:
          entry = self.requests.get(chunk.request.id)
          if entry is not None and (chunk.restores or entry.phase is Phase.RESTARTING):
            entry.computed = entry.computed or chunk.restores
            self._settle(entry)
        if len(event.results) < len(order.decodes) + len(order.chunks):  # some got nothing of the pass
          for decode in order.decodes:
            entry = self.requests.get(decode.request)
            if entry is not None and entry.phase is Phase.RESTARTING:
              self._begin_again(entry)
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
    source.allocator.drop(order.span.source_pages)
    target.allocator.drop(order.span.target_pages)
    source.staging_out.give_back(order.staging_bytes)
    target.staging_in.give_back(order.staging_bytes)
    self._staging_freed = bool(self._due)
    entry = self.requests.get(self._transfers.end(order.id).request)
    if entry is not None:
      entry.transfers -= 1
    return entry

  def _got(self, result: Result, now_s: float) -> None:
    entry = self.requests.get(result.request)
    if entry is None or entry.phase is Phase.ENDING:
      return
    entry.tokens.extend(result.tokens)
    entry.computed = True
    if result.finish_reason is not None:
      self._finish(entry, result.finish_reason, now_s, result.error)
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
      enter(entry, Phase.PREFILLED)
      if not any(worker.given_up for worker in self.decode_workers) or not self._refuse_unfit(entry, self._now_s):
        self._file(self.prefilled, entry)
    elif entry.transfers or entry.request.id in self._due:
      enter(entry, Phase.MOVING)
    else:
      self._begin_decoding(entry)
      if entry.samples is not None and followed:
        for other in entry.samples.following.values():
          self._begin_decoding(other)
        entry.samples.following.clear()

  def _begin_decoding(self, entry: RequestState) -> None:
    assert entry.target is not None
    if entry.phase is not Phase.DECODING:
      enter(entry, Phase.DECODING)
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
    entry.pages, entry.slot = {}, None
    enter(entry, Phase.FINISHED)
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
    match order:
      case StepOrder():
        self._step_ended(order)
        for name in order.requests:
          if entry := self.requests.get(name):
            self._lose_work(entry, order.worker, event.error, now_s)
      case TransferOrder():
        self._transfer_failed(order, event.error, event.corrupt, now_s)
      case EndOrder():
        if entry := self.requests.get(order.request):
          self._finish_all(entry, event.error, now_s)
      case AbandonOrder():
        raise AssertionError(f'{order} failed ({event.error}); it must not, for its pages cannot be given to others')
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
    problem = why_unfit(self, entry, finds_stops=self._finds_stops)
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

  def _lose(self, worker: str, error: str, returning: bool, now_s: float) -> None:
    place = self.workers[worker]
    place.up, place.lost = False, error
    if returning:
      self._timers.cancel('patience', worker)
    else:
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
      self._lose_work(entry, worker, error, now_s)

  def _lose_work(self, entry: RequestState, worker: str, error: str, now_s: float) -> None:
    """What a worker did or was to do for a request is gone: see to it as the fault settings say."""
    if entry.phase in (Phase.FINISHED, Phase.WAITING, Phase.ENDING, Phase.FOLLOWING):
      return  # it ended, or was begun again, with one before it; the end of the others is under way
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
      self._lose(name, f'worker {name!r} began another life', True, now_s)
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
      enter(one, Phase.RESTARTING)
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
    enter(entry, Phase.WAITING)
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

  def _start_end(self, action: Cancel | Reject, reason: FinishReason) -> tuple[EndOrder, ...]:
    entries = self._meant_by(action.request) or [find_request(self, action, action.request)]
    entries = [entry for entry in entries if entry.phase is not Phase.ENDING]
    if not entries:
      raise PolicyError(f'{action!r}: the request is being ended already.')
    if isinstance(action, Reject) and entries[0].phase is not Phase.WAITING:
      raise PolicyError(
        f'{action!r}: the request is {entries[0].phase.value}; only a waiting one can be rejected, cancel it.'
      )
    self._unschedule_all(entries)
    for entry in entries:
      enter(entry, Phase.ENDING)
      self._give_up(entry.request.id, reason)
    return tuple(EndOrder(self._order_id(), entry.request.id, reason, action.reason) for entry in entries)

  def _start_abandon(self, action: Abandon) -> AbandonOrder:
    attempt = self._transfers.get(action.transfer)
    if attempt is None:
      raise PolicyError(f'{action!r}: no transfer of that id is under way.')
    if any(
      isinstance(order, AbandonOrder) and order.transfer == attempt.order.id for order in self._in_flight.values()
    ):
      raise PolicyError(f'{action!r}: the transfer is being given up already.')
    self._transfers.abandon(action.transfer)
    return AbandonOrder(self._order_id(), action.transfer, attempt.order.source, attempt.order.target)

  def _start_resend(self, action: Resend) -> TransferOrder:
    attempt = self._transfers.take_again(action.transfer)
    if attempt is None:
      raise PolicyError(f'{action!r}: no transfer of that id is to be tried again.')
    before = attempt.order
    after = before.after if before.after in self._in_flight else None
    order = dataclasses.replace(before, id=self._order_id(), request=attempt.request, after=after)
    self._hold(order)
    self._transfers.begin(order, attempt.number + 1, self._now_s, waits=after is not None)
    return order

  def _start_step(self, step: Step) -> tuple[Order, ...]:
    worker = find_worker(self, step, step.worker)
    decodes = check_step(self, step, worker)
    step_id = self._order_id()
    chunk_orders = []
    transfers = []
    for chunk in step.chunks:
      chunk_orders.append(self._start_chunk(chunk, worker))
      transfers += self._send_chunk(chunk, worker, step_id)
    groups = self.transfer.pass_groups(worker.role, self.model.num_layers) if step.chunks else ()
    steps = min(step.steps, max((entry.tokens_left for entry in decodes), default=1))
    decode_orders = self._start_decodes(decodes, steps)
    order = StepOrder(step_id, worker.name, tuple(chunk_orders), decode_orders, steps, worker.incarnation, groups)
    worker.orders.append(order)
    return order, *transfers

  def _reserve(self, entry: RequestState, worker: WorkerState, *, decodes: bool) -> None:
    allocator, whole = worker.allocator, self.whole_pages(entry, worker, decodes=decodes)
    pages = entry.pages[worker.name] = allocator.take(whole)
    if not decodes:
      return
    entry.target, entry.slot = worker.name, worker.free_slots.popleft()
    if entry.samples is None or entry.samples.carrier is not entry:
      return
    whole_pages = self.shared_pages(entry, worker)
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

  def _start_chunk(self, chunk: Chunk, worker: WorkerState) -> ChunkOrder:
    entry = self.requests[chunk.request]
    if entry.phase is Phase.WAITING:
      del self.waiting[chunk.request]
      enter(entry, Phase.PREFILLING)
      entry.worker = worker.name
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
        enter(entry, Phase.DECODING)
        entry.admitted, slot = True, entry.slot
        worker.decoding[chunk.request] = entry
    return ChunkOrder(entry.request, chunk.start, chunk.length, entry.pages[worker.name], slot, entry.delivered)

  # -------------------------------------------------------------------------- sending on

  def _send_chunk(self, chunk: Chunk, worker: WorkerState, step: int) -> list[TransferOrder]:
    """The transfers of what a chunk completes: pages of the smaller of both sizes, once they are to travel."""
    if chunk.send_to is None:
      return []
    entry, target = self.requests[chunk.request], self.workers[chunk.send_to]
    unit = self.unit(worker, target)
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
    unit, unit_bytes = self.unit(source, target), self.unit_bytes(source, target)
    # Half of it at most, so that one part is gathered while another is on the wire.
    most = max(unit_bytes, self.transfer.staging_bytes // 2)
    left = entry.tokens_due - entry.tokens_sent
    orders: list[TransferOrder] = []
    while left > 0 and not self._is_kept_free(source, target):
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

  def _is_kept_free(self, source: WorkerState, target: WorkerState) -> bool:
    """Whether staging is for a transfer that is to be tried again: what is new would take its room for ever."""
    again = [self._transfers.get_again(task.transfer) for task in self._tasks if isinstance(task, Resend)]
    return any(one and (one.order.source == source.name or one.order.target == target.name) for one in again)

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
    start, unit = entry.tokens_sent, self.unit(source, target)
    end = -(-(start + tokens) // unit) * unit
    source_pages, target_pages = (
      entry.pages[place.name][start // place.page_size : -(-end // place.page_size)] for place in (source, target)
    )
    span = Span(source_pages, target_pages, start, end - start, layers)
    first, stop = span.bounds(self.model.num_layers)
    num_bytes = (end - start) // unit * self.unit_bytes(source, target) * (stop - first) // self.model.num_layers
    order = TransferOrder(
      self._order_id(), entry.request.id, source.name, target.name, span, after,
      (source.incarnation, target.incarnation), num_bytes,
    )  # fmt: skip
    self._hold(order)
    entry.transfers += 1
    return order

  def _hold(self, order: TransferOrder) -> None:
    """Take what a transfer holds until it has ended."""
    source, target = self.workers[order.source], self.workers[order.target]
    source.allocator.hold(order.span.source_pages)
    target.allocator.hold(order.span.target_pages)
    source.staging_out.take(order.staging_bytes)
    target.staging_in.take(order.staging_bytes)

  def _start_transfer(self, action: Transfer) -> tuple[TransferOrder, ...]:
    entry = find_request(self, action, action.request)
    target = find_worker(self, action, action.target)
    if action.request in self._due and entry.target == action.target:
      return tuple(self._send_due(entry, entry.last_step if entry.last_step in self._in_flight else None))
    if entry.phase is not Phase.PREFILLED:
      raise PolicyError(f'{action!r}: the request is {entry.phase.value}; only a prefilled one can be moved.')
    if not target.role.decodes:
      raise PolicyError(f'{action!r}: worker {target.name!r} has role {target.role.value}; name one that decodes.')
    check_up(action, target)
    room = self.room()
    if not room.fits(action.request, target.name, decodes=True):
      raise PolicyError(
        f'{action!r}: it needs {describe_needs(self, action.request, target.name, decodes=True)} on {target.name!r}, '
        f'which has {room.pages(target.name)} pages and {room.slots(target.name)} slots left.'
      )
    del self.prefilled[action.request]
    enter(entry, Phase.MOVING)
    entry.tokens_due = entry.prefill_len
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
