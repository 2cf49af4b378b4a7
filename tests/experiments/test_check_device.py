"""The check of an accelerator, on CPU: figures are kept, and a command that fails or never ends is told."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests.compiling import quick_environment

ROOT = pathlib.Path(__file__).parents[2]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, '-m', 'experiments.check_device', '--platform=cpu', *arguments],
    cwd=ROOT, env=quick_environment(), capture_output=True, text=True, timeout=300, check=False,
  )  # fmt: skip


@pytest.mark.slow
def test_what_a_command_measures_is_in_the_result(tmp_path):
  file = tmp_path / 'device.json'
  done = command('--only=device_put', f'--json={file}')
  assert done.returncode == 0, done.stdout + done.stderr
  result = json.loads(file.read_text(encoding='utf-8'))
  (check,) = result['checks']
  assert result['device'] == 'cpu' and check['check'] == 'device_put' and check['status'] == 0
  assert all(row['value'] > 0 and row['peer_value'] > 0 for row in check['rows']) and len(check['rows']) == 3


def test_a_command_out_of_time_is_told_and_the_next_runs(tmp_path):
  file = tmp_path / 'device.json'
  done = command('--only=device_put,host_staged', '--timeout_s=0.05', f'--json={file}')
  assert done.returncode == 1 and 'host_staged: out of time' in done.stdout
  assert [check['status'] for check in json.loads(file.read_text(encoding='utf-8'))['checks']] == [None, None]


def test_a_check_that_is_not_there_is_named():
  done = command('--only=speed')
  assert done.returncode != 0 and "names ['speed']; there are device_put" in done.stdout + done.stderr
