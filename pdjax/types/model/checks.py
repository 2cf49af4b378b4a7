"""Checks of the numbers in a model's description."""

import sys
from typing import Any, TypeGuard


def is_size(value: Any) -> TypeGuard[int]:
  """Whether this is a positive integer."""
  return type(value) is int and value > 0


def is_positive(value: Any) -> TypeGuard[float]:
  """Whether this is a positive number that is finite as a float."""
  return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def are_below(limit: int, values: Any) -> bool:
  """Whether this is a tuple of integers from 0 to below a limit."""
  return isinstance(values, tuple) and all(type(value) is int and 0 <= value < limit for value in values)


def check_sizes(part: object, *names: str) -> None:
  """Raise ValueError unless these fields of a part are integers of at least 1."""
  for name in names:
    if not is_size(value := getattr(part, name)):
      raise ValueError(f'{type(part).__name__} has {name}={value!r}, expected an integer of at least 1.')


def check_flags(part: object, *names: str) -> None:
  """Raise ValueError unless these fields of a part are True or False."""
  for name in names:
    if not isinstance(value := getattr(part, name), bool):
      raise ValueError(f'{type(part).__name__} has {name}={value!r}, expected True or False.')
