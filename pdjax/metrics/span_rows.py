"""The busy spans of workers and links: one by one as `BusySpan`, and all together as arrays."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from pdjax.metrics.columns import Column, Read, numbered
from pdjax.serving.batch import NOBODY as NO_BATCH
from pdjax.serving.batch import Batch
from pdjax.serving.events import Done, Trip
from pdjax.serving.orders import StepOrder, TransferOrder

SpanKind = Literal['prefill', 'decode', 'fused', 'transfer', 'copy']
KINDS: tuple[SpanKind, ...] = get_args(SpanKind)
TRANSFER, COPY = KINDS.index('transfer'), KINDS.index('copy')
MOST_TRACED = 200_000  # spans that are drawn one by one; a viewer hardly opens more
MOST_NAMED = 1 << 24  # members of batches; of spans behind that, those that only decode are not kept
_NONE = -1
_UNKNOWN = -2
_DTYPE = np.dtype([
  ('worker', 'i2'), ('kind', 'i1'), ('target', 'i2'), ('began_s', 'f8'), ('ended_s', 'f8'), ('order', 'i8'),
  ('num_prompts', 'i4'), ('prompt_tokens', 'i4'), ('steps', 'i4'), ('output_tokens', 'i4'), ('wire_bytes', 'i8'),
  ('submitted_s', 'f8'), ('trip', 'i4'), ('named', 'i8'), ('batch', 'i4'),
])  # fmt: skip
_TRIP_DTYPE = np.dtype([('wire_began_s', 'f8'), ('arrived_s', 'f8'), ('pieces', 'i4')])


@dataclasses.dataclass(frozen=True, slots=True)
class BusySpan:
  """One order's time on a worker or, for a transfer, on the way between two.

  Attributes:
    worker: The worker, or the source of a transfer.
    kind: A step is `prefill`, `decode` or, with both in one, `fused`; what travels is a `transfer`, or as cached blocks
      that no request needed where they were a `copy`.
    began_s: The time the worker or link turned to it.
    ended_s: The time its outcome was on the host.
    order: The order's id.
    requests: Everyone in it, those with prompt tokens first.
    num_prompts: The number of those.
    prompt_tokens: Prompt tokens a step computed, or tokens that a copy moved.
    steps: Steps of one that stands, where several are told of at once.
    output_tokens: Tokens a step brought.
    target: The place that a transfer or a copy goes to.
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

  @property
  def moves(self) -> bool:
    """Whether something travels, and no step is run."""
    return self.target is not None


class SpanRows(Read[BusySpan]):
  """Every order that ended well, in the order in which the loop learnt of it, each made as it is read.

  Args:
    rows: `[S]`, a row each; workers, requests and trips are numbers.
    trips: The times on the wire of those that have some.
    named: Requests of spans, one span behind the other: prompts, or that of a transfer.
    members: Requests of batches, one batch behind the other.
    ends: The end of each batch there.
    workers: The names of the workers.
    ids: The ids of the requests.
  """

  def __init__(
    self,
    rows: np.ndarray | None = None,
    trips: np.ndarray | None = None,
    named: np.ndarray | None = None,
    members: np.ndarray | None = None,
    ends: np.ndarray | None = None,
    workers: Sequence[str] = (),
    ids: Sequence[str] = (),
  ):
    self.rows = np.empty(0, _DTYPE) if rows is None else rows
    self.trips = np.empty(0, _TRIP_DTYPE) if trips is None else trips
    self._named = np.empty(0, np.int32) if named is None else named
    self._members = np.empty(0, np.int32) if members is None else members
    self._ends = np.empty(0, np.int64) if ends is None else ends
    self._workers = workers
    self._ids = ids

  def __len__(self) -> int:
    return len(self.rows)

  def made(self, number: int) -> BusySpan:
    """The one of a number, in their order."""
    row = dict(zip(_DTYPE.names or (), self.rows[number].item(), strict=True))
    return BusySpan(
      worker=self._workers[row['worker']],
      kind=KINDS[row['kind']],
      began_s=row['began_s'],
      ended_s=row['ended_s'],
      order=row['order'],
      requests=self.requests(number),
      num_prompts=row['num_prompts'],
      prompt_tokens=row['prompt_tokens'],
      steps=row['steps'],
      output_tokens=row['output_tokens'],
      target=None if row['target'] == _NONE else self._workers[row['target']],
      wire_bytes=row['wire_bytes'],
      submitted_s=row['submitted_s'],
      trip=None if row['trip'] == _NONE else Trip(*self.trips[row['trip']].item()),
    )

  def requests(self, number: int) -> tuple[str, ...]:
    """Everyone in a span, those with prompt tokens first."""
    row = self.rows[number]
    count = 1 if row['kind'] in (TRANSFER, COPY) else row['num_prompts']
    numbers = self._named[row['named'] : row['named'] + count].tolist()
    if row['batch'] >= 0:
      start = self._ends[row['batch'] - 1] if row['batch'] else 0
      numbers += self._members[start : self._ends[row['batch']]].tolist()
    return tuple(self._ids[one] for one in numbers)

  def everyone(self, which: Iterable[int]) -> tuple[str, ...]:
    """The requests of several spans, each once; of a batch that goes on through them they are looked at once."""
    found: dict[str, None] = {}
    last = None
    for number in which:
      batch = self.rows['batch'][number]
      if batch == last and not self.rows['num_prompts'][number] and batch >= 0:
        continue
      last = batch
      found.update(dict.fromkeys(self.requests(number)))
    return tuple(found)

  # -------------------------------------------------------------------------- over all of them

  @property
  def kinds(self) -> set[SpanKind]:
    """The kinds that there are."""
    return {KINDS[kind] for kind in np.unique(self.rows['kind'])}

  @property
  def is_transfer(self) -> np.ndarray:
    """Whether each is a transfer, `[S]`."""
    return self.rows['kind'] == TRANSFER

  @property
  def is_copy(self) -> np.ndarray:
    """Whether each is a transfer of cached blocks, which no request needed where it was, `[S]`."""
    return self.rows['kind'] == COPY

  def of_kind(self, kind: SpanKind) -> np.ndarray:
    """Whether each is of a kind, `[S]`."""
    return self.rows['kind'] == KINDS.index(kind)

  def of_worker(self, name: str) -> np.ndarray:
    """Whether each is of a worker, or a transfer from it, `[S]`."""
    return self._is('worker', name)

  def to_worker(self, name: str) -> np.ndarray:
    """Whether each is a transfer to a worker, `[S]`."""
    return self._is('target', name)

  def _is(self, field: str, name: str) -> np.ndarray:
    if name not in self._workers:
      return np.zeros(len(self), bool)
    return self.rows[field] == self._workers.index(name)

  def place(self, number: int) -> str:
    """The name of a place that rows have the number of."""
    return self._workers[number]

  def first_named(self, rows: np.ndarray) -> np.ndarray:
    """The number of the request of each of some transfers, given their rows."""
    return self._named[rows['named']]

  @property
  def are_traced(self) -> bool:
    """Whether they are few enough to be drawn one by one."""
    return len(self) <= MOST_TRACED

  @property
  def are_named(self) -> bool:
    """Whether every span has all its requests."""
    return not (self.rows['batch'] == _UNKNOWN).any()

  @property
  def nbytes(self) -> int:
    """Bytes of the arrays."""
    return sum(one.nbytes for one in (self.rows, self.trips, self._named, self._members, self._ends))


class SpanColumns:
  """Spans as orders end, in arrays.

  Args:
    workers: Numbers of workers by name, which it adds to.
    requests: Numbers of requests by id.
    most_named: Most members of batches that are kept.
  """

  def __init__(self, workers: dict[str, int], requests: dict[str, int], most_named: int):
    self._workers = workers
    self._requests = requests
    self._most_named = most_named
    self._rows, self._trips = Column(_DTYPE), Column(_TRIP_DTYPE)
    self._named, self._members, self._ends = Column(np.int32), Column(np.int32), Column(np.int64)
    self._batches: dict[str, tuple[Batch, int]] = {}  # the last of each worker, and its number

  def add_step(self, order: StepOrder, done: Done, submitted_s: float) -> None:
    """Add a step, or those of a standing order that are told of."""
    kind: SpanKind = 'decode' if not order.chunks else 'fused' if order.decodes else 'prefill'
    named = len(self._named)
    self._named.extend([self._requests[chunk.request.id] for chunk in order.chunks])
    tokens = 0 if done.decoded is None else done.decoded.num_tokens()
    self._rows.append((
      numbered(self._workers, order.worker), KINDS.index(kind), _NONE, done.began_s, done.ended_s, order.id,
      len(order.chunks), sum(chunk.length for chunk in order.chunks), done.num_steps if order.standing else 1,
      tokens + sum(len(result.tokens) for result in done.results), 0, submitted_s, _NONE, named,
      self._number(order.worker, order.batch),
    ))  # fmt: skip

  def add_transfer(self, order: TransferOrder, done: Done, submitted_s: float) -> None:
    """Add a transfer, or one that is a part of a copy of cached blocks."""
    trip, named = _NONE, len(self._named)
    if done.trip is not None:
      trip = len(self._trips)
      self._trips.append((done.trip.wire_began_s, done.trip.arrived_s, done.trip.pieces))
    self._named.append(self._requests[order.request])
    source, target = numbered(self._workers, order.source), numbered(self._workers, order.target)
    kind, tokens = (TRANSFER, 0) if order.copy is None else (COPY, order.span.tokens)
    self._rows.append((
      source, kind, target, done.began_s, done.ended_s, order.id, 0, tokens, 1, 0, done.wire_bytes, submitted_s, trip,
      named, _NONE,
    ))  # fmt: skip

  def spans(self, workers: Sequence[str], ids: Sequence[str]) -> SpanRows:
    """Those so far."""
    trips, named = self._trips.array, self._named.array
    return SpanRows(self._rows.array, trips, named, self._members.array, self._ends.array, workers, ids)

  def _number(self, worker: str, batch: Batch) -> int:
    if batch is NO_BATCH or not batch.requests:
      return _NONE
    last = self._batches.get(worker)
    if last is not None and last[0] is batch:
      return last[1]
    if len(self._members) + len(batch) > self._most_named:
      return _UNKNOWN
    number = len(self._ends)
    self._members.extend([self._requests[name] for name in batch.requests])
    self._ends.append(len(self._members))
    self._batches[worker] = batch, number
    return number
