r"""Hit rates of a prefix cache over its capacity, on a recorded trace: LRU, and the best that is possible.

python -m experiments.replay_cache --trace=conversation_trace.jsonl
python -m experiments.replay_cache --trace=sessions.jsonl.gz --capacities=300k,1M,3M,inf --json=hits.json \
    --figure=hits.svg

What is counted, and what is best, `experiments/prefix_hits.py` says. The unit is the trace's own block.
"""

import contextlib
import math
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import cast

from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.prefix_hits import LRU, OPTIMUM, WAYS, Prompts, over_capacity, replay
from experiments.rows import row, save_rows
from pdjax.metrics import charts
from pdjax.workload import TraceFormat, read_trace

_TRACE = flags.DEFINE_string('trace', None, 'The trace, plain or compressed with gzip.')
_FORMAT = flags.DEFINE_enum('format', None, ['mooncake', 'bailian', 'weka'], 'Its format; told from its first line.')
_CAPACITIES = flags.DEFINE_list(
  'capacities', ['1M', '3M', '10M', '30M', '50M', 'inf'], 'Tokens that the cache holds, such as 500k, 3M or inf.'
)
_JSON = flags.DEFINE_string('json', None, 'Write rows of name, value, unit to this file.')
_PLOT = flags.DEFINE_string('figure', None, 'Draw the hit rates: a file that ends in .svg or .png.')

_SCALES = {'': 1, 'k': 10**3, 'M': 10**6, 'G': 10**9}


def parse_capacity(text: str) -> float:
  """A number of tokens, such as 500k, 3M, 2.5M, 1000000 or inf."""
  if text == 'inf':
    return math.inf
  if not (match := re.fullmatch(r'(\d+(?:\.\d+)?)([kMG]?)', text)):
    raise ValueError(f'the capacity {text!r} is not understood, expected a number of tokens such as 500k, 3M or inf.')
  return float(match[1]) * _SCALES[match[2]]


def _shown(capacity: float) -> str:
  for suffix, scale in reversed(_SCALES.items()):
    if scale <= capacity < math.inf:
      return f'{capacity / scale:g}{suffix}'
  return f'{capacity:g}'


def main(argv: list[str]) -> None:
  try:
    _replay(argv)
  except (OSError, ValueError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(1)


@contextlib.contextmanager
def _of(flag: str, value: object) -> Iterator[None]:
  """Name a flag in what is wrong with its value."""
  try:
    yield
  except (OSError, ValueError) as error:
    raise ValueError(f'--{flag}={value}: {error}') from error


def _replay(argv: list[str]) -> None:
  """Do what the flags ask for.

  Raises:
    OSError: if a result cannot be written.
    ValueError: if the flags, or the trace, are not what they are to be; it names the flag.
  """
  if len(argv) > 1:
    raise ValueError(f'unexpected arguments {argv[1:]}; options begin with --.')
  if _TRACE.value is None:
    raise ValueError('--trace is missing; give a file, e.g. --trace=conversation_trace.jsonl.')
  if _PLOT.value is not None and not _PLOT.value.endswith(('.svg', '.png')):
    raise ValueError(f'--figure={_PLOT.value} wants a name that ends in .svg or .png.')
  with _of('capacities', ','.join(_CAPACITIES.value)):
    capacities = sorted({parse_capacity(text) for text in _CAPACITIES.value})
    if not capacities:
      raise ValueError('there is none, expected numbers of tokens such as 500k,3M,inf.')
  if _PLOT.value is not None and capacities == [math.inf]:
    raise ValueError(f'--figure draws hits by size, and --capacities is {_CAPACITIES.value}; name a finite one too.')
  for flag, path in (('json', _JSON.value), ('figure', _PLOT.value)):  # before minutes are spent
    if path is not None and (pathlib.Path(path).is_dir() or not pathlib.Path(path).absolute().parent.is_dir()):
      raise ValueError(f'--{flag}={path} is no file in a folder that is there; name another, or make the folder.')
  with _of('trace', _TRACE.value):
    trace = read_trace(_TRACE.value, cast(TraceFormat | None, _FORMAT.value))
    prompts = Prompts.of(trace.requests)
  with _of('capacities', ','.join(_CAPACITIES.value)):
    attainable, found = replay(prompts, capacities)
  num_blocks = sum(map(len, prompts.blocks))
  said = (
    f'{len(trace.requests):,} prompts, {sum(prompts.lens):,} tokens, {num_blocks:,} blocks of {prompts.block_size}, '
    f'{prompts.num_distinct:,} of them distinct'
  )
  table = Table(title=f'hits in {trace.name}: {said}')
  columns = ('of tokens', 'of possible', 'of blocks')
  for column in ('tokens\nheld', *(f'{way}\n{column}' for way in WAYS for column in columns)):
    table.add_column(column, justify='right')
  rows = []
  for capacity, rates in found.items():
    cells = [
      f'{share:.2%}'
      for rate in rates.values()
      for share in (rate.tokens, rate.tokens / attainable.tokens if attainable.tokens else math.nan, rate.blocks)
    ]
    table.add_row(_shown(capacity), *cells)
    for what, unit in (('tokens', 'of input tokens'), ('blocks', 'of blocks')):
      ours, best = (getattr(rates[way], what) for way in (LRU, OPTIMUM))
      rows.append(row(f'hits, LRU, {_shown(capacity)} tokens', ours, unit, peer='the optimum', peer_value=best))
  Console().print(table)
  save_rows(_JSON.value, rows)
  if _PLOT.value is not None:
    curves = {way: [(held, rates[way].tokens) for held, rates in found.items() if held < math.inf] for way in WAYS}
    chart = over_capacity(curves, attainable.tokens, f'Hits in {trace.name} by the size of the cache', said)
    print(f'{charts.save(chart, _PLOT.value)} is drawn')


if __name__ == '__main__':
  app.run(main)
