"""The timeline of a run: the times of each request and the busy spans of each worker, read from the event log."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Literal

from pdjax.metrics.returns import WorkerAbsence, WorkerReturn
from pdjax.serving.events import (
  Arrived,
  Delivered,
  Done,
  Event,
  Failed,
  Finished,
  Occupancy,
  Preempted,
  RoleChanged,
  Started,
  TimerDue,
  Trip,
  Turn,
  WorkerBack,
  WorkerLost,
)
from pdjax.serving.orders import AbandonOrder, StepOrder, TransferOrder
from pdjax.types.request import SERVED, SLO, FinishReason, Request
from pdjax.types.worker import Role, WorkerSpec

SpanKind = Literal['prefill', 'decode', 'fused', 'transfer']


@dataclasses.dataclass(frozen=True, slots=True)
class HandOff:
  """The parts of the time between a request's first and second token, in seconds.

  They lie between successive points, each no earlier than the one before:

      t0  first token delivered
      t1  last transfers began      wait  = t1 - t0   for the transfers' turn
      t2  last transfer ended       wire  = t2 - t1   moving pages, of one cache kind behind the other
      t3  decode step began         admit = t3 - t2   until a step of the decode worker took it up
      t4  second token delivered    step  = t4 - t3   that step, and bringing its token to the user

  Each point is held between its neighbours, so what was hidden behind compute is left out: pages that travelled
  chunk by chunk before the first token cost nothing here. Without transfers, wait and wire are 0.
  """

  wait_s: float
  wire_s: float
  admit_s: float
  step_s: float

  @property
  def total_s(self) -> float:
    """The four parts together."""
    return self.wait_s + self.wire_s + self.admit_s + self.step_s


@dataclasses.dataclass(frozen=True, slots=True)
class RequestTimeline:
  """The times and outcome of one request, or one sample of it; all times in seconds after the start of the run.

  Samples of one prompt share its arrival and its prefill, so the TTFT of a further one holds the hand-off too: its
  first token comes of the decode worker. The prompt's transfers are those of the sample that carried it.

  A token is delivered at the time of the turn in which the loop learnt of it, so host delays count. Figures that
  a request never reached are None.

  Attributes:
    id: The request.
    arrival_s: The time it arrived.
    prompt_len: Tokens in its prompt.
    slo: Latency limits of its own, if any.
    prefill_began_s: The time the step with its first chunk began.
    token_times_s: The time each token was delivered; tokens of one delta share a time.
    transfer_began_s: The time its last transfers before the second token began: those up to the one with the latest
      end, as far as one was under way at any time.
    transfer_ended_s: The time the last of them ended.
    num_transfers: Transfers that ended well.
    wire_bytes: Bytes they put onto target devices.
    decode_began_s: The time the step that brought its second token began.
    finished_s: The time the loop ended it.
    finish_reason: The reason it ended; None if the log stops before.
    error: The error it ended with, if any.
    prefill_worker: The worker that made the first token.
    decode_worker: The worker that made the second.
    sample_of: The request that it is a further sample of, if it is one.
  """

  id: str
  arrival_s: float
  prompt_len: int
  slo: SLO | None = None
  prefill_began_s: float | None = None
  token_times_s: tuple[float, ...] = ()
  transfer_began_s: float | None = None
  transfer_ended_s: float | None = None
  num_transfers: int = 0
  wire_bytes: int = 0
  decode_began_s: float | None = None
  finished_s: float | None = None
  finish_reason: FinishReason | None = None
  error: str | None = None
  prefill_worker: str | None = None
  decode_worker: str | None = None
  sample_of: str | None = None

  @property
  def completed(self) -> bool:
    """Whether it got all that it asked for."""
    return self.finish_reason in SERVED

  @property
  def num_tokens(self) -> int:
    """Tokens delivered."""
    return len(self.token_times_s)

  @property
  def delta_times_s(self) -> tuple[float, ...]:
    """The time each delta of the answer was delivered: the tokens of one time are one delta, of however many steps."""
    return tuple(dict.fromkeys(self.token_times_s))

  @property
  def ttft_s(self) -> float | None:
    """Time to first token: from arrival until it was delivered."""
    return self.token_times_s[0] - self.arrival_s if self.token_times_s else None

  @property
  def e2el_s(self) -> float | None:
    """End-to-end latency: from arrival until the last token was delivered."""
    return self.token_times_s[-1] - self.arrival_s if self.token_times_s else None

  @property
  def tpot_s(self) -> float | None:
    """Time per output token after the first; None with fewer than two."""
    if self.num_tokens < 2:
      return None
    return (self.token_times_s[-1] - self.token_times_s[0]) / (self.num_tokens - 1)

  @property
  def itls_s(self) -> tuple[float, ...]:
    """Inter-token latencies as a streaming user sees them: the gaps between deltas, whatever each holds."""
    return tuple(b - a for a, b in itertools.pairwise(self.delta_times_s))

  @property
  def queue_s(self) -> float | None:
    """From arrival until the step with the first chunk began."""
    return None if self.prefill_began_s is None else self.prefill_began_s - self.arrival_s

  @property
  def prefill_s(self) -> float | None:
    """From the beginning of the step with the first chunk until the first token was delivered."""
    if self.prefill_began_s is None or not self.token_times_s:
      return None
    return self.token_times_s[0] - self.prefill_began_s

  @property
  def handoff_s(self) -> float | None:
    """From the first token to the second."""
    return self.token_times_s[1] - self.token_times_s[0] if self.num_tokens > 1 else None

  @property
  def handoff(self) -> HandOff | None:
    """The parts of `handoff_s`."""
    if self.num_tokens < 2 or self.decode_began_s is None:
      return None
    first_s, second_s = self.token_times_s[:2]
    points = [first_s]
    for stamp_s in (self.transfer_began_s, self.transfer_ended_s, self.decode_began_s):
      points.append(points[-1] if stamp_s is None else min(max(points[-1], stamp_s), second_s))
    points.append(second_s)
    return HandOff(*(after - before for before, after in itertools.pairwise(points)))

  def meets(self, slo: SLO) -> bool:
    """Whether it completed within every limit; with one token there is no TPOT to miss."""
    if not self.completed:
      return False
    pairs = ((self.ttft_s, slo.ttft_ms), (self.tpot_s, slo.tpot_ms), (self.e2el_s, slo.e2el_ms))
    return all(limit is None or value is None or value <= limit / 1e3 for value, limit in pairs)


@dataclasses.dataclass(frozen=True, slots=True)
class BusySpan:
  """One order's time on a worker or, for a transfer, on the way between two.

  Attributes:
    worker: The worker, or the source of a transfer.
    kind: A step is `prefill`, `decode` or, with both in one, `fused`.
    began_s: The time the worker or link turned to it.
    ended_s: The time its outcome was on the host.
    order: The order's id.
    requests: Everyone in it, those with prompt tokens first.
    num_prompts: The number of those.
    prompt_tokens: Prompt tokens a step computed.
    steps: Steps of one that stands, where several are told of at once.
    output_tokens: Tokens a step brought.
    target: The worker that a transfer goes to.
    wire_bytes: Bytes a transfer put onto target devices.
    submitted_s: The time the order was given.
    trip: The times of a transfer's pieces on the wire.
  """

  worker: str
  kind: SpanKind
  began_s: float
  ended_s: float
  order: int
  requests: tuple[str, ...]
  num_prompts: int = 0
  prompt_tokens: int = 0
  steps: int = 1
  output_tokens: int = 0
  target: str | None = None
  wire_bytes: int = 0
  submitted_s: float = 0.0
  trip: Trip | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Timeline:
  """A whole run, as `read_timeline` finds it in the log.

  Attributes:
    requests: Every request, in the order of arrival.
    spans: Every order that ended well, in the order in which the loop learnt of it.
    occupancy: The use of the cluster, whenever that changed.
    host_lags_s: For each order, seconds from its end until the turn that took notice.
    wasted_tokens: Tokens computed and thrown away.
    failed_transfers: The request of each transfer that failed, had no end by its deadline, or was lost with a worker.
    returns: Each return of a worker that was lost, in order.
    absences: Each worker that was lost and did not return, in the order of the losses.
    preemptions: Each time that a request was preempted, in order.
    role_changes: Each time that a worker took another role, in order.
  """

  requests: tuple[RequestTimeline, ...] = ()
  spans: tuple[BusySpan, ...] = ()
  occupancy: tuple[Occupancy, ...] = ()
  host_lags_s: tuple[float, ...] = ()
  wasted_tokens: int = 0
  failed_transfers: tuple[str, ...] = ()
  returns: tuple[WorkerReturn, ...] = ()
  absences: tuple[WorkerAbsence, ...] = ()
  preemptions: tuple[Preempted, ...] = ()
  role_changes: tuple[RoleChanged, ...] = ()

  @property
  def start_s(self) -> float:
    """The first arrival."""
    return min((request.arrival_s for request in self.requests), default=0.0)

  @property
  def end_s(self) -> float:
    """The last token or end of a request, whichever is later."""
    ends = [request.finished_s for request in self.requests if request.finished_s is not None]
    ends += [request.token_times_s[-1] for request in self.requests if request.token_times_s]
    return max(ends, default=self.start_s)

  @property
  def duration_s(self) -> float:
    """From the first arrival to the end."""
    return self.end_s - self.start_s

  def role(self, worker: WorkerSpec, at_s: float = math.inf) -> Role:
    """The role that a worker had at that time, or when the log stops."""
    roles = [change.role for change in self.role_changes if change.worker == worker.name and change.now_s <= at_s]
    return roles[-1] if roles else worker.role


def read_timeline(events: Iterable[Event]) -> Timeline:
  """Follow the log from beginning to end.

  Tokens that come too late for a request count as wasted.
  """
  requests: dict[str, _Draft] = {}
  samples: dict[str, list[_Draft]] = {}
  orders: dict[int, Started] = {}
  failed_transfers: list[str] = []
  last_step: tuple[StepOrder, Done] | None = None
  late: set[int] = set()
  spans: list[BusySpan] = []
  occupancy: list[Occupancy] = []
  host_lags_s: list[float] = []
  wasted_tokens = 0
  losses: dict[str, WorkerLost] = {}  # of workers that are not back
  last_words: dict[str, WorkerLost] = {}  # of the same
  returns: list[WorkerReturn] = []
  preemptions: list[Preempted] = []
  role_changes: list[RoleChanged] = []
  now_s = 0.0

  for event in events:
    match event:
      case Turn():
        now_s = event.now_s
      case Started():
        orders[event.order.id] = event
      case Done():
        host_lags_s.append(now_s - event.ended_s)
        wasted_tokens += event.wasted_tokens
        started = orders.pop(event.order) if event.to_come == 0 else orders[event.order]
        order = started.order
        if isinstance(order, StepOrder):
          spans.append(_step_span(order, event, started.now_s))
          for chunk in order.chunks:
            for draft in samples.get(chunk.request.id) or [requests[chunk.request.id]]:
              draft.chunk(event)
          last_step = order, event
        elif isinstance(order, TransferOrder):
          spans.append(_transfer_span(order, event, started.now_s))
          requests[order.request].transfer(event)
        elif isinstance(order, AbandonOrder) and order.transfer in late:
          given_up = orders.pop(order.transfer, None)  # none if it has ended after all
          if given_up is not None and isinstance(given_up.order, TransferOrder):
            failed_transfers.append(given_up.order.request)
      case Delivered():
        assert last_step is not None and last_step[1].order == event.order, f'{event} does not stand behind its step'
        for result in event.firsts:
          requests[result.request].deliver((event.now_s,) * len(result.tokens), *last_step)
        if event.decoded is not None:
          counts = event.decoded.counts.tolist()
          for row, (name, count) in enumerate(zip(event.batch.requests, counts, strict=True)):
            if count and row not in event.late_rows:
              requests[name].deliver(event.times_s(count), *last_step)
        if event.late_firsts or event.late_rows:
          wasted_tokens += event.num_late_tokens
      case Failed():
        host_lags_s.append(now_s - event.ended_s)
        failed = orders.pop(event.order, None)
        if failed is not None and isinstance(failed.order, TransferOrder):
          failed_transfers.append(failed.order.request)
      case TimerDue(_, 'deadline', int(overdue)):
        late.add(overdue)
      case WorkerLost(name):
        losses.setdefault(name, event)
        last_words[name] = event
        open_orders = [one.order for one in orders.values() if isinstance(one.order, TransferOrder)]
        for lost in [order for order in open_orders if name in (order.source, order.target)]:
          failed_transfers.append(lost.request)
          del orders[lost.id]
      case WorkerBack(name) if name in losses:
        returns.append(WorkerReturn.of(losses.pop(name), event))
      case Arrived():
        drafts = samples[event.request.id] = [_Draft(sample) for sample in event.request.samples()]
        requests |= {draft.request.id: draft for draft in drafts}
      case Occupancy():
        occupancy.append(event)
      case Preempted():
        preemptions.append(event)
      case RoleChanged():
        role_changes.append(event)
      case Finished():
        requests[event.request].finished = event

  return Timeline(
    requests=tuple(draft.timeline() for draft in requests.values()),
    spans=tuple(spans),
    occupancy=tuple(occupancy),
    host_lags_s=tuple(host_lags_s),
    wasted_tokens=wasted_tokens,
    failed_transfers=tuple(failed_transfers),
    returns=tuple(returns),
    absences=tuple(
      WorkerAbsence(name, lost.ended_s, last_words[name].error, last_words[name].returning)
      for name, lost in losses.items()
    ),
    preemptions=tuple(preemptions),
    role_changes=tuple(role_changes),
  )


def _step_span(order: StepOrder, done: Done, submitted_s: float) -> BusySpan:
  kind: SpanKind = 'decode' if not order.chunks else 'fused' if order.decodes else 'prefill'
  return BusySpan(
    worker=order.worker,
    kind=kind,
    began_s=done.began_s,
    ended_s=done.ended_s,
    order=order.id,
    requests=order.requests,
    num_prompts=len(order.chunks),
    prompt_tokens=sum(chunk.length for chunk in order.chunks),
    output_tokens=sum(len(result.tokens) for result in done.results) + _num_decoded(done),
    steps=done.num_steps if order.standing else 1,
    submitted_s=submitted_s,
  )


def _num_decoded(done: Done) -> int:
  return 0 if done.decoded is None else done.decoded.num_tokens()


def _transfer_span(order: TransferOrder, done: Done, submitted_s: float) -> BusySpan:
  return BusySpan(
    worker=order.source,
    kind='transfer',
    began_s=done.began_s,
    ended_s=done.ended_s,
    order=order.id,
    requests=(order.request,),
    target=order.target,
    wire_bytes=done.wire_bytes,
    submitted_s=submitted_s,
    trip=done.trip,
  )


class _Draft:
  """A request's timeline while the log is being read."""

  def __init__(self, request: Request):
    self.request = request
    self.token_times_s: list[float] = []
    self.prefill_began_s: float | None = None
    self.last_transfer: Done | None = None
    self.transfer_began_s = 0.0  # of that and those before it, one behind or beside the other
    self.num_transfers = 0
    self.wire_bytes = 0
    self.decode_began_s: float | None = None
    self.prefill_worker: str | None = None
    self.decode_worker: str | None = None
    self.finished: Finished | None = None

  def chunk(self, done: Done) -> None:
    if self.prefill_began_s is None:
      self.prefill_began_s = done.began_s

  def transfer(self, done: Done) -> None:
    self.num_transfers += 1
    self.wire_bytes += done.wire_bytes
    before_second_token = len(self.token_times_s) < 2
    if before_second_token and (self.last_transfer is None or done.ended_s >= self.last_transfer.ended_s):
      in_one_go = self.last_transfer is not None and done.began_s <= self.last_transfer.ended_s
      self.transfer_began_s = min(self.transfer_began_s, done.began_s) if in_one_go else done.began_s
      self.last_transfer = done

  def deliver(self, times_s: Sequence[float], order: StepOrder, done: Done) -> None:
    """Note more tokens, of one step or of several that are told of at once."""
    before = len(self.token_times_s)
    self.token_times_s += times_s
    if before < 1 <= before + len(times_s):
      self.prefill_worker = order.worker
    if before < 2 <= before + len(times_s):
      self.decode_worker = order.worker
      self.decode_began_s = done.begin_s(1 - before)

  def timeline(self) -> RequestTimeline:
    transfer, finished = self.last_transfer, self.finished
    return RequestTimeline(
      id=self.request.id,
      arrival_s=self.request.arrival_s,
      prompt_len=self.request.prompt_len,
      slo=self.request.slo,
      prefill_began_s=self.prefill_began_s,
      token_times_s=tuple(self.token_times_s),
      transfer_began_s=self.transfer_began_s if transfer else None,
      transfer_ended_s=transfer.ended_s if transfer else None,
      num_transfers=self.num_transfers,
      wire_bytes=self.wire_bytes,
      decode_began_s=self.decode_began_s,
      finished_s=finished.now_s if finished else None,
      finish_reason=finished.finish_reason if finished else None,
      error=finished.error if finished else None,
      prefill_worker=self.prefill_worker,
      decode_worker=self.decode_worker,
      sample_of=self.request.sample_of,
    )
