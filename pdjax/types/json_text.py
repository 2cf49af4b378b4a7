"""The one encoder of JSON files: strict JSON, in which a number that is not finite is its name in quotes."""

import dataclasses
import enum
import functools
import json
import math
from collections.abc import Mapping
from typing import Any


def json_text(
  value: Any, *, indent: int | None = None, separators: tuple[str, str] | None = None, ensure_ascii: bool = True
) -> str:
  """The value as JSON text; no value of a run can keep what else there is from being written.

  JSON (RFC 8259) has no numbers but finite ones, so a float that is none becomes the text `"NaN"`, `"Infinity"` or
  `"-Infinity"`, which Python's `float` reads, as JavaScript's `Number` does. For everything else see `plain_data`.

  Args:
    value: Any data.
    indent: Spaces of each level, as `json.dumps` takes it.
    separators: Between items and after names, as `json.dumps` takes them.
    ensure_ascii: Write other characters as escapes; without, half a surrogate pair stays what no file can hold.
  """
  encode = _encoder(indent, separators, ensure_ascii)
  try:
    return encode(value)
  except (ValueError, TypeError):  # rare, and to look for it beforehand would cost every line
    return encode(plain_data(value))


def plain_data(value: Any) -> Any:
  """The value as dicts with text for keys, lists, text, truth values, None and finite numbers.

  Fields of a dataclass are entries by their names, an enum is its value, an array nested lists, and what is nothing of
  all that its text.
  """
  match value:
    case enum.Enum():
      return plain_data(value.value)
    case None | bool():
      return value
    case str():
      return str(value)
    case int():
      return int(value)
    case float():
      return float(value) if math.isfinite(value) else _NAMES[str(float(value))]
    case Mapping():
      return {_key(name): plain_data(item) for name, item in value.items()}
    case list() | tuple() | set() | frozenset() | range():
      return [plain_data(item) for item in value]
    case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
      return {field.name: plain_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    case _ if hasattr(value, 'tolist'):  # of NumPy, or a device's
      return plain_data(value.tolist())
    case _:
      return str(value)


_NAMES = {'nan': 'NaN', 'inf': 'Infinity', '-inf': '-Infinity'}


def _key(name: Any) -> str:
  """The name of an entry: its text, which of what is no text is the JSON."""
  plain = plain_data(name)
  return plain if isinstance(plain, str) else json.dumps(plain)


@functools.cache
def _encoder(indent: int | None, separators: tuple[str, str] | None, ensure_ascii: bool) -> Any:
  return json.JSONEncoder(
    indent=indent, separators=separators, ensure_ascii=ensure_ascii, allow_nan=False, default=plain_data
  ).encode
