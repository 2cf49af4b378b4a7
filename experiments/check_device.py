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
kept. A part that passed for this commit, device and versions is taken from there; --again runs it anew. A table of all
figures comes last. The exit status is 1 if a part failed or ran out of time. Needs JAX, NumPy, absl, rich, jinja2,
tokenizers and safetensors; a part that wants more says so and is passed over.
"""

import contextlib
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from absl import app, flags
from rich.console import Console

from experiments.device_check.figures import read_lines
from experiments.device_check.parts import PARTS, Part
from experiments.device_check.result import DESCRIBE, FORMAT, commit, ending, load, same, save, show, sources

_OUT = flags.DEFINE_string('out', None, 'Folder of the result, of logs and of compiled programs.', required=True)
_ONLY = flags.DEFINE_list('only', None, 'Names of parts to run; all by default.')
_PLATFORM = flags.DEFINE_enum('platform', 'gpu', ['cpu', 'gpu', 'tpu'], 'Devices to check.')
_TIMEOUT_S = flags.DEFINE_float('timeout_s', 90, 'Most seconds of one part.', lower_bound=0.0)
_AGAIN = flags.DEFINE_bool('again', False, 'Run parts anew whose result is there.')
_TUNE = flags.DEFINE_bool('tune', False, 'Also time parameters of kernels, and write them to DIR/tuned.json.')
_COMMIT = flags.DEFINE_string('commit', None, 'What the result calls the commit where there is no repository.')
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Every part on a CPU at toy shapes: shows that it works, no more.')

_QUICK = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
_LIMIT_S = 60.0  # of finding out what the device is


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  platform = 'cpu' if _DRY_RUN.value else _PLATFORM.value
  todo = wanted(_ONLY.value, _TUNE.value or _DRY_RUN.value)
  folder = pathlib.Path(_OUT.value).resolve()
  (folder / 'logs').mkdir(parents=True, exist_ok=True)
  result = described(platform, folder) | {'parts': []}
  print(f'{result["count"]} × {result["device"]}, jax {result["versions"]["jax"]}, {result["commit"]}', flush=True)
  file = folder / 'result.json'
  before = load(file)
  if before is not None and same(before, result):
    result['parts'] = before['parts']
  elif before is not None:
    print(f'{file} is of another commit, device or version: it is replaced', flush=True)
  save(file, result)

  def one(part: Part) -> None:
    known = {done['part']: done for done in result['parts']}.get(part.name)
    if known is not None and known['status'] == 'passed' and not _AGAIN.value:
      print(f'{part.name}: passed already on {known["date"]}, taken from {file} (--again runs it anew)', flush=True)
      return
    done = run(part, platform, _DRY_RUN.value, _TIMEOUT_S.value, folder)
    with lock:
      others = [other for other in result['parts'] if other['part'] != part.name]
      result['parts'] = sorted([*others, done], key=lambda part: list(PARTS).index(part['part']))
      save(file, result)
    reason = f': {done["reason"]}' if done['reason'] else ''
    print(f'{part.name}: {done["status"]} after {done["seconds"]} s{reason}', flush=True)

  lock = threading.Lock()
  # Where nothing is measured, two parts may share the machine.
  with ThreadPoolExecutor(2 if _DRY_RUN.value else 1) as pool:
    for _ in pool.map(one, todo):
      pass
  show(Console(highlight=False, width=max(Console().width, 120)), result)
  names = {part.name for part in todo}
  sys.exit(any(done['status'] not in ('passed', 'passed over') for done in result['parts'] if done['part'] in names))


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
  named = {'commit': commit() or _COMMIT.value, 'sources': sources(), 'date': _now()}
  return {'format': FORMAT, 'dry_run': _DRY_RUN.value, **found, **named}


def run(part: Part, platform: str, toy: bool, timeout_s: float, folder: pathlib.Path) -> dict[str, Any]:
  """Run one part in a process of its own; how it ended, its figures, and the end of what it printed."""
  begin, date = time.perf_counter(), _now()
  reason = part.passed_over(platform, toy)
  if reason is not None:
    return _done(part, 'passed over', reason, 0.0, date, read_lines(pathlib.Path(os.devnull)), [])
  print(f'{part.name}: {part.about}', flush=True)
  with tempfile.TemporaryDirectory() as temporary:
    lines, rows = pathlib.Path(temporary, 'lines.jsonl'), pathlib.Path(temporary, 'rows.json')
    command = part.command_line(platform, toy, str(lines), str(rows), str(folder))
    printed: list[str] = []
    process = subprocess.Popen(
      command, env=environment(folder, part.shares, toy), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
      errors='replace', start_new_session=True,
    )  # fmt: skip
    log = folder / 'logs' / f'{part.name}.txt'
    reader = threading.Thread(target=_relay, args=(process, part.name, log, printed), daemon=True)
    reader.start()
    try:
      status: int | None = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
      status = None
    finally:
      with contextlib.suppress(ProcessLookupError):  # also what it has started and not ended
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()
    reader.join(5)
    seconds = round(time.perf_counter() - begin, 1)
    found = read_lines(lines)
    if rows.exists():
      found['rows'] += json.loads(rows.read_text(encoding='utf-8'))
  if status is None:
    return _done(
      part, 'out of time', f'ended after {timeout_s:g} s; --timeout_s gives more', seconds, date, found, printed
    )
  if status or found['failures']:
    last = next((line for line in reversed(printed) if line.strip()), '')
    reason = '; '.join(found['failures']) or f'exit status {status}: {last[:300]}'
    return _done(part, 'failed', reason, seconds, date, found, printed)
  if found['passed_over'] is not None:
    return _done(part, 'passed over', found['passed_over'], seconds, date, found, printed)
  return _done(part, 'passed', None, seconds, date, found, printed)


def _relay(process: 'subprocess.Popen[str]', name: str, log: pathlib.Path, printed: list[str]) -> None:
  """Pass on what a process prints, as it comes."""
  assert process.stdout is not None
  with log.open('w', encoding='utf-8') as file:
    for line in process.stdout:
      printed.append(line.rstrip('\n'))
      file.write(line)
      file.flush()
      print(f'  {name} | {line}', end='', flush=True)


def _done(
  part: Part,
  status: str,
  reason: str | None,
  seconds: float,
  date: str,
  found: Mapping[str, Any],
  printed: Sequence[str],
) -> dict[str, Any]:
  return {
    'part': part.name, 'status': status, 'reason': reason, 'seconds': seconds, 'compile_s': found['compile_s'],
    'date': date, 'rows': found['rows'], 'notes': found['notes'], 'printed': ending(printed),
  }  # fmt: skip


def environment(folder: pathlib.Path, shares: bool, toy: bool = False) -> dict[str, str]:
  """Of the process of a part: programs are kept, and nearly all memory is taken beforehand unless two share it.

  Of toys, programs are optimised little: compiling them takes longest.
  """
  memory = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'} if shares else {'XLA_PYTHON_CLIENT_MEM_FRACTION': '.92'}
  kept = {
    'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }
  if toy:
    kept['XLA_FLAGS'] = ' '.join(filter(None, (os.environ.get('XLA_FLAGS'), _QUICK)))
  return os.environ | memory | kept


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


if __name__ == '__main__':
  app.run(main)
