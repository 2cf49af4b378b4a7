"""Notes which implementation of a kernel is taken where nobody asks for one, and why no other is."""

import logging

from experiments.device_check.figures import Figures


def note_choices(figures: Figures) -> logging.Handler:
  """Note from now on every choice that `pallas_kernels` tells, once for each implementation and reason.

  Returns:
    What was added to the logger of `pallas_kernels`, for whoever takes it away again.
  """
  logger, handler = logging.getLogger('pallas_kernels'), _Choices(figures)
  logger.setLevel(logging.INFO)
  logger.addHandler(handler)
  return handler


class _Choices(logging.Handler):
  def __init__(self, figures: Figures):
    super().__init__(logging.INFO)
    self._figures = figures
    self._noted: set[tuple[str, str, str]] = set()

  def emit(self, record: logging.LogRecord) -> None:
    if isinstance(record.args, tuple) and len(record.args) == 6:
      kernel, _, name, taken, _, passed_over = map(str, record.args)
      if (kernel, name, passed_over) not in self._noted:
        self._noted.add((kernel, name, passed_over))
        self._figures.note(f'{kernel} takes {name}, {taken}{passed_over}')
