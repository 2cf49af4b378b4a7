"""Checks of single values that users give: whole texts, and numbers."""

import numbers
import re

_HALF = re.compile('[\ud800-\udfff]')


def is_whole(text: str) -> bool:
  """Whether UTF-8 can hold it, as tokenizers, terminals and files ask for: it has no half of a surrogate pair."""
  return _HALF.search(text) is None


def check_text(text: str, place: str) -> str:
  """The text, if it is whole; `place` names it in the message.

  Raises:
    ValueError: if it has half a surrogate pair.
  """
  if not text.isascii() and (half := _HALF.search(text)):
    raise ValueError(
      f'{place} has half a surrogate pair, {half[0]!r}, at position {half.start()}, expected whole characters; '
      "send both halves or neither; text.encode('utf-16', 'surrogatepass').decode('utf-16', 'ignore') drops halves."
    )
  return text


def is_integer(value: object) -> bool:
  """Whether it is an integer, Python's or NumPy's; a truth value is none."""
  return type(value) is int or (isinstance(value, numbers.Integral) and not isinstance(value, bool))


def is_number(value: object) -> bool:
  """Whether it is a real number that a float can hold; a truth value is none."""
  if type(value) is float:
    return True
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    return False
  try:
    float(value)
  except OverflowError:
    return False
  return True
