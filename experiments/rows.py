"""Figures of a benchmark as rows that other programs read."""

import json
import pathlib
from typing import Any


def row(name: str, value: float, unit: str) -> dict[str, Any]:
  """One figure."""
  return {'name': name, 'value': value, 'unit': unit}


def save_rows(path: str | None, rows: list[dict[str, Any]]) -> None:
  """Write figures as a JSON list, if a path is given."""
  if path is not None:
    pathlib.Path(path).write_text(json.dumps(rows, indent=2) + '\n', encoding='utf-8')
