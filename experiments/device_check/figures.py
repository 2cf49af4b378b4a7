"""Figures as a part finds them: each is handed over at once, so that what is found before its end counts."""

import json
import pathlib
import sys
from typing import Any

from experiments.rows import row
from pdjax.types.json_text import json_text

OVER = 'over its bound'  # the note of a figure that cannot be: what measured it is at fault
CHECKED = 'relative error'  # the unit of answers that are checked
FAR = 'at the end of'  # in the name of one that is read there of a large pool
_TOLERANCE = 1.02  # of a bound that was itself measured


class Figures:
  """The findings of a part of the check, a line of JSON for each in a file that another process reads."""

  def __init__(self, path: str, marks: bool = True):
    """Add lines to the file at `path`; `marks` says whether a figure over its bound is marked."""
    self._path, self._marks = pathlib.Path(path), marks
    self.failures: list[str] = []
    self.remark: str | None = None  # a note of every figure that is added while it stands

  def add(
    self,
    name: str,
    value: float,
    unit: str,
    *,
    peer: str | None = None,
    peer_value: float | None = None,
    floor_share: float | None = None,
    bound_share: float | None = None,
    **more: Any,
  ) -> dict[str, Any]:
    """Hand over one figure; see `experiments.rows.row`.

    Args:
      name: The measured quantity.
      value: The figure.
      unit: Its unit.
      peer: The name of another that was measured beside it.
      peer_value: The peer's figure, in the same unit.
      floor_share: The least time that it could take as a share of the time that it took.
      bound_share: The same by a bound that nothing can exceed, where `floor_share` is by one that some can; above 1,
        the figure is marked.
      **more: Other entries of the row, such as a note.
    """
    bound_share = floor_share if bound_share is None else bound_share
    over = OVER if self._marks and bound_share is not None and bound_share > _TOLERANCE else None
    if notes := [note for note in (over, more.get('note'), self.remark) if note]:
      more['note'] = '; '.join(notes)
    one = row(name, value, unit, peer=peer, peer_value=peer_value, floor_share=floor_share) | more
    self._write({'row': one})
    beside = '' if one['ratio'] is None else f', {one["ratio"]:.3f} of {peer}'
    share = '' if floor_share is None else f', {floor_share:.1%} of its ceiling'
    note = f' ({more["note"]})' if more.get('note') else ''
    print(f'{name}: {value:,.6g} {unit}{beside}{share}{note}', flush=True)
    return one

  def note(self, text: str) -> None:
    """Say what was not measured, and why."""
    self._write({'note': text})
    print(text, flush=True)

  def fail(self, text: str) -> None:
    """Say what is wrong; the part goes on, and has failed."""
    self.failures.append(text)
    self._write({'failure': text})
    print(f'FAILED {text}', file=sys.stderr, flush=True)

  def give_up(self, text: str) -> None:
    """Say what there was no time for; the part goes on, and is not complete, so that it runs again next time."""
    self._write({'given_up': text})
    print(text, flush=True)

  def pass_over(self, reason: str) -> None:
    """Say why the part does nothing here."""
    self._write({'passed_over': reason})
    print(reason, flush=True)

  def compiled(self, seconds: float) -> None:
    """Say how long compiling took in all, of what has been compiled so far."""
    self._write({'compile_s': seconds})

  def _write(self, line: dict[str, Any]) -> None:
    with self._path.open('a', encoding='utf-8') as file:
      file.write(json_text(line) + '\n')


def read_lines(path: pathlib.Path) -> dict[str, Any]:
  """The findings of a part: `rows`, `notes`, `failures`, `given_up`, `passed_over` and `compile_s`.

  A line in which a part was killed is left out.
  """
  found: dict[str, Any] = {
    'rows': [], 'notes': [], 'failures': [], 'given_up': [], 'passed_over': None, 'compile_s': None,
  }  # fmt: skip
  text = path.read_text(encoding='utf-8') if path.is_file() else ''
  for line in text.splitlines():
    try:
      one = json.loads(line)
    except json.JSONDecodeError:
      continue
    match one:
      case {'row': row}:
        found['rows'].append(row)
      case {'note': note}:
        found['notes'].append(note)
      case {'failure': failure}:
        found['failures'].append(failure)
      case {'given_up': text}:
        found['given_up'].append(text)
      case {'passed_over': reason}:
        found['passed_over'] = reason
      case {'compile_s': seconds}:
        found['compile_s'] = (found['compile_s'] or 0.0) + seconds
  return found
