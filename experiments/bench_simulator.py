r"""The speed of the simulator: decode tokens that a second of CPU time serves, the log on disk, in two trees.

python -m experiments.bench_simulator
python -m experiments.bench_simulator --beside=../before --repeats=3 --json=simulator.json

Half of the workers of `configs/llama3_8b_simulated.py` prefill and half decode. Timed are serving and closing the log,
in a process of its own each time: no imports, no building and no report, but all threads. As many requests take longer
to come to few workers, and so fill larger batches. For equal ones, the largest cluster is also held against as many of
the smallest, one after another, as have its workers in all, each with its share of the requests.
"""

import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence

from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.rows import row, save_rows
from experiments.simulated_speed import check_equal, serve_simulated, speed
from experiments.two_trees import HERE, in_turns, measure, open_tree

_WORKERS = flags.DEFINE_list('workers', ['4', '64'], 'Workers of a cluster, an even number, a case each.')
_RATES = flags.DEFINE_list('rates', ['20', '2'], 'Requests a second for each pair of workers, a case each.')
_REQUESTS = flags.DEFINE_integer('requests', 3000, 'Requests of a case.', lower_bound=1)
_REPEATS = flags.DEFINE_integer('repeats', 1, 'Runs of each tree, in turns, of which the median counts.', lower_bound=1)
_BESIDE = flags.DEFINE_string('beside', None, 'The root of another checkout, measured in turns with this one.')
_JSON = flags.DEFINE_string('json', None, 'Write rows of name, value, unit to this file.')


def compare_trees(trees: Sequence[pathlib.Path], cases: Iterable[tuple[float, int]]) -> tuple[Table, list[dict]]:
  """Each case, a rate and a number of workers, on each tree in turns."""
  requests = _REQUESTS.value
  table = Table(title=f'million decode tokens a CPU second, {requests} requests, log on disk')
  for column in (
    'requests/s a pair',
    'workers',
    'mean batch',
    *('this tree', 'the other', 'ratio')[: 2 * len(trees) - 1],
  ):
    table.add_column(column, justify='right')
  rows = []
  for rate, workers in cases:
    turns = in_turns(trees, _REPEATS.value, serve_simulated, workers=workers, rate=rate, requests=requests)
    check_equal([answer for turn in turns for answer in turn], requests)
    ours, *theirs = (statistics.median(speed(turn[tree]) for turn in turns) for tree in range(len(trees)))
    ratio = statistics.median(speed(turn[0]) / speed(turn[-1]) for turn in turns)
    batches = ' and '.join(f'{answer["batch"]:.1f}' for answer in turns[0])
    beside = [f'{theirs[0]:.3f}', f'{ratio:.2f}'] if theirs else []
    table.add_row(f'{rate:g}', str(workers), batches, f'{ours:.3f}', *beside)
    name = f'decode tokens a CPU second, {workers} workers, {rate:g} requests/s a pair'
    if theirs:
      rows.append(row(name, ours, 'million/s', peer='the other tree', peer_value=theirs[0]))
      rows.append(row(f'median of the ratios, {workers} workers, {rate:g} requests/s a pair', ratio, 'times'))
    else:
      rows.append(row(name, ours, 'million/s'))
  return table, rows


def compare_sizes(few: int, many: int, rates: Iterable[float]) -> tuple[Table, list[dict]]:
  """The largest cluster against as many of the smallest as have its workers in all, this tree's, in turns."""
  clusters = many // few
  share = -(-_REQUESTS.value // clusters)
  table = Table(title=f'{many} workers against {clusters} times {few} with as many requests a pair')
  for column in ('requests/s a pair', f'mean batch of {many}', f'of {few}', f'{many} workers', f'{few}', 'ratio'):
    table.add_column(column, justify='right')
  rows = []
  for rate in rates:
    turns = []
    for _ in range(_REPEATS.value):
      whole = measure(HERE, serve_simulated, workers=many, rate=rate, requests=share * clusters)
      parts = measure(HERE, serve_simulated, workers=few, rate=rate, requests=share, clusters=clusters)
      for answer in (whole, parts):  # of other seeds, so of other lengths
        check_equal([answer], share * clusters)
      turns.append((whole, parts))
    batches = [f'{answer["batch"]:.1f}' for answer in turns[0]]
    speeds = [f'{statistics.median(speed(turn[side]) for turn in turns):.3f}' for side in (0, 1)]
    ratio = statistics.median(speed(whole) / speed(parts) for whole, parts in turns)
    table.add_row(f'{rate:g}', *batches, *speeds, f'{ratio:.2f}')
    rows.append(row(f'{many} workers against {few} at equal mean batch, {rate:g} requests/s a pair', ratio, 'times'))
  return table, rows


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  if not all(value.isdigit() and int(value) and int(value) % 2 == 0 for value in _WORKERS.value):
    raise app.UsageError(f'--workers is {_WORKERS.value}, expected even numbers of at least 2, e.g. 4,64.')
  sizes = sorted({int(value) for value in _WORKERS.value})
  if sizes[-1] % sizes[0]:
    raise app.UsageError(f'--workers is {_WORKERS.value}, expected the largest to be a multiple of the smallest.')
  try:
    rates = [float(value) for value in _RATES.value]
    trees = [HERE] if _BESIDE.value is None else [HERE, open_tree(_BESIDE.value)]
  except ValueError as error:
    raise app.UsageError(f'--rates is {_RATES.value} and --beside {_BESIDE.value}: {error}') from error
  if not all(0 < rate < math.inf for rate in rates):
    raise app.UsageError(f'--rates is {_RATES.value}, expected positive numbers, e.g. 20,2.')
  console = Console()
  table, rows = compare_trees(trees, [(rate, workers) for rate in rates for workers in sizes])
  console.print(table)
  if len(sizes) > 1:
    table, more = compare_sizes(sizes[0], sizes[-1], rates)
    console.print(table)
    rows += more
  save_rows(_JSON.value, rows)


if __name__ == '__main__':
  app.run(main)
