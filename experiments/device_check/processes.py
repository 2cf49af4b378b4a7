"""Parts in processes of their own: each is ended with all that it has started, and what it has found is kept."""

import contextlib
import datetime
import json
import os
import pathlib
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.device_check.figures import read_lines
from experiments.device_check.parts import Part
from experiments.device_check.result import ending

_QUICK = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
_FRACTIONS = ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION')  # of which JAX refuses two together
_FRACTION = '.92'
_MOST_TOLD = 3  # figures that a part had no time for


class Processes:
  """Runs parts, several at once if asked from several threads, and ends all of them if this process is to end."""

  def __init__(self, platform: str, toy: bool, timeout_s: float, folder: pathlib.Path, seed: int | None = None):
    """Run parts on a platform, at toy shapes or not, each for so long at most; logs and programs go to a folder.

    A `seed` is for those whose inputs are random.
    """
    self._seed = seed
    self._platform, self._toy, self._timeout_s, self._folder = platform, toy, timeout_s, folder
    self._running: set[int] = set()
    self.ended_by: int | None = None  # the signal that has told this process to end
    (folder / 'logs').mkdir(parents=True, exist_ok=True)

  @contextlib.contextmanager
  def ended_by_signals(self) -> Iterator[None]:
    """SIGINT and SIGTERM, meanwhile, end the parts that run; whoever runs them has their results then, and goes on."""

    def end(number: int, frame: Any) -> None:
      self.ended_by = self.ended_by or number
      for group in list(self._running):
        _end(group)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
      yield
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def run(self, part: Part) -> dict[str, Any]:
    """Run one part to its end; how it ended, its figures, and the end of what it printed."""
    begin, date = time.perf_counter(), now()
    reason = part.passed_over(self._platform, self._toy)
    if reason is not None:
      return _done(part, 'passed over', reason, 0.0, date, read_lines(pathlib.Path(os.devnull)), [])
    say(f'{part.name}: {part.about}')
    printed: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
      lines, rows = pathlib.Path(temporary, 'lines.jsonl'), pathlib.Path(temporary, 'rows.json')
      command = part.command_line(self._platform, self._toy, str(lines), str(rows), str(self._folder))
      if part.seeded and self._seed is not None:
        command.append(f'--seed={self._seed}')
      code = self._wait(part, command, printed)
      seconds = round(time.perf_counter() - begin, 1)
      found = read_lines(lines)
      if rows.exists():
        try:
          found['rows'] += json.loads(rows.read_text(encoding='utf-8'))
        except ValueError:
          found['notes'].append('its file of figures was cut short, and is left out')
          found['failures'] += ['its file of figures was cut short'] if code == 0 else []
    status, reason = self._status(code, found, printed)
    return _done(part, status, reason, seconds, date, found, printed)

  def _wait(self, part: Part, command: Sequence[str], printed: list[str]) -> int | None:
    """Run a command and all that it starts; its exit status, or None if it was out of time."""
    process = subprocess.Popen(
      command, env=environment(self._folder, part.shares, self._toy), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      text=True, errors='replace', start_new_session=True,
    )  # fmt: skip
    self._running.add(process.pid)
    if self.ended_by is not None:  # which came before it was among those that run
      _end(process.pid)
    log = self._folder / 'logs' / f'{part.name}.txt'
    reader = threading.Thread(target=_relay, args=(process, part.name, log, printed), daemon=True)
    reader.start()
    code: int | None = None
    try:
      with contextlib.suppress(subprocess.TimeoutExpired):
        code = process.wait(self._timeout_s)
    finally:
      _end(process.pid)  # also what it has started and not ended
      process.wait()
      self._running.discard(process.pid)
    reader.join(5)
    return code

  def _status(self, code: int | None, found: Mapping[str, Any], printed: Sequence[str]) -> tuple[str, str | None]:
    if self.ended_by is not None and code != 0:
      return 'ended', f'ended by {signal.Signals(self.ended_by).name}'
    if code is None:
      return 'out of time', f'ended after {self._timeout_s:g} s; --timeout_s gives more'
    if found['failures']:
      return 'failed', '; '.join(found['failures'])
    if code < 0:
      return 'failed', f'ended by {signal.Signals(-code).name}: {_last(printed)}'
    if code:
      return 'failed', f'exit status {code}: {_last(printed)}'
    if found['passed_over'] is not None:
      return 'passed over', found['passed_over']
    if given_up := found['given_up']:
      more = f' and {len(given_up) - _MOST_TOLD} more' if len(given_up) > _MOST_TOLD else ''
      return 'incomplete', '; '.join(given_up[:_MOST_TOLD]) + more
    return 'passed', None


def _end(group: int) -> None:
  with contextlib.suppress(ProcessLookupError):
    os.killpg(group, signal.SIGKILL)


def _last(printed: Sequence[str]) -> str:
  return next((line for line in reversed(printed) if line.strip()), 'it printed nothing')[:300]


def _relay(process: 'subprocess.Popen[str]', name: str, log: pathlib.Path, printed: list[str]) -> None:
  """Pass on what a process prints, as it comes."""
  assert process.stdout is not None
  with process.stdout, log.open('w', encoding='utf-8') as file:
    for line in process.stdout:
      printed.append(line.rstrip('\n'))
      file.write(line)
      file.flush()
      say(f'  {name} | {line.rstrip()}')


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
    'date': date, 'rows': found['rows'], 'notes': [*found['notes'], *found['given_up']], 'printed': ending(printed),
  }  # fmt: skip


def environment(folder: pathlib.Path, shares: bool, toy: bool = False) -> dict[str, str]:
  """The environment of a part's process.

  Programs are kept, and nearly all memory is taken beforehand unless two processes share it or the user's environment
  says how much. Of toys, programs are optimised little: compiling them takes longest.
  """
  own = {
    'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }
  if shares:
    own['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  elif not any(name in os.environ for name in _FRACTIONS):
    own['XLA_PYTHON_CLIENT_MEM_FRACTION'] = _FRACTION
  if toy:
    own['XLA_FLAGS'] = ' '.join(filter(None, (os.environ.get('XLA_FLAGS'), _QUICK)))
  return os.environ | own


def say(text: str) -> None:
  """Print a line in one piece, so that those of two threads are never on one."""
  print(f'{text}\n', end='', flush=True)


def now() -> str:
  """The date and time as a result has it."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
