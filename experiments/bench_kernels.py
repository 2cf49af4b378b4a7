r"""The cost of the kernels on TPUs: timed on one that is here, else compiled ahead and read from the compiler.

python -m experiments.bench_kernels                                  # the table of pallas_kernels/README.md
python -m experiments.bench_kernels --only=decode --devices=v6e,tpu7x
python -m experiments.bench_kernels --anchors                        # published kernels beside ours
python -m experiments.bench_kernels --tune                           # try parameters, keep the best in tuning.json
python -m experiments.bench_kernels --compile                        # every kernel at every shape, for every device
python -m experiments.bench_kernels --compile --sample=200           # some of them, alike from each kernel and device
python -m experiments.bench_kernels --write_budgets                  # what tests/pallas_kernels/budgets.json holds

Percentages are of what the matrix units or the memory allow; over 100, the compiler's model of copies is more generous
than the memory. They are estimates unless a device is here, and compare kernels, not chips.
"""

import concurrent.futures
import dataclasses
import datetime
import itertools
import json
import logging
import pathlib
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments import kernel_problems
from experiments.kernel_problems import SMALL_BUNDLES, Problem
from experiments.rows import row, save_rows
from pallas_kernels import devices, static_cost, tuning
from pdjax.types.json_text import json_text

_ONLY = flags.DEFINE_string('only', '', 'A regular expression: rows whose name it matches.')
_DEVICES = flags.DEFINE_list('devices', ['v5e', 'v6e', 'v5p', 'tpu7x'], 'TPUs to compile for, if none is here.')
_ANCHORS = flags.DEFINE_boolean('anchors', False, "Published kernels' figures beside ours.")
_TUNE = flags.DEFINE_boolean('tune', False, 'Try all parameters of each row and write the best to tuning.json.')
_COMPILE = flags.DEFINE_boolean('compile', False, 'Only compile, every kernel at every shape.')
_SAMPLE = flags.DEFINE_integer(
  'sample',
  None,
  'With --compile: only so many, as many of each kernel for each device, the same ones each time.',
  lower_bound=1,
)
_WRITE_BUDGETS = flags.DEFINE_boolean(
  'write_budgets', False, 'Measure the small cases that tests look at, and store them.'
)
_JOBS = flags.DEFINE_integer('jobs', 2, 'Compilers at once.', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'Another one takes another sample.')
_REPEATS = flags.DEFINE_integer('repeats', 20, 'Runs of calls of which the median counts, on a TPU.', lower_bound=1)
_JSON = flags.DEFINE_string('json', None, 'Write rows of name, value, unit to this file.')

_CALLS = 10  # in a row: starting a call is hidden behind the one before


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
  elif _TUNE.value and here.platform == 'tpu':
    tune(console, problems, (here.name,), timed)
  elif _TUNE.value:
    tune(console, problems, _DEVICES.value, estimated, _JOBS.value)
  elif here.platform == 'tpu':
    time_all(console, problems, here)
  else:
    estimate_all(console, problems)


# ---------------------------------------------------------------------------- estimates


def estimate_all(console: Console, problems: Sequence[Problem]) -> None:
  """Compile ahead for every device and print what the compiler says."""
  names = _DEVICES.value
  table = Table(title=f'% of the bound, bundles in thousands; estimates of libtpu {static_cost.LIBTPU}')
  table.add_column('problem')
  for name in names:
    table.add_column(name, justify='right')
  shown = [one for problem in problems for one in (problem, *(_beside(problem) if _ANCHORS.value else ()))]
  costs = _measure_all([(problem, name) for problem in shown for name in names])
  rows: list[dict[str, Any]] = []
  reasons = []
  for problem in shown:
    cells = []
    for name in names:
      cost = costs[problem.name, name]
      if isinstance(cost, str) or cost.percent is None:
        reasons.append(f'{problem.name} on {name}: {cost if isinstance(cost, str) else cost.failure}')
      if isinstance(cost, str):
        cells.append('-')
        continue
      bar = problem.bars.get(name)
      mark = '' if bar is None or cost.percent is None else ' ok' if cost.percent >= bar else f' < {bar}'
      cells.append(f'{cost.percent or "-"}{mark}  {cost.bundles / 1000:.1f}k')
      rows.append(row(f'{problem.name} on {name}', cost.percent or 0.0, '% of the bound', peer='bar', peer_value=bar))
    table.add_row(f'  {problem.name}' if problem.beside else problem.name, *cells)
  console.print(table)
  if reasons:
    console.print('No figure:', *reasons, sep='\n  ', markup=False, highlight=False)
  save_rows(_JSON.value, rows)


def _beside(problem: Problem) -> list[Problem]:
  return [anchor for anchor in kernel_problems.ANCHORS if anchor.beside == problem.name]


def _measure_all(wanted: list[tuple[Problem, str]]) -> dict[tuple[str, str], static_cost.Cost | str]:
  with concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool:
    costs = pool.map(lambda pair: _measure(*pair), wanted)
    return {(problem.name, device): cost for (problem, device), cost in zip(wanted, costs, strict=True)}


def _measure(problem: Problem, device: str) -> static_cost.Cost | str:
  try:
    return static_cost.measure(device, problem.case, problem.arguments)
  except (RuntimeError, subprocess.TimeoutExpired) as error:
    return str(error)


# ---------------------------------------------------------------------------- parameters


@dataclasses.dataclass(frozen=True)
class Figure:
  """The figures of one choice of parameters."""

  merit: tuple[float, ...]  # less is better
  figures: Mapping[str, Any]  # as the table of parameters tells them
  small: bool = True  # whether it needs no smaller form beside it


Measure = Callable[[Problem, str], 'Figure | str']  # a problem on a device, or why there is no figure


def tune(
  console: Console,
  problems: Sequence[Problem],
  names: Sequence[str],
  measure: Measure,
  jobs: int = 1,
  tables: pathlib.Path = pathlib.Path(static_cost.__file__).parent,
) -> None:
  """Measure problems with all parameters that are worth a try, and keep the best of each, and the best small form.

  Args:
    console: For what was found.
    problems: Those to tune.
    names: The devices.
    measure: `estimated`, or `timed` where the device is here, which then is the only one of `names`.
    jobs: Measurements at once.
    tables: The folder of which `<kernel>/tuning.json` is written.
  """
  for problem in problems:
    for name in names:
      tries = {
        json.dumps(config): dataclasses.replace(problem, arguments={**problem.arguments, 'config': config})
        for config in _candidates(problem, devices.by_name(name))
      }
      if not tries:
        continue
      with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        found = dict(zip(tries, pool.map(measure, tries.values(), itertools.repeat(name)), strict=True))
      good = {config: figure for config, figure in found.items() if not isinstance(figure, str)}
      if not good:
        console.print(f'{problem.name} on {name}: nothing runs; {next(iter(found.values()))}', markup=False)
        continue
      best = min(good, key=lambda config: good[config].merit)
      kept = [best]
      if not good[best].small and any(figure.small for figure in good.values()):
        kept.append(min((config for config in good if good[config].small), key=lambda config: good[config].merit))
      if not _keep(problem, name, [(json.loads(config), good[config].figures) for config in kept], tables):
        console.print(f'{problem.name} on {name}: its row was timed, and an estimate does not replace it')
        continue
      for config in kept:
        console.print(f'{problem.name} on {name}: {dict(good[config].figures)} {config}', markup=False)


def estimated(problem: Problem, device: str) -> Figure | str:
  """By the compiler's estimate, down to where nothing but the memory can count: then the shorter program is better."""
  cost = _measure(problem, device)
  if isinstance(cost, str) or not cost.cycles:
    return cost if isinstance(cost, str) else cost.failure
  figures = {'percent': cost.percent, 'bundles': cost.bundles, 'spills': cost.spills, 'libtpu': static_cost.LIBTPU}
  merit = max(cost.cycles, cost.bound_cycles / 1.4), cost.bundles  # the model of copies is up to 40 % too generous
  return Figure(merit, figures, cost.bundles < SMALL_BUNDLES)


def timed(problem: Problem, device: str) -> Figure | str:
  """By the time that it takes on the device that is here."""
  case = problem.to_time().build()
  try:
    seconds = _seconds(case)
  except Exception as error:  # parameters that do not compile are no candidates
    return f'{type(error).__name__}: {str(error)[:200]}'
  percent = round(100 * max(case.least_seconds(devices.by_name(device))) / seconds, 1)
  figures = {
    'percent': percent, 'microseconds': round(1e6 * seconds, 1), 'on': jax.devices()[0].device_kind,
    'date': datetime.date.today().isoformat(),
  }  # fmt: skip
  bundles = _known_bundles(problem, case, device)
  if bundles is None:
    return Figure((seconds,), figures)
  return Figure((seconds,), figures | {'bundles': bundles}, bundles < SMALL_BUNDLES)


def _known_bundles(problem: Problem, case: static_cost.Case, device: str) -> int | None:
  """The length of a problem's program in bundles, if it was estimated before with these parameters."""
  wanted = problem.arguments.get('config', {})
  for known in tuning.load(case.kernel):
    if (known.device, known.problem) == (device, case.facts) and wanted.items() <= known.config.items():
      return known.figures.get('bundles')
  return None


def _candidates(problem: Problem, device: devices.Device) -> list[dict[str, Any]]:
  """The parameters to try; where a kernel takes the number of cores as one of them, that of the device."""
  takes_cores = problem.build().kernel in ('quantized_matmul', 'page_copy', 'token_append')
  cores = {'cores': device.tpu.cores} if takes_cores else {}
  return [{**config, **cores} for config in problem.candidates]


def _keep(
  problem: Problem, device: str, found: list[tuple[dict[str, Any], Mapping[str, Any]]], tables: pathlib.Path
) -> bool:
  """Put rows into the kernel's tuning.json in place of those of the same problem, unless these are better founded."""
  case = problem.build()
  path = tables / case.kernel / 'tuning.json'
  rows = json.loads(path.read_text(encoding='utf-8')) if path.exists() else []
  replaced = [old for old in rows if (old['device'], old['problem']) == (device, case.facts)]
  if any('microseconds' in old.get('figures', {}) for old in replaced) and 'microseconds' not in found[0][1]:
    return False
  rows = [old for old in rows if old not in replaced]
  for config, figures in found:
    rows.append({'device': device, 'problem': case.facts, 'config': config, 'figures': figures})
  rows.sort(key=lambda row: (row['device'], json.dumps(row['problem'], sort_keys=True)))
  text = ',\n'.join(f'  {json_text(one)}' for one in rows)
  path.write_text(f'[\n{text}\n]\n', encoding='utf-8')
  return True


# ---------------------------------------------------------------------------- every shape


def compile_all(console: Console) -> None:
  """Compile every kernel at every shape for every device, or a sample of these; print what fails."""
  problems = [problem for problem in kernel_problems.shapes() if re.search(_ONLY.value, problem.name)]
  product = list(itertools.product(_DEVICES.value, problems))
  wanted = product if _SAMPLE.value is None else sample(product, _SAMPLE.value, _SEED.value)
  tried: dict[tuple[str, str], list[bool]] = {}
  logging.getLogger('pallas_kernels').setLevel(logging.WARNING)  # not a line for each choice
  for name, problem in wanted:
    works = tried.setdefault((_kernel(problem), name), [])
    try:
      static_cost.compile_for(devices.by_name(name), problem.build())
      works.append(True)
    except Exception as error:  # the compiler's refusal is the result
      works.append(False)
      console.print(f'{name} {problem.name}: {type(error).__name__}: {str(error)[:300]}', markup=False)
    jax.clear_caches()  # or thousands of programs stay in memory
  for (kernel, name), works in sorted(tried.items()):
    console.print(f'{kernel} on {name}: {sum(works)} of {len(works)} compile')
  compiled = sum(map(sum, tried.values()))
  console.print(f'{len(wanted)} programs of {len(product)}, of which {len(wanted) - compiled} do not compile.')


def sample(product: Sequence[tuple[str, Problem]], count: int, seed: int) -> list[tuple[str, Problem]]:
  """So many pairs of a device and a problem, as many of each kernel for each device as of another, give or take one."""
  groups: dict[tuple[str, str], list[tuple[str, Problem]]] = {}
  for name, problem in product:
    groups.setdefault((_kernel(problem), name), []).append((name, problem))
  dice = random.Random(seed)
  for group in groups.values():
    dice.shuffle(group)
  in_turn = itertools.chain.from_iterable(itertools.zip_longest(*groups.values()))
  return list(itertools.islice((pair for pair in in_turn if pair is not None), count))


def _kernel(problem: Problem) -> str:
  return problem.case.partition(':')[2]


# ---------------------------------------------------------------------------- budgets


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
  path.write_text(json_text(budgets, indent=2) + '\n', encoding='utf-8')


# ---------------------------------------------------------------------------- timing


def time_all(console: Console, problems: Sequence[Problem], device: devices.Device) -> None:
  """Time the problems on the TPU that is here."""
  table = Table(title=f'on {device.name}, median of {_REPEATS.value}')
  for column in ('problem', 'ms', '% of the bound'):
    table.add_column(column, justify='right')
  rows = []
  shown = [one for problem in problems for one in (problem, *(_beside(problem) if _ANCHORS.value else ()))]
  for problem in shown:
    try:
      case = problem.to_time().build()
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
  """Of one call, of which the next is started before it ends."""
  arguments = [
    case.integers[place]() if place in case.integers else jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), argument)
    for place, argument in enumerate(case.arguments)
  ]
  run = jax.jit(case.function, donate_argnums=case.donated)
  times = []
  for _ in range(_REPEATS.value + 1):
    start = time.perf_counter()
    for _ in range(_CALLS):
      out = run(*arguments)
      for place in case.donated:
        arguments[place] = out
    jax.block_until_ready(out)
    times.append((time.perf_counter() - start) / _CALLS)
  return statistics.median(times[1:])  # the first compiles


if __name__ == '__main__':
  app.run(main)
