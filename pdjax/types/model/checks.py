"""Checks of the numbers in a model's description."""

import sys
from typing import Any, TypeGuard


def is_size(value: Any) -> TypeGuard[int]:
  """Whether this is a positive integer."""
  return type(value) is int and value > 0


def is_positive(value: Any) -> TypeGuard[float]:
  """Whether this is a positive number that is finite as a float."""
  return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
