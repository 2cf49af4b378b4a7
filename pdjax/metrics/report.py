"""The report of one run: latencies, throughput, goodput, utilisation and where the time went, from the log alone."""

import dataclasses
import datetime
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pdjax.metrics.account import Account, sum_line
from pdjax.metrics.bill import Bill, Chips
from pdjax.metrics.copies import CopiedBlocks, copied_blocks
from pdjax.metrics.groups import GroupFigures, by_class, by_tenant, deadline_share
from pdjax.metrics.notes import own_notes
from pdjax.metrics.numbers import number, percent
from pdjax.metrics.request_rows import NOBODY, RequestRows
from pdjax.metrics.returns import WorkerReturn
from pdjax.metrics.stats import Stats, ratio
from pdjax.metrics.timeline import Timeline, read_timeline
from pdjax.metrics.transfers import TransferFigures
from pdjax.metrics.utilisation import Utilisation
from pdjax.serving.events import Event, HitSide, RoleChanged
from pdjax.types.cluster import split_name
from pdjax.types.json_text import json_text, plain_data
from pdjax.types.request import SLO
from pdjax.types.worker import Role, WorkerSpec

_MOST_RETURNS = 8  # that are told a line each


@dataclasses.dataclass(frozen=True)
class Report:
  """One run in figures; make it with `from_events`.

  Latencies and tokens are those of completed requests (finish reason `stop` or `length`); all others count as
  failed, and `finish_reasons` tells them apart.

  Attributes:
    date: The time the report was made.
    backend: The backend: the engine or the simulator.
    model_id: The model.
    tokenizer_id: Its tokenizer, if any.
    num_prompts: Requests that arrived, each sample of one counted.
    request_rate: Requests per second that the workload asked for; infinite if all came at once.
    burstiness: Shape of the arrival gaps; 1 is a Poisson process.
    max_concurrency: Most requests in flight that the workload allowed, if it did.
    duration_s: From the first arrival to the last token or end of a request.
    completed: Requests that got all that they asked for.
    failed: The others.
    total_input_tokens: Prompt tokens, those of several samples counted once.
    total_output_tokens: Tokens delivered.
    request_throughput: Completed requests per second.
    request_goodput: Completed requests per second that met every latency limit; None without limits.
    goodput_share: Those requests as a share of all that arrived; None without limits.
    deadline_share: Requests that had ended well by their deadline, as a share of those that have one; None without.
    by_class: The figures of each class, `''` for requests without one; empty where no request has one.
    by_tenant: The same by tenant.
    output_throughput: Delivered tokens per second.
    total_token_throughput: Prompt and delivered tokens per second.
    max_output_tokens_per_s: Most deltas of answers in one second from the first arrival; `to_json` says why deltas.
    max_concurrent_requests: Most requests that were there during one such second.
    ttft: Time to first token.
    tpot: Time per output token after the first.
    itl: Inter-token latency: the gaps between the deltas of an answer, the tokens of one time being one delta.
    e2el: End-to-end latency.
    handoff: From first to second token, what disaggregation costs.
    account: The parts of TTFT and hand-off.
    host_lag: From an order's end until the loop took notice.
    utilisation: One entry per worker.
    wire_bytes: Bytes that transfers put onto target devices.
    num_transfers: Transfers that ended well.
    transfers: The time they took, and the part of it that was hidden.
    copies: The cached blocks that were copied from place to place, by way; `wire_bytes` and `transfers` are without
      them.
    wasted_tokens: Tokens computed and thrown away.
    cached_tokens: Tokens of prompts that were cached, and so not computed.
    caches: Whether there was a prefix cache.
    begun_tokens: Prompt tokens of requests that were begun, served or not.
    prefix_hits: Those of them that were found, by side (not computed: 'prefill', not sent: 'decode') and place.
    num_preemptions: Times that a request was preempted.
    recomputed_tokens: Cached tokens that were to be computed anew for that.
    role_changes: Each time that a worker took another role, in order.
    returns: Each return of a lost worker, with the parts of the time it took.
    finish_reasons: The number of requests by how they ended; `unfinished` if the log stops before.
    bill: The chips of the cluster, and what its answers cost as far as that is known.
    slo: The run's latency limits, if any.
    warmup_s: Seconds of loading and compiling before the clock ran, if known.
    calibrated: Whether the times are measured, or predicted from measurements of this machine.
    seed: The seed of the run's random numbers, if known.
    notes: Sentences to know before comparing.
    config: The run's configuration.
    environment: Versions, devices and commit.
    generated_texts: The text of each request's answer, by its id.
    timeline: The times of every request and worker.
    workers: The cluster.
    places: The places that only hold pages.
  """

  date: str
  backend: str
  model_id: str
  tokenizer_id: str | None
  num_prompts: int
  request_rate: float
  burstiness: float | None
  max_concurrency: int | None
  duration_s: float
  completed: int
  failed: int
  total_input_tokens: int
  total_output_tokens: int
  request_throughput: float | None
  request_goodput: float | None
  goodput_share: float | None
  deadline_share: float | None
  by_class: Mapping[str, GroupFigures]
  by_tenant: Mapping[str, GroupFigures]
  output_throughput: float | None
  total_token_throughput: float | None
  max_output_tokens_per_s: float
  max_concurrent_requests: int
  ttft: Stats
  tpot: Stats
  itl: Stats
  e2el: Stats
  handoff: Stats
  account: Account
  host_lag: Stats
  utilisation: tuple[Utilisation, ...]
  wire_bytes: int
  num_transfers: int
  transfers: TransferFigures
  copies: tuple[CopiedBlocks, ...]
  wasted_tokens: int
  cached_tokens: int
  caches: bool
  begun_tokens: int
  prefix_hits: Mapping[HitSide, Mapping[str, int]]
  num_preemptions: int
  recomputed_tokens: int
  role_changes: tuple[RoleChanged, ...]
  returns: tuple[WorkerReturn, ...]
  finish_reasons: Mapping[str, int]
  slo: SLO | None
  warmup_s: float | None
  calibrated: bool
  seed: int | None
  notes: tuple[str, ...]
  config: Mapping[str, Any] = dataclasses.field(repr=False)
  environment: Mapping[str, Any] = dataclasses.field(repr=False)
  generated_texts: Mapping[str, str] = dataclasses.field(repr=False)
  timeline: Timeline = dataclasses.field(repr=False)
  workers: tuple[WorkerSpec, ...] = dataclasses.field(repr=False)
  places: tuple[WorkerSpec, ...] = dataclasses.field(default=(), repr=False)
  bill: Bill = Bill()

  @classmethod
  def from_events(
    cls,
    events: Iterable[Event] | Timeline,
    *,
    workers: Sequence[WorkerSpec],
    places: Sequence[WorkerSpec] = (),
    chips: Chips = Chips(),
    slo: SLO | None = None,
    notes: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    seed: int | None = None,
    request_rate: float = math.inf,
    burstiness: float | None = None,
    max_concurrency: int | None = None,
    model_id: str = '',
    tokenizer_id: str | None = None,
    backend: str = '',
    warmup_s: float | None = None,
    calibrated: bool = True,
    generated_texts: Mapping[str, str] | None = None,
    date: str | None = None,
  ) -> 'Report':
    """Make the report of a run out of its log.

    Args:
      events: The log, or the timeline of one that was followed as it came.
      workers: The cluster; each gets a line of utilisation.
      places: The places that only hold pages.
      chips: The chips of the workers, as far as they are known.
      slo: Latency limits of every request that has none of its own; a request's own replace these altogether.
      notes: Sentences for the reader. Shared devices, uncalibrated times, failed requests and workers
        that did not come back are noted anyway.
      config: The run's configuration, kept as it is.
      environment: Versions, devices and commit, kept as they are.
      seed: The seed of the run's random numbers.
      request_rate: Requests per second that the workload asked for.
      burstiness: Shape of its arrival gaps; 1 is a Poisson process.
      max_concurrency: Most requests in flight that it allowed.
      model_id: The model.
      tokenizer_id: Its tokenizer.
      backend: The name of the backend.
      warmup_s: Seconds of loading and compiling before the clock ran.
      calibrated: False if times were predicted from anything but measurements of this machine.
      generated_texts: The text of each request's answer, by its id.
      date: The time it is made, by default now.
    """
    timeline = events if isinstance(events, Timeline) else read_timeline(events)
    requests = timeline.requests
    done = int(requests.completed.sum())
    duration_s = timeline.duration_s
    input_tokens, output_tokens = _input_tokens(requests), int(requests.rows['num_tokens'][requests.completed].sum())
    good = _num_good(requests, slo)
    most_pieces, most_requests = _peaks(requests)
    finish_reasons = requests.finish_reasons()
    return cls(
      date=date or datetime.datetime.now().strftime('%Y%m%d-%H%M%S'),
      backend=backend,
      model_id=model_id,
      tokenizer_id=tokenizer_id,
      num_prompts=len(requests),
      request_rate=request_rate,
      burstiness=burstiness,
      max_concurrency=max_concurrency,
      duration_s=duration_s,
      completed=done,
      failed=len(requests) - done,
      total_input_tokens=input_tokens,
      total_output_tokens=output_tokens,
      request_throughput=ratio(done, duration_s),
      request_goodput=None if good is None else ratio(good, duration_s),
      goodput_share=None if good is None else ratio(good, len(requests)),
      deadline_share=deadline_share(requests),
      by_class=by_class(requests, slo, duration_s),
      by_tenant=by_tenant(requests, slo, duration_s),
      output_throughput=ratio(output_tokens, duration_s),
      total_token_throughput=ratio(input_tokens + output_tokens, duration_s),
      max_output_tokens_per_s=most_pieces,
      max_concurrent_requests=most_requests,
      ttft=requests.distribution('ttft').stats,
      tpot=requests.distribution('tpot').stats,
      itl=requests.distribution('itl').stats,
      e2el=requests.distribution('e2el').stats,
      handoff=requests.distribution('handoff').stats,
      account=Account.of(requests),
      host_lag=Stats.of_seconds(timeline.host_lags_s),
      utilisation=tuple(Utilisation.of(worker, timeline) for worker in workers),
      wire_bytes=int(requests.rows['wire_bytes'].sum()),
      num_transfers=int(requests.rows['num_transfers'].sum()),
      transfers=TransferFigures.of(timeline),
      copies=copied_blocks(timeline.spans),
      wasted_tokens=timeline.wasted_tokens,
      cached_tokens=timeline.cached_tokens,
      caches=timeline.caches or bool(timeline.hits) or bool((config or {}).get('prefix_cache')),
      begun_tokens=requests.begun_tokens,
      prefix_hits=timeline.hits.tokens(),
      num_preemptions=len(timeline.preemptions),
      recomputed_tokens=sum(one.tokens for one in timeline.preemptions),
      role_changes=timeline.role_changes,
      returns=timeline.returns,
      finish_reasons=finish_reasons,
      slo=slo,
      warmup_s=warmup_s,
      calibrated=calibrated,
      seed=seed,
      notes=tuple(dict.fromkeys((*notes, *own_notes(workers, calibrated, finish_reasons, timeline)))),
      config=dict(config or {}),
      environment=dict(environment or {}),
      generated_texts=dict(generated_texts or {}),
      timeline=timeline,
      workers=tuple(workers),
      places=tuple(places),
      bill=Bill.of(chips, output_tokens, None if good is None else ratio(good, duration_s), duration_s),
    )

  @property
  def all_places(self) -> tuple[WorkerSpec, ...]:
    """The workers, and behind them the places that only hold pages."""
    return (*self.workers, *self.places)

  @property
  def split(self) -> str:
    """The cluster in shorthand, such as '2P1D', as the run began."""
    return split_name(self.workers)

  @property
  def last_split(self) -> str:
    """As `split`, by the roles that the workers had at the end."""
    return split_name([dataclasses.replace(one, role=self.timeline.role(one)) for one in self.workers])

  def ttft_account(self) -> str:
    """The parts of TTFT, in a line."""
    parts = {'queue': self.account.queue_ms, 'prefill': self.account.prefill_ms}
    return sum_line('TTFT', self.ttft.mean_ms, parts)

  def handoff_account(self) -> str:
    """The parts of the hand-off, in a line."""
    account = self.account
    parts = {'wait': account.wait_ms, 'wire': account.wire_ms, 'admit': account.admit_ms, 'step': account.step_ms}
    colocated = not self.role_changes and all(worker.role is Role.BOTH for worker in self.workers)
    moved = ' (colocated: no pages move)' if colocated else ''
    return sum_line('hand-off', self.handoff.mean_ms, parts) + moved

  def hit_tokens(self, side: HitSide) -> int:
    """Tokens of `prefix_hits` on one side."""
    return sum(self.prefix_hits.get(side, {}).values())

  def hits_account(self) -> str:
    """The gain of the prefix cache, in a line."""
    if not self.prefix_hits:
      return 'the prefix cache was on, and nothing was found in it'
    where = {'prefill': 'as they were prefilled', 'decode': 'where they decoded'}
    fetched = [
      f'{percent(ratio(count, self.begun_tokens))} at {place}' for place, count in self.fetched_tokens().items()
    ]
    where['prefill'] += f' ({", ".join(fetched)})' if fetched else ''
    parts = [f'{percent(ratio(self.hit_tokens(side), self.begun_tokens))} {where[side]}' for side in self.prefix_hits]
    cached = ' and '.join(parts).replace('%', '% were cached', 1)
    return f'of {self.begun_tokens:,} prompt tokens asked for, {cached}'

  def fetched_tokens(self) -> dict[str, int]:
    """Prompt tokens that were found at each place that only holds pages, of those where any were."""
    found = self.prefix_hits.get('prefill', {})
    return {place.name: found[place.name] for place in self.places if place.name in found}

  def return_lines(self) -> list[str]:
    """The returns of lost workers with the time they took, in a line each; of many, the first."""
    more = len(self.returns) - _MOST_RETURNS
    lines = [str(one) for one in self.returns[:_MOST_RETURNS]]
    return [*lines, f'{more:,} other returns; report.json has them all'] if more > 0 else lines

  def to_json(self) -> dict[str, Any]:
    """The report as plain dicts, lists and finite numbers.

    Where a key is one of `vllm bench serve --save-result` (0.33.0), so are its unit and its formula, and its tools
    read the file; lists have an entry per request in the order of arrival. It measures a stream by its chunks, which
    are deltas here: the tokens that a request got at one time, with or without text. So `itls` and the ITL are gaps
    between deltas, and `max_output_tokens_per_s` counts deltas, while TPOT divides by tokens. An answer of one token
    has no TPOT and keeps every limit on it. `std` divides by the count, percentiles interpolate linearly, and peaks
    are of whole seconds from the first arrival of those that completed: whoever was there for any of one counts.

    By nature these differ:

    * Times are seconds after the start of the run, `duration` begins with the first arrival, and no network is in
      them; there they are a client's, whose clock starts before the first request is due.
    * Each of the `n` samples of a prompt is a request with a row of its own, and only `total_input_tokens` counts
      their prompt once; there they are one request, whose chunks take turns.
    * Who was cancelled, rejected or not finished has failed. A failed request's row has 0 output tokens and what else
      there was of it: its prompt, TTFT (0 without a first token), gaps and, other than there, text.
    * A request's own limits replace the run's in `request_goodput`.
    * None stands for a figure of nothing, where 0 is written there.

    Beyond these keys come the hand-off like any other latency, `account`, `utilisation` and what else the attributes
    name. An infinite rate is `'Infinity'`, as in every JSON file here, where vLLM writes `'inf'`.
    """
    requests, rows = self.timeline.requests, self.timeline.requests.rows
    figures: dict[str, Any] = {
      'date': self.date,
      'backend': self.backend,
      'model_id': self.model_id,
      'tokenizer_id': self.tokenizer_id,
      'num_prompts': self.num_prompts,
      'request_rate': self.request_rate,
      'burstiness': self.burstiness,
      'max_concurrency': self.max_concurrency,
      'duration': self.duration_s,
      'completed': self.completed,
      'failed': self.failed,
      'total_input_tokens': self.total_input_tokens,
      'total_output_tokens': self.total_output_tokens,
      'request_throughput': self.request_throughput,
      'request_goodput': self.request_goodput,
      'output_throughput': self.output_throughput,
      'total_token_throughput': self.total_token_throughput,
      'max_output_tokens_per_s': self.max_output_tokens_per_s,
      'max_concurrent_requests': self.max_concurrent_requests,
    }
    for name in ('ttft', 'tpot', 'itl', 'e2el', 'handoff', 'host_lag'):
      for field, value in dataclasses.asdict(getattr(self, name)).items():
        figures[f'{field.removesuffix("_ms")}_{name}_ms'] = value
    figures |= {
      'account': {
        **{part: getattr(self.account, f'{part}_ms') for part in ('queue', 'prefill', 'wait', 'wire', 'admit', 'step')},
        'ttft_closes': self.account.ttft_closes_s,
        'handoff_closes': self.account.handoff_closes_s,
      },
      'utilisation': {use.worker: _without(dataclasses.asdict(use), 'worker') for use in self.utilisation},
      **self.bill.to_json(),
      'wire_bytes': self.wire_bytes,
      'num_transfers': self.num_transfers,
      'transfers': {**dataclasses.asdict(self.transfers), 'overlap_share': self.transfers.overlap_share},
      'copies': [dataclasses.asdict(one) for one in self.copies],
      'wasted_tokens': self.wasted_tokens,
      'cached_tokens': self.cached_tokens,
      'begun_tokens': self.begun_tokens,
      'prefix_hits': self.prefix_hits if self.caches else None,
      'num_preemptions': self.num_preemptions,
      'recomputed_tokens': self.recomputed_tokens,
      'role_changes': [_role_change(one) for one in self.role_changes],
      'returns': [one.to_json() for one in self.returns],
      'goodput_share': self.goodput_share,
      'deadline_share': self.deadline_share,
      'by_class': {name: group.to_json() for name, group in self.by_class.items()},
      'by_tenant': {name: group.to_json() for name, group in self.by_tenant.items()},
      'finish_reasons': self.finish_reasons,
      'slo': self.slo,
      'warmup_s': self.warmup_s,
      'calibrated': self.calibrated,
      'seed': self.seed,
      'notes': self.notes,
      'environment': self.environment,
      'config': self.config,
      'input_lens': rows['prompt_len'].tolist(),
      'output_lens': np.where(requests.completed, rows['num_tokens'], 0).tolist(),
      'start_times': rows['arrival_s'].tolist(),
      'ttfts': np.nan_to_num(requests.ttft_s).tolist(),
      'itls': requests.all_itls_s(),
      'generated_texts': [self.generated_texts.get(name, '') for name in requests.ids],
      'errors': requests.reasons_of_failure(),
    }
    return plain_data(figures)

  def save(self, path: str | os.PathLike) -> pathlib.Path:
    """Write `to_json()` to a file, one figure a line, and return its path.

    Args:
      path: A file that ends in `.json`, or a folder, which gets a `report.json`; missing folders are made.
    """
    path = pathlib.Path(path)
    if path.suffix != '.json':
      path = path / 'report.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f'  {json_text(name)}: {json_text(value)}' for name, value in self.to_json().items())
    path.write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='utf-8')
    return path

  def __str__(self) -> str:
    lines = [
      f'{self.completed} of {self.num_prompts} requests completed in {number(self.duration_s, 2)} s'
      + (f' ({self.backend})' if self.backend else ''),
      f'throughput {number(self.request_throughput, 2)} requests/s, {number(self.output_throughput, 2)} output tokens/s'
      + ('' if self.request_goodput is None else f'; goodput {number(self.request_goodput, 2)} requests/s'),
    ]
    latencies = (('TTFT', self.ttft), ('hand-off', self.handoff), ('TPOT', self.tpot), ('E2E', self.e2el))
    lines.append('p50/p99 ms: ' + ', '.join(f'{name} {number(s.p50_ms)}/{number(s.p99_ms)}' for name, s in latencies))
    lines += [self.ttft_account(), self.handoff_account()]
    if bill := self.bill.line():
      lines.append(bill)
    if self.cached_tokens:
      lines.append(f'{self.cached_tokens:,} of {self.total_input_tokens:,} input tokens were cached')
    if self.caches and not self.prefix_hits:
      lines.append(self.hits_account())
    return '\n'.join([*lines, *self.return_lines(), *(f'note: {note}' for note in self.notes)])


def _input_tokens(requests: RequestRows) -> int:
  """Prompt tokens of those that completed, those of several samples counted once."""
  done = requests.rows[requests.completed]
  if (done['sample_of'] == NOBODY).all():
    return int(done['prompt_len'].sum())
  return sum({one.sample_of or one.id: one.prompt_len for one in requests if one.completed}.values())


def _num_good(requests: RequestRows, slo: SLO | None) -> int | None:
  if slo is None and (requests.rows['slo'] == NOBODY).all():
    return None
  return int(requests.meets(slo).sum())


def _peaks(requests: RequestRows) -> tuple[float, int]:
  """Most deltas in one second and most requests present during one, in whole seconds from the first arrival."""
  which = np.flatnonzero(requests.completed & (requests.rows['num_tokens'] > 0))
  if not len(which):
    return 0.0, 0
  done = requests.rows[which]
  start_s = done['arrival_s'].min()
  begins, ends = np.floor(done['arrival_s'] - start_s), np.floor(done['last_s'] - start_s)
  # Only seconds in which something changes: a run may have arrivals years apart.
  seconds, place = np.unique(np.concatenate([begins, ends + 1]), return_inverse=True)
  changes = np.bincount(place[: len(done)], minlength=len(seconds)) - np.bincount(
    place[len(done) :], minlength=len(seconds)
  )
  deltas, counts = np.empty(0), np.empty(0, np.int64)
  for times_s, _ in requests.delta_times_s(which):
    found, more = np.unique(np.floor(times_s - start_s), return_counts=True)
    deltas, place = np.unique(np.concatenate([deltas, found]), return_inverse=True)
    counts = np.bincount(place, np.concatenate([counts, more]), len(deltas)).astype(np.int64)
  return float(counts.max()), int(np.cumsum(changes).max())


def _role_change(change: RoleChanged) -> dict[str, Any]:
  drained_s = change.now_s - change.asked_s
  return {'worker': change.worker, 'at': change.now_s, 'drained': drained_s, 'from': change.before, 'to': change.role}


def _without(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
  return {name: value for name, value in mapping.items() if name != key}
