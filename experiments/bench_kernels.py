r"""What the kernels cost on TPUs: timed on one that is here, else compiled ahead and read from the compiler.

python -m experiments.bench_kernels                                  # the table of pallas_kernels/README.md
python -m experiments.bench_kernels --only=decode --devices=v6e,tpu7x
python -m experiments.bench_kernels --anchors                        # published kernels beside ours
python -m experiments.bench_kernels --tune                           # try parameters, keep the best in tuning.json
python -m experiments.bench_kernels --compile                        # every kernel at every shape, for every device
python -m experiments.bench_kernels --write_budgets                  # what tests/pallas_kernels/budgets.json holds

Percentages are of what the matrix units or the memory allow; over 100, the compiler's model of copies is more generous
than the memory. They are estimates unless a device is here, and compare kernels, not chips.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import pathlib
import re
import statistics
import subprocess
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments import kernel_problems
from experiments.kernel_problems import Problem
from experiments.rows import row, save_rows
from pallas_kernels import devices, static_cost

_ONLY = flags.DEFINE_string('only', '', 'A regular expression: rows whose name it matches.')
_DEVICES = flags.DEFINE_list('devices', ['v5e', 'v6e', 'v5p', 'tpu7x'], 'TPUs to compile for, if none is here.')
_ANCHORS = flags.DEFINE_boolean('anchors', False, "Published kernels' figures beside ours.")
_TUNE = flags.DEFINE_boolean('tune', False, 'Try all parameters of each row and write the best to tuning.json.')
_COMPILE = flags.DEFINE_boolean('compile', False, 'Only compile, every kernel at every shape.')
_WRITE_BUDGETS = flags.DEFINE_boolean(
  'write_budgets', False, 'Measure the small cases that tests look at, and store them.'
)
_JOBS = flags.DEFINE_integer('jobs', 2, 'Compilers at once.', lower_bound=1)
_REPEATS = flags.DEFINE_integer('repeats', 20, 'Calls of which the median counts, on a TPU.', lower_bound=1)
_JSON = flags.DEFINE_string('json', None, 'Write rows of name, value, unit to this file.')


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  console = Console()
  problems = [problem for problem in kernel_problems.BARS if re.search(_ONLY.value, problem.name)]
  if not problems and not _COMPILE.value:
    names = '\n  '.join(problem.name for problem in kernel_problems.BARS)
    raise app.UsageError(f'--only={_ONLY.value} matches none of\n  {names}')
  here = devices.current()
  if _WRITE_BUDGETS.value:
    write_budgets(console)
  elif _COMPILE.value:
    compile_all(console)
  elif here.platform == 'tpu':
    time_all(console, problems, here)
  elif _TUNE.value:
    tune(console, problems)
  else:
    estimate_all(console, problems)


def estimate_all(console: Console, problems: list[Problem]) -> None:
  """Compile ahead for every device and print what the compiler says."""
  names = _DEVICES.value
  table = Table(title=f'% of the bound, bundles in thousands; estimates of libtpu {static_cost.LIBTPU}')
  table.add_column('problem')
  for name in names:
    table.add_column(name, justify='right')
  rows: list[dict[str, Any]] = []
  costs = _measure_all([(problem, name) for problem in problems for name in names])
  for problem in problems:
    cells = []
    for name in names:
      cost = costs[problem.name, name]
      if isinstance(cost, str):
        cells.append(cost[:60])
        continue
      bar = problem.bars.get(name)
      mark = '' if bar is None or cost.percent is None else ' ok' if cost.percent >= bar else f' < {bar}'
      cells.append(f'{cost.percent or "-"}{mark}  {cost.bundles / 1000:.1f}k')
      rows.append(row(f'{problem.name} on {name}', cost.percent or 0.0, '% of the bound', peer='bar', peer_value=bar))
    table.add_row(problem.name, *cells)
  console.print(table)
  if _ANCHORS.value:
    rows += _anchors(console, names)
  save_rows(_JSON.value, rows)


def _measure_all(wanted: list[tuple[Problem, str]]) -> dict[tuple[str, str], static_cost.Cost | str]:
  def measure(pair: tuple[Problem, str]) -> static_cost.Cost | str:
    problem, device = pair
    try:
      return static_cost.measure(device, problem.case, problem.arguments)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool:
    costs = pool.map(measure, wanted)
    return {(problem.name, device): cost for (problem, device), cost in zip(wanted, costs, strict=True)}


def _anchors(console: Console, names: list[str]) -> list[dict[str, Any]]:
  """Published kernels, as they come and with the blocks that did best."""
  table = Table(title='published kernels, % of the same bound')
  table.add_column('kernel')
  for name in names:
    table.add_column(name, justify='right')
  rows = []
  costs = _measure_all([(problem, name) for problem in kernel_problems.ANCHORS for name in names])
  for problem in kernel_problems.ANCHORS:
    cells = []
    for name in names:
      cost = costs[problem.name, name]
      percent = cost if isinstance(cost, str) else cost.percent
      cells.append(f'{percent}' if isinstance(percent, float) else 'no figure')
      if isinstance(percent, float):
        rows.append(row(f'{problem.name} on {name}', percent, '% of the bound'))
    table.add_row(problem.name, *cells)
  console.print(table)
  return rows


def tune(console: Console, problems: list[Problem]) -> None:
  """Measure each problem with all parameters that are worth a try, and keep the best and the best small form."""
  for problem in problems:
    for name in _DEVICES.value:
      tries = [
        dataclasses.replace(problem, name=json.dumps(config), arguments={**problem.arguments, 'config': config})
        for config in _candidates(problem, devices.by_name(name))
      ]
      costs = _measure_all([(one, name) for one in tries])
      found = {one.name: costs[one.name, name] for one in tries}
      good = {config: cost for config, cost in found.items() if not isinstance(cost, str) and cost.cycles}
      if not good:
        console.print(f'{problem.name} on {name}: nothing runs; {next(iter(found.values()), "no candidates")}')
        continue
      best = min(good, key=lambda config: _merit(good[config]))
      small = [config for config in good if good[config].bundles < kernel_problems.SMALL_BUNDLES]
      kept = [best]
      if small and best not in small:
        kept.append(min(small, key=lambda config: _merit(good[config])))
      _keep(problem, name, [(json.loads(config), good[config]) for config in kept])
      for config in kept:
        console.print(f'{problem.name} on {name}: {good[config].percent} % {good[config].bundles} bundles {config}')


def _candidates(problem: Problem, device: devices.Device) -> list[dict[str, Any]]:
  """The parameters to try; where a kernel takes the number of cores as one of them, that of the device."""
  cores = {'cores': device.cores} if problem.build().kernel == 'quantized_matmul' else {}
  return [{**config, **cores} for config in problem.candidates]


def _merit(cost: static_cost.Cost) -> tuple[float, int]:
  """Less is better, down to where nothing but the memory can count, whose model is up to 40 % too generous."""
  return max(cost.cycles or 0, cost.bound_cycles / 1.4), cost.bundles


def _keep(problem: Problem, device: str, found: list[tuple[dict[str, Any], static_cost.Cost]]) -> None:
  """Put rows into the kernel's tuning.json in place of those of the same problem."""
  case = problem.build()
  path = pathlib.Path(kernel_problems.__file__).parents[1] / 'pallas_kernels' / case.kernel / 'tuning.json'
  rows = json.loads(path.read_text(encoding='utf-8')) if path.exists() else []
  rows = [old for old in rows if (old['device'], old['problem']) != (device, case.facts)]
  for config, cost in found:
    figures = {'percent': cost.percent, 'bundles': cost.bundles, 'spills': cost.spills, 'libtpu': static_cost.LIBTPU}
    rows.append({'device': device, 'problem': case.facts, 'config': config, 'figures': figures})
  rows.sort(key=lambda row: (row['device'], json.dumps(row['problem'], sort_keys=True)))
  text = ',\n'.join(f'  {json.dumps(one)}' for one in rows)
  path.write_text(f'[\n{text}\n]\n', encoding='utf-8')


def compile_all(console: Console) -> None:
  """Compile every kernel at every shape for every device; print what fails."""
  failed = 0
  problems = [problem for problem in kernel_problems.shapes() if re.search(_ONLY.value, problem.name)]
  product = list(itertools.product(_DEVICES.value, problems))
  for name, problem in product:
    try:
      static_cost.compile_for(devices.by_name(name), problem.build())
    except Exception as error:  # the compiler's refusal is the result
      failed += 1
      console.print(f'{name} {problem.name}: {type(error).__name__}: {str(error)[:300]}')
  console.print(f'{len(product)} programs, of which {failed} do not compile.')


def write_budgets(console: Console) -> None:
  """Measure the canaries."""
  budgets = {}
  for problem, device in kernel_problems.CANARIES:
    cost = static_cost.measure(device, problem.case, problem.arguments)
    budgets[f'{problem.name} on {device}'] = {
      'device': device, 'case': problem.case, 'arguments': problem.arguments,
      'cycles': cost.cycles, 'bundles': cost.bundles, 'temp_bytes': cost.temp_bytes,
    }  # fmt: skip
    console.print(f'{problem.name} on {device}: {cost.cycles} cycles, {cost.bundles} bundles')
  path = pathlib.Path(kernel_problems.__file__).parents[1] / 'tests' / 'pallas_kernels' / 'budgets.json'
  path.write_text(json.dumps(budgets, indent=2) + '\n', encoding='utf-8')


def time_all(console: Console, problems: list[Problem], device: devices.Device) -> None:
  """Time the problems on the TPU that is here."""
  table = Table(title=f'on {device.name}, median of {_REPEATS.value}')
  for column in ('problem', 'ms', '% of the bound'):
    table.add_column(column, justify='right')
  rows = []
  for problem in (*problems, *(kernel_problems.TIMED_ANCHORS if _ANCHORS.value else ())):
    try:
      case = problem.build()
      seconds = _seconds(case)
    except Exception as error:  # a published kernel may not run here, or not be installed
      console.print(f'{problem.name}: {type(error).__name__}: {str(error)[:200]}')
      continue
    percent = 100 * max(case.least_seconds(device)) / seconds
    table.add_row(problem.name, f'{1000 * seconds:.3f}', f'{percent:.1f}')
    rows.append(row(f'{problem.name} on {device.name}', percent, '% of the bound'))
  console.print(table)
  save_rows(_JSON.value, rows)


def _seconds(case: static_cost.Case) -> float:
  arguments = [
    case.integers[place]() if place in case.integers else jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), argument)
    for place, argument in enumerate(case.arguments)
  ]
  run = jax.jit(case.function, donate_argnums=case.donated)
  times = []
  for _ in range(_REPEATS.value + 1):
    start = time.perf_counter()
    out = jax.block_until_ready(run(*arguments))
    times.append(time.perf_counter() - start)
    for place in case.donated:
      arguments[place] = out
  return statistics.median(times[1:])  # the first compiles


if __name__ == '__main__':
  app.run(main)
