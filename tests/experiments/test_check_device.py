"""The check of a device, on CPU: every part runs, figures are kept, and what failed or never ended is told."""

import json
import pathlib
import subprocess
import sys

from tests.compiling import quick_environment

ROOT = pathlib.Path(__file__).parents[2]


def command(out: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, '-m', 'experiments.check_device', f'--out={out}', *arguments],
    cwd=ROOT, env=quick_environment(), capture_output=True, text=True, timeout=300, check=False,
  )  # fmt: skip


def result(out: pathlib.Path) -> dict:
  return json.loads((out / 'result.json').read_text(encoding='utf-8'))


def test_a_part_out_of_time_is_told_and_the_next_runs(tmp_path):
  done = command(tmp_path, '--dry_run', '--only=ceilings,decode', '--timeout_s=0.05')
  assert done.returncode == 1 and 'decode: out of time' in done.stdout
  assert [part['status'] for part in result(tmp_path)['parts']] == ['out of time', 'out of time']


def test_a_part_that_is_not_there_is_named(tmp_path):
  done = command(tmp_path, '--only=speed')
  assert done.returncode != 0 and "names ['speed']; there are ceilings" in done.stdout + done.stderr
