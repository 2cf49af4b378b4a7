"""Checks of single values that users give: whole texts, numbers, seeds."""

import numbers
import re
from collections.abc import Iterable

_HALF = re.compile('[\ud800-\udfff]')


def is_whole(text: str) -> bool:
  """Whether UTF-8 can hold it, as tokenizers, terminals and files ask for: it has no half of a surrogate pair."""
  return _HALF.search(text) is None


def check_text(text: str, place: str) -> str:
  """The text, if it is whole; `place` names it in the message.

  Raises:
    ValueError: if it has half a surrogate pair.
  """
  if half := _HALF.search(text):
    raise ValueError(
      f'{place} has half a surrogate pair, {half[0]!r}, at position {half.start()}, expected whole characters; '
      "send both halves or neither; text.encode('utf-16', 'surrogatepass').decode('utf-16', 'ignore') drops halves."
    )
  return text


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


def check_seed(seed: int, what: str) -> None:
  """See that random numbers can be made from a seed.

  Raises:
    ValueError: if it is out of range; `what` names it in the message.
  """
  if not hasattr(seed, '__index__') or isinstance(seed, bool) or not 0 <= seed < 2**63:
    raise ValueError(f'{what} is {seed!r}, expected an integer from 0 to 2**63 - 1.')


def check_token_ids(tokens: Iterable[int], what: str) -> None:
  """See that these can be token ids of some vocabulary; found later, it would break the step of others.

  Raises:
    ValueError: if it is no list, or one is no integer of 31 bits; `what` names them in the message.
  """
  check_list(tokens, what, 'token ids')
  for token in tokens:
    if not hasattr(token, '__index__') or isinstance(token, bool) or not 0 <= token < 2**31:
      raise ValueError(f'{what} has {token!r}, expected token ids from 0 to 2**31 - 1; correct it or leave it out.')


def check_list(value: object, what: str, of: str) -> None:
  """See that a value is a tuple or a list.

  Raises:
    ValueError: if it is none; the message says `what` it is and `of` what the tuple should be.
  """
  if not isinstance(value, tuple | list):
    raise ValueError(f'{what} is {value!r:.80}, expected a tuple of {of}; () is none of them.')
