"""A disk that is full from now on, for what this process has open in a folder."""

import contextlib
import os
import pathlib

_DESCRIPTORS = pathlib.Path('/proc/self/fd')
_FULL = pathlib.Path('/dev/full')  # whatever is written there fails as on a full disk


def can_fill_disk() -> bool:
  """Whether this system has what it takes."""
  return _DESCRIPTORS.is_dir() and _FULL.exists()


def fill_disk(folder: str | os.PathLike) -> int:
  """Let every further write to the files that are open in a folder fail for want of space; how many these are."""
  inside = os.path.realpath(folder) + os.sep
  filled = 0
  for descriptor in list(_DESCRIPTORS.iterdir()):
    with contextlib.suppress(OSError):  # closed meanwhile
      if os.readlink(descriptor).startswith(inside):
        full = os.open(_FULL, os.O_WRONLY)
        os.dup2(full, int(descriptor.name), inheritable=False)
        os.close(full)
        filled += 1
  return filled
