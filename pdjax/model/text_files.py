"""Reads the small text files of a checkpoint, and names the one that cannot be read."""

import json
import pathlib
from typing import Any


def read_text(path: pathlib.Path) -> str:
  """The text in a file.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is no UTF-8.
  """
  if not path.is_file():
    raise FileNotFoundError(f'{path.parent} has no {path.name}, expected one; download it or check the path.')
  try:
    return path.read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is no text in UTF-8 ({error}); download it again.') from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The JSON object in a file.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it holds anything else.
  """
  text = read_text(path)
  try:
    content = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is not valid JSON ({error}); download it again.') from error
  if not isinstance(content, dict):
    raise ValueError(f'{path} holds a {type(content).__name__}, expected a JSON object; download it again.')
  return content
