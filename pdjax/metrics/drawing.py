"""What a run leaves in its folder for people to look at; a run never fails because it could not be drawn."""

import os
import warnings

from pdjax.metrics.page import Beside, save_html
from pdjax.metrics.perfetto import save_trace
from pdjax.metrics.report import Report


def draw(report: Report, folder: str | os.PathLike, beside: Beside | None = None) -> None:
  """Write `report.html` and `trace.json` into a folder; where one cannot be made, warn and go on."""
  try:
    save_trace(report, folder)
    save_html(report, folder, beside)
  except Exception as error:  # whatever it is, the run and its figures are worth more than the picture
    warnings.warn(
      f'{os.fspath(folder)} lacks a picture of the run ({type(error).__name__}: {error}); the figures are complete.',
      stacklevel=2,
    )
