"""Disaggregated against colocated: the same workload on the same devices, over rates, splits, divisions and budgets."""

import dataclasses
import functools
import gc
import json
import math
import os
import pathlib
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from pdjax import launch
from pdjax.config import ServingConfig
from pdjax.metrics import Beside, OverRate, Report, Timeline, charts, draw
from pdjax.metrics.event_log import EventLog
from pdjax.metrics.wording import number, percent, short
from pdjax.policies import Colocated, Disaggregated
from pdjax.serving.loop import Arrivals, serve
from pdjax.serving.messages import Event
from pdjax.types.cluster import (
  Role,
  WorkerSpec,
  carve_devices,
  colocated_pool,
  decode_pool,
  devices_needed,
  parse_split,
  prefill_pool,
)
from pdjax.types.model import ModelSpec, mesh_shape
from pdjax.types.request import SLO
from pdjax.workload import Workload, WorkloadContext

if TYPE_CHECKING:
  import altair as alt

BackendName = Literal['engine', 'simulator']

_RESAMPLES = 200  # of the requests, to tell a difference from chance
_CONFIDENCE = 0.95
_WRAP = 110  # columns of printed sentences
_NEGLIGIBLE = 0.01  # of the larger figure: less than that is no difference, however sure


# ---------------------------------------------------------------------------- what is compared


@dataclasses.dataclass(frozen=True)
class System:
  """One way to use the devices.

  Attributes:
    name: What it is called in tables and charts.
    config: The run.
    colocated: Whether it is one of the baseline's.
    devices: How many devices it takes.
  """

  name: str
  config: ServingConfig
  colocated: bool
  devices: int


def with_split(config: ServingConfig, split: str) -> ServingConfig:
  """The config with another number of workers of either role, such as '2P1D'.

  Every prefill worker is like the config's first that prefills, every decode worker like its first that decodes, so the
  split takes as many devices as their meshes add up to. Of workers with devices of their own choosing only those that
  all share the same ones can be multiplied.

  Raises:
    ValueError: if the split is malformed, or the workers name different devices.
  """
  num_prefill, num_decode = parse_split(split)
  places = {worker.devices for worker in config.workers}
  if len(places) > 1:
    raise ValueError(
      f'split {split!r} cannot be made of workers that name different devices; leave `devices` out of the workers.'
    )
  pools = []
  for make, count, has in ((prefill_pool, num_prefill, 'prefills'), (decode_pool, num_decode, 'decodes')):
    like = next(worker for worker in config.workers if getattr(worker.role, has))
    pools.append(make(count, **_sizes(like)))
  policy = Disaggregated() if isinstance(config.policy, Colocated) else config.policy
  return dataclasses.replace(config, workers=pools[0] + pools[1], policy=policy)


def colocated_systems(
  config: ServingConfig, model: ModelSpec, budgets: Sequence[int] | None = None
) -> tuple[list[System], dict[str, str]]:
  """The colocated baseline on a config's devices: every equal division of them, with each chunk budget.

  A division has `n / tp` workers of `tp` devices for every `tp` that divides the `n` devices and is legal for the
  model. The KV memory of the config is divided among them ('auto' stays 'auto'). Each takes passes as large as the
  config's workers do, and at least its share of their decode slots, so that the baseline lacks nothing.

  Args:
    config: A disaggregated run.
    model: The model as it is served.
    budgets: Tokens of one pass to try; None tries the largest pass, a half, a quarter and an eighth of it.

  Returns:
    The systems, and why each division that is missing cannot be.

  Raises:
    ValueError: if a budget is not positive.
  """
  used = sorted(_devices(config))
  named = any(worker.devices is not None for worker in config.workers)
  prefills = [worker for worker in config.workers if worker.role.prefills]
  decodes = [worker for worker in config.workers if worker.role.decodes]
  largest_pass = max(worker.max_step_tokens for worker in prefills)
  slots = sum(worker.max_sequences for worker in decodes)
  if budgets is None:
    budgets = sorted({max(largest_pass // part, 1) for part in (8, 4, 2, 1)})
  for budget in budgets:
    if budget < 1:
      raise ValueError(f'token budget {budget} of the colocated baseline is not positive; give at least 1.')
  fused = min(worker.max_fused_steps for worker in decodes)
  decode_steps = min(getattr(config.policy, 'decode_steps', 1), fused)
  systems, missing = [], {}
  for count in range(1, len(used) + 1):
    if len(used) % count:
      continue
    tp = len(used) // count
    name = f'{count}C tp{tp}'
    try:
      mesh_shape(model, tp)
      num_pages = _equal_pages(config, model, count, tp)
    except ValueError as error:
      missing[name] = str(error)
      continue
    workers = colocated_pool(
      count, tp=tp, num_pages=num_pages,
      max_sequences=max(-(-slots // count), *(worker.max_sequences for worker in decodes)),
      max_step_tokens=largest_pass, max_chunks=max(worker.max_chunks for worker in prefills), max_fused_steps=fused,
    )  # fmt: skip
    if named:
      workers = tuple(
        dataclasses.replace(worker, devices=tuple(used[i * tp : (i + 1) * tp])) for i, worker in enumerate(workers)
      )
    for budget in budgets:
      policy = Colocated(token_budget=budget, decode_steps=decode_steps)
      here = dataclasses.replace(config, workers=workers, policy=policy)
      systems.append(System(f'{name}, {budget} tokens', here, True, len(used)))
  return systems, missing


def at_rate(workload: Workload, rate: float) -> Workload:
  """The same requests at another rate.

  Raises:
    ValueError: if the rate is not positive, or the workload has none.
  """
  if not (rate > 0 and math.isfinite(rate)):
    raise ValueError(f'rate {rate:g} is not a positive number of requests per second; give e.g. --rates=1,2,4.')
  plain: Any = workload
  if not dataclasses.is_dataclass(plain) or not any(one.name == 'requests_per_s' for one in dataclasses.fields(plain)):
    raise ValueError(
      f'the requests of a {type(workload).__name__} workload come at times of their own, so no rate can be set; leave '
      'the rates out, or use Poisson, Bursty or Constant arrivals.'
    )
  again: Any = dataclasses.replace(plain, requests_per_s=float(rate))  # type: ignore[type-var]
  return again


def _sizes(worker: WorkerSpec) -> dict[str, Any]:
  return {field.name: getattr(worker, field.name) for field in dataclasses.fields(worker) if field.name not in _WHO}


_WHO = ('name', 'role')


def _equal_pages(config: ServingConfig, model: ModelSpec, count: int, tp: int) -> int | Literal['auto']:
  """Pages of each of `count` workers, so that together they have the bytes of the config's pools."""
  pages = [worker.num_pages for worker in config.workers]
  if 'auto' in pages:
    return 'auto'

  def copies(tp: int) -> float:  # devices over which a page lies, each with its share of the heads
    return tp / mesh_shape(model, tp)[0]

  whole = sum(int(worker.num_pages) * copies(worker.tp) for worker in config.workers)
  each = int(whole / (count * copies(tp)))
  if each < 1:
    raise ValueError(f'the {whole:g} pages of the config leave none for each of {count} workers.')
  return each


# ---------------------------------------------------------------------------- what came of it


@dataclasses.dataclass(frozen=True)
class Outcomes:
  """What each request of a run got, in the order of arrival: seconds `[R]`, NaN where there were none."""

  ttft_s: np.ndarray
  tpot_s: np.ndarray
  e2el_s: np.ndarray
  good: np.ndarray  # within all limits; without limits, completed

  @classmethod
  def of(cls, report: Report) -> 'Outcomes':
    done = [request if request.completed else None for request in report.timeline.requests]

    def seconds(field: str) -> np.ndarray:
      values = [None if request is None else getattr(request, field) for request in done]
      return np.array([math.nan if value is None else value for value in values], np.float64)

    good = [request is not None and request.meets(request.slo or report.slo or SLO()) for request in done]
    return cls(seconds('ttft_s'), seconds('tpot_s'), seconds('e2el_s'), np.array(good, np.float64))


@dataclasses.dataclass(frozen=True)
class Case:
  """One system at one rate.

  Attributes:
    system: Its name.
    colocated: Whether it is one of the baseline's.
    devices: How many devices it took.
    rate: Requests per second.
    report: Every figure; with times of single requests only for the cases that a page shows.
    outcomes: What each request got.
  """

  system: str
  colocated: bool
  devices: int
  rate: float
  report: Report = dataclasses.field(repr=False)
  outcomes: Outcomes = dataclasses.field(repr=False)

  @property
  def merit(self) -> tuple[float, float]:
    """What the best is chosen by: most requests within their limits, then the lowest mean end-to-end latency."""
    mean_s = np.nanmean(self.outcomes.e2el_s) if np.isfinite(self.outcomes.e2el_s).any() else math.inf
    return float(self.outcomes.good.sum()), -float(mean_s)


@dataclasses.dataclass(frozen=True)
class Contest:
  """One figure of two systems; `winner` is the name of the better one, None where chance could have decided.

  The requests are drawn anew, with replacement, the same for both (a paired bootstrap; Efron and Tibshirani 1993): a
  system wins if at least 95 % of the draws say so and the figures differ by more than 1 %.
  """

  figure: str
  unit: str
  ours: float | None
  theirs: float | None
  winner: str | None

  def __str__(self) -> str:
    better_first = sorted((self.ours or 0.0, self.theirs or 0.0), reverse=not self.unit)
    return f'{self.figure} ({" against ".join(map(self._text, better_first))}{self.unit and f" {self.unit}"})'

  def _text(self, value: float | None) -> str:
    if value is None:
      return '-'
    return short(value) if self.unit == 'ms' else percent(value) if not self.unit else number(value, 2)


def contests(ours: Case, theirs: Case) -> tuple[Contest, ...]:
  """Who is better in what, among two systems that served the same requests."""
  rng = np.random.default_rng(0)
  count = len(ours.outcomes.good)
  draws = rng.integers(0, count, (_RESAMPLES, count))
  limited = ours.report.request_goodput is not None
  results = [
    _contest('share within limits' if limited else 'share completed', '', 'good', _mean, 1.0, ours, theirs, draws)
  ]
  for name, field in (('TTFT', 'ttft_s'), ('TPOT', 'tpot_s')):
    for percentile in (50, 99):
      measure = _percentile(percentile)
      results.append(_contest(f'{name} p{percentile}', 'ms', field, measure, -1e3, ours, theirs, draws))
  results.append(_contest('mean E2E', 'ms', 'e2el_s', _mean, -1e3, ours, theirs, draws))
  return tuple(results)


def _contest(
  figure: str,
  unit: str,
  field: str,
  measure: Callable[[np.ndarray], np.ndarray],
  factor: float,
  ours: Case,
  theirs: Case,
  draws: np.ndarray,
) -> Contest:
  """A contest over one field of the outcomes; a negative factor says that less is better."""
  pair = np.stack([getattr(ours.outcomes, field), getattr(theirs.outcomes, field)])  # [2, R]
  if not np.isfinite(pair).any(axis=1).all():
    return Contest(figure, unit, None, None, None)
  seen = pair.copy()
  seen[:, ~np.isfinite(pair).all(axis=0)] = math.nan  # only requests that both served
  a, b = (float(measure(row[None, :])[0]) * abs(factor) for row in pair)
  winner = None
  if np.isfinite(seen).any() and abs(a - b) > _NEGLIGIBLE * max(abs(a), abs(b)):
    with np.errstate(all='ignore'):
      gains = (measure(seen[0][draws]) - measure(seen[1][draws])) * math.copysign(1.0, factor)
    gains = gains[np.isfinite(gains)]
    ahead = ours if (a - b) * factor > 0 else theirs
    agree = np.mean(gains > 0 if ahead is ours else gains < 0) if len(gains) else 0.0
    winner = ahead.system if agree >= _CONFIDENCE else None
  return Contest(figure, unit, a, b, winner)


def _mean(values: np.ndarray) -> np.ndarray:
  return np.nanmean(values, axis=1)


def _percentile(percent: float) -> Callable[[np.ndarray], np.ndarray]:
  def measure(values: np.ndarray) -> np.ndarray:
    values = values[:, np.isfinite(values).any(axis=0)] if len(values) == 1 else values
    if np.isfinite(values).all():  # many times as fast as with gaps
      return np.percentile(values, percent, axis=1)
    return np.nanpercentile(values, percent, axis=1)

  return measure


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Every case that was tried, and who wins where.

  Attributes:
    backend: What ran them.
    cases: All of them, in the order in which they ran.
    shown_rate: The rate whose two best cases a page shows in full: the config's own, or the one next to it.
    missing: Divisions of the devices that cannot be, with the reason.
  """

  backend: BackendName
  cases: tuple[Case, ...]
  shown_rate: float
  missing: dict[str, str]

  @property
  def rates(self) -> tuple[float, ...]:
    """Requests per second, ascending."""
    return tuple(sorted({case.rate for case in self.cases}))

  def best(self, rate: float, *, colocated: bool, devices: int | None = None) -> Case:
    """The best case of a side at a rate: most requests within their limits, then the lowest mean E2E."""
    able = [
      case
      for case in self.cases
      if case.rate == rate and case.colocated is colocated and devices in (None, case.devices)
    ]
    return max(able, key=lambda case: case.merit)

  def pair(self, rate: float) -> tuple[Case, Case]:
    """The best disaggregated case at a rate, and the best colocated one on as many devices."""
    ours = self.best(rate, colocated=False)
    return ours, self.best(rate, colocated=True, devices=ours.devices)

  @functools.cached_property
  def contests(self) -> dict[float, tuple[Contest, ...]]:
    """Who is better in what at each rate, among the two best."""
    return {rate: contests(*self.pair(rate)) for rate in self.rates}

  def verdict(self) -> list[str]:
    """Who wins where, in sentences made of the figures."""
    ours, theirs = self.pair(self.shown_rate)
    lines = [_at_one_rate(ours, theirs, self.contests[self.shown_rate])]
    if len(self.rates) > 1:
      lines += _over_rates(self)
    tried = [case for case in self.cases if case.colocated and case.rate == self.shown_rate]
    limited = theirs.report.request_goodput is not None
    lines.append(
      f'The colocated baseline is {theirs.system}, the best of {len(tried)} divisions and budgets tried '
      f'({"most requests within their limits" if limited else "most requests completed"}, then the lowest mean E2E).'
    )
    noise = 'each system ran once, so what the machine itself varies by is not in it'
    if self.backend == 'simulator':
      noise = 'every figure is an estimate of the simulator'
    lines.append(
      f'A side is ahead where {_CONFIDENCE:.0%} of resampled sets of the {len(ours.outcomes.good):,} requests agree '
      f'and the figures differ by more than {_NEGLIGIBLE:.0%}; {noise}.'
    )
    return lines

  def __str__(self) -> str:
    return '\n'.join(textwrap.fill(line, _WRAP) for line in self.verdict())

  def to_json(self) -> dict[str, Any]:
    """All figures as plain data: cases, contests at every rate, the verdict."""
    return {
      'backend': self.backend,
      'rates': [_plain(rate) for rate in self.rates],
      'shown_rate': _plain(self.shown_rate),
      'verdict': self.verdict(),
      'contests': {f'{rate:g}': [dataclasses.asdict(one) for one in self.contests[rate]] for rate in self.rates},
      'best': {f'{rate:g}': [case.system for case in self.pair(rate)] for rate in self.rates},
      'missing': self.missing,
      'cases': [_case_json(case) for case in self.cases],
    }

  def save(self, folder: str | os.PathLike) -> None:
    """Write `compare.json`, and the `report.html`, `report.json` and `trace.json` of the two runs shown.

    Those of the baseline go into a folder `colocated`; the page of the disaggregated run has both.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(self.to_json(), indent=1, allow_nan=False)
    (folder / 'compare.json').write_text(text + '\n', encoding='utf-8')
    ours, theirs = self.pair(self.shown_rate)
    for case, place in zip((ours, theirs), _places(folder), strict=True):
      case.report.save(place)
    draw(ours.report, folder, self.beside())
    draw(theirs.report, _places(folder)[1])

  def chart(self) -> 'alt.ConcatChart':
    """The comparison in one picture: figures over the rate, or at a single rate the latencies of the two runs shown."""
    if len(self.rates) > 1:
      parts = [
        charts.over_rate(one.curves, one.title, one.unit, baseline='colocated', log=one.log) for one in self._curves()
      ]
    else:
      pair = self.pair(self.shown_rate)
      reports, names = [case.report for case in pair], [case.system for case in pair]
      parts = [charts.latency(*reports, metric=metric, names=names) for metric in ('ttft', 'handoff', 'tpot', 'e2el')]
    return charts.side_by_side(*parts)

  def beside(self) -> Beside:
    """What the page of the disaggregated run shows beside it."""
    ours, theirs = self.pair(self.shown_rate)
    curves = self._curves() if len(self.rates) > 1 else ()
    return Beside(
      theirs.report,
      theirs.system,
      verdict=self.verdict(),
      over_rate=curves,
      baseline_curve='colocated' if curves else None,
      head=HEAD,
      rows=[_cells(case) for case in self.cases],
      best=frozenset(row for row, case in enumerate(self.cases) if case is ours or case is theirs),
    )

  def _curves(self) -> tuple[OverRate, ...]:
    groups: dict[str, list[Case]] = {}
    for case in self.cases:
      if not case.colocated:
        groups.setdefault(case.system, []).append(case)
    counts = sorted({case.devices for case in self.cases if case.colocated})
    for devices in counts:
      name = 'colocated' if devices == self.pair(self.shown_rate)[1].devices else f'colocated, {devices} devices'
      groups[name] = [self.best(rate, colocated=True, devices=devices) for rate in self.rates]

    def curve(title: str, unit: str, of: Callable[[Report], float | None], log: bool = False) -> OverRate:
      return OverRate(
        title, unit, {name: [(c.rate, of(c.report)) for c in cases] for name, cases in groups.items()}, log
      )

    limited = any(case.report.request_goodput is not None for case in self.cases)
    return (
      curve('Goodput', 'req/s within limits', lambda r: r.request_goodput)
      if limited
      else curve('Throughput', 'req/s', lambda r: r.request_throughput),
      curve('Time to first token, p99', 'ms', lambda r: r.ttft.p99_ms, log=True),
      curve('Time per output token, p99', 'ms', lambda r: r.tpot.p99_ms, log=True),
      curve('End-to-end latency, p99', 'ms', lambda r: r.e2el.p99_ms, log=True),
    )


HEAD = ('system', 'req/s', 'goodput', 'TTFT p99', 'TPOT p99', 'mean E2E')


def _cells(case: Case) -> tuple[str, ...]:
  """A row of the table of all cases, below `HEAD`."""
  report = case.report
  goodput = report.request_throughput if report.request_goodput is None else report.request_goodput
  figures = (report.ttft.p99_ms, report.tpot.p99_ms, report.e2el.mean_ms)
  return (case.system, f'{case.rate:.3g}', number(goodput, 2), *map(short, figures))


def _case_json(case: Case) -> dict[str, Any]:
  whole = case.report.to_json()
  kept = {name: value for name, value in whole.items() if not isinstance(value, list) and name not in _LONG}
  about = {'system': case.system, 'colocated': case.colocated, 'devices': case.devices, 'rate': _plain(case.rate)}
  policy = case.report.config.get('policy', {})
  return about | {'workers': whole['config'].get('workers', []), 'policy': policy} | kept


_LONG = ('config', 'environment', 'generated_texts')


def _at_one_rate(ours: Case, theirs: Case, results: Sequence[Contest]) -> str:
  wins = [str(one) for one in results if one.winner == ours.system]
  losses = [str(one) for one in results if one.winner == theirs.system]
  open_ = [one.figure for one in results if one.winner is None]
  rate = '' if math.isinf(ours.rate) else f'At {ours.rate:.3g} req/s, '
  place = f'on the same {ours.devices} device{"" if ours.devices == 1 else "s"}, '
  start = rate + place if rate else place[0].upper() + place[1:]
  if not wins and not losses:
    return (
      f'{start}{ours.system} and the best colocated system are alike: no figure differs by more than chance and 1 %.'
    )
  if wins and losses:
    said = f'{ours.system} wins on {_listed(wins)}, and the best colocated system on {_listed(losses)}'
  elif wins:
    said = f'{ours.system} wins on {_listed(wins)}; the best colocated system wins on nothing'
  else:
    said = f'the best colocated system wins on {_listed(losses)}; {ours.system} wins on nothing'
  return f'{start}{said}' + (f'. No clear difference in {_listed(open_)}.' if open_ else '.')


def _over_rates(comparison: Comparison) -> Iterator[str]:
  """For each figure, at which rates which side is ahead."""
  by_figure: dict[str, dict[str, list[str]]] = {}
  for rate in comparison.rates:
    ours, _ = comparison.pair(rate)
    for one in comparison.contests[rate]:
      side = 'neither' if one.winner is None else 'ours' if one.winner == ours.system else 'theirs'
      by_figure.setdefault(one.figure, {'ours': [], 'theirs': [], 'neither': []})[side].append(f'{rate:g}')
  for figure, sides in by_figure.items():
    parts = [
      f'{name} at {_listed(rates)}'
      for name, rates in (
        ('disaggregation is ahead', sides['ours']),
        ('colocation is ahead', sides['theirs']),
        ('no clear difference', sides['neither']),
      )
      if rates
    ]
    if sides['ours'] or sides['theirs']:
      yield f'{figure[0].upper()}{figure[1:]}: {"; ".join(parts)} req/s.'
  even = [figure for figure, sides in by_figure.items() if not sides['ours'] and not sides['theirs']]
  if even:
    yield f'No clear difference at any rate in {_listed(even)}.'


def _listed(items: Sequence[str]) -> str:
  return ' and '.join(filter(None, (', '.join(items[:-1]), items[-1])))


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
  """Print the two best of every rate and who wins where, by default to the terminal."""
  console = console or Console()
  table = Table(box=None, padding=(0, 1), header_style='bold cyan')
  for name in HEAD:
    table.add_column(name, justify='left' if name == HEAD[0] else 'right', no_wrap=True)
  for rate in comparison.rates:
    for case in comparison.pair(rate):
      table.add_row(*_cells(case))
  console.print(table)
  for line in comparison.verdict():
    console.print(f'• {line}', markup=False)


# ---------------------------------------------------------------------------- running it


def compare(
  config: ServingConfig,
  *,
  backend: BackendName = 'simulator',
  rates: Iterable[float] | None = None,
  splits: Iterable[str] | None = None,
  budgets: Sequence[int] | None = None,
  workdir: str | os.PathLike | None = None,
  say: launch.Say = lambda line: None,
  calibrate: bool = False,
  opened: launch.OpenedModel | None = None,
) -> Comparison:
  """Serve a workload disaggregated and colocated, on the same devices and with the same KV memory.

      comparison = pdjax.compare(config, rates=(1, 2, 4), splits=('2P1D', '1P2D'))
      print(comparison)  # who wins where; comparison.chart() draws it

  On the engine, each cluster is loaded and compiled once and serves every rate and budget in turn.

  Args:
    config: The run; its workers say how large a worker of either role is.
    backend: What carries the orders out.
    rates: Requests per second to try; None takes the workload as it is.
    splits: Splits to try instead of the config's own, see `with_split`. Each is compared with the baseline on as many
      devices as it takes.
    budgets: Tokens of one pass to try on the baseline; see `colocated_systems`.
    workdir: Gets the files of `Comparison.save`, and the event logs of the two runs it shows.
    say: Told in a line what is being done.
    calibrate: Measure this machine first and simulate with that (loads JAX).
    opened: What `open_model` answered, if it was asked before.

  Raises:
    ValueError: if a rate or split is not one, the workload has no rate, the config is colocated and there are no
      splits, no division of the devices fits, or as `run` and `simulate` raise.
  """
  if config.workload is None:
    raise ValueError('the config has no workload; set one, e.g. workload=Poisson(requests_per_s=1, num_requests=16).')
  if rates is not None and not (rates := sorted(set(rates))):
    raise ValueError('rates is empty; give at least one rate, or leave it out to take the workload as it is.')
  whole = config.workload
  workloads = [whole] if rates is None else [at_rate(whole, rate) for rate in rates]
  if calibrate and backend == 'simulator':
    config = launch.calibrated(config)
  opened = opened or launch.open_model(config)
  ours = _disaggregated(config, splits)
  baselines, missing = _baselines(ours, opened.model, budgets)
  own = _rate(whole)
  shown = min(workloads, key=lambda workload: _distance(_rate(workload), own))
  cases: list[Case] = []
  full: dict[tuple[bool, int], tuple[int, Case, tuple[Event, ...]]] = {}  # the best of a side and number of devices
  for cluster in _by_cluster([*ours, *baselines]):
    try:
      for system, workload, report, events in _run_cluster(cluster, workloads, backend, opened, say):
        case = Case(system.name, system.colocated, system.devices, _rate(workload), report, Outcomes.of(report))
        say(f'{case.system}{_at(case.rate)}: {_line(case)}')
        side = case.colocated, case.devices
        if workload is shown and (side not in full or case.merit > full[side][1].merit):
          full[side] = len(cases), case, events
        cases.append(dataclasses.replace(case, report=dataclasses.replace(report, timeline=Timeline())))
    except ValueError as error:  # of a division that the memory does not hold
      if not cluster[0].colocated:
        raise
      division = cluster[0].name.partition(',')[0]
      missing[division] = str(error)
      say(f'{division} cannot be: {error}')
  _check_baselines(cases, missing)
  for index, case, _ in full.values():
    cases[index] = case
  comparison = Comparison(backend, tuple(cases), _rate(shown), missing)
  if workdir is not None:
    comparison.save(workdir)
    for case, place in zip(comparison.pair(_rate(shown)), _places(workdir), strict=True):
      with EventLog(place / 'events.jsonl') as log:
        for event in full[case.colocated, case.devices][2]:
          log.append(event)
  return comparison


def _disaggregated(config: ServingConfig, splits: Iterable[str] | None) -> list[System]:
  """The systems to hold against the baseline."""
  if splits is None:
    if all(worker.role is Role.BOTH for worker in config.workers):
      raise ValueError(
        f'the config is the colocated baseline itself ({config.split}); give splits to compare it with, e.g. 1P1D.'
      )
    configs = [config]
  else:
    configs = [with_split(config, split) for split in dict.fromkeys(split.strip().upper() for split in splits)]
  if not configs:
    raise ValueError("splits is empty; give at least one, such as '2P1D', or leave it out.")
  return [System(one.split, one, False, len(_devices(one))) for one in configs]


def _baselines(
  ours: Sequence[System], model: ModelSpec, budgets: Sequence[int] | None
) -> tuple[list[System], dict[str, str]]:
  """The baseline for every number of devices that a disaggregated system takes, with the KV memory of the richest."""
  systems: list[System] = []
  missing: dict[str, str] = {}
  for devices in dict.fromkeys(system.devices for system in ours):
    alike = [system.config for system in ours if system.devices == devices]
    richest = max(alike, key=lambda one: sum(w.num_pages for w in one.workers if isinstance(w.num_pages, int)))
    found, lacking = colocated_systems(richest, model, budgets)
    systems += found
    missing |= lacking
  return systems, missing


def _check_baselines(cases: Sequence[Case], missing: dict[str, str]) -> None:
  for devices in {case.devices for case in cases if not case.colocated}:
    if not any(case.colocated and case.devices == devices for case in cases):
      reasons = '; '.join(f'{name}: {reason}' for name, reason in missing.items())
      raise ValueError(
        f'no equal division of {devices} devices makes a colocated baseline ({reasons}); change the number of devices '
        'or the memory of the workers.'
      )


def _devices(config: ServingConfig) -> set[int]:
  """The devices that the workers take, by index."""
  carved = carve_devices(config.workers, devices_needed(config.workers))
  return {device for mesh in carved.values() for device in mesh}


def _by_cluster(systems: Sequence[System]) -> list[list[System]]:
  """Systems whose workers are the same together: they differ in the policy alone and need no other programs."""
  clusters: dict[tuple[WorkerSpec, ...], list[System]] = {}
  for system in systems:
    clusters.setdefault(system.config.workers, []).append(system)
  return list(clusters.values())


Run = tuple[System, Workload, Report, tuple[Event, ...]]


def _run_cluster(
  cluster: Sequence[System],
  workloads: Sequence[Workload],
  backend: BackendName,
  opened: launch.OpenedModel,
  say: launch.Say,
) -> Iterator[Run]:
  """Serve every workload with every policy of a cluster."""
  if backend == 'engine':
    yield from _run_on_devices(cluster, workloads, opened, say)
    return
  for workload in workloads:
    for system in cluster:
      result = launch.simulate(dataclasses.replace(system.config, workload=workload), opened=opened)
      yield system, workload, result.report, result.events


def _run_on_devices(
  cluster: Sequence[System], workloads: Sequence[Workload], opened: launch.OpenedModel, say: launch.Say
) -> Iterator[Run]:
  """The same on devices, loaded and compiled once."""
  served: list[Arrivals] = []  # the one being served last: it knows how many tokens its requests generate
  deployment = launch.deploy(cluster[0].config, opened, lambda request: served[-1].output_len(request), say)
  encode = None if opened.tokenizer is None else opened.encode_prompt
  context = WorkloadContext(opened.model.vocab_size, opened.model.context_len, encode)
  engine = deployment.built.engine
  try:
    for workload in workloads:
      for system in cluster:
        served.append(workload.arrivals(context))
        engine.start_clock()
        events = tuple(serve(served[-1], system.config.policy, engine, deployment.empty_state()))
        config = dataclasses.replace(system.config, workload=workload)
        report = dataclasses.replace(deployment, config=config).report(events, (), None)
        yield system, workload, report, events
  finally:
    engine.close()
    del deployment, engine
    gc.collect()  # the next cluster wants the memory, and an engine stands in a ring of references


def _plain(rate: float) -> float | None:
  """A rate as JSON has it: requests that do not come at times of their own have none."""
  return None if math.isinf(rate) else rate


def _rate(workload: Workload) -> float:
  return math.inf if workload.request_rate is None else workload.request_rate


def _distance(rate: float, own: float) -> float:
  """How far two rates lie apart, in factors."""
  return 0.0 if rate == own else math.inf if math.isinf(own) or math.isinf(rate) else abs(math.log(rate / own))


def _at(rate: float) -> str:
  return '' if math.isinf(rate) else f' at {rate:.3g} req/s'


def _line(case: Case) -> str:
  report = case.report
  goodput = '' if report.request_goodput is None else f'goodput {number(report.request_goodput, 2)} req/s, '
  tails = f'TTFT p99 {short(report.ttft.p99_ms)} ms, TPOT p99 {short(report.tpot.p99_ms)} ms'
  return f'{goodput}{tails}'


def _places(folder: str | os.PathLike) -> tuple[pathlib.Path, pathlib.Path]:
  """Where the files of the disaggregated run go, and those of the baseline."""
  return pathlib.Path(folder), pathlib.Path(folder) / 'colocated'
