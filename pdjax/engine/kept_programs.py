"""The folder where JAX keeps the programs that this process compiles, without those that it cannot read again."""

import contextlib
import logging
import os
import tempfile

import jax
from jax.experimental.compilation_cache import compilation_cache

from pdjax.config import KEEP_NO_PROGRAMS

_NEVER_S = 1e9  # of compiling: no program takes as long
_LEAST_S = 1.0  # of compiling, for which JAX keeps a program if nobody says otherwise
_ENDING = '-cache'  # of a program's file, after its key
_PROBE_BYTES = 2**16
_LOGGER = 'jax._src.compiler'


def keep_programs(folder: str | None) -> str | None:
  """Have JAX keep compiled programs, from now on and for all of this process.

  Args:
    folder: A folder, or what else `ServingConfig.compilation_cache` takes; None leaves JAX as it is.

  Returns:
    The reason why none can be written there, if so; those that are there are read.
  """
  if folder is None:
    return None
  path = None if folder == KEEP_NO_PROGRAMS else folder
  reason = None if path is None else why_not_kept(path)
  if path is not None and reason is not None and not os.path.isdir(path):
    path = None
  if path != kept_programs():
    compilation_cache.reset_cache()  # otherwise JAX goes on with the folder that it used first
  jax.config.update('jax_compilation_cache_dir', path)
  least_s = 0.0 if reason is None else _NEVER_S  # JAX would warn of each program that it cannot write
  jax.config.update('jax_persistent_cache_min_compile_time_secs', least_s)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  remove_unreadable()
  return reason


def keep_quick_programs() -> None:
  """Have JAX keep programs that compile within a second too, unless others set the least time of compiling."""
  option = 'jax_persistent_cache_min_compile_time_secs'
  if option.upper() not in os.environ and getattr(jax.config, option) == _LEAST_S:
    jax.config.update(option, 0.0)
  remove_unreadable()


def kept_programs() -> str | None:
  """The folder where JAX keeps compiled programs, if it does."""
  return jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]


def why_not_kept(folder: str) -> str | None:
  """The reason why programs cannot be written to a folder, which is made if need be; None if they can."""
  if '://' in folder:
    return None  # JAX will see
  try:
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as probe:
      probe.write(bytes(_PROBE_BYTES))
  except OSError as error:
    return error.strerror or str(error)
  return None


def link_programs(source: str, folder: str) -> None:
  """Have all programs of a folder found in another one too, as far as that can be."""
  with contextlib.suppress(OSError), os.scandir(source) as entries:
    for entry in entries:
      if entry.name.endswith(_ENDING):
        with contextlib.suppress(FileExistsError):
          os.symlink(entry.path, os.path.join(folder, entry.name))


class _RemoveUnreadable(logging.Filter):
  """Removes a program that JAX is about to compile because it could not read the file.

  JAX (0.10.2) writes a program in one go, so a process that is killed meanwhile leaves half of it, and never writes
  one again whose file is there: it would be compiled at every start. What it logs between its try to read a program
  and compiling it names the key.

  Args:
    level: The lowest level of the records shown; 0 stands for that of the logger above.
  """

  def __init__(self, level: int):
    super().__init__()
    self._level = level

  def filter(self, record: logging.LogRecord) -> bool:
    folder = kept_programs()
    if folder is not None and str(record.msg).startswith('PERSISTENT COMPILATION CACHE MISS'):
      with contextlib.suppress(OSError, TypeError, LookupError):  # a program that was not there, or another JAX's words
        os.unlink(os.path.join(folder, f'{record.args[1]}{_ENDING}'))  # type: ignore[index]
    above = logging.getLogger(_LOGGER).parent
    return above is None or record.levelno >= (self._level or above.getEffectiveLevel())


def remove_unreadable() -> None:
  """Have programs that are kept but cannot be read written anew, from now on and for all of this process."""
  logger = logging.getLogger(_LOGGER)
  if not any(isinstance(one, _RemoveUnreadable) for one in logger.filters):
    logger.addFilter(_RemoveUnreadable(logger.level))
    logger.setLevel(logging.DEBUG)
