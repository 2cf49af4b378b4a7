r"""Serves for minutes while everything fails, and looks at each answer: no wrong token, no lost page, no hang.

python -m experiments.soak --minutes=10
python -m experiments.soak --minutes=1 --seed=7 --only=pass_refused,transfer_stalls --json=soak.json

A tiny model with random weights on virtual CPU devices, in float32, disaggregated (2P2D) and colocated (2C) in turns,
each in live sessions of a few waves: users come at random moments, read in threads and in asyncio, cancel, and go on
with chats; answers are greedy or drawn from a seed, of one sample or several, cut short by stop strings and tokens.
Meanwhile transfers fail, stall and come damaged, late or twice, links are slow or stand still, steps are refused,
fail, stall and meet NaN, workers are lost in prefill, in decode and while KV is handed over, pools are small, and the
disk of the log is full. Everything is answered by a cluster that nobody disturbs, too: tokens and log probabilities
must be the same, in the stream as in its completion, and errors come only of NaN, or where the fault settings allow
them. Once nobody is served every page, slot, byte of staging and transfer is free, a log that could not be written says
from when on it is incomplete, and from session to session device arrays, open files and threads become no more.

A fault is counted as it acts, not as it is drawn: a step that was to fail may never begin.

The seed is printed. With it the same is asked for in the same order; when what fails depends on the time that things
take, so that a failure comes again as far as that allows. The exit status is 1 if anything was wrong, or if nothing
happened for --patience_s; what was open then is told, with the stack of every thread.
"""

import faulthandler
import os
import random
import sys

from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from experiments.faults.full_disk import can_fill_disk
from experiments.faults.kinds import KINDS
from experiments.rows import row, save_rows
from experiments.soaking.clusters import Alone, FaultyCluster
from experiments.soaking.soak import Soak, Tally
from experiments.soaking.watch import Hang, describe, watch

_MINUTES = flags.DEFINE_float('minutes', 10.0, 'How long; what was begun then is served to its end.', lower_bound=0.0)
_SEED = flags.DEFINE_integer('seed', None, 'Of all that is drawn; drawn itself by default.', lower_bound=0)
_ONLY = flags.DEFINE_list('only', [], f'Faults to inject, all by default: {", ".join(KINDS)}.')
_PATIENCE_S = flags.DEFINE_float(
  'patience_s', 60.0, 'Seconds without any change that count as a hang.', lower_bound=1.0
)
_EVERY_S = flags.DEFINE_float('every_s', 5.0, 'Seconds between two lines.', lower_bound=0.1)
_JSON = flags.DEFINE_string('json', None, 'Write rows of name, value, unit to this file.')

_WRONG = {
  'wrong tokens': 'tokens that an undisturbed run does not have',
  'stream differs': 'streams with other tokens or text than their completion',
  'log probabilities': 'samples with other log probabilities than an undisturbed run',
  'wrong end': 'requests that ended otherwise than they should',
  'leak': 'pages, slots, staging, transfers, requests, threads, files or device arrays that are not free',
  'log': 'logs that are torn, or lack lines and do not say from when on',
  'breakdown': 'sessions or readers that broke down',
}


def print_tally(console: Console, tally: Tally) -> None:
  """Print what went wrong on purpose and what was wrong as tables."""
  faults = Table(title='faults', box=None)
  for column in ('kind', 'acted', 'what'):
    faults.add_column(column, justify='right' if column == 'acted' else 'left')
  for name, kind in KINDS.items():
    faults.add_row(name, f'{tally.faults[name]:,}', kind.what)
  wrong = Table(title='what must not be', box=None)
  wrong.add_column('count', justify='right')
  wrong.add_column('what')
  for name, what in _WRONG.items():
    wrong.add_row(f'{tally.counts[name]:,}', what)
  ends = ', '.join(f'{count:,} {reason}' for reason, count in tally.ends.most_common())
  console.print(faults, wrong)
  console.print(
    f'{tally.sessions:,} sessions, {tally.requests:,} requests, {tally.tokens:,} tokens; samples by end: {ends}.'
  )
  console.print(f'{tally.late:,} transfers were late by themselves; on a machine that has time there should be none.')


def rows(tally: Tally, seed: int, minutes: float) -> list[dict]:
  """The same as rows."""
  found = [row('seed', seed, 'count'), row('minutes', minutes, 'min'), row('requests ended', tally.requests, 'count')]
  found += [row('tokens delivered', tally.tokens, 'count'), row('faults injected', tally.faults.total(), 'count')]
  found += [row(f'injected, {name}', tally.faults[name], 'count') for name in KINDS]
  found.append(row('transfers late by themselves', tally.late, 'count'))
  return found + [row(name, tally.counts[name], 'count') for name in _WRONG]


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  kinds = _ONLY.value or list(KINDS)
  if unknown := sorted(set(kinds) - set(KINDS)):
    raise app.UsageError(f'--only names {", ".join(unknown)}, expected some of {", ".join(KINDS)}.')
  if 'log_full' in _ONLY.value and not can_fill_disk():
    raise app.UsageError('--only names log_full, but this system has no /dev/full; leave it out.')
  seed = random.SystemRandom().randrange(2**32) if _SEED.value is None else _SEED.value
  logging.set_verbosity(logging.FATAL)  # a full disk is told of each time
  console = Console(highlight=False, markup=False, soft_wrap=True)
  console.print(f'seed {seed}')
  clusters = [FaultyCluster('2P2D'), FaultyCluster('2C')]
  soak = Soak(clusters, Alone(), seed, kinds, say=console.print)
  hang = None
  try:
    watch(soak, 60 * _MINUTES.value, console.print, _EVERY_S.value, _PATIENCE_S.value)
  except Hang as error:
    hang = error
    console.print(f'HANG: {error}')
    faulthandler.dump_traceback(all_threads=True)
  console.print(f'in all: {describe(soak.tally)}')
  print_tally(console, soak.tally)
  save_rows(_JSON.value, [*rows(soak.tally, seed, _MINUTES.value), row('hangs', int(hang is not None), 'count')])
  console.print('Something was wrong; see above.' if hang or not soak.tally.well else 'Nothing was wrong.')
  if hang is not None:  # its threads would be waited for
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
  sys.exit(0 if soak.tally.well else 1)


if __name__ == '__main__':
  app.run(main)
