"""A report as tables for a terminal."""

from collections.abc import Mapping

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pdjax.metrics.groups import GroupFigures
from pdjax.metrics.report import Report
from pdjax.metrics.wording import group_table, groups, number, percent, totals

_WIDTH = 100


def render(report: Report) -> RenderableType:
  """The report as something `rich` can print, at most 100 columns wide."""
  parts: list[RenderableType] = [_headline(report), _latencies(report), _totals(report)]
  if report.utilisation:
    parts += [Text(), _utilisation(report)]
  for what, named in groups(report):
    parts += [Text(), _groups(what, named)]
  lines = (report.ttft_account(), report.handoff_account(), *report.return_lines())
  parts.append(Padding(Text('\n'.join(lines)), (1, 0, 0, 1), expand=False))
  if report.notes:
    notes = Table.grid(padding=(0, 1))
    for note in report.notes:
      notes.add_row(Text('•', style='yellow'), Text(note))
    parts.append(Padding(notes, (1, 0, 0, 1), expand=False))
  return Group(*parts)


def print_report(report: Report, console: Console | None = None) -> None:
  """Print the report, by default to the terminal."""
  console = console or Console()
  console.print(render(report), width=min(console.width, _WIDTH))


def _headline(report: Report) -> RenderableType:
  named = [name for name in (report.model_id, report.backend) if name]
  counts = f'{report.completed} of {report.num_prompts} requests completed in {number(report.duration_s, 2)} s'
  return Text(f' {" · ".join([*named, counts])}', style='bold')


def _latencies(report: Report) -> RenderableType:
  table = _table('latency (ms)', 'mean', 'p50', 'p90', 'p99', width=11)
  rows = (
    ('TTFT', report.ttft),
    ('hand-off', report.handoff),
    ('TPOT', report.tpot),
    ('ITL', report.itl),
    ('E2E', report.e2el),
  )
  for name, stats in rows:
    table.add_row(name, *(number(value) for value in (stats.mean_ms, stats.p50_ms, stats.p90_ms, stats.p99_ms)))
  return table


def _totals(report: Report) -> RenderableType:
  table = Table.grid(padding=(0, 2))
  for width, justify in ((19, 'left'), (17, 'right'), (19, 'left'), (21, 'right')):
    table.add_column(width=width, justify=justify, no_wrap=True)  # type: ignore[arg-type]
  cells = list(totals(report))
  half = (len(cells) + 1) // 2
  for left, right in zip(cells[:half], [*cells[half:], ('', '')], strict=False):
    table.add_row(Text(left[0], style='dim'), left[1], Text(right[0], style='dim'), right[1])
  return Padding(table, (1, 0, 0, 1), expand=False)


def _utilisation(report: Report) -> RenderableType:
  copies = ['copy'] if report.copies else []
  table = _table('utilisation', 'busy', 'prefill', 'decode', 'fused', 'transfer', *copies, width=9)
  for use in report.utilisation:
    shares = (use.busy, use.prefill, use.decode, use.fused, use.transfer, *([use.copy] if copies else []))
    table.add_row(Text(report.bill.chips.label(use.worker)), *(percent(share) for share in shares))
  return table


def _groups(what: str, named: Mapping[str, GroupFigures]) -> RenderableType:
  head, rows = group_table(list(named.values()))
  table = _table(f'{what} (ms)', *head, least=10)
  for name, row in zip(named, rows, strict=True):
    table.add_row(Text(name), *row)
  return table


def _table(first: str, *columns: str, width: int | None = None, least: int = 18) -> Table:
  table = Table(box=None, padding=(0, 1), header_style='bold cyan')
  table.add_column(first, min_width=least, max_width=32, overflow='ellipsis', no_wrap=True)
  for column in columns:
    table.add_column(column, width=width, justify='right', no_wrap=True)
  return table
