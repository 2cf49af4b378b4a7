"""Tables of what was measured to be fastest: which parameters a kernel takes for a problem on a device."""

import dataclasses
import functools
import importlib.resources
import json
import math
from collections.abc import Mapping
from typing import Any

Facts = Mapping[str, int | str]  # what a choice depends on: sizes as numbers, kinds as words


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of a kernel's tuning.json."""

  device: str
  problem: Facts
  config: Mapping[str, Any]
  figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@functools.cache
def load(kernel: str) -> tuple[Row, ...]:
  """The rows of `pallas_kernels/<kernel>/tuning.json`, best first; none if there is no such file."""
  file = importlib.resources.files('pallas_kernels') / kernel / 'tuning.json'
  if not file.is_file():
    return ()
  return tuple(Row(**row) for row in json.loads(file.read_text(encoding='utf-8')))


def nearest(rows: tuple[Row, ...], device: str, facts: Facts) -> tuple[Row, bool] | None:
  """The row of this device that is most like a problem, and whether it is just that problem.

  Words must be equal; numbers count by how many doublings lie between them. Of equally near rows the first counts.
  """
  near = [
    (_doublings(row.problem, facts), row) for row in rows if row.device == device and _same_words(row.problem, facts)
  ]
  if not near:
    return None
  distance, row = min(near, key=lambda pair: pair[0])
  return row, distance == 0


def _same_words(one: Facts, other: Facts) -> bool:
  return all(other.get(name) == value for name, value in one.items() if isinstance(value, str))


def _doublings(one: Facts, other: Facts) -> float:
  numbers = (name for name, value in one.items() if not isinstance(value, str))
  return sum(abs(math.log2(max(int(one[name]), 1) / max(int(other.get(name, 1)), 1))) for name in numbers)
