"""The timeline of a run: the times of each request and the busy spans of each worker, read from the event log."""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from pdjax.metrics.columns import Column, numbered
from pdjax.metrics.hit_rows import HitColumns, HitRows
from pdjax.metrics.occupancy_rows import OccupancyColumns, OccupancyRows
from pdjax.metrics.request_rows import DTYPE, NEVER, NOBODY, REASONS, RequestRows
from pdjax.metrics.request_rows import HandOff as HandOff
from pdjax.metrics.request_rows import RequestTimeline as RequestTimeline
from pdjax.metrics.returns import WorkerAbsence, WorkerReturn
from pdjax.metrics.span_rows import MOST_NAMED, SpanColumns, SpanRows
from pdjax.metrics.span_rows import BusySpan as BusySpan
from pdjax.metrics.span_rows import SpanKind as SpanKind
from pdjax.metrics.token_times import Pieces, TokenTimes
from pdjax.serving.events import (
  Arrived,
  BlockStored,
  Delivered,
  Done,
  Event,
  Failed,
  Finished,
  Occupancy,
  Preempted,
  PrefixHit,
  RoleChanged,
  Started,
  TimerDue,
  Turn,
  WorkerBack,
  WorkerLost,
)
from pdjax.serving.orders import AbandonOrder, Order, StepOrder, TransferOrder
from pdjax.types.request import SERVED, SLO, Request
from pdjax.types.worker import Role, WorkerSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Timeline:
  """A whole run, as a `Summary` has it.

  Attributes:
    requests: Every request, in the order of arrival.
    spans: Every order that ended well, in the order in which the loop learnt of it.
    occupancy: The use of the cluster, whenever that changed.
    hits: The hits of the prefix cache, in order.
    caches: Whether anything was stored in a prefix cache.
    host_lags_s: For each order, seconds from its end until the turn that took notice.
    wasted_tokens: Tokens computed and thrown away.
    cached_tokens: Tokens of prompts that were cached, and so not computed, of requests that were served.
    failed_transfers: The request of each transfer that failed, had no end by its deadline, or was lost with a worker.
    returns: Each return of a worker that was lost, in order.
    absences: Each worker that was lost and did not return, in the order of the losses.
    preemptions: Each time that a request was preempted, in order.
    role_changes: Each time that a worker took another role, in order.
  """

  requests: RequestRows = dataclasses.field(default_factory=RequestRows)
  spans: SpanRows = dataclasses.field(default_factory=SpanRows)
  occupancy: OccupancyRows = dataclasses.field(default_factory=OccupancyRows)
  hits: HitRows = dataclasses.field(default_factory=HitRows)
  caches: bool = False
  host_lags_s: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0), compare=False)
  wasted_tokens: int = 0
  cached_tokens: int = 0
  failed_transfers: tuple[str, ...] = ()
  returns: tuple[WorkerReturn, ...] = ()
  absences: tuple[WorkerAbsence, ...] = ()
  preemptions: tuple[Preempted, ...] = ()
  role_changes: tuple[RoleChanged, ...] = ()

  @property
  def start_s(self) -> float:
    """The first arrival."""
    return float(self.requests.rows['arrival_s'].min()) if len(self.requests) else 0.0

  @property
  def end_s(self) -> float:
    """The last token or end of a request, whichever is later."""
    ends_s = np.concatenate([self.requests.rows['finished_s'], self.requests.rows['last_s']])
    return float(np.nanmax(ends_s)) if not np.isnan(ends_s).all() else self.start_s

  @property
  def duration_s(self) -> float:
    """From the first arrival to the end."""
    return self.end_s - self.start_s

  def role(self, worker: WorkerSpec, at_s: float = math.inf) -> Role:
    """The role that a worker had at that time, or when the log stops."""
    roles = [change.role for change in self.role_changes if change.worker == worker.name and change.now_s <= at_s]
    return roles[-1] if roles else worker.role

  @property
  def nbytes(self) -> int:
    """Bytes of all that grows with the run, but for the names of requests."""
    return sum(one.nbytes for one in (self.requests, self.spans, self.occupancy, self.hits, self.host_lags_s))


def read_timeline(events: Iterable[Event]) -> Timeline:
  """Follow the log from beginning to end.

  Tokens that come too late for a request count as wasted.
  """
  summary = Summary()
  for event in events:
    summary.follow(event)
  return summary.timeline()


class Summary:
  """Follows a run event by event, and has its timeline at any time; no event is kept.

  What it keeps lies in arrays: some hundred bytes for a request, its steps and its transfers, and eight for a step of a
  worker, however many tokens that brought. What is under way is kept as it came.
  """

  def __init__(self) -> None:
    self._now_s = 0.0
    self._numbers: dict[str, int] = {}  # of requests
    self._workers: dict[str, int] = {}
    self._slos: dict[SLO, int] = {}
    self._wholes: dict[str, int] = {}  # what others are samples of
    self._class_names: dict[str, int] = {}
    self._tenants: dict[str, int] = {}
    self._rows = np.empty(1024, DTYPE)
    self._pieces = Column(np.int64)
    self._errors: dict[int, str] = {}
    self._times = TokenTimes()
    self._open: dict[str, _Draft] = {}
    self._samples: dict[str, list[_Draft]] = {}  # of those, by the request that they are samples of
    self._orders: dict[int, tuple[Started, list[_Draft]]] = {}  # with those whose chunks or pages they are
    self._last_step: tuple[StepOrder, Done] | None = None
    self._late: set[int] = set()
    self._spans = SpanColumns(self._workers, self._numbers, MOST_NAMED)
    self._occupancy = OccupancyColumns(self._workers)
    self._hits = HitColumns(self._numbers)
    self._caches = False
    self._host_lags_s = Column(np.float64)
    self._wasted_tokens = self._cached_tokens = 0
    self._failed_transfers: list[str] = []
    self._losses: dict[str, WorkerLost] = {}  # of workers that are not back
    self._last_words: dict[str, WorkerLost] = {}  # of the same
    self._returns: list[WorkerReturn] = []
    self._preemptions: list[Preempted] = []
    self._role_changes: list[RoleChanged] = []

  @property
  def num_requests(self) -> int:
    """Requests that have arrived, each sample of one counted."""
    return len(self._numbers)

  def follow(self, event: Event) -> None:
    """Take notice of what happened next."""
    match event:
      case Turn():
        self._now_s = event.now_s
      case Started():
        self._start(event)
      case Done():
        self._done(event)
      case Delivered():
        self._deliver(event)
      case Failed():
        self._host_lags_s.append(self._now_s - event.ended_s)
        failed, _ = self._orders.pop(event.order, (None, ()))
        self._note_failed(None if failed is None else failed.order)
      case TimerDue(_, 'deadline', int(overdue)):
        self._late.add(overdue)
      case WorkerLost():
        self._lose(event)
      case WorkerBack(name) if name in self._losses:
        self._returns.append(WorkerReturn.of(self._losses.pop(name), event))
      case Arrived():
        self._arrive(event.request)
      case Occupancy():
        self._occupancy.add(event)
      case PrefixHit():
        self._hits.add(event)
      case BlockStored():
        self._caches = True
      case Preempted():
        self._preemptions.append(event)
      case RoleChanged():
        self._role_changes.append(event)
      case Finished():
        self._finish(event)

  def timeline(self) -> Timeline:
    """The run so far; what follows changes nothing of it."""
    workers, ids = list(self._workers), list(self._numbers)
    return Timeline(
      requests=self._requests(workers, ids),
      spans=self._spans.spans(workers, ids),
      occupancy=self._occupancy.rows(workers),
      hits=self._hits.rows(ids),
      caches=self._caches,
      host_lags_s=self._host_lags_s.array,
      wasted_tokens=self._wasted_tokens,
      cached_tokens=self._cached_tokens,
      failed_transfers=tuple(self._failed_transfers),
      returns=tuple(self._returns),
      absences=tuple(
        WorkerAbsence(name, lost.ended_s, self._last_words[name].error, self._last_words[name].returning)
        for name, lost in self._losses.items()
      ),
      preemptions=tuple(self._preemptions),
      role_changes=tuple(self._role_changes),
    )

  @property
  def num_open(self) -> int:
    """Samples and orders under way, which it keeps as they came."""
    return len(self._open) + len(self._samples) + len(self._orders)

  def _note_failed(self, order: Order | None) -> None:
    if isinstance(order, TransferOrder) and order.copy is None:  # without a copy nobody lacks anything
      self._failed_transfers.append(order.request)

  # -------------------------------------------------------------------------- requests

  def _arrive(self, request: Request) -> None:
    drafts = self._samples[request.id] = []
    for sample in request.samples():
      draft = _Draft(sample, request.id, numbered(self._numbers, sample.id))
      drafts.append(draft)
      self._open[sample.id] = draft

  def _start(self, started: Started) -> None:
    order, drafts = started.order, []
    if isinstance(order, StepOrder):
      for chunk in order.chunks:
        self._open[chunk.request.id].begin(started.now_s)
        drafts += self._samples.get(chunk.request.id) or [self._open[chunk.request.id]]
    elif isinstance(order, TransferOrder) and order.copy is None:
      drafts.append(self._open[order.request])
    self._orders[order.id] = started, drafts

  def _done(self, done: Done) -> None:
    if done.decoded is None or not done.decoded.ends_s:  # a simulator that leaps tells late, and no host is late
      self._host_lags_s.append(self._now_s - done.ended_s)
    self._wasted_tokens += done.wasted_tokens
    started, drafts = self._orders.pop(done.order) if done.to_come == 0 else self._orders[done.order]
    order = started.order
    if isinstance(order, StepOrder):
      self._spans.add_step(order, done, started.now_s)
      self._last_step = order, done
    elif isinstance(order, TransferOrder):
      self._spans.add_transfer(order, done, started.now_s)
    elif isinstance(order, AbandonOrder) and order.transfer in self._late:
      given_up, _ = self._orders.pop(order.transfer, (None, ()))  # none if it has ended after all
      self._note_failed(None if given_up is None else given_up.order)
    for draft in drafts:
      draft.computed(done) if isinstance(order, StepOrder) else draft.moved(done)
      if draft.finished is not None:
        self._rows[draft.number] = draft.row(self._row_of(draft))

  def _deliver(self, event: Delivered) -> None:
    last = self._last_step
    assert last is not None and last[1].order == event.order, f'{event} does not stand behind its step'
    order, done = last
    for draft, before, count in self._times.deliver(order.worker, event, self._open.__getitem__):
      draft.delivered(event.times_s(count), before, numbered(self._workers, order.worker), done)
    if event.late_firsts or event.late_rows:
      self._wasted_tokens += event.num_late_tokens

  def _finish(self, event: Finished) -> None:
    draft = self._open[event.request]
    draft.finished = event
    self._cached_tokens += event.cached_tokens if event.finish_reason in SERVED else 0
    if len(self._rows) <= draft.number:
      self._rows = _with_room(self._rows, draft.number + 1)
    self._times.settle(draft.pieces)
    draft.piece = len(self._pieces) // 3
    self._pieces.extend(draft.pieces.flat)
    self._rows[draft.number] = draft.row(self._row_of(draft))
    if event.error is not None:
      self._errors[draft.number] = event.error
    del self._open[event.request]
    if all(one.finished is not None for one in self._samples[draft.asked]):
      del self._samples[draft.asked]

  def _row_of(self, draft: '_Draft') -> '_Known':
    """The fields of a row that only the whole knows."""
    slo, whole = draft.request.slo, draft.request.sample_of
    class_name, tenant = draft.request.class_name, draft.request.tenant
    return (
      NOBODY if slo is None else self._slos.setdefault(slo, len(self._slos)),
      NOBODY if whole is None else numbered(self._wholes, whole),
      self._times.last_s(draft.pieces) if draft.pieces.flat else NEVER,
      NOBODY if class_name is None else numbered(self._class_names, class_name),
      NOBODY if tenant is None else numbered(self._tenants, tenant),
    )

  def _requests(self, workers: list[str], ids: list[str]) -> RequestRows:
    rows, pieces = _with_room(self._rows, len(ids))[: len(ids)], self._pieces.array
    if self._open:
      rows = rows.copy()
      more: list[int] = []
      for draft in self._open.values():
        self._times.settle(draft.pieces)
        draft.piece = (len(pieces) + len(more)) // 3
        more += draft.pieces.flat
        rows[draft.number] = draft.row(self._row_of(draft))
      pieces = np.concatenate([pieces, np.array(more, np.int64)])
    errors = dict(sorted(self._errors.items()))
    return RequestRows(
      rows, ids, workers, list(self._slos), list(self._wholes), errors, pieces, self._times.columns,
      list(self._class_names), list(self._tenants),
    )  # fmt: skip

  # -------------------------------------------------------------------------- workers

  def _lose(self, event: WorkerLost) -> None:
    name = event.worker
    self._losses.setdefault(name, event)
    self._last_words[name] = event
    open_orders = [one.order for one, _ in self._orders.values() if isinstance(one.order, TransferOrder)]
    for lost in [order for order in open_orders if name in (order.source, order.target)]:
      self._note_failed(lost)
      del self._orders[lost.id]


# The numbers of its limits and of what it is a sample of, its last token's time, the numbers of its class and tenant.
_Known = tuple[int, int, float, int, int]


def _with_room(rows: np.ndarray, count: int) -> np.ndarray:
  """The rows, or with half as many more where these are too few."""
  if len(rows) >= count:
    return rows
  wider = np.empty(max(count, len(rows) * 3 // 2), rows.dtype)
  wider[: len(rows)] = rows
  return wider


class _Draft:
  """A request's timeline while the log is being read."""

  def __init__(self, request: Request, asked: str, number: int):
    self.request = request
    self.asked = asked  # the request that came, of which it is a sample
    self.number = number
    self.pieces = Pieces()
    self.piece = 0  # the first of them in the column of pieces
    self.first_s = self.second_s = NEVER
    self.begun_s = self.prefill_began_s = NEVER
    self.last_transfer: Done | None = None
    self.transfer_began_s = 0.0  # of that and those before it, one behind or beside the other
    self.num_transfers = 0
    self.wire_bytes = 0
    self.decode_began_s = NEVER
    self.prefill_worker = self.decode_worker = NOBODY
    self.finished: Finished | None = None

  def begin(self, now_s: float) -> None:
    """Note that a worker was handed a chunk of its prompt."""
    if self.begun_s != self.begun_s:
      self.begun_s = now_s

  def computed(self, done: Done) -> None:
    """Note a step with a chunk of its prompt."""
    if self.prefill_began_s != self.prefill_began_s:
      self.prefill_began_s = done.began_s

  def moved(self, done: Done) -> None:
    """Note a transfer of its pages."""
    self.num_transfers += 1
    self.wire_bytes += done.wire_bytes
    before_second_token = self.pieces.count < 2
    if before_second_token and (self.last_transfer is None or done.ended_s >= self.last_transfer.ended_s):
      in_one_go = self.last_transfer is not None and done.began_s <= self.last_transfer.ended_s
      self.transfer_began_s = min(self.transfer_began_s, done.began_s) if in_one_go else done.began_s
      self.last_transfer = done

  def delivered(self, times_s: tuple[float, ...], before: int, worker: int, done: Done) -> None:
    """Note its first or second token, behind so many, of one step or of several that are told of at once."""
    if before < 1:
      self.first_s, self.prefill_worker = times_s[0], worker
    if before < 2 <= before + len(times_s):
      self.second_s, self.decode_worker = times_s[1 - before], worker
      self.decode_began_s = done.begin_s(1 - before)

  def row(self, known: _Known) -> tuple[float, ...]:
    """Its row, of `DTYPE`."""
    slo, sample_of, last_s, class_name, tenant = known
    deadline_s = self.request.deadline_s
    transfer, finished = self.last_transfer, self.finished
    return (
      self.request.arrival_s, self.request.prompt_len, slo, sample_of, self.begun_s,
      self.prefill_began_s, self.pieces.count, self.first_s, self.second_s, last_s,
      self.transfer_began_s if transfer else NEVER, transfer.ended_s if transfer else NEVER, self.num_transfers,
      self.wire_bytes, self.decode_began_s, finished.now_s if finished else NEVER,
      REASONS.index(finished.finish_reason if finished else None), self.prefill_worker, self.decode_worker,
      self.piece, len(self.pieces.flat) // 3, class_name, tenant, NEVER if deadline_s is None else deadline_s,
    )  # fmt: skip
