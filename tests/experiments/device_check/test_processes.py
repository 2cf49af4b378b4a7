"""Parts end when they should, with all that they have started, and what they had found by then is kept."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments.device_check.parts import PARTS, Part
from experiments.device_check.processes import Processes, environment
from experiments.device_check.result import load

ROOT = pathlib.Path(__file__).parents[3]

# Of every planted part: hand a figure over as parts do, without JAX.
BEGIN = """
import json, os, pathlib, signal, subprocess, sys, time
lines, rows = sys.argv[1:3]
row = {'name': 'a', 'value': 1.0, 'unit': 's', 'peer': None, 'peer_value': None, 'ratio': None, 'floor_share': None}
pathlib.Path(lines).write_text(json.dumps({'row': row}) + chr(10))
print('begun', flush=True)
"""
# A process that the part starts and leaves behind; its number goes to a file.
LEAVES = """
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
pathlib.Path(os.environ['LEFT'] + '.new').write_text(str(child.pid))
os.rename(os.environ['LEFT'] + '.new', os.environ['LEFT'])
"""
HANGS = 'time.sleep(600)'


@dataclasses.dataclass(frozen=True)
class Planted(Part):
  """A part that is a few lines of Python."""

  code: str = ''

  def command_line(self, platform, toy, lines, rows, folder):
    return [sys.executable, '-c', BEGIN + self.code, lines, rows]


def run(code: str, folder: pathlib.Path, timeout_s: float = 60) -> dict:
  return Processes('cpu', True, timeout_s, folder).run(Planted('planted', 'a toy', code=code))


def gone(pid: int) -> bool:
  """Whether a process has ended; one that nobody has waited for yet has."""
  for _ in range(200):
    try:
      state = pathlib.Path(f'/proc/{pid}/stat').read_text(encoding='utf-8').rpartition(')')[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
      return True
    if state == 'Z':
      return True
    time.sleep(0.05)
  return False


@pytest.mark.parametrize(
  ('code', 'status', 'reason'),
  [
    ('', 'passed', None),
    ("sys.exit('no such thing')", 'failed', 'exit status 1: no such thing'),
    ('os.kill(os.getpid(), signal.SIGSEGV)', 'failed', 'ended by SIGSEGV: begun'),
    ("open(lines, 'a').write(json.dumps({'failure': 'wrong'}) + chr(10)); sys.exit(1)", 'failed', 'wrong'),
    ("open(lines, 'a').write(json.dumps({'given_up': 'late'}) + chr(10))", 'incomplete', 'late'),
    ("open(rows, 'w').write('[{')", 'failed', 'its file of figures was cut short'),
    ("open(rows, 'w').write('[{'); sys.exit(3)", 'failed', 'exit status 3: begun'),
  ],
)
def test_how_a_part_ended_is_told_and_what_it_found_is_kept(code, status, reason, tmp_path):
  done = run(code, tmp_path)
  assert (done['status'], done['reason']) == (status, reason)
  assert [row['name'] for row in done['rows']] == ['a'] and done['printed'][0] == 'begun'
  assert (tmp_path / 'logs' / 'planted.txt').read_text(encoding='utf-8').startswith('begun')


def test_figures_of_a_part_out_of_time_are_kept_and_what_it_has_started_is_ended(tmp_path, monkeypatch):
  left = tmp_path / 'left'
  monkeypatch.setenv('LEFT', str(left))
  done = run(LEAVES + HANGS, tmp_path, timeout_s=3)
  assert done['status'] == 'out of time' and [row['name'] for row in done['rows']] == ['a']
  assert gone(int(left.read_text()))


def test_what_a_part_leaves_behind_is_ended(tmp_path, monkeypatch):
  left = tmp_path / 'left'
  monkeypatch.setenv('LEFT', str(left))
  assert run(LEAVES, tmp_path)['status'] == 'passed'
  assert gone(int(left.read_text()))


def test_a_part_whose_packages_are_missing_is_passed_over_with_the_reason(tmp_path):
  done = Processes('cpu', True, 60, tmp_path).run(Planted('planted', 'a toy', packages=('json', 'no_such_package')))
  assert (done['status'], done['reason']) == ('passed over', 'no_such_package not installed')
  serving = [part for part in PARTS.values() if part.command]
  assert all({'flax', 'psutil'} <= set(part.packages) for part in serving)


def test_a_seed_goes_to_the_part_that_has_random_inputs(tmp_path):
  for seeded in (True, False):
    part = Planted('planted', 'a toy', code='print(sys.argv[3:])', seeded=seeded)
    done = Processes('cpu', True, 60, tmp_path, seed=7).run(part)
    assert done['printed'][-1] == ("['--seed=7']" if seeded else '[]')
  assert [part.name for part in PARTS.values() if part.seeded] == ['correct']


# The command itself, in which one part is planted that has begun another process and hangs, and one behind it.
COMMAND = """
import sys
from absl import app
from experiments import check_device
from tests.experiments.device_check import test_processes as planted
check_device.PARTS.clear()
for name in ('planted', 'next'):
  check_device.PARTS[name] = planted.Planted(name, 'a toy', code=planted.LEAVES + planted.HANGS)
if __name__ == '__main__':
  app.run(check_device.main)
"""


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_that_was_started_and_the_result_is_there(number, tmp_path):
  left, out = tmp_path / 'left', tmp_path / 'out'
  given = os.environ | {'LEFT': str(left), 'PYTHONPATH': str(ROOT)}
  process = subprocess.Popen(
    [sys.executable, '-c', COMMAND, f'--out={out}', '--platform=cpu', '--timeout_s=300'],
    cwd=ROOT, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )  # fmt: skip
  try:
    while not left.exists() and process.poll() is None:
      time.sleep(0.05)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 128 + number, printed
  (part,) = load(out / 'result.json')['parts']
  assert (part['part'], part['status'], part['reason']) == ('planted', 'ended', f'ended by {number.name}')
  assert [row['name'] for row in part['rows']] == ['a']
  assert gone(int(left.read_text()))


def test_a_fraction_of_memory_that_the_user_has_set_stays(monkeypatch, tmp_path):
  names = ('XLA_PYTHON_CLIENT_MEM_FRACTION', 'XLA_CLIENT_MEM_FRACTION')
  for name in names:
    monkeypatch.delenv(name, raising=False)
  assert environment(tmp_path, shares=False)[names[0]] and names[0] not in environment(tmp_path, shares=True)
  for name in names:
    monkeypatch.setenv(name, '.5')
    found = environment(tmp_path, shares=False)
    assert {one: found.get(one) for one in names} == {name: '.5', names[name == names[0]]: None}
    monkeypatch.delenv(name)
