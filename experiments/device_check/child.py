"""The process of one part of the check of a device; `experiments.check_device` starts it."""

import importlib
import os
import pathlib
import sys
import time
import traceback

import jax
from absl import app, flags

from experiments.device_check.choices import note_choices
from experiments.device_check.context import Context
from experiments.device_check.figures import Figures
from experiments.device_check.parts import PARTS
from experiments.device_check.sizes import Sizes
from experiments.device_check.timing import describe

_PART = flags.DEFINE_string('part', None, 'The part to run.', required=True)
_PLATFORM = flags.DEFINE_enum('platform', 'gpu', ['cpu', 'gpu', 'tpu'], 'The devices to run it on.')
_LINES = flags.DEFINE_string('lines', None, 'Add figures to this file, a line of JSON each.', required=True)
_FOLDER = flags.DEFINE_string('folder', None, 'Where the result is, and the cache of programs.', required=True)
_TOY = flags.DEFINE_bool('toy', False, 'Toy shapes: the figures mean nothing.')
_SEED = flags.DEFINE_integer('seed', None, 'Of random inputs; drawn by default.', lower_bound=0)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  if _PART.value not in PARTS or not PARTS[_PART.value].function:
    ours = ', '.join(part.name for part in PARTS.values() if part.function)
    raise app.UsageError(f'--part is {_PART.value!r}, expected one of {ours}.')
  figures, folder = Figures(_LINES.value, marks=not _TOY.value), pathlib.Path(_FOLDER.value)
  sizes = Sizes.toy() if _TOY.value else Sizes.real()
  context = Context(_PLATFORM.value, sizes, figures, folder, _TOY.value, _SEED.value)
  if _PLATFORM.value == 'cpu':
    jax.config.update('jax_platforms', 'cpu')
  note_choices(figures)
  begin = time.perf_counter()
  try:
    module, name = PARTS[_PART.value].function.split(':')
    getattr(importlib.import_module(module), name)(context)
  except Exception as error:  # whatever it is, the other parts go on
    traceback.print_exc()
    figures.fail(describe(error))
  print(f'{time.perf_counter() - begin:.1f} s in the part itself', flush=True)
  sys.stderr.flush()
  os._exit(1 if figures.failures else 0)  # threads that still compile what is no longer wanted would be waited for


if __name__ == '__main__':
  app.run(main)
