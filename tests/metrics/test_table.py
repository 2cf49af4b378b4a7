"""The tables of a report in a terminal."""

import io

from rich.console import Console

import pdjax
from pdjax.metrics.table import print_report
from tests import tiny


def test_a_name_that_looks_like_markup_is_printed_as_it_is():
  workers = (pdjax.WorkerSpec('[/red]x', 'prefill', **tiny.SIZES), pdjax.WorkerSpec('[bold]y', 'decode', **tiny.SIZES))
  config = pdjax.ServingConfig(workers, pdjax.Given(tiny.requests((3,))), model=tiny.TINY)
  console = Console(file=io.StringIO(), width=100)
  print_report(pdjax.simulate(config).report, console)
  assert '[/red]x' in console.file.getvalue() and '[bold]y' in console.file.getvalue()
