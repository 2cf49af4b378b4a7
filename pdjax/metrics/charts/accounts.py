"""The account of a run's time as stacked bars: the parts of the time to the first token, and of the hand-off."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pdjax.metrics import wording
from pdjax.metrics.charts.rows import table, to_digits
from pdjax.metrics.charts.style import FIGURE, finish
from pdjax.metrics.charts.systems import named
from pdjax.metrics.colours import PARTS
from pdjax.metrics.report import Report

if TYPE_CHECKING:
  import altair as alt


def account(*reports: Report, names: Sequence[str] = ()) -> 'alt.LayerChart':
  """The parts of the mean time to the first token and from the first to the second, in stacked bars.

  Args:
    reports: A run, and others to compare it with.
    names: Names of the runs; by default the shorthands of their clusters.
  """
  import altair as alt

  systems = named(reports, names)
  several = len(systems) > 1
  bars: list[dict[str, Any]] = []
  totals: list[dict[str, Any]] = []
  for what, parts in (('TTFT', ('queue', 'prefill')), ('hand-off', ('wait', 'wire', 'admit', 'step'))):
    for name, report in systems.items():
      label = f'{what} · {name}' if several else what
      reached, known = 0.0, False
      for part in parts:
        length = getattr(report.account, f'{part}_ms')
        if length is None:
          continue
        bars.append(
          {'bar': label, 'part': part, 'of': what, 'system': name, 'from': to_digits(reached),
           'to': to_digits(reached + length), 'ms': to_digits(length)}
        )  # fmt: skip
        reached, known = reached + length, True
      totals.append({'bar': label, 'to': to_digits(reached), 'ms': wording.number(reached if known else None)})
  rows = [total['bar'] for total in totals]
  parts_seen = [part for part in PARTS if any(bar['part'] == part for bar in bars)]
  y = alt.Y('bar:N', sort=rows, title=None, axis=alt.Axis(domain=False, ticks=False, labelLimit=150))
  longest = max((total['to'] for total in totals), default=0.0) or 1.0
  x = alt.X('from:Q', title='ms', scale=alt.Scale(domain=[0, longest * 1.16], nice=False), axis=alt.Axis(tickCount=5))
  stack = (
    alt.Chart(table(bars))
    .mark_bar(height={'band': 0.6})
    .encode(
      x=x, x2='to', y=y,
      color=alt.Color(
        'part:N', scale=alt.Scale(domain=parts_seen, range=[PARTS[part] for part in parts_seen]), title=None
      ),
      tooltip=[
        alt.Tooltip('of:N', title='part of'), alt.Tooltip('part:N'), alt.Tooltip('system:N'),
        alt.Tooltip('ms:Q', title='mean (ms)', format=FIGURE),
      ],
    )
  )  # fmt: skip
  text = alt.Chart(table(totals)).mark_text(align='left', dx=6).encode(x='to:Q', y=y, text='ms:N')
  return finish(alt.layer(stack, text), 'Where the time went', height=34 * len(rows))
