"""The fault matrix as one table: when something goes wrong (rows), what (columns), or why a cell is empty."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import pytest

from experiments.faults.chaos import Fault
from pdjax.policies import Disaggregated, LongestPrefix
from pdjax.serving.events import Arrived, Done, Event, Withdrawn
from pdjax.serving.orders import Order, StepOrder, TransferOrder
from pdjax.serving.state import ClusterState
from pdjax.types import FaultSpec, PrefixCache, Request, SamplingParams, WorkerSpec
from tests.faults.injection import Asking, Injector, Seen
from tests.tiny import prompt

VICTIM = 'victim'
HIT = 16  # tokens that the victim finds, where something is cached
CACHE = PrefixCache(block_tokens=4)
POLICY = Disaggregated(max_prefill_tokens=16)
CACHED_POLICY = Disaggregated(max_prefill_tokens=16, place_prefill=LongestPrefix())
QUICK = {  # cells that are served in each run of the tests in every way, one a row at least; else some are slow
  ('queued', 'both full'),
  ('in prefill chunk', 'transfer fails'),
  ('prefill done, decode not admitted', 'prefill worker dies'),
  ('pages reserved', 'decode full'),
  ('transfer half done', 'pages permuted'),
  ('done but unacknowledged', 'decode worker dies'),
  ('first decode step', 'worker restarts under the same name'),
  ('mid decode', 'decode worker dies'),
  ('mid decode', 'both full'),
  ('mid decode', 'abort storm beyond capacity'),
}


# ---------------------------------------------------------------------------- rows: when


def _queued(seen: Seen, what: Order | Event) -> bool:
  return isinstance(what, StepOrder) and seen.prefill is None


def _in_chunk(seen: Seen, what: Order | Event) -> bool:
  chunks = what.chunks if isinstance(what, StepOrder) else ()
  return any(chunk.request.id == VICTIM and chunk.start > 0 and not chunk.is_last for chunk in chunks)


def _prefilled(seen: Seen, what: Order | Event) -> bool:
  return isinstance(what, Done) and seen.tokens == 1 and bool(seen.open)


def _reserved(seen: Seen, what: Order | Event) -> bool:
  return isinstance(what, TransferOrder) and what.request == VICTIM


def _half_done(seen: Seen, what: Order | Event) -> bool:
  return isinstance(what, Done) and bool(seen.ended) and bool(seen.open)


def _unacknowledged(seen: Seen, what: Order | Event) -> bool:
  return isinstance(what, Done) and seen.computed and bool(seen.ended) and not seen.open


def _first_decode(seen: Seen, what: Order | Event) -> bool:
  joins = what.joins if isinstance(what, StepOrder) else ()
  return any(join.request == VICTIM and join.admission is not None for join in joins)


def _mid_decode(seen: Seen, what: Order | Event) -> bool:
  return isinstance(what, Done) and seen.tokens >= 4


ROWS: dict[str, Callable[[Seen, Order | Event], bool]] = {
  'queued': _queued,
  'in prefill chunk': _in_chunk,
  'prefill done, decode not admitted': _prefilled,
  'pages reserved': _reserved,
  'transfer half done': _half_done,
  'done but unacknowledged': _unacknowledged,
  'first decode step': _first_decode,
  'mid decode': _mid_decode,
}
WHICH_TRANSFER = {  # the one of the victim's three that a row is about
  'in prefill chunk': 0,
  'prefill done, decode not admitted': 2,
  'pages reserved': 0,
  'transfer half done': 1,
  'done but unacknowledged': 2,
}


# ---------------------------------------------------------------------------- columns: what


@dataclasses.dataclass(frozen=True)
class Times:
  """Times of a backend, in seconds."""

  deadline_s: float
  late_s: float  # past the deadline
  down_s: float  # that a dead worker is away
  backoff_s: float
  later_s: float  # by then what came first has ended, and left its blocks


@dataclasses.dataclass
class Cell:
  """One meeting of a row and a column, to be set up on a backend.

  With `cached` two requests come before all others, and leave what the victim and a bystander begin with on two workers
  of each side; the victim is longer by that, and so has as many chunks and transfers behind its hit.
  """

  row: str
  column: str
  times: Times
  cached: bool = False

  @property
  def requests(self) -> list[Request]:
    """The victim and those it must not harm."""
    tokens = prompt(56 if self.cached else 40, 9)
    victim = Request(
      VICTIM,
      tokens,
      SamplingParams(max_tokens=8, temperature=0.8, seed=3, repetition_penalty=1.2, ignore_eos=True),
    )
    others = _others(self.lengths, self.column)
    if not self.cached:
      return [*others, victim][:: 1 if self.row == 'queued' else -1]
    short, alike = SamplingParams(max_tokens=2, ignore_eos=True), SamplingParams(max_tokens=6, ignore_eos=True)
    before = [Request(f'before{i}', (*tokens[: HIT + 2], *prompt(3, 50 + i)), short) for i in range(2)]
    others.append(Request('other alike', (*tokens[: HIT + 1], *prompt(5, 60)), alike))
    later = [*others, victim][:: 1 if self.row == 'queued' else -1]
    return [*before, *(dataclasses.replace(one, arrival_s=self.times.later_s) for one in later)]

  @property
  def lengths(self) -> Sequence[int]:
    """Of the bystanders' prompts."""
    return FULL[self.column][0] if self.column in FULL else (9, 30, 3, 17)

  def sized(self, workers: Iterable[WorkerSpec]) -> list[WorkerSpec]:
    """The workers with as many of their pages as the column lets them have."""
    pages = FULL[self.column][1] if self.column in FULL else {}
    return [dataclasses.replace(one, num_pages=pages.get(one.role, one.num_pages)) for one in workers]

  def is_full(self, state: ClusterState) -> bool:
    """Whether nobody has room for the victim, where the column says so."""
    sides = {'prefill': state.view.prefill_workers, 'decode': state.view.decode_workers}
    room = state.view.room()
    if VICTIM not in state.view.requests:
      return False
    held = state.books.requests[VICTIM].pages  # where it has its pages there is room for it
    return not any(
      room.fits(VICTIM, worker.name, decodes=role == 'decode') and worker.name not in held
      for role in FULL.get(self.column, ((), {}))[1]
      for worker in sides[role]
    )

  @property
  def faults(self) -> FaultSpec:
    return FaultSpec(max_attempts=6, backoff_s=self.times.backoff_s)

  def set_up(self, injector: Injector, arrivals: Asking) -> None:
    """Arrange for what is to happen."""
    injector.moment = lambda seen, what: self.has_come(injector) and ROWS[self.row](seen, what)
    if self.row == 'done but unacknowledged':
      _told(lambda times: times.backoff_s)(self, injector, arrivals)
    COLUMNS[self.column].set_up(self, injector, arrivals)
    if self.row == 'transfer half done':
      fails = injector.on_transfer
      injector.on_transfer = lambda seen, order: fails(seen, order) or ('slow' if seen.index(order) == 1 else None)

  def has_come(self, injector: Injector) -> bool:
    """Whether the victim may have come."""
    return not self.cached or injector.now_s >= self.times.later_s

  @property
  def transfer(self) -> int | None:
    return WHICH_TRANSFER.get(self.row)

  def is_first_try(self, seen: Seen, order: TransferOrder) -> bool:
    """Whether an order is the first try at the row's transfer."""
    return seen.index(order) == self.transfer and seen.is_first_try(order)


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of the matrix: one way of going wrong.

  Attributes:
    set_up: Arranges for it.
    ends: Finish reasons that the victim may have.
    empty: The rows where it means nothing, with the reasons.
  """

  set_up: Callable[[Cell, Injector, Asking], None]
  ends: tuple[str, ...] = ('length',)
  empty: dict[str, str] = dataclasses.field(default_factory=dict)


def _acts(act: Callable[[Cell, Injector, Asking], None]) -> Callable[[Cell, Injector, Asking], None]:
  def set_up(cell: Cell, injector: Injector, arrivals: Asking) -> None:
    injector.act = lambda injector: act(cell, injector, arrivals)

  return set_up


def _abort(cell: Cell, injector: Injector, arrivals: Asking) -> None:
  arrivals.push(Withdrawn(VICTIM))
  arrivals.push(Withdrawn(VICTIM))


def _storm(cell: Cell, injector: Injector, arrivals: Asking) -> None:
  """Many more than there is room for come and go, some at once, some twice, some with a few tokens."""
  storm = [Request(f'storm{i}', prompt(20 + i % 5, i % 5), SamplingParams(max_tokens=30)) for i in range(60)]
  arrivals.push(*map(Arrived, storm), *(Withdrawn(one.id) for one in storm[::3]))
  arrivals.push(*(Withdrawn(one.id) for one in storm[::2]))
  arrivals.push(Withdrawn(VICTIM))
  for _ in range(6):
    arrivals.push()
  arrivals.push(*(Withdrawn(one.id) for one in storm))


def _prefill_dies(cell: Cell, injector: Injector, arrivals: Asking) -> None:
  injector.lose(injector.seen.prefill or 'prefill0', cell.times.down_s)


def _decode_dies(cell: Cell, injector: Injector, arrivals: Asking) -> None:
  injector.lose(injector.seen.decode or 'decode0', cell.times.down_s)


def _restarts(cell: Cell, injector: Injector, arrivals: Asking) -> None:
  """It is back at once, and is told afterwards to have ended steps of its earlier incarnation."""
  decodes = cell.row in ('first decode step', 'mid decode', 'done but unacknowledged')
  worker = (injector.seen.decode if decodes else injector.seen.prefill) or 'prefill0'
  orders = injector.orders_of(worker)
  injector.lose(worker, 0.0)
  for order in orders[-3:]:
    injector.say(Done(order, injector.now_s, injector.now_s), cell.times.backoff_s)


def _transfer(fault: Fault, refused: bool = False) -> Callable[[Cell, Injector, Asking], None]:
  def set_up(cell: Cell, injector: Injector, arrivals: Asking) -> None:
    kind = 'refused' if refused and cell.row == 'pages reserved' else fault
    injector.on_transfer = lambda seen, order: kind if cell.is_first_try(seen, order) else None

  return set_up


def _told(*after: Callable[[Times], float]) -> Callable[[Cell, Injector, Asking], None]:
  """The end of the row's transfer is told so many seconds later, as often as there are such times."""

  def set_up(cell: Cell, injector: Injector, arrivals: Asking) -> None:
    def on_done(seen: Seen, order: TransferOrder, done: Done) -> list[tuple[float, Event]]:
      if not cell.is_first_try(seen, order):
        return [(0.0, done)]
      return [(when(cell.times), done) for when in after]

    injector.on_done = on_done

  return set_up


def _twice(cell: Cell, injector: Injector, arrivals: Asking) -> None:
  if cell.transfer is not None:
    _told(lambda times: 0.0, lambda times: 0.0, lambda times: times.backoff_s)(cell, injector, arrivals)
  injector.act = lambda injector: [injector.say(done) for done in injector.seen.ended]


def _link(stalled: bool) -> Callable[[Cell, Injector, Asking], None]:
  """From the moment on all transfers are slow; or those of everybody stall, until some have been tried again."""

  def set_up(cell: Cell, injector: Injector, arrivals: Asking) -> None:
    stalls: list[int] = []

    def fault_of(order: TransferOrder) -> Fault | None:
      begun = injector.acted or (cell.row in WHICH_TRANSFER and cell.has_come(injector))
      if not begun:
        return None
      if not stalled:
        return 'slow'
      stalls.append(order.id)
      return 'stalls' if len(stalls) <= 4 else None

    injector.backend.fault_of = fault_of

  return set_up


def _full(cell: Cell, injector: Injector, arrivals: Asking) -> None:
  """While others take the room, the victim must be tried again, or begin again."""
  if cell.transfer is not None and cell.row != 'done but unacknowledged':
    _transfer('fails', refused=True)(cell, injector, arrivals)
  elif cell.row in ('queued',):
    injector.act = lambda injector: _prefill_dies(cell, injector, arrivals)
  else:
    injector.act = lambda injector: _decode_dies(cell, injector, arrivals)


def _evict(cell: Cell, injector: Injector, arrivals: Asking) -> None:
  """There is no eviction yet: that no page of a transfer can be taken, whatever its request does, stands for it."""
  arrivals.push(Withdrawn(VICTIM))
  arrivals.push(Arrived(Request('greedy', prompt(60, 4), SamplingParams(max_tokens=4, ignore_eos=True))))


_NO_TRANSFER = {'queued': 'a queued request has no transfer'}
_OVER = dict.fromkeys(('first decode step', 'mid decode'), 'all its transfers are over')
_NOT_YET = {'pages reserved': "nothing has arrived yet; the first transfer's are in the row 'in prefill chunk'"}
_WELL = {'done but unacknowledged': 'the transfer is done, and well'}
_BEHIND = {'done but unacknowledged': 'the link is behind it', **_OVER}

COLUMNS = {
  'abort': Column(_acts(_abort), ends=('cancelled',)),
  'abort storm beyond capacity': Column(_acts(_storm), ends=('cancelled', 'length')),
  'prefill worker dies': Column(_acts(_prefill_dies)),
  'decode worker dies': Column(_acts(_decode_dies)),
  'worker restarts under the same name': Column(_acts(_restarts)),
  'transfer fails': Column(_transfer('fails', refused=True), empty=_NO_TRANSFER | _OVER | _WELL),
  'transfer times out': Column(
    _transfer('stalls'),
    empty=_NO_TRANSFER | _OVER | {'done but unacknowledged': 'it does so where its completion is lost'},
  ),
  'completes late': Column(_told(lambda times: times.late_s), empty=_NO_TRANSFER | _NOT_YET | _OVER),
  'completes twice': Column(_twice, empty=_NO_TRANSFER | _NOT_YET),
  'completion lost': Column(_told(), empty=_NO_TRANSFER | _NOT_YET | _OVER),
  'bytes corrupted': Column(_transfer('corrupts'), ends=('error',), empty=_NO_TRANSFER | _NOT_YET | _OVER | _WELL),
  'pages permuted': Column(_transfer('permutes'), ends=('error',), empty=_NO_TRANSFER | _NOT_YET | _OVER | _WELL),
  'decode full': Column(_full),
  'prefill full': Column(_full),
  'both full': Column(_full),
  'eviction asked under transfer': Column(_acts(_evict), ends=('cancelled',), empty=_NO_TRANSFER | _OVER),
  '5 % random failures over 500 requests': Column(
    _full,
    empty=dict.fromkeys(ROWS, 'one run meets every moment: test_random_faults.py, and test_random_faults_engine.py'),
  ),
  'slow link': Column(_link(stalled=False), empty=_BEHIND),
  'stalled link': Column(_link(stalled=True), empty=_BEHIND),
}
FULL = {  # prompts of those who take the room, and pages of each worker by role
  'decode full': ((6,) * 14, {'decode': 24}),
  'prefill full': ((40,) * 12, {'prefill': 16}),
  'both full': ((40,) * 16, {'prefill': 16, 'decode': 21}),
}


def _others(lengths: Iterable[int], column: str) -> list[Request]:
  """Bystanders; one wants two samples. Where the decode side is to be full they take long."""
  long = column in ('decode full', 'both full')
  return [
    Request(
      f'other{i}',
      prompt(length, i),
      SamplingParams(
        max_tokens=20 if long else 2 if column == 'prefill full' else 6, ignore_eos=True, n=2 if i == 1 else 1
      ),
    )
    for i, length in enumerate(lengths)
  ]


def mostly_slow(choices: Iterable[Any], quick: Set[tuple[str, str]] = frozenset(QUICK)) -> list:
  """Every cell with every choice of something; all but the quick cells are slow."""
  return [
    pytest.param(*cell, chosen, marks=[] if cell in quick else [pytest.mark.slow])
    for chosen in choices
    for cell in cells()
  ]


def cells() -> list[tuple[str, str]]:
  """Every (row, column) that means something."""
  return [(row, column) for row in ROWS for column, what in COLUMNS.items() if row not in what.empty]
