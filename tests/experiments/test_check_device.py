"""The check of an accelerator, on CPU: figures are kept, and a command that fails or never ends is told."""

import json
import pathlib
import subprocess
import sys

import pytest

from experiments import check_device
from tests.compiling import quick_environment

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  for name, value in quick_environment().items():
    monkeypatch.setenv(name, value)


def test_what_a_command_measures_is_in_the_result(tmp_path):
  file = tmp_path / 'device.json'
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.check_device', '--platform=cpu', '--only=device_put', f'--json={file}'],
    cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  result = json.loads(file.read_text(encoding='utf-8'))
  (check,) = result['checks']
  assert result['device'] == 'cpu' and check['check'] == 'device_put' and check['status'] == 0
  assert all(row['value'] > 0 and row['peer_value'] > 0 for row in check['rows']) and len(check['rows']) == 3


def test_a_command_that_fails_and_one_out_of_time_are_told(monkeypatch):
  monkeypatch.setitem(check_device.CHECKS, 'wrong', ('check_tokens', '--ways=nowhere'))
  failed = check_device.check('wrong', 'cpu', timeout_s=120)
  assert failed['status'] not in (0, None) and any('nowhere' in line for line in failed['printed'])
  assert check_device.check('wrong', 'cpu', timeout_s=0.05)['status'] is None


def test_a_check_that_is_not_there_is_named():
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.check_device', '--platform=cpu', '--only=speed'],
    cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
  )  # fmt: skip
  assert done.returncode != 0 and "names ['speed']; there are device_put" in done.stdout + done.stderr
