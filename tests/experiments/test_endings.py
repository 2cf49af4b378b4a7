"""However the command ends, what was answered is on disk, and going on from there gives what an undisturbed run gives.

A table of endings: a signal or a kill × a moment × in one process or on Ray, each with the same oracles.
"""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from tests.compiling import quick_environment
from tests.experiments.conftest import ROOT
from tests.tiny import prompt

CONFIG = '--config=tests/experiments/tiny_config.py'
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: -9}
WAIT_S = 240.0  # for what takes seconds: past it, something hangs
NUM = 16


def lines(times_s) -> list[dict]:
  """Requests of all kinds, at these times."""
  kinds = ({}, {'temperature': 1.5}, {'temperature': 1.5, 'n': 2}, {'temperature': 0.7, 'seed': 5, 'logprobs': 2})
  return [
    {'prompt_token_ids': prompt(3 + i % 9, seed=i), 'max_tokens': 12, 'ignore_eos': True, 'arrival_s': time_s}
    | kinds[i % len(kinds)]
    for i, time_s in zip(range(NUM), times_s, strict=False)
  ]


def write(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def read(path: pathlib.Path) -> list[dict]:
  """The whole lines of a file that may be growing."""
  text = path.read_text() if path.is_file() else ''
  return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith('\n')]


def told(rows: list[dict]) -> list[tuple]:
  return [
    (row['id'], row['seed'], row['output_token_ids'], row['finish_reason'], row['logprobs'] and len(row['logprobs']))
    for row in rows
  ]


@pytest.fixture(scope='module')
def undisturbed(answered, tmp_path_factory) -> list[tuple]:
  """The answer of each sample of the lines if nothing happens."""
  folder = tmp_path_factory.mktemp('undisturbed')
  write(folder / 'in.jsonl', lines(itertools.repeat(0.0)))
  status, said, _ = answered(CONFIG, f'--requests={folder / "in.jsonl"}', f'--workdir={folder / "out"}')
  assert status == 0, said
  rows = read(folder / 'out' / 'requests.jsonl')
  assert len(rows) == NUM + NUM // 4 and told(rows) != told(rows[::-1])
  assert sorted(told(read(folder / 'out' / 'answers.jsonl')), key=str) == sorted(told(rows), key=str)
  return told(rows)


class Command:
  """The command in a process of its own, stopped in the middle of what it does."""

  def __init__(self, folder: pathlib.Path, *arguments: str):
    self.out = folder / 'out'
    self.said: list[str] = []
    self.process = subprocess.Popen(
      [sys.executable, '-m', 'experiments.run', *arguments, f'--workdir={self.out}'],
      cwd=ROOT, env=quick_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    self._reader = threading.Thread(target=self._read)
    self._reader.start()
    self.errors = ''

  def _read(self) -> None:
    for line in self.process.stdout:
      self.said.append(line)

  def until(self, condition) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():
      assert time.monotonic() < end_s, 'it never came'
      assert self.process.poll() is None, f'ended with {self.process.returncode}: {self.process.stderr.read()}'
      time.sleep(0.02)

  def until_compiling(self) -> None:
    self.until(lambda: any(line.startswith(('weights loaded', 'Ray ')) for line in self.said))

  def until_idle(self) -> None:
    self.until((self.out / 'events.jsonl').is_file)

  def until_answered(self, count: int) -> None:
    self.until(lambda: len(read(self.out / 'answers.jsonl')) >= count)
    self.until(lambda: sum(one['event'] == 'Finished' for one in read(self.out / 'events.jsonl')) >= count)

  def until_reporting(self) -> None:
    self.until((self.out / 'report.json').is_file)

  def end(self) -> int:
    """Wait for the end; nothing that it started may be left."""
    with self.process:  # its pipes are closed in the end
      try:
        self.errors = self.process.stderr.read()
        return self.process.wait(WAIT_S)
      finally:
        self.process.kill()
        self._reader.join()


def cells() -> list:
  """Every ending; those that are quick and tell most are no slow tests."""
  quick = [(signal.SIGTERM, 'serving'), (signal.SIGKILL, 'serving')]
  found = []
  for ray, number, moment in itertools.product(
    (False, True), (signal.SIGINT, signal.SIGTERM, signal.SIGKILL), ('compiling', 'idle', 'serving', 'reporting')
  ):
    marks = [] if not ray and (number, moment) in quick else [pytest.mark.slow]
    name = f'{"Ray" if ray else "one process"}, {number.name}, {moment}'
    found.append(pytest.param(ray, number, moment, marks=marks, id=name))
  found.append(
    pytest.param(False, signal.SIGHUP, 'serving', marks=[pytest.mark.slow], id='one process, SIGHUP, serving')
  )
  return found


@pytest.mark.parametrize(('ray', 'number', 'moment'), cells())
def test_what_was_answered_is_on_disk_and_going_on_gives_what_an_undisturbed_run_gives(
  answered, undisturbed, tmp_path, ray, number, moment
):
  if ray:
    pytest.importorskip('ray')
  times_s = {'idle': itertools.repeat(1e3), 'serving': [0.05 * i for i in range(NUM - 1)] + [1e3]}
  file = write(tmp_path / 'in.jsonl', lines(times_s.get(moment, itertools.repeat(0.0))))
  if moment == 'reporting':  # what opens this to write waits until somebody reads
    (tmp_path / 'out').mkdir()
    os.mkfifo(tmp_path / 'out' / 'metrics.prom')
  command = Command(tmp_path, f'{CONFIG}:ray={ray}', f'--requests={file}')
  out = command.out
  if moment == 'serving':
    command.until_answered(3)
  else:
    getattr(command, f'until_{moment}')()
  seen = told(read(out / 'answers.jsonl'))
  children = psutil.Process(command.process.pid).children(recursive=True)
  command.process.send_signal(number)
  if moment == 'reporting':
    reader = os.open(out / 'metrics.prom', os.O_RDONLY | os.O_NONBLOCK)
  code = command.end()
  if moment == 'reporting':
    os.close(reader)

  # the exit code, and a line that says why
  assert code == CODES[number], command.errors
  assert 'Traceback' not in command.errors
  if number != signal.SIGKILL:
    assert command.errors.strip().splitlines()[-1].startswith(f'stopped by {number.name}: ')
  # nothing that it started is left
  assert psutil.wait_procs(children, timeout=90)[1] == []  # Ray's agents are the last to notice
  # what was answered is there, and no other answer
  kept = told(read(out / 'answers.jsonl'))
  assert {*map(str, seen)} <= {*map(str, kept)} <= {*map(str, undisturbed)}
  assert len(kept) >= {'serving': 3, 'reporting': len(undisturbed)}.get(moment, 0)
  if number != signal.SIGKILL:
    rows = read(out / 'requests.jsonl')
    assert [row['id'] for row in rows] == [row[0] for row in undisturbed]
    assert [row for row in told(rows) if row[3] == 'length'] == [row for row in undisturbed if row in kept]
    assert all(row['error'] == 'the run ended before it did.' for row in rows if row['finish_reason'] != 'length')
    if moment != 'compiling':
      report = json.loads((out / 'report.json').read_text())
      assert report['completed'] == len(kept)
      ended = [event['request'] for event in read(out / 'events.jsonl') if event['event'] == 'Finished']
      assert sorted(ended) == sorted(row[0] for row in kept)
  # going on, with all at once, serves the rest and nothing twice
  write(file, lines(itertools.repeat(0.0)))
  status, said, shown = answered(f'--resume={out}')
  assert status == 0, said
  assert told(read(out / 'requests.jsonl')) == undisturbed
  assert sorted(told(read(out / 'answers.jsonl')), key=str) == sorted(undisturbed, key=str)
  assert ('Nothing is left' in shown) == (len(kept) == len(undisturbed))


@pytest.mark.slow
def test_a_kill_loses_no_answer_that_is_older_than_a_second(tmp_path):
  asked = lines([0.1 * i for i in range(NUM - 1)] + [1e3])
  file = write(tmp_path / 'in.jsonl', asked)
  answers = tmp_path / 'out' / 'answers.jsonl'
  command = Command(tmp_path, f'{CONFIG}:way=tells who is there,answers={answers}', f'--requests={file}')
  there = answers.with_suffix('.there')

  def ended_long_ago() -> set[str]:
    """The requests that were there, and were not any more a second before the policy was last asked."""
    rows = read(there)
    early = [names for time_s, *names in rows if time_s < rows[-1][0] - 1.0]
    return {name for names in early for name in names} - set(early[-1]) if early else set()

  command.until(lambda: len(ended_long_ago()) >= 3)
  command.process.send_signal(signal.SIGKILL)
  assert command.end() == -9
  ended = ended_long_ago()
  assert len(ended) >= 3 and ended <= {row['id'] for row in read(answers)}


@pytest.mark.slow
@pytest.mark.parametrize(('moment', 'code'), [('compiling', 1), ('serving', 3)])
def test_a_control_service_of_ray_that_is_lost_ends_the_run_in_a_line(answered, undisturbed, tmp_path, moment, code):
  """Ray itself would end the process a minute later, from outside of Python."""
  pytest.importorskip('ray')
  file = write(tmp_path / 'in.jsonl', lines([0.05 * i for i in range(NUM - 1)] + [1e3]))
  command = Command(tmp_path, f'{CONFIG}:ray=True', f'--requests={file}')
  out = command.out
  command.until_answered(3) if moment == 'serving' else command.until_compiling()
  seen = told(read(out / 'answers.jsonl'))
  children = psutil.Process(command.process.pid).children(recursive=True)
  (service,) = (one for one in children if one.name() == 'gcs_server')
  service.kill()
  assert command.end() == code, command.errors
  last = command.errors.strip().splitlines()[-1]
  assert last.startswith("error: Ray's control service at ") and f'--resume={out} goes on' in last, command.errors
  assert 'Traceback' not in command.errors and command.errors.count('control service') == 1
  assert psutil.wait_procs(children, timeout=90)[1] == []
  kept = told(read(out / 'answers.jsonl'))
  assert {*map(str, seen)} <= {*map(str, kept)} <= {*map(str, undisturbed)}
  if moment == 'serving':
    rows = read(out / 'requests.jsonl')
    assert [row['id'] for row in rows] == [row[0] for row in undisturbed]
    assert [row for row in told(rows) if row[3] == 'length'] == [row for row in undisturbed if row in kept]
    report = json.loads((out / 'report.json').read_text())
    assert report['completed'] == len(kept) >= 3 and "Ray's control service" in report['notes'][0]
  write(file, lines(itertools.repeat(0.0)))
  status, said, _ = answered(f'--resume={out}')
  assert status == 0, said
  assert told(read(out / 'requests.jsonl')) == undisturbed


def test_a_second_signal_ends_the_command_at_once(undisturbed, tmp_path):
  file = write(tmp_path / 'in.jsonl', lines([0.0]))
  (tmp_path / 'out').mkdir()
  os.mkfifo(tmp_path / 'out' / 'metrics.prom')  # in which it would hang for ever
  command = Command(tmp_path, CONFIG, f'--requests={file}')
  command.until_reporting()
  command.process.send_signal(signal.SIGTERM)
  time.sleep(0.5)
  command.process.send_signal(signal.SIGINT)
  assert command.end() == 130
  assert told(read(command.out / 'requests.jsonl')) == undisturbed[:1]  # they are written before the report


def test_a_stop_while_the_command_is_imported_is_told_in_a_line(tmp_path):
  (tmp_path / 'absl').mkdir()
  (tmp_path / 'absl' / '__init__.py').write_text('raise KeyboardInterrupt')  # as if it came just then
  environment = quick_environment() | {'PYTHONPATH': str(tmp_path)}
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.run', CONFIG], cwd=ROOT, env=environment, capture_output=True, text=True,
    timeout=300,
  )  # fmt: skip
  assert (done.returncode, done.stderr) == (-signal.SIGINT, 'stopped by SIGINT: nothing was served\n')


# ---------------------------------------------------------------------------- errors


WAYS = {
  'finds a value wrong': 'error: ValueError: no such value (',
  'raises': 'error: ZeroDivisionError: nothing to divide by (',
  'exits': 'error: SystemExit: 0 (',
  'asks for what cannot be': 'error: ',
  'does nothing': 'error: ',
}


UNFORESEEN = ('finds a value wrong', 'raises', 'exits')


@pytest.mark.parametrize(
  ('way', 'after', 'code', 'backend'),
  [
    *((way, 0, 1, 'simulator') for way in WAYS),
    ('raises', 3, 3, 'engine'),
    *(pytest.param(way, 3, 3, 'engine', marks=pytest.mark.slow) for way in WAYS if way != 'raises'),
    *(pytest.param(way, 0, 1, 'engine', marks=pytest.mark.slow) for way in WAYS),
  ],
)
def test_an_error_is_told_in_a_line_and_takes_no_answer_with_it(answered, tmp_path, way, after, code, backend):
  out = tmp_path / 'out'
  file = write(tmp_path / 'in.jsonl', lines([0.4 * i for i in range(8)] if after else itertools.repeat(0.0)))
  failing = f'{CONFIG}:way={way},answers={out / "answers.jsonl"},after={after}'
  status, said, _ = answered(failing, f'--requests={file}', f'--workdir={out}', f'--backend={backend}')
  last = said.strip().splitlines()[-1]
  assert status == code and 'Traceback' not in said, said
  assert last.startswith(WAYS[way]) and f'--resume={out} goes on' in last
  kept = [row['id'] for row in read(out / 'answers.jsonl')]
  rows = read(out / 'requests.jsonl')
  assert [row['id'] for row in rows if row['finish_reason'] == 'length'] == [
    row['id'] for row in rows if row['id'] in kept
  ]
  assert len(kept) >= after and all('the run ended' in row['error'] for row in rows if row['id'] not in kept)
  report = json.loads((out / 'report.json').read_text())
  assert report['completed'] == len(kept) and 'The run was broken off before its end' in report['notes'][0]
  assert (out / 'traceback.txt').is_file() == ('traceback.txt has the traceback' in last) == (way in UNFORESEEN)
  if way in UNFORESEEN:
    assert 'tiny_config.py' in last and 'in decide' in (out / 'traceback.txt').read_text()


def test_a_run_without_a_work_directory_tells_an_error_in_a_line_too(answered):
  status, said, _ = answered(f'{CONFIG}:way=raises,answers=README.md', '--backend=simulator')
  assert status == 1 and 'Traceback' not in said
  assert 'ZeroDivisionError' in said and '--verbosity=1 shows the traceback' in said and '--resume' not in said


@pytest.mark.parametrize(('after', 'code'), [(0, 1), (2, 3)])
def test_an_error_that_nobody_can_be_told_has_its_exit_code_and_its_report(tmp_path, after, code):
  """The log of the command is on the full disk, and other requests of the workload have not come yet."""
  out = tmp_path / 'out'
  failing = f'{CONFIG}:way=raises,answers={out / "answers.jsonl"},after={after},apart_s=0.5'
  with open('/dev/full', 'w') as full:
    done = subprocess.run(
      [sys.executable, '-m', 'experiments.run', failing, f'--workdir={out}'],
      cwd=ROOT, env=quick_environment(), stdout=subprocess.PIPE, stderr=full, text=True, timeout=300,
    )  # fmt: skip
  assert done.returncode == code
  assert json.loads((out / 'report.json').read_text())['completed'] == len(read(out / 'answers.jsonl')) < 6
  assert len(read(out / 'requests.jsonl')) >= after


SMALL_FILES = """
import resource, runpy, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_module('experiments.run', run_name='__main__', alter_sys=True)
"""


@pytest.mark.parametrize(('kilobytes', 'code'), [(8, 1), (128, 0)])
def test_a_full_disk_ends_nothing_and_is_named(tmp_path, kilobytes, code):
  """Files that may not grow beyond a size stand for a full disk: the log comes first, then answers and report."""
  file = write(tmp_path / 'in.jsonl', lines(itertools.repeat(0.0)) * 6)
  out = tmp_path / 'out'
  done = subprocess.run(
    [sys.executable, '-c', SMALL_FILES, str(kilobytes * 1024), CONFIG, f'--requests={file}', f'--workdir={out}',
     '--backend=simulator'],
    cwd=ROOT, env=quick_environment(), capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == code and 'Traceback' not in done.stderr, done.stderr
  for name in ('events.jsonl', *(('answers.jsonl', 'requests.jsonl', 'report.json') if code else ())):
    assert done.stderr.count(f'{out / name} ') == 1, done.stderr
  assert f'{out / "events.jsonl"} ends early: it has nothing from ' in done.stderr and 'File too large' in done.stderr
  assert '120 of 120 requests completed' in done.stdout and 'ends early' in done.stdout  # n=2 is two
  assert [event['event'] for event in read(out / 'events.jsonl')][:3] == ['Log', 'Turn', 'Arrived']
  for path in out.iterdir():
    if path.suffix in ('.json', '.jsonl'):
      assert path.read_text().endswith('\n'), f'{path} is torn'
  assert (out / 'requests.jsonl').is_file() == (not code) == (len(read(out / 'answers.jsonl')) == 120)


def test_a_reader_of_stdout_that_is_gone_ends_nothing(undisturbed, tmp_path):
  file = write(tmp_path / 'in.jsonl', lines([0.0]))
  with subprocess.Popen(
    [sys.executable, '-m', 'experiments.run', CONFIG, f'--requests={file}', f'--workdir={tmp_path / "out"}',
     '--backend=simulator'],
    cwd=ROOT, env=quick_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  ) as process:  # fmt: skip
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(WAIT_S) == 0 and errors == ''
  assert len(read(tmp_path / 'out' / 'requests.jsonl')) == 1
