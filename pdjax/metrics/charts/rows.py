"""Rows that charts draw, as they lie in a chart's file: short, and rounded to what can be seen."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pdjax.metrics.report import Report

if TYPE_CHECKING:
  import altair as alt


def table(rows: Sequence[Mapping[str, Any]]) -> 'alt.InlineData':
  """Rows as CSV in the chart: a third as long as JSON, and Altair need not walk through it."""
  import altair as alt

  columns = list(dict.fromkeys(name for row in rows for name in row))
  numbers = {name: 'number' for row in rows for name, value in row.items() if isinstance(value, int | float)}
  text = io.StringIO()
  writer = csv.DictWriter(text, columns, lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return alt.InlineData(values=text.getvalue(), format=alt.CsvDataFormat(type='csv', parse=numbers or None))


def some_of(requests: Sequence[str], most: int = 4) -> str:
  """The first of some requests, and how many more there are."""
  more = f' and {len(requests) - most} more' if len(requests) > most else ''
  return ', '.join(requests[:most]) + more


def to_digits(figure: float, digits: int = 6) -> float:
  """A figure with so many digits, wherever its point is: rounded behind the point, tiny ones would all be 0."""
  return float(f'{figure:.{digits}g}')


def rounding(report: Report) -> Callable[[float], float]:
  """Rounds seconds of a run: to microseconds, or to a millionth of a run that is shorter than a second."""
  duration_s = report.duration_s
  places = 6 - math.floor(math.log10(duration_s)) if 0 < duration_s < 1 else 6
  return lambda seconds: round(seconds, places)
