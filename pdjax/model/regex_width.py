"""The width of a match of a regular expression, where that can be told from its text alone."""

import re

_ONE_CHARACTER = re.compile(
  r"""
  \\[pP]\{\^?[\w ]+\}              # a property
  | \\[dDsSwWhHntrfae]             # a class or a control character by its letter
  | \\x\{[0-9A-Fa-f]+\} | \\x[0-9A-Fa-f]{2} | \\u[0-9A-Fa-f]{4}
  | \\[^\w\s<>'`]                  # a sign that stands for itself
  | [^\\\[\](){}|*+?^$]
  """,
  re.VERBOSE,
)
_GROUP = re.compile(r'\((?:\?:|\?<[A-Za-z_]\w*>|(?!\?))')
# `{n}?` is not read: to Ruby it may be left out, to Perl it is just lazy.
_REPEAT = re.compile(r'(?:(?P<maybe>\?)\??|\{(?P<least>\d+)(?:(?P<range>,)(?P<most>\d+)\}\??|\}))(?![*+?{])')


class Unbounded(Exception):
  """Nothing can be said of the width: a repetition without end, or what looks beyond its match or is not known."""


def match_width(pattern: str) -> tuple[int, int]:
  """The least and the most characters that a match of `pattern` has.

  An accepted pattern looks at nothing outside its match: it has no anchors, no looking around, no references and
  no flags. The syntax is that of Oniguruma, which the tokenizers library uses.

  Raises:
    Unbounded: if there is no bound, or none that is seen here.
  """
  widths, end = _either(pattern, 0)
  if end < len(pattern):
    raise Unbounded
  return widths


def _either(pattern: str, at: int) -> tuple[tuple[int, int], int]:
  """Widths of alternatives, up to the end of their group."""
  (least, most), at = _row(pattern, at)
  while pattern.startswith('|', at):
    (other_least, other_most), at = _row(pattern, at + 1)
    least, most = min(least, other_least), max(most, other_most)
  return (least, most), at


def _row(pattern: str, at: int) -> tuple[tuple[int, int], int]:
  least = most = 0
  while at < len(pattern) and pattern[at] not in '|)':
    (part_least, part_most), at = _part(pattern, at)
    repeat = _REPEAT.match(pattern, at)
    if repeat:
      at = repeat.end()
      fewest = 0 if repeat['maybe'] else int(repeat['least'])
      times = 1 if repeat['maybe'] else int(repeat['most'] if repeat['range'] else fewest)
      if times < fewest:  # Oniguruma turns these round and makes them possessive
        raise Unbounded
      part_least, part_most = part_least * fewest, part_most * times
    elif pattern.startswith(('*', '+', '?', '{'), at):
      raise Unbounded
    least, most = least + part_least, most + part_most
  return (least, most), at


def _part(pattern: str, at: int) -> tuple[tuple[int, int], int]:
  if group := _GROUP.match(pattern, at):
    widths, at = _either(pattern, group.end())
    if not pattern.startswith(')', at):
      raise Unbounded
    return widths, at + 1
  if pattern[at] == '[':
    return (1, 1), _class_end(pattern, at)
  if one := _ONE_CHARACTER.match(pattern, at):
    return (1, 1), one.end()
  raise Unbounded


def _class_end(pattern: str, at: int) -> int:
  """Behind a class of characters, which may hold others."""
  depth = 0
  while at < len(pattern):
    if pattern.startswith(('[]', '[^]'), at):  # a bracket that may stand for itself
      raise Unbounded
    depth += {'[': 1, ']': -1}.get(pattern[at], 0)
    at += 2 if pattern[at] == '\\' else 1
    if not depth:
      return at
  raise Unbounded
