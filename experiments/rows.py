"""Figures of a benchmark as rows that other programs read."""

import pathlib
from typing import Any

from pdjax.types.json_text import json_text


def row(
  name: str,
  value: float,
  unit: str,
  *,
  peer: str | None = None,
  peer_value: float | None = None,
  floor_share: float | None = None,
) -> dict[str, Any]:
  """One figure, of which more is better where there is a peer.

  Args:
    name: The measured quantity.
    value: The figure.
    unit: Its unit.
    peer: The name of another that was measured beside it, under the same conditions.
    peer_value: The peer's figure in the same unit.
    floor_share: The least time that it could take as a share of the time that it took, from 0 to 1.

  Returns:
    These by name, None where there is none, and `ratio`, the figure divided by the peer's unless that is 0.
  """
  ratio = value / peer_value if peer_value else None
  return {
    'name': name, 'value': value, 'unit': unit, 'peer': peer, 'peer_value': peer_value, 'ratio': ratio,
    'floor_share': floor_share,
  }  # fmt: skip


def save_rows(path: str | None, rows: list[dict[str, Any]]) -> None:
  """Write figures as a JSON list, if a path is given."""
  if path is not None:
    pathlib.Path(path).write_text(json_text(rows, indent=2) + '\n', encoding='utf-8')
