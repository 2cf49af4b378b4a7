"""Runs a notebook from its first cell to its last on this interpreter, and saves it with what it put out.

python -m experiments.execute_notebook experiments/notebooks/quickstart.ipynb
"""

import os
import pathlib
import sys
import tempfile
from typing import Any

import nbformat
from absl import app
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = pathlib.Path(__file__).parents[1]

_ABOUT = {  # what does not differ from machine to machine
  'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'},
  'language_info': {'name': 'python'},
}


def main(argv: list[str]) -> None:
  if len(argv) < 2:
    raise app.UsageError('name the notebooks to run, e.g. experiments/notebooks/quickstart.ipynb.')
  for path in argv[1:]:
    try:
      notebook = execute(path)
    except (CellExecutionError, OSError) as error:
      sys.exit(f'error: {path}: {error}')
    nbformat.write(notebook, path)
    print(f'{path} ran and is saved, {pathlib.Path(path).stat().st_size / 1e3:.0f} kB')


def execute(path: str | os.PathLike, timeout_s: int = 600) -> Any:
  """Run a notebook, on CPU unless `JAX_PLATFORMS` says otherwise, and return it as it is then; its file stays the same.

  The kernel is this interpreter, whatever kernels are registered, with this checkout's packages, in an empty folder.

  Args:
    path: The notebook.
    timeout_s: Most seconds of one cell.

  Raises:
    CellExecutionError: if a cell raises.
  """
  notebook = nbformat.read(path, as_version=4)
  for cell in notebook.cells:
    cell.metadata.pop('execution', None)
  notebook.metadata.update(_ABOUT)
  paths = filter(None, (str(ROOT), os.environ.get('PYTHONPATH')))
  environment = {'JAX_PLATFORMS': 'cpu', **os.environ, 'PYTHONPATH': os.pathsep.join(paths)}
  with tempfile.TemporaryDirectory() as folder:
    client = NotebookClient(
      notebook,
      kernel_name='python3',
      timeout=timeout_s,
      record_timing=False,
      coalesce_streams=True,
      resources={'metadata': {'path': folder}},
    )
    # With no folders to find a kernel in, 'python3' is this interpreter.
    client.create_kernel_manager().kernel_spec_manager = KernelSpecManager(kernel_dirs=[])
    client.execute(env=environment)
  notebook.metadata.update(_ABOUT)  # the kernel says more of itself
  return notebook


if __name__ == '__main__':
  app.run(main)
