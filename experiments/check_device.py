r"""Checks and measures pdjax on the accelerator at hand, in the few minutes for which one is.

python -m experiments.check_device --out=device
python -m experiments.check_device --out=device --only=ceilings,decode
python -m experiments.check_device --out=device --only=tune --tune
python -m experiments.check_device --out=dry --dry_run

In parts, in order of worth, each in a process of its own that is ended after --timeout_s: ceilings, correctness of
every kernel beside float64, prefill and decode attention by shape beside cuDNN and XLA, passes of Llama-3-8B, 1P1D on
one device beside colocated, the hand-off; with --tune parameters of kernels; last golden tokens and transfers. One that
fails does not stop the others. What a part found so far is kept if it is ended.

DIR gets `result.json` (every figure, written anew after each part), `logs` and `cache`, where compiled programs are
kept. A part that passed for these sources, device, versions and settings (XLA's flags, memory) is taken from there;
--again runs it anew; one with figures that there was no time to compile is incomplete, and runs again. A result of
others is kept as `result-COMMIT.json`. A table of all figures comes last. The exit status is 0 if every part passed or
was passed over, 130 or 143 if SIGINT or SIGTERM ended it, else 1. Needs JAX, NumPy, absl, rich, jinja2, tokenizers and
safetensors; a part that wants more says so and is passed over. A dry run leaves out what has nothing small to run: on
a CPU there is no FlashInfer, and golden tokens are those of a whole model.
"""

import json
import pathlib
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from absl import app, flags
from rich.console import Console

from experiments.device_check.parts import PARTS, Part
from experiments.device_check.processes import Processes, environment, now
from experiments.device_check.result import (
  DESCRIBE,
  ENDED_WELL,
  FORMAT,
  commit,
  differences,
  load,
  save,
  set_aside,
  settings,
  show,
  sources,
)

_OUT = flags.DEFINE_string('out', None, 'Folder of the result, of logs and of compiled programs.', required=True)
_ONLY = flags.DEFINE_list('only', None, 'Names of parts to run; all by default.')
_PLATFORM = flags.DEFINE_enum('platform', 'gpu', ['cpu', 'gpu', 'tpu'], 'Devices to check.')
_TIMEOUT_S = flags.DEFINE_float('timeout_s', 90, 'Most seconds of one part.', lower_bound=0.0)
_AGAIN = flags.DEFINE_bool('again', False, 'Run parts anew whose result is there.')
_TUNE = flags.DEFINE_bool('tune', False, 'Also time parameters of kernels, and write them to DIR/tuned_<kernel>.json.')
_COMMIT = flags.DEFINE_string('commit', None, 'What the result calls the commit where there is no repository.')
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'On a CPU at toy shapes, all parts but FlashInfer and golden tokens.')

_LIMIT_S = 60.0  # of finding out what the device is


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  platform = 'cpu' if _DRY_RUN.value else _PLATFORM.value
  todo = wanted(_ONLY.value, _TUNE.value or _DRY_RUN.value)
  folder = pathlib.Path(_OUT.value).resolve()
  processes = Processes(platform, _DRY_RUN.value, _TIMEOUT_S.value, folder)
  result = described(platform, folder) | {'parts': []}
  print(f'{result["count"]} × {result["device"]}, jax {result["versions"]["jax"]}, {result["commit"]}', flush=True)
  file = folder / 'result.json'
  result['parts'] = taken_up(file, result)
  save(file, result)

  def one(part: Part) -> None:
    known = {done['part']: done for done in result['parts']}.get(part.name)
    if known is not None and known['status'] == 'passed' and not _AGAIN.value:
      print(f'{part.name}: passed already on {known["date"]}, taken from {file} (--again runs it anew)', flush=True)
      return
    if processes.ended_by is not None:
      return
    done = processes.run(part) | {'commit': result['commit']}
    with lock:
      others = [other for other in result['parts'] if other['part'] != part.name]
      result['parts'] = sorted([*others, done], key=lambda part: list(PARTS).index(part['part']))
      save(file, result)
    reason = f': {done["reason"]}' if done['reason'] else ''
    print(f'{part.name}: {done["status"]} after {done["seconds"]} s{reason}', flush=True)

  lock = threading.Lock()
  # Where nothing is measured, two parts may share the machine.
  with processes.ended_by_signals(), ThreadPoolExecutor(2 if _DRY_RUN.value else 1) as pool:
    for _ in pool.map(one, todo):
      pass
  show(Console(highlight=False, width=max(Console().width, 120)), result)
  if processes.ended_by is not None:
    sys.exit(128 + processes.ended_by)
  names = {part.name for part in todo}
  sys.exit(any(done['status'] not in ENDED_WELL for done in result['parts'] if done['part'] in names))


def taken_up(file: pathlib.Path, result: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The parts in a file if it is of this code, device, versions and settings; otherwise it is kept by another name."""
  before = load(file)
  if before is not None:
    differing = differences(before, result)
    if not differing:
      return [done for done in before['parts'] if done['part'] in PARTS]
    print(f'{file} differs in {", ".join(differing)}: it is kept as {set_aside(file).name}', flush=True)
  elif file.exists():
    print(f'{file} is damaged or no result of format {FORMAT}: it is kept as {set_aside(file).name}', flush=True)
  return []


def wanted(only: Sequence[str] | None, tune: bool) -> list[Part]:
  """The parts to run, in order of worth.

  Raises:
    app.UsageError: if a name is unknown.
  """
  if unknown := set(only or ()) - set(PARTS):
    raise app.UsageError(f'--only names {sorted(unknown)}; there are {", ".join(PARTS)}.')
  if only:
    return [part for part in PARTS.values() if part.name in only]
  return [part for part in PARTS.values() if tune or not part.asked]


def described(platform: str, folder: pathlib.Path) -> dict[str, Any]:
  """What the device is, found out by a process that ends before the parts begin; ends the command if there is none."""
  try:
    done = subprocess.run(
      [sys.executable, '-c', DESCRIBE, platform], env=environment(folder, shares=True), capture_output=True, text=True,
      timeout=_LIMIT_S, check=False,
    )  # fmt: skip
  except subprocess.TimeoutExpired:
    sys.exit(f'no {platform} answered within {_LIMIT_S:.0f} s.')
  if done.returncode:
    sys.exit(f'no {platform} was found:\n{done.stderr[-2000:]}')
  found = json.loads(done.stdout.splitlines()[-1])
  code = {'commit': commit() or _COMMIT.value, 'sources': sources(), 'environment': settings(), 'date': now()}
  return {'format': FORMAT, 'dry_run': _DRY_RUN.value, **found, **code}


if __name__ == '__main__':
  app.run(main)
