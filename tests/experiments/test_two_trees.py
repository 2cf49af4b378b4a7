"""Benchmarks of two trees: each process finds one tree only, and what it answers comes back."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from experiments.two_trees import HERE, in_turns, measure, open_tree


def where(name: str, fails: bool = False) -> list[str]:
  import importlib
  import os

  print('what a function prints is no answer')
  if fails:
    raise LookupError('it is not here')
  return [importlib.import_module(name).__file__, os.getcwd()]


@pytest.fixture(scope='module')
def other(tmp_path_factory) -> pathlib.Path:
  """A copy of what a tree needs to simulate and to time a turn."""
  tree = tmp_path_factory.mktemp('trees') / 'other'
  for folder in ('pdjax', 'configs', 'experiments', 'pallas_kernels'):
    shutil.copytree(HERE / folder, tree / folder, ignore=shutil.ignore_patterns('__pycache__', 'results', 'notebooks'))
  return tree


def command(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, '-m', f'experiments.{name}', *map(str, arguments)], cwd=HERE, capture_output=True, text=True,
    timeout=300,
  )  # fmt: skip


def rows_of(path: pathlib.Path) -> dict[str, dict]:
  return {row['name']: row for row in json.loads(path.read_text())}


def test_a_process_runs_in_its_tree_and_imports_that_one(other):
  for tree in (HERE, other):
    assert measure(tree, where, name='pdjax') == [str(tree / 'pdjax' / '__init__.py'), str(tree)]
  assert measure(other, where, name='experiments.rows')[0] == str(other / 'experiments' / 'rows.py')


def test_trees_are_measured_in_turns(other):
  turns = in_turns([HERE, other], 2, where, name='pdjax')
  assert [[folder for _, folder in turn] for turn in turns] == [[str(HERE), str(other)]] * 2


def test_an_error_says_the_tree_and_the_line_that_raised_it(other):
  with pytest.raises(RuntimeError, match=r'where failed in .*other:') as caught:
    measure(other, where, name='pdjax', fails=True)
  assert 'it is not here' in str(caught.value) and pathlib.Path(__file__).name in str(caught.value)
  assert "raise LookupError('it is not here')" in str(caught.value)


def test_a_tree_without_pdjax_is_refused_and_no_other_is_measured_in_its_place(tmp_path):
  with pytest.raises(ValueError, match=r'has no pdjax/__init__\.py, expected the root of a checkout'):
    open_tree(tmp_path)
  with pytest.raises(RuntimeError, match=r'pdjax was found in|No module named'):
    measure(tmp_path, where, name='json')


def test_the_simulator_is_measured_beside_a_tree_with_equal_tokens_and_batches(other, tmp_path):
  figures = tmp_path / 'rows.json'
  done = command(
    'bench_simulator', '--workers=2,4', '--rates=8', '--requests=9', f'--beside={other}', f'--json={figures}'
  )
  assert done.returncode == 0, done.stderr
  rows = rows_of(figures)
  for workers in (2, 4):
    what = f'{workers} workers, 8 requests/s a pair'
    speed, ratio = rows[f'decode tokens a CPU second, {what}'], rows[f'median of the ratios, {what}']
    assert speed['peer'] == 'the other tree' and speed['value'] > 0 and speed['peer_value'] > 0
    assert ratio['value'] == pytest.approx(speed['ratio'])
  assert rows['4 workers against 2 at equal mean batch, 8 requests/s a pair']['value'] > 0
  assert len(rows) == 5 and 'the other' in done.stdout


def test_a_turn_is_measured_beside_a_tree_by_its_mean_median_and_tail(other, tmp_path):
  figures = tmp_path / 'rows.json'
  done = command(
    'bench_loop', '--batch=2', '--steps=20', '--repeats=1', f'--beside={other}', f'--json={figures}'
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  rows = rows_of(figures)
  turns = [rows[f'{name} turn, 1P1D, batch 2'] for name in ('median', 'mean', 'p99')]
  for side in ('value', 'peer_value'):
    median, mean, tail = (turn[side] for turn in turns)
    assert 0 < median <= tail and 0 < mean <= tail
  assert rows['p99 of turns by their median, 1P1D, batch 2']['value'] >= 1


@pytest.mark.parametrize(
  ('name', 'argument', 'words'),
  [
    ('bench_simulator', '--workers=3', ('--workers', 'even numbers')),
    ('bench_simulator', '--workers=4,6', ('--workers', 'multiple')),
    ('bench_simulator', '--rates=fast', ('--rates', 'fast')),
    ('bench_simulator', '--rates=-1', ('--rates', 'positive')),
    ('bench_simulator', '--beside=nowhere', ('nowhere', 'pdjax/__init__.py')),
    ('bench_loop', '--beside=nowhere', ('nowhere', 'pdjax/__init__.py')),
  ],
)
def test_bad_arguments_are_answered_by_name(name, argument, words):
  done = command(name, argument)
  assert done.returncode != 0 and all(word in done.stdout + done.stderr for word in words), done.stderr
