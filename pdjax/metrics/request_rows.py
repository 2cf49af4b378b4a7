"""The times and outcome of every request: one by one as `RequestTimeline`, and all together as arrays."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pdjax.metrics.columns import Read
from pdjax.metrics.stats import Distribution
from pdjax.metrics.token_times import take
from pdjax.types.request import SERVED, SLO, FinishReason

REASONS: tuple[FinishReason | None, ...] = (None, 'stop', 'length', 'cancelled', 'rejected', 'error')
NEVER = np.nan  # a time that was not reached
NOBODY = -1
DTYPE = np.dtype([
  ('arrival_s', 'f8'), ('prompt_len', 'i4'), ('slo', 'i4'), ('sample_of', 'i4'), ('begun_s', 'f8'),
  ('prefill_began_s', 'f8'), ('num_tokens', 'i4'), ('first_s', 'f8'), ('second_s', 'f8'), ('last_s', 'f8'),
  ('transfer_began_s', 'f8'), ('transfer_ended_s', 'f8'), ('num_transfers', 'i4'), ('wire_bytes', 'i8'),
  ('decode_began_s', 'f8'), ('finished_s', 'f8'), ('reason', 'i1'), ('prefill_worker', 'i2'), ('decode_worker', 'i2'),
  ('piece', 'i8'), ('num_pieces', 'i4'), ('class_name', 'i4'), ('tenant', 'i4'), ('deadline_s', 'f8'),
])  # fmt: skip
MOST_GAPS = 4_000_000  # that a report's file has one by one
_BLOCK = 4096  # requests whose token times are looked at together


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
    begun_s: The time of the turn that first began its prompt; of several samples, the one that carried that has it.
    class_name: The kind of traffic it is of, if any.
    tenant: The user or group that it was served for, if any.
    deadline_s: Seconds after its arrival by which its last token was to be there, if any.
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
  begun_s: float | None = None
  class_name: str | None = None
  tenant: str | None = None
  deadline_s: float | None = None

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


class RequestRows(Read[RequestTimeline]):
  """Every request in the order of arrival, each made as it is read; the attributes are arrays over all of them, `[R]`.

  A time that was not reached is NaN in an array.

  Args:
    rows: `[R]` of `DTYPE`; workers, limits and the like are numbers.
    ids: The id of each.
    workers: The names of the workers.
    slos: The limits that requests have of their own.
    wholes: The requests that others are further samples of.
    errors: The error of each that ended with one.
    pieces: `[N]` numbers, column, start and stop of each piece of the token times.
    columns: Those columns.
    class_names: The classes of requests.
    tenants: Their tenants.
  """

  def __init__(
    self,
    rows: np.ndarray | None = None,
    ids: Sequence[str] = (),
    workers: Sequence[str] = (),
    slos: Sequence[SLO] = (),
    wholes: Sequence[str] = (),
    errors: Mapping[int, str] | None = None,
    pieces: np.ndarray | None = None,
    columns: Sequence[np.ndarray] = (),
    class_names: Sequence[str] = (),
    tenants: Sequence[str] = (),
  ):
    self.rows = np.empty(0, DTYPE) if rows is None else rows
    self.ids = ids
    self.errors = errors or {}
    self.class_names = class_names
    self.tenants = tenants
    self._workers = workers
    self._slos = slos
    self._wholes = wholes
    self._pieces = np.empty(0, np.int64) if pieces is None else pieces
    self._columns = columns
    self._distributions: dict[str, Distribution] = {}

  def __len__(self) -> int:
    return len(self.rows)

  def made(self, number: int) -> RequestTimeline:
    """The one of a number, in their order."""
    row = dict(zip(DTYPE.names or (), self.rows[number].item(), strict=True))

    def worker(field: str) -> str | None:
      return None if row[field] == NOBODY else self._workers[row[field]]

    return RequestTimeline(
      id=self.ids[number],
      arrival_s=row['arrival_s'],
      prompt_len=row['prompt_len'],
      slo=None if row['slo'] == NOBODY else self._slos[row['slo']],
      prefill_began_s=_reached(row['prefill_began_s']),
      token_times_s=tuple(self._times_s(number).tolist()),
      transfer_began_s=_reached(row['transfer_began_s']),
      transfer_ended_s=_reached(row['transfer_ended_s']),
      num_transfers=row['num_transfers'],
      wire_bytes=row['wire_bytes'],
      decode_began_s=_reached(row['decode_began_s']),
      finished_s=_reached(row['finished_s']),
      finish_reason=REASONS[row['reason']],
      error=self.errors.get(number),
      prefill_worker=worker('prefill_worker'),
      decode_worker=worker('decode_worker'),
      sample_of=None if row['sample_of'] == NOBODY else self._wholes[row['sample_of']],
      begun_s=_reached(row['begun_s']),
      class_name=None if row['class_name'] == NOBODY else self.class_names[row['class_name']],
      tenant=None if row['tenant'] == NOBODY else self.tenants[row['tenant']],
      deadline_s=_reached(row['deadline_s']),
    )

  def _times_s(self, number: int) -> np.ndarray:
    first, count = self.rows['piece'][number], self.rows['num_pieces'][number]
    return take(self._columns, self._pieces[3 * first : 3 * (first + count)].tolist())

  # -------------------------------------------------------------------------- over all of them

  @functools.cached_property
  def completed(self) -> np.ndarray:
    """Whether each got all that it asked for."""
    return np.isin(self.rows['reason'], [REASONS.index(reason) for reason in SERVED])

  @property
  def begun_tokens(self) -> int:
    """Prompt tokens of those that were begun."""
    return int(self.rows['prompt_len'][~np.isnan(self.rows['begun_s'])].sum())

  @property
  def ttft_s(self) -> np.ndarray:
    """Time to first token."""
    return self.rows['first_s'] - self.rows['arrival_s']

  @property
  def e2el_s(self) -> np.ndarray:
    """End-to-end latency."""
    return self.rows['last_s'] - self.rows['arrival_s']

  @property
  def tpot_s(self) -> np.ndarray:
    """Time per output token after the first."""
    rows = self.rows
    counts = np.where(rows['num_tokens'] > 1, rows['num_tokens'] - 1.0, NEVER)
    return (rows['last_s'] - rows['first_s']) / counts

  @property
  def queue_s(self) -> np.ndarray:
    """From arrival until the step with the first chunk began."""
    return self.rows['prefill_began_s'] - self.rows['arrival_s']

  @property
  def prefill_s(self) -> np.ndarray:
    """From then until the first token was delivered."""
    return self.rows['first_s'] - self.rows['prefill_began_s']

  @property
  def handoff_s(self) -> np.ndarray:
    """From the first token to the second."""
    return self.rows['second_s'] - self.rows['first_s']

  @property
  def handoff_parts_s(self) -> np.ndarray:
    """The parts of that, as `HandOff` has them, `[R, 4]`."""
    rows = self.rows
    points = [np.where(np.isnan(rows['decode_began_s']), NEVER, rows['first_s'])]
    for name in ('transfer_began_s', 'transfer_ended_s', 'decode_began_s'):
      held = np.minimum(np.maximum(points[-1], rows[name]), rows['second_s'])
      points.append(np.where(np.isnan(rows[name]), points[-1], held))
    points.append(rows['second_s'])
    return np.stack([after - before for before, after in itertools.pairwise(points)], axis=1)

  @property
  def in_time(self) -> np.ndarray:
    """Whether each has a deadline, and completed by it."""
    return self.completed & (self.e2el_s <= self.rows['deadline_s'])

  def meets(self, slo: SLO | None) -> np.ndarray:
    """Whether each completed within every limit, which is its own or else this one."""
    met = self.completed.copy()
    for number in np.unique(self.rows['slo']).tolist():
      one = slo if number == NOBODY else self._slos[number]
      mine = self.rows['slo'] == number
      for values_s, limit_ms in () if one is None else (
        (self.ttft_s, one.ttft_ms), (self.tpot_s, one.tpot_ms), (self.e2el_s, one.e2el_ms)
      ):  # fmt: skip
        if limit_ms is not None:
          met &= ~mine | ~(values_s > limit_ms / 1e3)
    return met

  def distribution(self, metric: str) -> Distribution:
    """A latency of those that completed: `ttft`, `tpot`, `itl`, `e2el` or `handoff`; worked out once."""
    if metric not in self._distributions:
      if metric == 'itl':
        values_s = self.itls_s(np.flatnonzero(self.completed))
      else:
        values_s = getattr(self, f'{metric}_s')[self.completed]
        values_s = values_s[~np.isnan(values_s)]
      self._distributions[metric] = Distribution.of_seconds(values_s)
    return self._distributions[metric]

  def finish_reasons(self) -> dict[str, int]:
    """The number of requests by how they ended, in the order of the first of each."""
    codes, first, counts = np.unique(self.rows['reason'], return_index=True, return_counts=True)
    return {REASONS[codes[i]] or 'unfinished': int(counts[i]) for i in np.argsort(first)}

  def delta_times_s(self, which: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The times of the deltas of some requests (their numbers): of a good many at once, and how many each has."""
    for start in range(0, len(which), _BLOCK):
      parts = [self._times_s(number) for number in which[start : start + _BLOCK].tolist()]
      times_s = np.concatenate(parts)
      is_delta = np.ones(len(times_s), bool)
      is_delta[1:] = times_s[1:] != times_s[:-1]
      lengths = np.array([len(part) for part in parts], np.int64)
      ends = np.cumsum(lengths)
      firsts = (ends - lengths)[lengths > 0]
      is_delta[firsts] = True
      before = np.concatenate([[0], np.cumsum(is_delta)])
      yield times_s[is_delta], before[ends] - before[ends - lengths]

  def itls_s(self, which: np.ndarray) -> np.ndarray:
    """The gaps between the deltas of some requests, one request behind the other."""
    gaps_s = np.empty(int(np.maximum(self.rows['num_tokens'][which] - 1, 0).sum()))
    place = 0
    for times_s, counts in self.delta_times_s(which):
      if not len(times_s):
        continue
      found_s = np.delete(np.diff(times_s), np.cumsum(counts[counts > 0])[:-1] - 1)
      gaps_s[place : place + len(found_s)] = found_s
      place += len(found_s)
    return gaps_s[:place]

  def all_itls_s(self) -> list[list[float]]:
    """The gaps of each; empty of all if there are more than `MOST_GAPS`."""
    if not self.gaps_are_told:
      return [[] for _ in range(len(self))]
    found: list[list[float]] = []
    for times_s, counts in self.delta_times_s(np.arange(len(self))):
      for own_s in np.split(times_s, np.cumsum(counts)[:-1]):
        found.append(np.diff(own_s).tolist())
    return found

  @property
  def gaps_are_told(self) -> bool:
    """Whether `all_itls_s` has any."""
    return int(np.maximum(self.rows['num_tokens'] - 1, 0).sum()) <= MOST_GAPS

  def reasons_of_failure(self) -> list[str]:
    """The error of each that did not complete, or else how it ended; empty of the others."""
    reasons = [REASONS[code] or 'unfinished' for code in self.rows['reason'].tolist()]
    completed = self.completed.tolist()
    return ['' if completed[i] else self.errors.get(i) or reason for i, reason in enumerate(reasons)]

  @property
  def nbytes(self) -> int:
    """Bytes of the arrays."""
    return self.rows.nbytes + self._pieces.nbytes + sum(column.nbytes for column in self._columns)


def _reached(time_s: float) -> float | None:
  return None if time_s != time_s else time_s
