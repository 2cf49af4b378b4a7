"""A work directory is never written over: an earlier run moves, files of others stay, and one run at a time writes."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import psutil
import pytest

from pdjax import launch, run_folder
from pdjax.overrides import apply_overrides
from pdjax.reporting import describe
from pdjax.run_folder import RunFolder, differences, open_folder, read_run
from pdjax.types import DeviceError, RayCluster
from pdjax.workload import Given
from tests.tiny import config, requests

ROOT = pathlib.Path(__file__).parents[1]
RUN = {'backend': 'engine', 'serves': 'requests', 'config': {'page_size': 16}}


def begin(folder, *names: str) -> list[str]:
  """Begin a run that leaves these files; what was said."""
  said: list[str] = []
  opened = RunFolder.begin(folder, RUN, said.append)
  for name in names:
    (folder / name).write_text(name)
  opened.close()
  return said


def names(folder: pathlib.Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


LEFT = ('answers.jsonl', 'events.jsonl', 'report.json', 'report.html', 'trace.json', 'metrics.prom', 'requests.jsonl')


def test_a_second_run_moves_the_first_beside_it_and_a_third_both(tmp_path):
  folder = tmp_path / 'runs' / 'out'
  assert begin(folder, *LEFT) == []
  (tmp_path / 'runs' / 'out.2').mkdir()  # of somebody else
  (said,) = begin(folder, 'answers.jsonl')
  assert said == f'{folder} held an earlier run, which is in {folder}.1 now'
  (said,) = begin(folder, 'report.json')
  assert said.endswith(f'is in {folder}.3 now')
  assert names(folder) == ['report.json', 'run.json']
  assert names(tmp_path / 'runs' / 'out.1') == sorted([*LEFT, 'run.json'])
  assert names(tmp_path / 'runs' / 'out.2') == [] and names(tmp_path / 'runs' / 'out.3') == [
    'answers.jsonl',
    'run.json',
  ]
  assert (tmp_path / 'runs' / 'out.1' / 'report.html').read_text() == 'report.html'


def test_files_of_somebody_else_stay_where_they_are(tmp_path):
  home = tmp_path / 'home'
  (home / 'thesis').mkdir(parents=True)
  (home / 'thesis' / 'report.json').write_text('mine')
  (home / 'in.jsonl').write_text('mine')
  begin(home, 'events.jsonl', 'report.json')
  begin(home)
  assert names(home) == ['in.jsonl', 'run.json', 'thesis'] and names(home / 'thesis') == ['report.json']
  assert names(tmp_path / 'home.1') == ['events.jsonl', 'report.json', 'run.json']


def test_a_picture_that_a_run_drew_in_its_folder_goes_with_it(tmp_path):
  folder = tmp_path / 'out'
  RunFolder.begin(folder, RUN | {'more_files': ['run.svg']}).close()
  for name in ('run.svg', 'mine.svg'):
    (folder / name).write_text(name)
  begin(folder)
  assert names(folder) == ['mine.svg', 'run.json'] and names(tmp_path / 'out.1') == ['run.json', 'run.svg']
  RunFolder.begin(folder, RUN | {'more_files': ['charts/a.svg']}).close()
  (folder / 'charts').mkdir()
  for name in ('a.svg', 'b.svg'):
    (folder / 'charts' / name).write_text(name)
  begin(folder)
  assert names(folder / 'charts') == ['b.svg'] and names(tmp_path / 'out.2' / 'charts') == ['a.svg']
  with pytest.raises(ValueError, match=r'has mine.svg, and nothing says that a run left that'):
    RunFolder.begin(folder, RUN | {'more_files': ['mine.svg']})


@pytest.mark.parametrize('name', ['report.json', 'requests.jsonl', 'events.jsonl', 'run.json'])
def test_a_file_by_the_name_of_a_runs_that_no_run_left_is_refused(tmp_path, name):
  (tmp_path / name).write_text('{"mine": true}\n')
  with pytest.raises(ValueError, match=rf'has {name}, and nothing says that a run left that; name another folder'):
    RunFolder.begin(tmp_path, RUN)
  assert names(tmp_path) == [name]


def test_a_run_from_before_there_was_run_json_is_known_by_its_log(tmp_path):
  folder = tmp_path / 'demo'
  folder.mkdir()
  for name in ('events.jsonl', 'report.json', 'requests.jsonl'):
    (folder / name).write_text('{"event": "Turn", "now_s": 0.0}\n')
  begin(folder)
  assert names(folder) == ['run.json'] and names(tmp_path / 'demo.1') == [
    'events.jsonl',
    'report.json',
    'requests.jsonl',
  ]


@pytest.mark.parametrize('text', [None, '', '{\n  "format": 1,\n  "beg'])
def test_a_run_that_has_served_nothing_leaves_nothing_to_move(tmp_path, text):
  folder = tmp_path / 'out'
  begin(folder)
  if text is not None:  # killed before it had written it
    (folder / 'run.json').write_text(text)
  for name in ('answers.jsonl', 'events.jsonl'):  # opened, and nothing came
    (folder / name).write_text('')
  assert begin(folder) == [] and names(tmp_path) == ['out'] and names(folder) == ['run.json']


def test_a_run_that_has_no_room_for_its_first_file_is_refused_and_leaves_none(tmp_path, monkeypatch):
  def write(file, run):
    file.write('{\n  "format"')
    file.flush()
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as full, pytest.raises(ValueError, match=r'run.json cannot be written .*No space left'):
    full.setattr(run_folder, '_write_run', write)
    begin(tmp_path / 'out')
  assert names(tmp_path / 'out') == []
  begin(tmp_path / 'out')


def test_what_a_comparison_leaves_goes_with_it_and_another_run_is_not_taken_for_a_part_of_it(tmp_path):
  comparison = RUN | {'more_files': ['colocated']}
  folder = tmp_path / 'out'
  begin(folder / 'colocated', 'report.json')
  with pytest.raises(ValueError, match='has colocated, and nothing says that a run left that'):
    RunFolder.begin(folder, comparison)
  assert names(folder / 'colocated') == ['report.json', 'run.json']
  (folder / 'colocated').rename(tmp_path / 'mine')
  RunFolder.begin(folder, comparison).close()
  (folder / 'colocated').mkdir()  # and before `compare.json` is written, the process is killed
  (folder / 'colocated' / 'report.json').write_text('{}')
  begin(folder)
  assert names(folder) == ['run.json'] and names(tmp_path / 'out.1') == ['colocated', 'run.json']


@pytest.mark.parametrize('typed', ['.', 'out/', '../{}/out'])
def test_a_folder_is_moved_beside_itself_however_it_is_written(tmp_path, monkeypatch, typed):
  begin(tmp_path / 'out', 'answers.jsonl')
  monkeypatch.chdir(tmp_path / 'out' if typed == '.' else tmp_path)
  RunFolder.begin(typed.format(tmp_path.name), RUN).close()
  assert names(tmp_path) == ['out', 'out.1'] and names(tmp_path / 'out.1') == ['answers.jsonl', 'run.json']


def test_a_folder_that_cannot_be_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  for path in (tmp_path / 'file', tmp_path / 'file' / 'below'):
    with pytest.raises(ValueError, match=r'cannot be made .*; name another folder'):
      RunFolder.begin(path, RUN)


def test_two_runs_cannot_write_into_one_folder(tmp_path):
  first = RunFolder.begin(tmp_path / 'out', RUN)
  (tmp_path / 'out' / 'answers.jsonl').write_text('')
  for again in (RunFolder.begin, RunFolder.resume):
    with pytest.raises(ValueError, match='is in use by another run, which has not ended'):
      again(tmp_path / 'out', RUN)
  assert names(tmp_path) == ['out']
  first.close()
  RunFolder.resume(tmp_path / 'out', RUN).close()


def test_a_process_that_is_killed_leaves_its_folder_to_others(tmp_path):
  code = f"""
import os, signal
from pdjax.run_folder import RunFolder
folder = RunFolder.begin({str(tmp_path / 'out')!r}, {RUN!r})
os.kill(os.getpid(), signal.SIGKILL)
"""
  assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=False).returncode == -9
  RunFolder.resume(tmp_path / 'out', RUN).close()


# ---------------------------------------------------------------------------- going on


def test_what_the_part_before_left_is_kept_in_the_folder_and_its_answers_grow(tmp_path):
  begin(tmp_path, *LEFT)
  for number in (1, 2, 3):
    folder = RunFolder.resume(tmp_path, RUN)
    folder.put_away()
    assert names(tmp_path)[:1] == ['answers.jsonl'] and names(tmp_path)[-1] == 'run.json'
    if number == 2:  # one that was killed before it had served anything
      folder.close()
      continue
    (tmp_path / 'events.jsonl').write_text(str(number))
    folder.close()
  left = sorted({*LEFT} - {'answers.jsonl'})
  assert names(tmp_path) == ['answers.jsonl', 'before-1', 'before-2', 'events.jsonl', 'run.json']
  assert names(tmp_path / 'before-1') == left and (tmp_path / 'before-2' / 'events.jsonl').read_text() == '1'
  begin(tmp_path)
  assert names(tmp_path.with_name(f'{tmp_path.name}.1')) == [
    'answers.jsonl', 'before-1', 'before-2', 'events.jsonl', 'run.json',
  ]  # fmt: skip


def test_what_the_devices_made_of_the_config_is_held_to(tmp_path):
  folder = RunFolder.begin(tmp_path / 'out', RUN)
  folder.settle({'dtype': 'float32'})
  with pytest.raises(ValueError, match='is in use by another run'):  # with the new file as with the old
    RunFolder.resume(tmp_path / 'out', RUN)
  folder.close()
  folder = RunFolder.resume(tmp_path / 'out', RUN)
  folder.settle({'dtype': 'float32'})
  with pytest.raises(ValueError, match=r'cannot go on here: settled.dtype was "float32" and is "bfloat16". Go on with'):
    folder.settle({'dtype': 'bfloat16'})
  folder.close()
  assert names(tmp_path / 'out') == ['run.json'] and read_run(tmp_path / 'out')['config'] == RUN['config']


def test_a_folder_that_has_no_room_for_what_the_devices_made_of_the_config_goes_on(tmp_path, monkeypatch, caplog):
  folder = RunFolder.begin(tmp_path / 'out', RUN)
  before = (tmp_path / 'out' / 'run.json').read_bytes()

  def write(file, run):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(run_folder, '_write_run', write)
  folder.settle({'dtype': 'float32'})
  assert (tmp_path / 'out' / 'run.json').read_bytes() == before and names(tmp_path / 'out') == ['run.json']
  assert 'No space left on device' in caplog.text
  with pytest.raises(ValueError, match='is in use by another run'):
    RunFolder.resume(tmp_path / 'out', RUN)
  folder.close()


@pytest.mark.parametrize(('name', 'text'), [('other.json', '{}'), ('run.json', '{"format"'), ('run.json', '[1]')])
def test_without_a_run_there_is_nothing_to_go_on_with(tmp_path, name, text):
  (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match='run'):
    read_run(tmp_path)


def opened(folder, run, **options):
  with_folder = open_folder(folder, run, 'engine', **options)
  with_folder.close()
  return with_folder


@pytest.mark.parametrize(
  ('override', 'told'),
  [
    ('page_size=8', 'config.page_size was 4 and is 8'),
    ('workers.decode0.max_sequences=2', 'config.workers.decode0.max_sequences was 4 and is 2'),
    ('seed=3', 'config.seed was 0 and is 3'),
    ('policy.max_prefill_tokens=8', 'config.policy.max_prefill_tokens was 16 and is 8'),
    ('dtype=bfloat16', 'config.dtype was "float32" and is "bfloat16"'),
  ],
)
def test_another_config_is_refused_with_the_difference(tmp_path, override, told):
  opened(tmp_path, config())
  with pytest.raises(ValueError, match='is another one: ') as error:
    opened(tmp_path, apply_overrides(config(), [override]), resume=True)
  assert told in str(error.value) and 'run.json' in str(error.value)


def test_every_difference_is_told_and_what_changes_no_answer_is_free(tmp_path):
  opened(tmp_path, config())
  with pytest.raises(ValueError) as error:
    opened(tmp_path, apply_overrides(config('2P1D'), ['seed=1']), resume=True, serves='a file')
  assert all(part in str(error.value) for part in ('serves was', 'config.workers was', 'config.seed was 0 and is 1'))
  opened(tmp_path, apply_overrides(config(), ['compilation_cache=other', 'slo.ttft_ms=5']), resume=True)
  opened(tmp_path, config(workload=Given(requests((1, 2)))), resume=True)

  def on(cluster):
    return {'config': {'processes': describe(cluster)}}

  assert differences(on(RayCluster('10.0.0.1:6379')), on(RayCluster('10.0.0.2:6379', host='node'))) == [
    'config.processes.host was "127.0.0.1" and is "node"'
  ]


def test_an_object_is_the_same_in_another_process(tmp_path):
  class Policy:
    moves_kv = True

    def decide(self, view):
      return []

  def run():
    return dataclasses.replace(config(), policy=Policy())

  keep = run()
  opened(tmp_path, keep)
  assert ' at 0x' in json.loads((tmp_path / 'run.json').read_text())['config']['policy']
  opened(tmp_path, run(), resume=True)


# ---------------------------------------------------------------------------- from Python


def test_runs_and_simulations_and_sessions_overwrite_nothing(tmp_path):
  folder = tmp_path / 'out'
  for number in range(3):
    result = launch.simulate(config(), workdir=folder)
    assert result.unwritten == () and result.report.completed == 6
    assert names(tmp_path) == ['out', *(f'out.{one}' for one in range(1, number + 1))]
  for place in ('out', 'out.1', 'out.2'):
    assert json.loads((tmp_path / place / 'report.json').read_text())['completed'] == 6
  assert 'answers.jsonl' not in names(folder)  # tokens of a simulation say nothing


def test_a_report_that_cannot_be_written_takes_no_result_with_it(tmp_path):
  for name in ('report.json', 'metrics.prom'):
    (tmp_path / name).mkdir()
  result = launch.simulate(config(), workdir=tmp_path)
  assert result.report.completed == 6 and len(result.completions) == 6
  assert [os.path.basename(line.split()[0]) for line in result.unwritten] == ['report.json', 'metrics.prom']
  assert 'Is a directory' in result.unwritten[0] and (tmp_path / 'report.html').is_file()


def test_a_page_that_cannot_be_written_is_told_in_the_log_and_takes_no_figure_with_it(tmp_path, caplog):
  (tmp_path / 'report.html').mkdir()
  result = launch.simulate(config(), workdir=tmp_path)
  assert result.unwritten == () and f'{tmp_path / "report.html"} cannot be written' in caplog.text
  assert (tmp_path / 'trace.json').is_file() and (tmp_path / 'report.json').is_file()


def raise_(error: Exception):
  raise error


def test_a_run_from_python_leaves_requests_and_goes_on(tmp_path, monkeypatch):
  folder = tmp_path / 'out'
  whole = launch.run(config('1P1D'), workdir=folder)
  rows = (folder / 'requests.jsonl').read_text().splitlines()
  assert [json.loads(row)['id'] for row in rows] == [one.request.id for one in whole.completions]
  answers = (folder / 'answers.jsonl').read_text().splitlines(keepends=True)
  (folder / 'answers.jsonl').write_text(''.join(answers[:2]))
  again = launch.run(config('1P1D'), workdir=folder, resume=True)
  assert [one.token_ids for one in again.completions] == [one.token_ids for one in whole.completions]
  assert [json.loads(row)['output_token_ids'] for row in (folder / 'requests.jsonl').read_text().splitlines()] == [
    json.loads(row)['output_token_ids'] for row in rows
  ]
  assert again.report.completed == len(rows) - 2 and (folder / 'before-1' / 'requests.jsonl').is_file()
  before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
  (folder / 'answers.jsonl').write_text(''.join(answers[:2]))
  with monkeypatch.context() as without, pytest.raises(DeviceError, match='no devices'):
    without.setattr(launch, 'deploy', lambda *args: raise_(DeviceError('no devices')))
    launch.run(config('1P1D'), workdir=folder, resume=True)
  after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
  assert after == before | {'answers.jsonl': after['answers.jsonl']} and not (folder / 'before-2').exists()
  (folder / 'answers.jsonl').write_bytes(before['answers.jsonl'])
  nothing = launch.run(config('1P1D'), workdir=folder, resume=True)  # is left
  assert len(nothing.completions) == len(rows) and nothing.report.num_prompts == 0
  assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
  assert not (folder / 'before-2').exists()


def test_a_run_that_cannot_begin_leaves_no_file_open(tmp_path, monkeypatch):
  monkeypatch.setattr(launch, 'deploy', lambda *args: raise_(DeviceError('no devices')))
  with pytest.raises(DeviceError, match='no devices'):
    launch.run(config('1P1D'), workdir=tmp_path / 'out')
  assert [file.path for file in psutil.Process().open_files() if file.path.startswith(str(tmp_path))] == []
