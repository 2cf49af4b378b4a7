"""The report as one page: a file of its own that opens offline, in light and dark, on a phone and on a desk."""

import dataclasses
import datetime
import functools
import importlib.resources
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pdjax.metrics import charts
from pdjax.metrics.colours import DARK, FONT, LIGHT, PARTS, PHASES, SYSTEMS, vega_config
from pdjax.metrics.report import Report
from pdjax.metrics.stats import Stats
from pdjax.metrics.wording import (
  group_table,
  groups,
  headline,
  listed,
  number,
  per_second,
  percent,
  plain,
  sentences,
  short,
  totals,
)
from pdjax.types.json_text import json_text

_LATENCIES = (('TTFT', 'ttft'), ('TPOT', 'tpot'), ('ITL', 'itl'), ('E2E', 'e2el'), ('hand-off', 'handoff'))


@dataclasses.dataclass(frozen=True)
class OverRate:
  """One figure of several systems over the rate of requests: a chart of the page; see `charts.over_rate`."""

  title: str
  unit: str
  curves: Mapping[str, Sequence[tuple[float, float | None]]]
  log: bool = False
  ideal: bool = False


@dataclasses.dataclass(frozen=True)
class Beside:
  """The part of a page that compares its run with others.

  Attributes:
    baseline: The run to stand beside it, in every chart.
    detail: The baseline in as few words as can be.
    name: Its name.
    verdict: The winners, in sentences.
    standings: The same over several rates as a table, its first row the head.
    method: The systems compared and the rule by which a side is ahead, in sentences.
    over_rate: Figures over the rate of requests.
    baseline_curve: The name of the baseline among their curves.
    head: Head of the table of all systems that were tried.
    rows: Its rows.
    best: The numbers of the rows of the runs shown.
    missing: The divisions that could not be tried.
  """

  baseline: Report
  detail: str = ''
  name: str = 'colocated'
  verdict: Sequence[str] = ()
  standings: Sequence[Sequence[str]] = ()
  method: Sequence[str] = ()
  over_rate: Sequence[OverRate] = ()
  baseline_curve: str | None = None
  head: Sequence[str] = ()
  rows: Sequence[Sequence[str]] = ()
  best: frozenset[int] = frozenset()
  missing: Sequence[str] = ()


def save_html(report: Report, path: str | os.PathLike, beside: Beside | None = None) -> pathlib.Path:
  """Write the report as a page that needs no other file, and return its path.

  Args:
    report: The run.
    path: A file that ends in `.html`, or a folder, which gets a `report.html`; missing folders are made.
    beside: The comparison with others, if any.
  """
  path = pathlib.Path(path)
  if path.suffix != '.html':
    path = path / 'report.html'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(render_html(report, beside), encoding='utf-8', errors='replace')
  return path


def render_html(report: Report, beside: Beside | None = None) -> str:
  """The page as text."""
  import jinja2

  source = importlib.resources.files('pdjax.metrics')
  environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
  template = environment.from_string((source / 'page.html').read_text(encoding='utf-8'))
  css = jinja2.Environment().from_string((source / 'page.css').read_text(encoding='utf-8'))
  notes = dict.fromkeys((*report.notes, *(beside.baseline.notes if beside else ())))
  rate = per_second(report.request_rate) if math.isfinite(report.request_rate) else ''
  return template.render(
    title=headline(report),
    kicker=' · '.join(filter(None, ('pdjax report', report.backend, rate, _date(report.date)))),
    headline=headline(report),
    sentences=list(sentences(report)),
    verdict=list(beside.verdict) if beside else [],
    standings=list(beside.standings) if beside else [],
    method=list(beside.method) if beside else [],
    notes=list(notes),
    cards=list(_cards(report, beside)),
    sections=list(_sections(report, beside)),
    folds=list(_folds(report, beside)),
    footer='Drawn with Vega-Lite.',
    themes=_json({'light': vega_config(LIGHT), 'dark': vega_config(DARK)}),
    bundle=_bundle(),
    js=(source / 'page.js').read_text(encoding='utf-8'),
    css=css.render(light=LIGHT, dark=DARK, font=FONT, accent=SYSTEMS[0]),
  )


@functools.cache
def _bundle() -> str:
  """Vega, Vega-Lite and Vega-Embed in one script."""
  import vl_convert

  return (
    vl_convert.javascript_bundle('window.vegaEmbed = vegaEmbed;')
    .replace('</script', '<\\/script')
    .replace('<!--', '<\\!--')
  )


def _date(text: str) -> str:
  """A report's date as people write it."""
  try:
    when = datetime.datetime.strptime(text, '%Y%m%d-%H%M%S')
  except ValueError:
    return text
  return f'{when.day} {when:%B %Y, %H:%M}'


def _json(data: Any) -> str:
  return _in_script(json_text(data, separators=(',', ':')))


def _in_script(text: str) -> str:
  """JSON that cannot end the script element it stands in."""
  return text.replace('<', '\\u003c')


# ---------------------------------------------------------------------------- figures


def _cards(report: Report, beside: Beside | None) -> Iterator[dict[str, Any]]:
  other = beside.baseline if beside else None

  def card(name: str, value: str, unit: str, more: str, beside_it: Sequence[str]) -> dict[str, Any]:
    lines = [f'{beside.name if beside else ""}: {beside_it[0]}', *beside_it[1:]] if beside_it else []
    return {'name': name, 'value': value, 'unit': unit, 'more': more, 'beside': lines}

  if report.request_goodput is not None:
    within = f'{percent(report.goodput_share)} within limits'
    than = [] if other is None else [number(other.request_goodput, 2), f'{percent(other.goodput_share)} within limits']
    yield card('Goodput', number(report.request_goodput, 2), 'req/s', within, than)
  tokens = f'{number(report.request_throughput, 2)} requests/s'
  than = [] if other is None else [short(other.output_throughput)]
  yield card('Output', short(report.output_throughput), 'tok/s', tokens, than)
  for name, field in (('TTFT', 'ttft'), ('TPOT', 'tpot'), ('Hand-off', 'handoff'), ('E2E', 'e2el')):
    median = f'{name} p50'
    stats: Stats = getattr(report, field)
    than = []
    if other is not None:
      theirs: Stats = getattr(other, field)
      than = [short(theirs.p50_ms), f'p99 {short(theirs.p99_ms)} ms']
    yield card(median, short(stats.p50_ms), 'ms', f'p99 {short(stats.p99_ms)} ms', than)


def _latency_table(report: Report, beside: Beside | None) -> dict[str, Any]:
  rows = []
  for name, field in _LATENCIES:
    for run, label in ((report, name), (beside and beside.baseline, beside and beside.name)):
      if run:
        stats: Stats = getattr(run, field)
        figures = (stats.mean_ms, stats.p50_ms, stats.p90_ms, stats.p99_ms)
        rows.append({'cells': [label, *map(short, figures)], 'beside': run is not report})
  return {'head': ['ms', 'mean', 'p50', 'p90', 'p99'], 'rows': rows}


def _totals_table(report: Report, beside: Beside | None) -> dict[str, Any]:
  others = dict(totals(beside.baseline)) if beside else {}
  head = ['over the whole run', report.split] + ([beside.name] if beside else [])
  rows = [{'cells': [name, text, *([others.get(name, '-')] if beside else [])]} for name, text in totals(report)]
  return {'head': head, 'rows': rows}


def _group_tables(runs: Sequence[tuple[Report, str]]) -> Iterator[dict[str, Any]]:
  """A table by class and one by tenant, where there are several; each row of the run with the baseline's below it."""
  others = dict(groups(runs[1][0])) if len(runs) > 1 else {}
  for what, named in groups(runs[0][0]):
    lines = []
    for name, group in named.items():
      lines.append((name, group, False))
      if name in others.get(what, {}):
        lines.append((f'{name}, {runs[1][1]}', others[what][name], True))
    head, cells = group_table([group for _, group, _ in lines])
    rows = [{'cells': [name, *row], 'beside': is_other} for (name, _, is_other), row in zip(lines, cells, strict=True)]
    yield {'head': [what, *head], 'rows': rows}


def _utilisation_table(report: Report, title: str) -> dict[str, Any]:
  kinds = [kind for kind in PHASES if any(getattr(use, kind) for use in report.utilisation)]
  rows = [
    {
      'cells': [
        report.bill.chips.label(use.worker),
        percent(use.busy),
        *(percent(getattr(use, kind)) for kind in kinds),
      ]
    }
    for use in report.utilisation
  ]
  return {
    'head': ['share of the run', 'busy', *kinds],
    'rows': rows,
    'fold': f'How busy each worker was{title and f", {title}"}',
  }


# ---------------------------------------------------------------------------- sections


def _sections(report: Report, beside: Beside | None) -> Iterator[dict[str, Any]]:
  runs = [(report, report.split)] + ([(beside.baseline, beside.name)] if beside else [])
  reports = [run for run, _ in runs]
  systems = charts.system_colours([name for _, name in runs], beside.name if beside else None)
  if beside and beside.over_rate:
    names = list(beside.over_rate[0].curves)
    yield {
      'id': 'rates', 'title': 'Over the rate of requests', 'in_grid': True, 'wide': True,
      'text': _about_rates(beside.over_rate),
      'legend': charts.system_colours(names, beside.baseline_curve),
      'charts': [
        _chart(
          charts.over_rate(
            one.curves, one.title, one.unit, baseline=beside.baseline_curve, log=one.log, ideal=one.ideal
          ),
          one.title,
        )
        for one in beside.over_rate
      ],
    }  # fmt: skip
  yield {
    'id': 'figures', 'title': 'Figures', 'text': [], 'charts': [], 'side_by_side': True,
    'tables': [_latency_table(report, beside), _totals_table(report, beside)],
  }  # fmt: skip
  tables = list(_group_tables(runs))
  if tables:
    yield {
      'id': 'groups', 'title': 'By class and tenant', 'charts': [], 'tables': tables,
      'text': ['Each with its own requests alone; latencies in ms, tokens a second of the whole run.'],
    }  # fmt: skip
  served = any(run.completed for run in reports)
  if served:
    parts = [('queue, wait', PARTS['queue']), *(pair for pair in PARTS.items() if pair[0] not in ('queue', 'wait'))]
    yield {
      'id': 'account', 'title': 'Where the time went',
      'text': [f'{f"{name}: " if beside else ""}{run.ttft_account()}; {run.handoff_account()}.' for run, name in runs],
      'legend': parts, 'charts': [_chart(charts.account(*reports, names=[name for _, name in runs]))],
    }  # fmt: skip
  titles = [(run, '') for run in reports]
  if beside:
    titles = [(report, report.split), (beside.baseline, f'{beside.name}: {beside.detail}'.removesuffix(': '))]
  kinds = {kind for run in reports for kind in run.timeline.spans.kinds}
  if kinds:
    yield {
      'id': 'workers', 'title': 'What each worker did', 'over_time': True,
      'text': _about_gantt(reports),
      'legend': [(kind, colour) for kind, colour in PHASES.items() if kind in kinds],
      'charts': [_chart(charts.gantt(run, beside=reports), title) for run, title in titles],
      'tables': [_utilisation_table(run, title) for run, title in titles],
    }  # fmt: skip
    yield {
      'id': 'pages', 'title': 'Pages in use', 'over_time': True,
      'text': [_about_pages(reports)],
      'charts': [_chart(charts.pages(run, beside=reports), title) for run, title in titles],
    }  # fmt: skip
  if any(run.caches for run in reports):
    finders = [run for run in reports if run.prefix_hits]
    yield {
      'id': 'hits', 'title': 'Prefix hits by place over time', 'over_time': bool(finders),
      'text': _about_hits(runs, finders),
      'legend': charts.place_colours(finders) if finders else [],
      'charts': [_chart(charts.prefix_hits(run, beside=reports), title) for run, title in titles if run in finders],
    }  # fmt: skip
  if served:
    yield {
      'id': 'latencies', 'title': 'Latencies', 'in_grid': True,
      'text': [_about_latencies(reports)],
      'legend': systems if beside else [],
      'charts': [
        _chart(charts.latency(*reports, metric=metric, names=[name for _, name in runs]), title)
        for metric, title in charts.METRICS.items()
      ],
    }  # fmt: skip
  if beside and beside.rows:
    missing = [f'Not possible: {", ".join(beside.missing)}; compare.json says why.'] if beside.missing else []
    rows = [{'cells': list(row), 'best': number in beside.best} for number, row in enumerate(beside.rows)]
    yield {
      'id': 'systems', 'title': 'All that was tried', 'charts': [],
      'text': [f'{len(rows)} runs, latencies in ms; those shown above are in bold.', *missing],
      'tables': [{'head': list(beside.head), 'rows': rows, 'fold': 'Every system at every rate'}],
    }  # fmt: skip


def _chart(chart: Any, title: str = '', text: str = '') -> dict[str, str]:
  return {'title': title, 'spec': _in_script(charts.page_spec(chart)), 'text': text}


def _about_rates(over_rate: Sequence[OverRate]) -> list[str]:
  lines = ['Every curve takes the best of its sizes of a step at each rate, the colocated one of its divisions too.']
  if any(one.ideal for one in over_rate):
    lines.append('The thin line is all that was offered.')
  return [' '.join(lines)]


def _about_latencies(reports: Sequence[Report]) -> str:
  text = 'The share of requests (for ITL, of gaps between deltas) that took at most so long. Dots are p50, p90 and p99'
  limits = {metric: charts.limit_ms(*reports, metric=metric) for metric in charts.METRICS}
  if any(drawn for _, drawn in limits.values()):
    text += '; a dotted line is a limit'
  names = {field: name for name, field in _LATENCIES}
  beyond = [
    f'{plain(ms)} ms on {names[metric]}' for metric, (ms, drawn) in limits.items() if ms is not None and not drawn
  ]
  if beyond:
    lie = 'the limits of {} lie' if len(beyond) > 1 else 'the limit of {} lies'
    text += f'; {lie.format(listed(beyond))} beyond the axis'
  return f'{text}.'


def _about_pages(reports: Sequence[Report]) -> str:
  cached = ''
  if any(run.caches for run in reports):
    cached = ' Pale are pages that nobody holds and whose content is found again, which count as free.'
  return f'Pages of the KV cache that somebody holds.{cached} Heights are shares of each pool; labels name each peak.'


def _about_hits(runs: Sequence[tuple[Report, str]], finders: Sequence[Report]) -> list[str]:
  reports = [run for run, _ in runs]
  lines = [f'{name}: {run.hits_account()}.' for run, name in runs if run.caches]
  if len(runs) == 1:
    line = f'{reports[0].hits_account()}.'
    lines = [line[0].upper() + line[1:]]
  if finders:
    seconds = plain(charts.interval_s(reports))
    lines.append(
      f'A bar is the prompt tokens of the requests that began within {seconds} s; in front of it, by place, stand '
      'those that were found: not computed where they are prefilled, not sent to where they decode. What a request '
      'finds when it begins again is not counted.'
    )
  return lines


def _about_gantt(reports: Sequence[Report]) -> list[str]:
  lines = ['Thick bars are steps; the thin line below them is KV leaving or reaching the worker.']
  slots_s = [slot_s for slot_s in map(charts.slot_seconds, reports) if slot_s is not None]
  if slots_s:
    orders = max(len(report.timeline.spans) for report in reports)
    are_traced = all(report.timeline.spans.are_traced for report in reports)
    traced = ' Every step is in trace.json, which ui.perfetto.dev opens.' if are_traced else ''
    lines.append(
      f'There were {orders:,} steps and transfers, too many to draw one by one: neighbours are merged into slots of '
      f'{max(slots_s):.2g} s, and the height of a bar is the share of its slot that was spent.{traced}'
    )
  lines += [f'{line}.' for report in reports for line in report.return_lines()]
  return lines


def _folds(report: Report, beside: Beside | None) -> Iterator[tuple[str, str]]:
  yield 'Config', _pretty(report.config)
  if beside:
    yield f'Config of {beside.name}', _pretty(beside.baseline.config)
  returns = {'returns': [one.to_json() for one in report.returns]} if report.returns else {}
  yield 'Environment', _pretty({**report.environment, **returns})


def _pretty(data: Any) -> str:
  return json_text(data, indent=2, ensure_ascii=False)
