"""The work directory of a run: `run.json` says what it is, and what an earlier run left is moved, not overwritten."""

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, Literal

from absl import logging

from pdjax.answers import read_answers
from pdjax.config import ServingConfig
from pdjax.reporting import describe
from pdjax.types.json_text import json_text
from pdjax.types.request import Completion
from pdjax.workload import Given
from pdjax.workload.requests_file import Refused, write_completions

RUN, ANSWERS, REQUESTS, EVENTS = 'run.json', 'answers.jsonl', 'requests.jsonl', 'events.jsonl'
TRACEBACK = 'traceback.txt'
REQUESTS_PART, RUN_PART = f'{REQUESTS}.part', f'{RUN}.part'  # while they are written
CASES = 'cases.jsonl'  # of a comparison, one after another
BASELINE = 'colocated'  # the folder of a comparison's other side
FILES = (
  RUN, RUN_PART, ANSWERS, REQUESTS, REQUESTS_PART, EVENTS, 'report.json', 'report.html', 'trace.json', 'metrics.prom',
  'compare.json', CASES, TRACEBACK,
)  # fmt: skip
_KEPT = (RUN, ANSWERS)  # by a run that goes on
_FORMAT = 1
_BEGINS = '{\n  "format": '  # a `run.json`, of which a full disk may hold no more
# What changes no answer: a run may go on with another one.
_FREE = ('config.compilation_cache', 'config.slo', 'config.processes.address')

Say = Callable[[str], None]


class RunFolder:
  """A folder that one run at a time writes into; `begin` and `resume` open it, and `close` gives it back.

  An earlier run's files are moved to a folder beside it, `NAME.1` or the next number that is free; files of somebody
  else stay where they are, and one that bears the name of a run's file is refused. A process that still writes into the
  folder keeps others out of it.

  Attributes:
    path: The folder.
    run: The contents of `run.json`.
    resumed: Whether the run goes on that was there.
  """

  def __init__(self, path: pathlib.Path, run: Mapping[str, Any], lock: IO[str], resumed: bool):
    self.path = path
    self.run = run
    self.resumed = resumed
    self._lock = lock

  @classmethod
  def begin(cls, folder: str | os.PathLike[str], run: Mapping[str, Any], say: Say = lambda line: None) -> 'RunFolder':
    """Make a folder for a new run, and put away what an earlier one left there.

    Args:
      folder: The folder.
      run: The contents of `run.json`: `backend`, `serves`, `config` and more; `more_files` are paths in the folder of
        what the run leaves there besides the files of every run.
      say: Told in a line where an earlier run has gone.

    Raises:
      ValueError: if there cannot be such a folder, it has files of somebody else by the names of a run's, or another
        process writes into it.
    """
    path = pathlib.Path(folder)
    try:
      path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise ValueError(f'workdir {str(path)!r} cannot be made ({error.strerror}); name another folder.') from error
    if _holds_run(path):
      if (path / RUN).is_file():
        _lock(path).close()
      names = _names(path)
      if _says_nothing(path, names):
        for name in names:
          (path / name).unlink()
      else:
        say(f'{path} held an earlier run, which is in {_move_aside(path, names)} now')
    more = run.get('more_files', ())
    taken = [name for name in FILES if (path / name).is_file()] + [name for name in more if (path / name).exists()]
    if taken:
      raise ValueError(
        f'workdir {str(path)!r} has {", ".join(taken)}, and nothing says that a run left that; name another folder.'
      )
    whole = {'format': _FORMAT, 'began': datetime.datetime.now().astimezone().isoformat(timespec='seconds'), **run}
    lock = _lock(path, 'x')
    try:
      _write_run(lock, whole)
    except OSError as error:
      with contextlib.suppress(OSError):
        lock.close()
      (path / RUN).unlink()
      raise ValueError(f'{path / RUN} cannot be written ({error}); name another folder, or make room.') from error
    return cls(path, json.loads(json_text(whole)), lock, False)

  @classmethod
  def resume(cls, folder: str | os.PathLike[str], run: Mapping[str, Any]) -> 'RunFolder':
    """Take up the run in a folder, if it is the same.

    Raises:
      ValueError: if there is none, the config or what it serves is another (the message tells the difference), or
        another process writes into it.
    """
    path = pathlib.Path(folder)
    there, now = read_run(path), json.loads(json_text(run))
    if changed := differences({key: there.get(key) for key in now}, now):
      raise ValueError(
        f'the run in {str(path)!r} is another one: {"; ".join(changed)}. Give what its {RUN} says, or begin a new run '
        'in another workdir.'
      )
    return cls(path, there, _lock(path), True)

  @property
  def answered(self) -> list[dict[str, Any]] | None:
    """If a run is taken up, the answers that were there, as `read_answers` gives them."""
    return read_answers(self.path / ANSWERS) if self.resumed else None

  def settle(self, facts: Mapping[str, Any]) -> None:
    """Keep in `run.json` what the devices made of the config, such as the dtype that 'auto' came to.

    Raises:
      ValueError: if it was something else when the run began (the message tells the difference).
    """
    before = self.run.get('settled')
    if before is not None:
      if changed := differences(before, dict(facts), 'settled'):
        raise ValueError(
          f'the run in {str(self.path)!r} cannot go on here: {"; ".join(changed)}. Go on with it where it began, or '
          'begin a new run in another workdir.'
        )
      return
    self.keep({'settled': dict(facts)})

  def keep(self, facts: Mapping[str, Any]) -> None:
    """Have `run.json` say these things, too, or instead; where it cannot be written, a warning says so."""
    self.run = {**self.run, **facts}
    part, lock = self.path / RUN_PART, None
    try:
      part.unlink(missing_ok=True)
      lock = _lock(self.path, 'x', RUN_PART)
      _write_run(lock, self.run)
      part.replace(self.path / RUN)
    except (OSError, ValueError) as error:  # such as a full disk
      if lock is not None:
        with contextlib.suppress(OSError):
          lock.close()
      logging.warning('%s cannot be written anew with %s (%s).', self.path / RUN, ', '.join(facts), error)
      with contextlib.suppress(OSError):
        part.unlink()
      return
    self._lock.close()
    self._lock = lock

  def put_away(self) -> None:
    """Move the files of the part before, but for its answers, to `before-1` in the folder, or the next number."""
    if names := [name for name in _names(self.path) if name not in _KEPT and not _is_before(name)]:
      _move(self.path, names, _new_folder(self.path / f'before-{number}' for number in itertools.count(1)))

  def write_requests(self, ends: Iterable[Completion | Refused]) -> str | None:
    """Make `requests.jsonl` of all outcomes, whole or not at all; return in a sentence why it cannot be, or None."""
    path, part = self.path / REQUESTS, self.path / REQUESTS_PART
    try:
      write_completions(part, ends)
      part.replace(path)
    except OSError as error:
      with contextlib.suppress(OSError):
        part.unlink()
      where = f'{ANSWERS} beside it has what could be written as requests ended'
      return f'{path} cannot be written ({type(error).__name__}: {error}); {where}.'
    return None

  def close(self) -> None:
    """Let others write into the folder."""
    with contextlib.suppress(OSError):
      self._lock.close()


def open_folder(
  workdir: str | pathlib.Path,
  config: ServingConfig | None,
  backend: str,
  *,
  resume: bool = False,
  serves: str = "the config's workload",
  more: Mapping[str, Any] | None = None,
  say: Say = lambda line: None,
) -> RunFolder:
  """The work directory of a run, which nobody else writes into until it is closed.

  Args:
    workdir: The folder.
    config: The run; None if it is not known yet.
    backend: The backend that runs it.
    resume: Go on with the run that is there.
    serves: The requests that it serves, in words; a workload of another kind than the config's own is not compared by
      its fields.
    more: Further entries of a new run's `run.json`.
    say: Told in a line where an earlier run has gone.

  Raises:
    ValueError: if the folder cannot be used, or to resume, if its run is another one; see `RunFolder`.
  """
  if config is not None and isinstance(config.workload, Given):
    config = dataclasses.replace(config, workload=None)  # its requests are known by their own answers
  about = {'backend': backend, 'serves': serves, 'config': describe(config)}
  if resume:
    return RunFolder.resume(workdir, about)
  return RunFolder.begin(workdir, about | dict(more or {}), say)


def read_run(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """The description of the run in a folder, from its `run.json`.

  Raises:
    ValueError: if there is none.
  """
  path = pathlib.Path(folder) / RUN
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise ValueError(
      f'{str(folder)!r} holds no run that can go on ({path} cannot be read: {error}); name the --workdir of one.'
    ) from None
  if not isinstance(found, dict) or found.get('format') != _FORMAT:
    raise ValueError(f'{path} is of no run that this version can go on with; expected "format": {_FORMAT}.')
  return found


def differences(before: Any, now: Any, place: str = '') -> list[str]:
  """The differences of two values of JSON, a sentence each; those that change no answer are passed over."""
  if place in _FREE:
    return []
  if isinstance(before, dict) and isinstance(now, dict):
    keys = dict.fromkeys((*before, *now))
    return [
      line for key in keys for line in differences(before.get(key), now.get(key), f'{place}.{key}' if place else key)
    ]
  if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
    return [
      line
      for index, (one, other) in enumerate(zip(before, now, strict=True))
      for line in differences(one, other, f'{place}.{_name_of(one, other, index)}')
    ]
  if _plain(before) == _plain(now):
    return []
  return [f'{place} was {_shortened(before)} and is {_shortened(now)}']


def _name_of(one: Any, other: Any, index: int) -> str:
  """The name of an item of a list if both have the same, else its index."""
  names = {item.get('name') if isinstance(item, dict) else None for item in (one, other)}
  (name,) = names if len(names) == 1 else (None,)
  return str(index) if name is None else str(name)


def _plain(value: Any) -> Any:
  """The value; of an object's text without the address, which is another one in every process."""
  return re.sub(r' at 0x[0-9a-f]+', '', value) if isinstance(value, str) else value


def _shortened(value: Any, width: int = 80) -> str:
  text = json.dumps(value)
  return text if len(text) <= width else text[: width - 1] + '…'


# ---------------------------------------------------------------------------- what is there


def _holds_run(path: pathlib.Path) -> bool:
  """Whether a run's files lie here; before there was `run.json`, its log says so."""
  if (path / RUN).is_file():
    text = (path / RUN).read_text(encoding='utf-8', errors='replace')
    try:
      found = json.loads(text)
    except ValueError:  # nothing of it may be there, or a part, if the process was killed as it wrote it
      return not text.strip() or text.startswith(_BEGINS)
    return isinstance(found, dict) and 'format' in found and 'began' in found
  try:
    with (path / EVENTS).open('rb') as file:
      return (path / EVENTS).is_file() and file.read(10) == b'{"event": '
  except OSError:
    return False


def _names(path: pathlib.Path) -> list[str]:
  """The names of the files of a run here, in the order in which to move them: `run.json`, which says so, last."""
  names = sorted(entry.name for entry in path.iterdir())
  more: list[str] = []
  with contextlib.suppress(OSError, ValueError, AttributeError):
    more = json.loads((path / RUN).read_text(encoding='utf-8')).get('more_files', [])
  ours = [name for name in names if name in FILES or _is_before(name)]
  ours += [name for name in more if (path / name).exists()]
  if 'compare.json' in names and BASELINE not in ours and (path / BASELINE).is_dir():
    ours.append(BASELINE)
  return sorted(ours, key=lambda name: name == RUN)


def _says_nothing(path: pathlib.Path, names: Iterable[str]) -> bool:
  """Whether these are of a run that ended before it had served anything."""
  return all(name == RUN or ((path / name).is_file() and not (path / name).stat().st_size) for name in names)


def _is_before(name: str) -> bool:
  return re.fullmatch(r'before-\d+', name) is not None


# ---------------------------------------------------------------------------- moving


def _move_aside(path: pathlib.Path, names: list[str]) -> pathlib.Path:
  """Move the files of a run to a folder beside its own."""
  place = path if path.name not in ('', '..') else pathlib.Path(os.path.abspath(path))
  try:
    target = _new_folder(place.with_name(f'{place.name}.{number}') for number in itertools.count(1))
    return _move(path, names, target)
  except OSError as error:
    raise ValueError(
      f'workdir {str(path)!r} holds an earlier run, which cannot be moved beside it ({error}); name another folder.'
    ) from error


def _new_folder(paths: Iterable[pathlib.Path]) -> pathlib.Path:
  """The first of these that is not there yet, made."""
  for path in paths:
    with contextlib.suppress(FileExistsError):
      path.mkdir()
      return path
  raise AssertionError('there are numbers without end')


def _move(path: pathlib.Path, names: list[str], target: pathlib.Path) -> pathlib.Path:
  for name in names:
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path / name, target / name)  # a copy, where the folder is a file system of its own
  return target


# ---------------------------------------------------------------------------- one process at a time


def _lock(path: pathlib.Path, mode: Literal['r+', 'x'] = 'r+', name: str = RUN) -> IO[str]:
  """Hold `run.json` of a folder, which `x` makes, until it is closed, or the process ends in whatever way.

  Args:
    path: The folder.
    mode: For an existing file `r+`, for a new one `x`.
    name: Of the file, if it is to become `run.json`.

  Raises:
    ValueError: if another process holds it, or it cannot be opened.
  """
  try:
    file = (path / name).open(mode, encoding='utf-8')
  except FileExistsError:
    raise _in_use(path) from None
  except OSError as error:
    raise ValueError(f'{path / name} cannot be opened ({error.strerror}); name another folder.') from error
  try:
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not os.path.samestat(os.fstat(file.fileno()), (path / name).stat()):  # another took its place meanwhile
      raise BlockingIOError
  except BlockingIOError:
    file.close()
    raise _in_use(path) from None
  except (ImportError, OSError):  # Windows, or a file system without locks: then users take care
    pass
  return file


def _write_run(file: IO[str], run: Mapping[str, Any]) -> None:
  file.write(json_text(run, indent=2) + '\n')
  file.flush()


def _in_use(path: pathlib.Path) -> ValueError:
  return ValueError(
    f'workdir {str(path)!r} is in use by another run, which has not ended; wait for it, or name another folder.'
  )
