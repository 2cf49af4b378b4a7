"""Whether the log that a session left in its folder is whole, or says from when on it is not."""

import json
import pathlib
from collections.abc import Sequence

from experiments.soaking.verdicts import Problem
from pdjax.metrics.event_json import event_to_json
from pdjax.metrics.event_log import read_events
from pdjax.run_folder import EVENTS
from pdjax.serving.events import Event, Turn
from pdjax.types.json_text import json_text


def judge_log(
  folder: pathlib.Path, events: Sequence[Event] | None, notes: Sequence[str], was_full: bool
) -> list[Problem]:
  """All that is wrong with a log, once its session is closed.

  Args:
    folder: Of the session.
    events: All that happened; None if nobody remembers.
    notes: Notes of the session about it, as in its report.
    was_full: Whether its disk was full from some time on.
  """
  path = folder / EVENTS
  try:
    lines = list(read_events(path))
  except ValueError as error:
    return [Problem('log', f'{path} has a line that cannot be read: {error}.')]
  text = path.read_bytes()
  if text and not text.endswith(b'\n'):
    return [Problem('log', f'{path} ends with a torn line.')]
  if notes and not was_full:
    return [Problem('log', f'nobody filled the disk, and {" ".join(notes)}')]
  if events is None:
    return []
  if lines != [json.loads(json_text(event_to_json(event))) for event in events[: len(lines)]]:
    return [Problem('log', f'the {len(lines)} lines of {path} are not the first events.')]
  if len(lines) == len(events):
    return [Problem('log', f'{path} has all lines, and {" ".join(notes)}')] if notes else []
  from_s = [event.now_s for event in events[: len(lines) + 1] if isinstance(event, Turn)][-1]
  expected = f'{path} ends early: it has nothing from {from_s:.3f} s on, '
  if not any(note.startswith(expected) for note in notes):
    return [Problem('log', f'it should say {expected!r}, and says {" ".join(notes) or "nothing"!r}.')]
  return []
