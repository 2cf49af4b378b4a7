"""What is a text: characters that UTF-8 can hold, as tokenizers, terminals and files ask for."""

import re

_HALF = re.compile('[\ud800-\udfff]')


def is_whole(text: str) -> bool:
  """Whether it has no half of a surrogate pair, which stands for no character and has no bytes in UTF-8."""
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
