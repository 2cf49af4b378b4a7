"""The folder of a result: made, held by one command at a time, with what an earlier one left in it."""

import contextlib
import fcntl
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.device_check.parts import PARTS
from experiments.device_check.processes import say
from experiments.device_check.result import FORMAT, differences, kept_before, load, of_another_format, set_aside


def made(out: str) -> pathlib.Path:
  """The folder that `out` names, made if it is not there.

  Raises:
    ValueError: if there can be none.
  """
  if not out.strip():
    raise ValueError('--out is empty; it is to name the folder of the result.')
  try:
    folder = pathlib.Path(out).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
  except (OSError, RuntimeError, ValueError) as error:
    what = 'is a file' if pathlib.Path(out).is_file() else f'cannot be made ({error})'
    raise ValueError(f'--out {out!r} {what}; name a folder that is there or can be made.') from None
  if not os.access(folder, os.W_OK | os.X_OK):
    raise ValueError(f'--out {out!r} cannot be written to; name another folder or change its permissions.')
  return folder


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
  """Meanwhile no other command writes to a folder; ends this one if another does."""
  try:
    lock = (folder / 'lock').open('a+', encoding='utf-8')
  except OSError as error:
    sys.exit(f'{folder / "lock"} cannot be opened ({error}); give another --out.')
  with lock as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      other = file.read().strip()
      sys.exit(f'process {other} is writing to {folder}; wait until it has ended, or give another --out.')
    except OSError as error:
      say(f'{folder} cannot be locked ({error}): let no other command write to it meanwhile')
    file.truncate(0)
    file.write(f'{os.getpid()}')
    file.flush()
    yield


def taken_up(file: pathlib.Path, result: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The parts in a file if it is of this code, device, versions and settings.

  Otherwise it is kept by another name, and one that was kept before and is of these takes its place.
  """
  before = load(file)
  if before is not None:
    differing = differences(before, result)
    if not differing:
      return [done for done in before['parts'] if done['part'] in PARTS]
    say(f'{file} differs in {", ".join(differing)}: it is kept as {set_aside(file).name}')
  elif file.exists():
    what = f'no result of format {FORMAT}' if of_another_format(file) else 'damaged'
    say(f'{file} is {what}: it is kept as {set_aside(file).name}')
  else:
    return []
  kept = kept_before(file.parent, result)
  if kept is None:
    return []
  say(f'{kept.name} is of these sources, versions and settings: it is taken back')
  kept.replace(file)
  return taken_up(file, result)
