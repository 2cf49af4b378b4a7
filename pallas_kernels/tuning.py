"""Tables of what was measured to be fastest: which parameters a kernel takes for a problem on a device."""

import dataclasses
import functools
import importlib
import importlib.resources
import json
import math
import os
from collections.abc import Mapping
from typing import Any

Facts = Mapping[str, int | str]  # what a choice depends on: sizes as numbers, kinds as words
FORM = 'PALLAS_KERNELS_FORM'  # of the environment: which of two equally near rows to take
FORMS = ('fast', 'small')
WITHOUT = 'PALLAS_KERNELS_WITHOUT'  # of the environment: implementations that are taken by name alone, 'cudnn,...'


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of a kernel's tuning.json."""

  device: str
  problem: Facts
  config: Mapping[str, Any]
  figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  implementation: str = 'pallas_tpu'  # whose parameters these are


@functools.cache
def load(kernel: str) -> tuple[Row, ...]:
  """The rows of `pallas_kernels/<kernel>/tuning.json`, of all implementations, best first; none without such a file."""
  file = importlib.resources.files('pallas_kernels') / kernel / 'tuning.json'
  if not file.is_file():
    return ()
  return tuple(Row(**row) for row in json.loads(file.read_text(encoding='utf-8')))


def form() -> str:
  """The form of programs that the environment prefers: 'fast', the best estimate, or 'small', the shortest program.

  The estimates know no instruction fetch, so a chip may like the shorter of two programs better.

  Raises:
    ValueError: if it says something else.
  """
  wanted = os.environ.get(FORM, FORMS[0])
  if wanted not in FORMS:
    raise ValueError(f'{FORM}={wanted!r} is no form of a kernel; set it to {" or ".join(map(repr, FORMS))}.')
  return wanted


def left_out() -> frozenset[str]:
  """The names of implementations that the environment leaves out of what is taken where nobody asks for one.

  Raises:
    ValueError: if no kernel has one of that name that could be left out.
  """
  names = frozenset(name.strip() for name in os.environ.get(WITHOUT, '').split(',')) - {''}
  if unknown := names - _own_implementations():
    raise ValueError(
      f'{WITHOUT} names {", ".join(map(repr, sorted(unknown)))}, which no kernel has; what can be left out is '
      f'{", ".join(sorted(_own_implementations()))}, separated by commas.'
    )
  return names


@functools.cache
def _own_implementations() -> frozenset[str]:
  """The names of all kernels' implementations that have parameters: none of them is needed, others are there."""
  found = set()
  for folder in importlib.resources.files('pallas_kernels').iterdir():
    if folder.is_dir() and (folder / 'api.py').is_file():
      tables = importlib.import_module(f'pallas_kernels.{folder.name}.api').IMPLEMENTATIONS
      for table in tables.values() if isinstance(next(iter(tables.values())), dict) else [tables]:
        found |= {name for name, one in table.items() if hasattr(one, 'platforms')}
  return frozenset(found)


def nearest(rows: tuple[Row, ...], device: str, facts: Facts, form: str = 'fast') -> tuple[Row, bool] | None:
  """The row of this device that is most like a problem, and whether it is just that problem.

  Words must be equal; numbers count by how many doublings lie between them. Of equally near rows the first counts, or
  in the small form that with the fewest bundles.
  """
  near = [
    (_doublings(row.problem, facts), row) for row in rows if row.device == device and _same_words(row.problem, facts)
  ]
  if not near:
    return None
  distance, row = min(near, key=lambda pair: (pair[0], _bundles(pair[1]) if form == 'small' else 0))
  return row, distance == 0


def _bundles(row: Row) -> float:
  return row.figures.get('bundles', math.inf)


def _same_words(one: Facts, other: Facts) -> bool:
  return all(other.get(name) == value for name, value in one.items() if isinstance(value, str))


def _doublings(one: Facts, other: Facts) -> float:
  numbers = (name for name, value in one.items() if not isinstance(value, str))
  return sum(abs(math.log2(max(int(one[name]), 1) / max(int(other.get(name, 1)), 1))) for name in numbers)
