"""The benchmark of transfers: what it prints, and that a pull of ours carries what a bare one does."""

import json
import pathlib
import subprocess
import sys

from tests.compiling import quick_environment

ROOT = pathlib.Path(__file__).parents[2]


def test_a_pull_between_processes_is_measured_beside_a_bare_one(tmp_path):
  file = tmp_path / 'rows.json'
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.bench_transfer', '--transport=cross_process', '--mib=1.4', '--repeats=3',
     f'--json={file}'],
    cwd=ROOT, env=quick_environment() | {'JAX_PLATFORMS': 'cpu'}, capture_output=True, text=True, timeout=300,
    check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  pulled, whole = json.loads(file.read_text())
  assert pulled['name'] == 'cross_process, 1 MiB' and pulled['peer'] == 'bare jax.experimental.transfer pull'
  assert pulled['ratio'] > 0.2 and pulled['value'] > whole['value'] > 0  # 0.8 and more on a quiet machine, see LOG.md
  assert 'of bare' in done.stdout
