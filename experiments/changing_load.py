r"""Workers that change their roles as the load turns, beside every fixed split of the same workers.

python -m experiments.changing_load
python -m experiments.changing_load --seeds=3 --phase_s=60 --json=changing.json

`configs/changing_load_simulated.py` on the simulator: long prompts, then long answers, then long prompts again. Goodput
is requests a second within their limits, of the means over seeds.
"""

import statistics
import sys

from absl import app, flags
from rich.console import Console
from rich.table import Table

from configs.changing_load_simulated import get_config
from experiments.rows import row, save_rows
from pdjax import launch
from pdjax.metrics import Report

_SEEDS = flags.DEFINE_integer('seeds', 1, 'Seeds of the traffic, 0 and up.', lower_bound=1)
_PHASE_S = flags.DEFINE_float('phase_s', 60.0, 'Seconds of each of the three phases.', lower_bound=1.0)
_LOAD = flags.DEFINE_float('load', 1.0, 'Factor of the rates.', lower_bound=0.01)
_JSON = flags.DEFINE_string('json', None, 'Write rows of name, value, unit to this file.')

SPLITS = ('3P1D', '2P2D', '1P3D')
FOLLOWS = 'roles follow'


def serve(split: str, seed: int, *, follows: bool) -> Report:
  """The report of a run from a split on."""
  config = get_config(split, _PHASE_S.value, _LOAD.value, seed, follows=follows)
  return launch.simulate(config, keep_events=False).report


def main(_):
  runs = {split: [serve(split, seed, follows=False) for seed in range(_SEEDS.value)] for split in SPLITS}
  runs[FOLLOWS] = [serve('2P2D', seed, follows=True) for seed in range(_SEEDS.value)]
  table = Table(title=f'{runs[FOLLOWS][0].num_prompts} requests, long prompts, long answers, long prompts')
  for column in ('workers', 'goodput/s', 'within limits', 'p99 TTFT ms', 'p99 TPOT ms', 'changes of role'):
    table.add_column(column, justify='left' if column == 'workers' else 'right')
  rows, goodput = [], {}
  for name, reports in runs.items():
    goodput[name] = statistics.fmean(one.request_goodput or 0.0 for one in reports)
    share = statistics.fmean(one.goodput_share or 0.0 for one in reports)
    tails = [statistics.fmean(getattr(one, kind).p99_ms or 0.0 for one in reports) for kind in ('ttft', 'tpot')]
    changes = statistics.fmean(len(one.role_changes) for one in reports)
    table.add_row(name, f'{goodput[name]:.2f}', f'{share:.1%}', *(f'{tail:.0f}' for tail in tails), f'{changes:.1f}')
    rows.append(row(f'goodput, {name}', goodput[name], 'requests/s'))
  best = max(SPLITS, key=lambda split: goodput[split])
  console = Console()
  console.print(table)
  console.print(f'{goodput[FOLLOWS] / goodput[best]:.2f} times the best fixed split, {best}')
  rows.append(row('goodput of roles that follow over the best fixed split', goodput[FOLLOWS] / goodput[best], 'times'))
  if _JSON.value:
    save_rows(_JSON.value, rows)


if __name__ == '__main__':
  sys.exit(app.run(main))
