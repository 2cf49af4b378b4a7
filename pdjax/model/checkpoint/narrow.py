"""Converts weights to a narrower floating-point type, and refuses what would overflow there."""

from typing import Any

import ml_dtypes
import numpy as np

# A result is looked through in pieces that fit a cache: all in all a fraction of the conversion itself.
_PIECE = 2**18


def convert_weight(weight: np.ndarray, dtype: Any, name: str, order: Any = 'K') -> np.ndarray:
  """The weight in another type; an infinity or NaN that it holds stays what it is.

  Args:
    weight: Floating-point numbers of any shape.
    dtype: The type.
    name: The weight, for the error message.
    order: The order of the result in memory, as in `numpy.ndarray.astype`.

  Raises:
    ValueError: if a finite number would become an infinity.
  """
  with np.errstate(over='ignore'):  # said better below
    converted = weight.astype(dtype, order=order, copy=False)
  if may_overflow(weight.dtype, converted.dtype) and _has_infinity(converted):
    refuse_overflow(weight, converted.dtype, name)
  return converted


def may_overflow(source: Any, target: Any) -> bool:
  """Whether a finite number of one type can be beyond the largest of the other."""
  source, target = np.dtype(source), np.dtype(target)
  return source != target and float(ml_dtypes.finfo(source).max) > float(ml_dtypes.finfo(target).max)


def refuse_overflow(weight: np.ndarray, dtype: Any, name: str) -> None:
  """Look for the finite number that becomes an infinity in this type.

  Raises:
    ValueError: if there is one.
  """
  with np.errstate(over='ignore'):
    lost = np.isinf(weight.astype(dtype)) & np.isfinite(weight)
  if lost.any():
    place = np.unravel_index(np.argmax(np.where(lost, np.abs(weight), 0)), weight.shape)
    kind = np.dtype(dtype).name
    wider = "'bfloat16' or dtype='float32'" if kind == 'float16' else "'float32'"
    raise ValueError(
      f'weight {name!r} holds {float(weight[place]):.6g} at {[*map(int, place)]} ({np.count_nonzero(lost)} too large), '
      f'but {kind} ends at {float(ml_dtypes.finfo(dtype).max):.6g} and would make it infinite; '
      f'load or convert with dtype={wider}.'
    )


def _has_infinity(array: np.ndarray) -> bool:
  flat = array.ravel(order='K')
  if array.dtype.itemsize != 2:
    return any(np.isinf(flat[start : start + _PIECE]).any() for start in range(0, flat.size, _PIECE))
  # As bits, which compares at the speed of memory: NumPy's isinf of these types costs as much as the conversion.
  bits = flat.view(np.uint16)
  infinity = np.array(np.inf, array.dtype).view(np.uint16)
  return any((bits[start : start + _PIECE] & 0x7FFF == infinity).any() for start in range(0, flat.size, _PIECE))
