"""The page and the trace that a run leaves in its folder; a run never fails because they could not be drawn."""

import contextlib
import functools
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

from pdjax.metrics.page import Beside, save_html
from pdjax.metrics.perfetto import save_trace
from pdjax.metrics.report import Report
from pdjax.metrics.saving import write_each


def draw(report: Report, folder: str | os.PathLike, beside: Beside | None = None) -> None:
  """Write `report.html` and `trace.json` into a folder; where one cannot be made, warn and go on without it.

  Of more steps and transfers than `MOST_TRACED` there is no trace, which a note of the report says.
  """
  folder = pathlib.Path(folder)
  saves: dict[str, Callable[[pathlib.Path], Any]] = {'report.html': lambda path: save_html(report, path, beside)}
  if report.timeline.spans.are_traced:
    saves = {'trace.json': lambda path: save_trace(report, path), **saves}
  write_each({folder / name: functools.partial(_draw, save) for name, save in saves.items()})


def _draw(save: Callable[[pathlib.Path], Any], path: pathlib.Path) -> None:
  try:
    save(path)
  except OSError:
    raise
  except Exception as error:  # whatever it is, the run and its figures are worth more than the picture
    with contextlib.suppress(OSError):
      path.unlink()  # what there is of it
    warnings.warn(
      f'{path}, a picture of the run, cannot be made ({type(error).__name__}: {error}); the figures are complete.',
      stacklevel=4,
    )
