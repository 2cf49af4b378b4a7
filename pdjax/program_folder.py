"""A temporary folder of compiled programs, which the processes of a run share on one host and the last of them removes.

Whoever can write into such a folder can run code in the processes that read it, so nobody but their user may.
"""

import contextlib
import dataclasses
import fcntl
import glob
import os
import shutil
import stat
import tempfile
import time

_PREFIX = 'pdjax-programs-'
_IN_USE = 'in_use'  # locked by each process that shares the folder, until it lets go or is gone
_YOUNG_S = 60.0  # an unlocked folder of this age may have been made a moment ago


@dataclasses.dataclass
class ProgramFolder:
  """A share in the folder.

  Attributes:
    path: The folder.
  """

  path: str
  _held: int | None  # the file that says that it is in use, locked

  @classmethod
  def make(cls) -> 'ProgramFolder':
    """A new folder.

    Raises:
      OSError: if there can be none, such as on a full disk or where files cannot be locked; nothing is left of it.
    """
    path = tempfile.mkdtemp(prefix=_PREFIX)
    try:
      return cls(path, _lock(path))
    except OSError:
      shutil.rmtree(path, ignore_errors=True)
      raise

  @classmethod
  def hold(cls, path: str) -> 'ProgramFolder | None':
    """A share in a folder that another process made; None if it is gone, not this user's alone, or being removed."""
    try:
      return cls(path, _lock(path))
    except OSError:
      return None

  @classmethod
  def share(cls, path: str | None) -> 'ProgramFolder':
    """A share in that folder, or in a new one if there is none, or it may be somebody else's by now.

    Raises:
      OSError: if there can be no new one.
    """
    return (None if path is None else cls.hold(path)) or cls.make()

  def close(self) -> None:
    """Let go; the last process that does removes the folder."""
    held, self._held = self._held, None
    if held is None:
      return
    try:
      _remove_if_unused(self.path, held)
    finally:
      os.close(held)


def remove_left_over() -> None:
  """Remove the folders of this user on this host that nobody let go of, because a whole run was killed."""
  with contextlib.suppress(OSError):
    for path in glob.glob(os.path.join(glob.escape(tempfile.gettempdir()), f'{_PREFIX}*')):
      with contextlib.suppress(OSError):
        if time.time() - os.lstat(path).st_mtime > _YOUNG_S:
          _is_left(path)


def remove_when_unused(path: str, within_s: float) -> None:
  """Remove a folder on this host once every process that shares it is gone, and wait so long for that at most.

  It is for those whose processes were killed: the last that closes its share has removed it otherwise.
  """
  until_s = time.monotonic() + within_s
  while _is_left(path):
    if time.monotonic() > until_s:
      return
    time.sleep(0.05)


def _is_left(path: str) -> bool:
  """Whether there still is such a folder of this user's, after trying to remove it."""
  try:
    if not _is_private(path) or not os.path.basename(path).startswith(_PREFIX):
      return False
    held = _open(path)
  except OSError:
    return False
  try:
    _remove_if_unused(path, held)
  finally:
    os.close(held)
  return os.path.exists(path)


def _lock(path: str) -> int:
  """The file that says a folder is in use, locked with all others that use it."""
  if not _is_private(path):
    raise PermissionError(f'{path} is not a folder that this user alone may enter')
  held = _open(path)
  try:
    fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    if not os.fstat(held).st_nlink:
      raise FileNotFoundError(f'{path} is being removed')
  except OSError:
    os.close(held)
    raise
  return held


def _open(path: str) -> int:
  return os.open(os.path.join(path, _IN_USE), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _is_private(path: str) -> bool:
  """Whether it is a folder of this user's into which no other may look or write."""
  found = os.lstat(path)
  return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077


def _remove_if_unused(path: str, held: int) -> None:
  with contextlib.suppress(OSError):  # others hold it
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    shutil.rmtree(path, ignore_errors=True)
