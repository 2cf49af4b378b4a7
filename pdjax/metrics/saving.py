"""Files that are written once a run is over, when figures are worth more than any of them."""

import contextlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging


def write_each(files: Mapping[pathlib.Path, Callable[[pathlib.Path], Any]]) -> tuple[str, ...]:
  """Write files, and missing folders; what could not be written, and why, in sentences that are logged, too.

  Nothing is raised for it, and what is written in part is taken away.

  Args:
    files: For each path, what writes it and raises OSError if it cannot.
  """
  unwritten = []
  for path, write in files.items():
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      write(path)
    except OSError as error:
      unwritten.append(f'{path} cannot be written ({type(error).__name__}: {error}).')
      logging.error('%s', unwritten[-1])
      with contextlib.suppress(OSError):
        path.unlink()
  return tuple(unwritten)
