"""Numbers as people read them; one that is not 0 never reads as 0, however small it is."""

import math

_LEAST_WRITTEN_OUT = 1e-6  # what is smaller gets an exponent


def number(value: float | None, digits: int = 1) -> str:
  """A number with thousands apart, `-` if there is none; one too small for its digits has two of its own."""
  if value is None:
    return '-'
  if value and abs(value) < 0.5 * 10**-digits:
    return _tiny(value)
  return f'{value:,.{digits}f}'


def short(value: float | None) -> str:
  """A number with about three digits: 7.28, 44.8, 1,431, 0.0035."""
  size = abs(value or 0)
  if 0 < size < 0.0995:
    return _tiny(value or 0)
  return number(value, 0 if size >= 999.95 else 1 if size >= 9.995 else 2)


def percent(share: float | None) -> str:
  """A share in percent."""
  return '-' if share is None else f'{share:.1%}'


def plain(value: float) -> str:
  """A number as it was given, without an exponent where it can be read: 0.5, 4, 12,000, 0.00003."""
  if 0 < abs(value) < 1e-4:
    return _tiny(value, 6)
  return f'{value:,.0f}' if abs(value) >= 1e5 else f'{value:,.6g}'


def digits_below(whole: float | None) -> int:
  """The digits after the point of the parts of a whole: one, or for a whole below 1 as many as give it three."""
  return 2 - math.floor(math.log10(whole)) if whole and 0 < whole < 1 else 1


def _tiny(value: float, digits: int = 2) -> str:
  rounded = float(f'{value:.{digits}g}')
  if abs(rounded) < _LEAST_WRITTEN_OUT:
    return f'{rounded:.{digits}g}'
  return f'{rounded:.15f}'.rstrip('0')
