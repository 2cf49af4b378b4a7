"""Runs that one chart compares: the name of each, its colour and its dash."""

import itertools
from collections.abc import Sequence
from typing import Any

from pdjax.metrics.colours import BASELINE, SYSTEMS
from pdjax.metrics.report import Report


def named(reports: Sequence[Report], names: Sequence[str] = ()) -> dict[str, Report]:
  """Each run under its name, or else the shorthand of its cluster; numbered where that repeats."""
  systems: dict[str, Report] = {}
  for report, given in zip(reports, names or [report.split for report in reports], strict=True):
    name, number = given, 2
    while name in systems:
      name, number = f'{given} ({number})', number + 1
    systems[name] = report
  return systems


def system_colours(names: Sequence[str], baseline: str | None = None) -> list[tuple[str, str]]:
  """The colour of each system that is compared; without a named baseline the second of two is one."""
  if baseline is None and len(names) == 2:
    baseline = names[1]
  others = itertools.cycle(SYSTEMS)
  return [(name, BASELINE if name == baseline else next(others)) for name in names]


def system_scales(names: Sequence[str], baseline: str | None = None) -> tuple[Any, Any]:
  """Colour and dash of each system."""
  import altair as alt

  colours = [colour for _, colour in system_colours(names, baseline)]
  dashes = [[5, 4] if colour == BASELINE else [1, 0] for colour in colours]
  legend = None if len(names) < 2 else alt.Legend(symbolType='stroke')
  return (
    alt.Color('system:N', scale=alt.Scale(domain=names, range=colours), title=None, legend=legend),
    alt.StrokeDash('system:N', scale=alt.Scale(domain=names, range=dashes), title=None, legend=legend),
  )
