"""Notebooks run on this interpreter with this checkout, and only a whole run is saved."""

import pathlib
import sys

import nbformat
import pytest

from experiments import execute_notebook

ROOT = pathlib.Path(__file__).parents[2]


def _write(path: pathlib.Path, *sources: str) -> pathlib.Path:
  nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources]), path)
  return path


def test_the_kernel_is_this_interpreter_with_this_checkout_in_an_empty_folder(tmp_path, monkeypatch):
  foreign = tmp_path / 'kernels' / 'python3'  # a kernel of another environment, under the same name
  foreign.mkdir(parents=True)
  (foreign / 'kernel.json').write_text('{"argv": ["false"], "display_name": "x", "language": "python"}')
  monkeypatch.setenv('JUPYTER_PATH', str(tmp_path))
  source = 'import os, sys, pdjax\nprint(sys.executable, pdjax.__file__, os.listdir(), sep="\\n")'
  path = _write(tmp_path / 'a.ipynb', source, '6 * 7')
  first, second = execute_notebook.execute(path).cells
  assert first.outputs[0].text.splitlines() == [sys.executable, str(ROOT / 'pdjax' / '__init__.py'), '[]']
  assert second.outputs[0].data['text/plain'] == '42'
  assert nbformat.read(path, 4).cells[0].outputs == []


def test_a_cell_that_raises_leaves_the_file_as_it_was(tmp_path):
  path = _write(tmp_path / 'a.ipynb', 'print(1)', 'raise ValueError("not today")')
  before = path.read_bytes()
  with pytest.raises(SystemExit, match='not today'):
    execute_notebook.main(['execute_notebook', str(path)])
  assert path.read_bytes() == before


def test_a_whole_run_is_saved_without_a_trace_of_the_machine(tmp_path, capsys):
  path = _write(tmp_path / 'a.ipynb', 'for i in range(3): print(i, flush=True)')
  execute_notebook.main(['execute_notebook', str(path)])
  notebook = nbformat.read(path, 4)
  assert [output.text for output in notebook.cells[0].outputs] == ['0\n1\n2\n']
  assert notebook.metadata.language_info == {'name': 'python'}
  assert 'a.ipynb ran and is saved' in capsys.readouterr().out
