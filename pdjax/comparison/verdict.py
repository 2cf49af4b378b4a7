"""All that a comparison tried, and the winners: in sentences, in a table, as data and on a page."""

import dataclasses
import functools
import math
import os
import pathlib
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pdjax.comparison.contest import (
  CONFIDENCE,
  FEWEST_FOR_P99,
  NEGLIGIBLE,
  RESAMPLES,
  Case,
  Contest,
  block_length,
  contests,
  paired,
)
from pdjax.comparison.sentences import at_one_rate, at_rates, over_rates, standings
from pdjax.comparison.systems import System
from pdjax.deployment import BackendName
from pdjax.metrics import Beside, OverRate, charts, draw
from pdjax.metrics.saving import write_each
from pdjax.metrics.wording import listed, percent, plain, short
from pdjax.run_folder import BASELINE
from pdjax.types.json_text import json_text

if TYPE_CHECKING:
  import altair as alt

_WRAP = 110  # columns of printed sentences


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Every case that was tried, and the winners.

  Attributes:
    backend: The backend that ran them.
    cases: All of them, in the order in which they ran.
    shown_rate: The rate whose two best cases a page shows in full: the config's own, or the one next to it.
    missing: Divisions of the devices that cannot be, with the reason.
    unwritten: The files that could not be written into the work directory, and why, in sentences.
  """

  backend: BackendName
  cases: tuple[Case, ...]
  shown_rate: float
  missing: Mapping[str, str]
  unwritten: tuple[str, ...] = ()

  @property
  def rates(self) -> tuple[float, ...]:
    """Requests per second, ascending."""
    return tuple(sorted({case.rate for case in self.cases}))

  @property
  def splits(self) -> tuple[str, ...]:
    """The disaggregated divisions, in the order in which they were given."""
    return tuple(dict.fromkeys(case.system.division for case in self.cases if not case.system.colocated))

  def best(self, rate: float, split: str) -> Case:
    """The best step size of a split at a rate: most requests within their limits, then the lowest mean E2E."""
    cases = [case for case in self.cases if case.rate == rate and case.system.division == split]
    return max(cases, key=lambda case: case.merit)

  def baseline(self, rate: float, devices: int) -> Case:
    """The best colocated division and budget at a rate, on so many devices."""
    cases = [case for case in self.cases if case.system.colocated and case.system.devices == devices]
    return max((case for case in cases if case.rate == rate), key=lambda case: case.merit)

  def pair(self, rate: float, split: str | None = None) -> tuple[Case, Case]:
    """A split's best case at a rate, by default that of the best split, and the baseline on as many devices.

    Both over the requests that came to both.
    """
    splits = self.splits if split is None else (split,)
    ours = max((self.best(rate, one) for one in splits), key=lambda case: case.merit)
    return paired(ours, self.baseline(rate, ours.system.devices))

  @functools.cached_property
  def contests(self) -> dict[float, dict[str, tuple[Contest, ...]]]:
    """The contests at each rate: every split against the baseline on as many devices."""
    return {rate: {split: contests(*self.pair(rate, split)) for split in self.splits} for rate in self.rates}

  def verdict(self) -> list[str]:
    """The winners in sentences made of the figures."""
    return [*self._at_shown_rate(), *over_rates(self.contests), *self._method()]

  def __str__(self) -> str:
    return '\n'.join(textwrap.fill(line, _WRAP) for line in self.verdict())

  def standings(self) -> list[list[str]]:
    """The splits ahead in each figure at each rate, as a table whose first row is its head.

    A cell names the splits that beat their baseline, 'colocated' if that beats every split, or has a dash.
    """
    return [['req/s', *map(plain, self.rates)], *standings(self.contests)]

  def to_json(self) -> dict[str, Any]:
    """All figures as plain data: cases, contests of every split at every rate, the verdict."""
    return {
      'backend': self.backend,
      'rates': list(self.rates),
      'shown_rate': self.shown_rate,
      'verdict': self.verdict(),
      'standings': self.standings(),
      'contests': {
        f'{rate:g}': {split: [dataclasses.asdict(one) for one in results] for split, results in by_split.items()}
        for rate, by_split in self.contests.items()
      },
      'best': {f'{rate:g}': [case.system.name for case in self.pair(rate)] for rate in self.rates},
      'missing': dict(self.missing),
      'cases': [case_json(case) for case in self.cases],
    }

  def save(self, folder: str | os.PathLike) -> tuple[str, ...]:
    """Write `compare.json`, and the `report.html`, `report.json` and `trace.json` of the two runs shown.

    Those of the baseline go into a folder `colocated`; the page of the disaggregated run has both.

    Returns:
      The files that could not be written, and why, in sentences. Nothing is raised: the figures are worth more.
    """
    text = json_text(self.to_json(), indent=1) + '\n'
    own, colocated = places(folder)
    ours, theirs = self.pair(self.shown_rate)
    unwritten = write_each(
      {
        own / 'compare.json': lambda path: path.write_text(text, encoding='utf-8'),
        own / 'report.json': ours.report.save,
        colocated / 'report.json': theirs.report.save,
      }
    )
    draw(ours.report, own, self.beside())
    draw(theirs.report, colocated)
    return unwritten

  def chart(self) -> 'alt.ConcatChart':
    """The comparison in one picture: figures over the rate, or at a single rate the latencies of the two runs shown."""
    if len(self.rates) > 1:
      parts = [
        charts.over_rate(one.curves, one.title, one.unit, baseline='colocated', log=one.log, ideal=one.ideal)
        for one in self._charts()
      ]
    else:
      pair = self.pair(self.shown_rate)
      reports, names = [case.report for case in pair], [case.system.name for case in pair]
      parts = [charts.latency(*reports, metric=metric, names=names) for metric in ('ttft', 'handoff', 'tpot', 'e2el')]
    return charts.side_by_side(*parts)

  def beside(self) -> Beside:
    """The part of the disaggregated run's page that compares it with the baseline."""
    ours, theirs = self.pair(self.shown_rate)
    several = len(self.rates) > 1
    curves = self._charts() if several else ()
    return Beside(
      theirs.report,
      theirs.system.name,
      verdict=list(self._at_shown_rate()),
      standings=self.standings() if several else (),
      method=list(self._method()),
      over_rate=curves,
      baseline_curve='colocated' if curves else None,
      head=HEAD,
      rows=[_cells(case) for case in self.cases],
      best=frozenset(row for row, case in enumerate(self.cases) if case is ours or case is theirs),
      missing=list(self.missing),
    )

  @functools.cached_property
  def curves(self) -> dict[str, tuple[Case, ...]]:
    """The cases shown: the best case of each split, and of the baseline on each number of devices, at every rate.

    The best split comes first, so that it has one colour in all charts.
    """
    shown = self.pair(self.shown_rate)[0].system
    splits = dict.fromkeys([shown.division, *self.splits])
    curves = {split: tuple(self.best(rate, split) for rate in self.rates) for split in splits}
    for devices in sorted({case.system.devices for case in self.cases if case.system.colocated}):
      name = 'colocated' if devices == shown.devices else f'colocated, {devices} devices'
      curves[name] = tuple(self.baseline(rate, devices) for rate in self.rates)
    return curves

  def _at_shown_rate(self) -> Iterator[str]:
    """Of the best split; of the others too if this is the only rate."""
    best = self.pair(self.shown_rate)[0].system.division
    for split in [best, *(split for split in self.splits if split != best and len(self.rates) == 1)]:
      yield at_one_rate(*self.pair(self.shown_rate, split), self.contests[self.shown_rate][split])

  def _method(self) -> Iterator[str]:
    """The systems compared, and the rule by which a side is ahead, in sentences."""
    count = len(self.cases[0].outcomes.good)
    limited = any(case.report.request_goodput is not None for case in self.cases)
    merit = 'most requests within their limits' if limited else 'most requests completed'
    at = self.rates.index(self.shown_rate)
    chosen = '; '.join(self._chosen(name, cases[at].system) for name, cases in self.curves.items())
    there = at_rates([self.shown_rate], len(self.rates))
    yield f'Each side shows its best ({merit}, then the lowest mean E2E){there}: {chosen}.'
    for end, where in _ends(self).items():
      beyond = 'a still smaller' if end == 'smallest' else 'a still larger'
      yield f'The {end} size of a step that was tried is the best for {where}; {beyond} one may be better.'
    block = block_length(count)
    yield (
      f'A side is ahead where {CONFIDENCE:.0%} of {RESAMPLES:,} resampled sets of the {count:,} '
      f'requests agree and the figures differ by more than {NEGLIGIBLE:.0%}'
      + (
        f'; sets are drawn in blocks of {block:,} neighbours, because requests that queue together are slow together.'
        if block > 1
        else '.'
      )
      + ('' if count >= FEWEST_FOR_P99 else f' p99 is not judged below {FEWEST_FOR_P99} requests.')
    )
    yield (
      'Every figure is an estimate of the simulator.'
      if self.backend == 'simulator'
      else 'Each system ran once, so what the machine itself varies by is not in it.'
    )

  def _chosen(self, name: str, system: System) -> str:
    """The best system of a side, and the number of those tried, in words."""
    tried = {case.system.name for case in self.cases if _same_side(case.system, system)}
    size = '' if system.pass_tokens is None else f' with steps of up to {system.pass_tokens:,} tokens'
    of = f' (of {len(tried)} tried)' if len(tried) > 1 else ''
    return f'{name} as {system.division}{size}{of}' if system.colocated else f'{name}{size}{of}'

  def _charts(self) -> tuple[OverRate, ...]:
    def chart(title: str, unit: str, of: Callable[[Case], float | None], **options: bool) -> OverRate:
      curves = {name: [(case.rate, of(case)) for case in cases] for name, cases in self.curves.items()}
      return OverRate(title, unit, curves, **options)

    limited = any(case.report.request_goodput is not None for case in self.cases)
    return (
      chart('Requests within their limits', 'req/s of those offered', _offered_within_limits, ideal=True)
      if limited
      else chart('Throughput', 'req/s', lambda case: case.report.request_throughput),
      chart('Time to first token, p99', 'ms', lambda case: case.report.ttft.p99_ms, log=True),
      chart('Time per output token, p99', 'ms', lambda case: case.report.tpot.p99_ms, log=True),
      chart('End-to-end latency, p99', 'ms', lambda case: case.report.e2el.p99_ms, log=True),
    )


HEAD = ('system', 'req/s', 'within limits', 'TTFT p99', 'TPOT p99', 'mean E2E')


def _cells(case: Case) -> tuple[str, ...]:
  """A row of the table of all cases, below `HEAD`; without limits every request that completed is within them."""
  report = case.report
  figures = (report.ttft.p99_ms, report.tpot.p99_ms, report.e2el.mean_ms)
  good = percent(float(case.outcomes.good.mean()) if len(case.outcomes.good) else None)
  return (case.system.name, '-' if math.isinf(case.rate) else plain(case.rate), good, *map(short, figures))


def _offered_within_limits(case: Case) -> float | None:
  """The requests per second offered that met their limits: unlike goodput it has no run's end in it."""
  share = case.report.goodput_share
  return None if share is None else case.rate * share


def case_json(case: Case) -> dict[str, Any]:
  """The figures of a case as plain data."""
  whole = case.report.to_json()
  kept = {name: value for name, value in whole.items() if not isinstance(value, list) and name not in _LONG}
  system = case.system
  about = {
    'system': system.name, 'division': system.division, 'pass_tokens': system.pass_tokens,
    'colocated': system.colocated, 'devices': system.devices, 'rate': case.rate,
  }  # fmt: skip
  policy = case.report.config.get('policy', {})
  return about | {'workers': whole['config'].get('workers', []), 'policy': policy} | kept


_LONG = ('config', 'environment', 'generated_texts')


def _same_side(one: System, other: System) -> bool:
  """Whether both are of one split, or of the baseline on equally many devices."""
  if one.colocated or other.colocated:
    return one.colocated == other.colocated and one.devices == other.devices
  return one.division == other.division


def _ends(comparison: Comparison) -> dict[str, str]:
  """The sides best with the smallest or largest step tried, which might gain beyond: 'colocated at 4 req/s'."""
  found: dict[str, dict[str, list[float]]] = {'smallest': {}, 'largest': {}}
  for name, cases in comparison.curves.items():
    for best in cases:
      alike = [
        case for case in comparison.cases if (case.rate, case.system.division) == (best.rate, best.system.division)
      ]
      sizes = {case.system.pass_tokens or 0: case.merit for case in alike if case.system.devices == best.system.devices}
      size = best.system.pass_tokens or 0
      if len(sizes) == 1 or size not in (min(sizes), max(sizes)):
        continue
      end = 'smallest' if size == min(sizes) else 'largest'
      inward = sorted(sizes)[1 if end == 'smallest' else -2]
      whole = max(worker.max_step_tokens for worker in best.system.config.workers if worker.role.prefills)
      if best.merit > sizes[inward] and 1 < size < whole:
        found[end].setdefault(name, []).append(best.rate)
  of = len(comparison.rates)
  return {
    end: listed([f'{name}{at_rates(rates, of)}' for name, rates in sides.items()])
    for end, sides in found.items()
    if sides
  }


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
  """Print the best of each split and of the baseline at every rate and the winners, by default to the terminal."""
  console = console or Console()
  table = Table(box=None, padding=(0, 1), header_style='bold cyan')
  for name in HEAD:
    table.add_column(name, justify='left' if name == HEAD[0] else 'right', no_wrap=True)
  for cases in zip(*comparison.curves.values(), strict=True):
    for case in cases:
      table.add_row(*map(Text, _cells(case)))
  console.print('The best of each split and of the colocated systems at each rate; latencies in ms', style='bold')
  console.print(table)
  for line in comparison.verdict():
    console.print(f'• {line}', markup=False, soft_wrap=True)


def places(folder: str | os.PathLike) -> tuple[pathlib.Path, pathlib.Path]:
  """The folders for the files of the disaggregated run, and for those of the baseline."""
  return pathlib.Path(folder), pathlib.Path(folder) / BASELINE
