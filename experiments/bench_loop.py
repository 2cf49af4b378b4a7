r"""The cost of a turn of the host loop: the policy, the state and the log, with a backend that does nothing.

python -m experiments.bench_loop
python -m experiments.bench_loop --batch=128 --json=loop.json
python -m experiments.bench_loop --batch=256 --beside=../before
python -m experiments.bench_loop --batch=256 --cached_blocks=100000
python -m experiments.bench_loop --decide

Every decode worker holds `--batch` sequences. A turn ends the oldest step of every worker, applies its tokens, asks the
policy, and hands the next step over: what a device would wait for if it were infinitely fast. Events are kept, and
somebody reads all that is delivered. With `--beside` another checkout's `turn_seconds` of one worker of each role is
measured in turns with this one's, each with its own backend, in processes of their own.

With `--cached_blocks` requests also come and go: each has 65 tokens and gets 512, so that a batch of 256 fills 4 blocks
of 64 tokens a turn and every other turn one ends and another begins. Without a prefix cache, with one that begins
empty, and with one that holds so many blocks on either worker and gives the oldest of them away: these take turns.

With `--decide` only `decide` is timed, of 8 and of 64 workers, 10,000 requests waiting or 100, and 1,000 that decode:
where it starts nothing, and what each prompt adds that it starts.
"""

import statistics
import tempfile

from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.deciding import decide_seconds
from experiments.host_turns import coming_and_going_seconds, turn_seconds
from experiments.rows import row, save_rows
from experiments.two_trees import HERE, in_turns, open_tree
from pdjax.policies import (
  Colocated,
  Disaggregated,
  EarliestDeadline,
  RejectLate,
  ShortestFirst,
  SoonestFirstToken,
)
from pdjax.serving import Policy
from pdjax.types import (
  WorkerSpec,
  colocated_pool,
  decode_pool,
  prefill_pool,
)

_BATCH = flags.DEFINE_integer('batch', 32, 'Sequences that decode at once on each worker.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 500, 'Tokens of each request, so about as many turns.', lower_bound=10)
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Runs of which the median counts.', lower_bound=1)
_BESIDE = flags.DEFINE_string('beside', None, 'The root of another checkout, measured in turns with this one.')
_CACHED = flags.DEFINE_integer(
  'cached_blocks', None, 'Measure turns beside so many cached blocks, and beside none, instead.', lower_bound=0
)
_DECIDE = flags.DEFINE_bool('decide', False, 'Measure decisions of policies and their parts instead.')
_JSON = flags.DEFINE_string('json', None, 'Write rows of name, value, unit to this file.')

_RUNNING = 1000  # requests that decode beside a decision


def one_and_one_seconds(batch: int, steps: int) -> list[float]:
  """A tree's own `turn_seconds` of one worker of each role; it names nothing of this file."""
  from experiments.bench_loop import turn_seconds
  from pdjax.policies import Disaggregated
  from pdjax.types import decode_pool, prefill_pool

  sizes = {'num_pages': 512 * batch, 'max_sequences': batch}
  return turn_seconds(Disaggregated(), prefill_pool(1, **sizes) + decode_pool(1, **sizes), batch, steps)


def p99(seconds: list[float]) -> float:
  """The value that one in a hundred reaches."""
  return sorted(seconds)[int(0.99 * len(seconds))]


def beside(path: str) -> None:
  """Measure one worker of each role in turns with another tree; print, and save rows."""
  try:
    other = open_tree(path)
  except ValueError as error:
    raise app.UsageError(f'--beside: {error}') from error
  batch = _BATCH.value
  turns = in_turns([HERE, other], _REPEATS.value, one_and_one_seconds, batch=batch, steps=_STEPS.value)
  table = Table(title=f'a turn of the host loop, 1P1D, {batch} sequences, medians of {len(turns)} runs in turns')
  for column in ('ms', 'this tree', 'the other', 'ratio'):
    table.add_column(column, justify='left' if column == 'ms' else 'right')
  rows = []
  for name, figure in (('mean', statistics.fmean), ('median', statistics.median), ('p99', p99)):
    ours, theirs = (statistics.median(figure(turn[tree]) for turn in turns) * 1e3 for tree in (0, 1))
    ratio = statistics.median(figure(here) / figure(there) for here, there in turns)
    table.add_row(name, f'{ours:.3f}', f'{theirs:.3f}', f'{ratio:.2f}')
    rows.append(row(f'{name} turn, 1P1D, batch {batch}', ours, 'ms', peer='the other tree', peer_value=theirs))
    rows.append(row(f'median of the ratios, {name} turn, 1P1D, batch {batch}', ratio, 'times'))
  tails = [statistics.median(p99(turn[tree]) / statistics.median(turn[tree]) for turn in turns) for tree in (0, 1)]
  table.add_row('p99 / median', *(f'{tail:.2f}' for tail in tails), '')
  rows.append(row(f'p99 of turns by their median, 1P1D, batch {batch}', tails[0], 'times'))
  Console().print(table)
  save_rows(_JSON.value, rows)


def beside_cached(num_blocks: int) -> None:
  """Measure turns without a cache, with an empty one, and beside so many cached blocks; print, and save rows."""
  batch, steps = _BATCH.value, _STEPS.value
  cases: dict[str, int | None] = {'no cache': None, 'none cached': 0, f'{num_blocks:,} cached': num_blocks}
  seconds: dict[str, list[float]] = {name: [] for name in cases}
  for number in range(_REPEATS.value):
    for name in list(cases)[:: 1 if number % 2 == 0 else -1]:
      mean_s, blocks = coming_and_going_seconds(batch, steps, cases[name], num_blocks)
      seconds[name].append(mean_s)
  without, empty, full = seconds.values()
  table = Table(title=f'a turn of the host loop, 1P1D, {batch} sequences, means, medians of {len(full)} runs in turns')
  for column in ('blocks', 'µs a turn', 'more than without a cache', 'more than with none cached'):
    table.add_column(column, justify='left' if column == 'blocks' else 'right')
  rows = []
  for name, found in seconds.items():
    cells = [f'{1e6 * statistics.median(found):.1f}']
    for other in (without, empty):
      more = sorted(1e6 * (ours - theirs) for ours, theirs in zip(found, other, strict=True))
      cells.append(f'{statistics.median(more):.1f} ({more[0]:.1f} to {more[-1]:.1f})')
    table.add_row(name, *cells)
    rows.append(row(f'mean turn, 1P1D, batch {batch}, {name}', 1e6 * statistics.median(found), 'µs'))
  for name, other in (('no cache', without), ('none cached', empty)):
    more_s = statistics.median(ours - theirs for ours, theirs in zip(full, other, strict=True))
    rows.append(row(f'more a turn with {num_blocks:,} cached than with {name}, batch {batch}', 1e6 * more_s, 'µs'))
  console = Console()
  console.print(table)
  console.print(f'{blocks:.2f} blocks are stored a turn on both workers')
  save_rows(_JSON.value, rows)


def decide() -> None:
  """Measure decisions, starting nothing and starting prompts; print, and save rows."""
  policies = {
    'first come, first served': Disaggregated(),
    'shortest first, aged': Disaggregated(order_by=ShortestFirst()),
    'earliest deadline': Disaggregated(order_by=EarliestDeadline()),
    'soonest first token': Disaggregated(decider=SoonestFirstToken()),
    'rejecting who is late': Disaggregated(admission=RejectLate()),
  }
  table = Table(title=f'a decision, {_RUNNING:,} requests decode, medians of {_REPEATS.value} runs')
  for column in ('policy', 'workers', 'waiting', 'starting nothing, ms', 'prompts started', 'µs a prompt'):
    table.add_column(column, justify='left' if column == 'policy' else 'right')
  rows = []
  for name, policy in policies.items():
    for workers in (8, 64):
      for waiting in (100, 10_000):
        runs = [decide_seconds(policy, workers, waiting, _RUNNING, 51) for _ in range(_REPEATS.value)]
        idle_s = statistics.median(run.idle_s for run in runs)
        each_s = statistics.median((run.starting_s - run.idle_s) / max(run.prompts, 1) for run in runs)
        prompts, each = runs[0].prompts, f'{each_s * 1e6:.1f}'
        table.add_row(name, str(workers), f'{waiting:,}', f'{idle_s * 1e3:.4f}', str(prompts), each)
        about = f'{name}, {workers} workers, {waiting} waiting'
        rows.append(row(f'a decision that starts nothing, {about}', idle_s * 1e3, 'ms'))
        rows.append(row(f'a prompt that a decision starts, {about}', each_s * 1e6, 'µs'))
  Console().print(table)
  save_rows(_JSON.value, rows)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  if _BESIDE.value is not None:
    beside(_BESIDE.value)
    return
  if _CACHED.value is not None:
    beside_cached(_CACHED.value)
    return
  if _DECIDE.value:
    decide()
    return
  batch = _BATCH.value
  sizes = {'num_pages': 512 * batch, 'max_sequences': batch}
  one_and_one = prefill_pool(1, **sizes) + decode_pool(1, **sizes)
  cases: dict[str, tuple[Policy, tuple[WorkerSpec, ...]]] = {
    '1P1D': (Disaggregated(), one_and_one),
    '1P1D, log in a file': (Disaggregated(), one_and_one),
    '1P1D, 8 steps fused': (Disaggregated(decode_steps=8), one_and_one),
    '4P4D': (Disaggregated(), prefill_pool(4, **sizes) + decode_pool(4, **sizes)),
    '1 colocated': (Colocated(), colocated_pool(1, **sizes)),
  }
  table = Table(title=f'a turn of the host loop, {batch} sequences on each decode worker')
  for column in ('cluster', 'median ms', 'p99 ms', 'µs a sequence'):
    table.add_column(column, justify='left' if column == 'cluster' else 'right')
  rows = []
  for name, (policy, workers) in cases.items():
    with tempfile.NamedTemporaryFile() as file:
      path = file.name if 'file' in name else None
      runs = [turn_seconds(policy, workers, batch, _STEPS.value, path) for _ in range(_REPEATS.value)]
    median_s = statistics.median(statistics.median(run) for run in runs)
    p99_s = statistics.median(p99(run) for run in runs)
    sequences = batch * sum(worker.role.decodes for worker in workers)
    table.add_row(name, f'{median_s * 1e3:.3f}', f'{p99_s * 1e3:.3f}', f'{median_s / sequences * 1e6:.2f}')
    rows.append(row(f'turn, {name}, batch {batch}', median_s * 1e3, 'ms'))
  Console().print(table)
  save_rows(_JSON.value, rows)


if __name__ == '__main__':
  app.run(main)
