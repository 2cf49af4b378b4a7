"""The benchmark of serving on a CPU: it works, says what it leaves out, and its rows can be read by a program."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests.compiling import quick_environment

ROOT = pathlib.Path(__file__).parents[2]
HIDE_TORCH = "import sys; sys.modules['torch'] = None; "
"""Makes torch look as if it were not installed."""


def benchmark(*arguments: str, before: str = '') -> subprocess.CompletedProcess[str]:
  call = f"{before}import runpy; runpy.run_module('experiments.bench_cpu', run_name='__main__', alter_sys=True)"
  return subprocess.run(
    [sys.executable, '-c', call, '--checkpoint=tests/data/families/smollm2', '--quick', *arguments],
    cwd=ROOT, env=quick_environment() | {'COLUMNS': '120'}, capture_output=True, text=True, timeout=300,
  )  # fmt: skip


@pytest.mark.slow
def test_the_benchmark_runs_without_its_peer_and_says_so(tmp_path):
  figures = tmp_path / 'cpu.json'
  done = benchmark('--threads=1', f'--json={figures}', before=HIDE_TORCH)
  assert done.returncode == 0, done.stderr
  assert 'torch' in done.stdout and 'not installed' in done.stdout and 'pdjax[peers]' in done.stdout
  rows = {row['name']: row for row in json.loads(figures.read_text())}
  assert list(rows) == [
    'prefill 32', 'decode batch 2 context 16', 'sampled batch 2 context 16',
    'host loop, share of decode batch 2 context 16',
  ]  # fmt: skip
  for row in rows.values():
    assert list(row) == ['name', 'value', 'unit', 'peer', 'peer_value', 'ratio', 'floor_share']
    assert row['value'] > 0 and row['peer'] is row['peer_value'] is row['ratio'] is None
  for name in ('prefill 32', 'decode batch 2 context 16'):
    assert rows[name]['unit'] == 'tokens/s' and rows[name]['floor_share'] > 0
    assert name in done.stdout


@pytest.mark.slow
def test_a_cache_is_measured_against_none_in_turns_and_without_a_peer(tmp_path):
  figures = tmp_path / 'cpu.json'
  done = benchmark('--threads=1', '--prefix_cache', '--only=batch', f'--json={figures}', before=HIDE_TORCH)
  assert done.returncode == 0, done.stderr
  rows = {row['name']: row for row in json.loads(figures.read_text())}
  for name in ('decode batch 2 context 16', 'sampled batch 2 context 16'):
    assert rows[name]['peer'] == 'without a cache' and rows[name]['value'] > 0 and rows[name]['peer_value'] > 0
    assert rows[f'median of the ratios, steps, {name}']['value'] == pytest.approx(rows[name]['ratio'])
    assert rows[f'median of the ratios, runs, {name}']['value'] > 0
  assert rows['median of the ratios, all runs']['value'] > 0 and len(rows) == 7
  assert 'torch' not in done.stdout


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (('--threads=4096',), ('--threads is 4096', 'lower it')),
    (('--peer=vllm',), ('--peer', 'transformers')),
    (('surplus',), ("['surplus']",)),
    (('--threads=1', '--only=prefil 32'), ('--only=prefil 32', 'prefill 32, decode batch 2 context 16')),
    (('--threads=1', '--checkpoint=tests/data/families/qwen3'), ('qwen3 is no plain Llama', '--peer=none')),
  ],
)
def test_bad_arguments_are_answered_by_name(arguments, words):
  done = benchmark(*arguments)
  assert done.returncode != 0
  assert all(word in done.stdout + done.stderr for word in words), done.stderr
