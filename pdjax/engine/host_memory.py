"""Memory of this host that arrays on CPU devices are made of: what was freed is kept for the next."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_KEPT_BYTES = 2**30  # that may be free at the end of the heap before some is given back to the system
_LARGEST_BYTES = 32 * 2**20  # of an array that comes from the heap; glibc allows no more


def keep_freed_memory() -> bool:
  """Have this process keep memory that it frees; whether it can.

  By itself the C library gives large blocks back to the system, which fills every page with zeros before it lends it
  again: that took longer than to copy as much. Only for glibc; elsewhere nothing changes.
  """
  if not sys.platform.startswith('linux'):
    return False
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is None:
    return False
  return bool(mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)) and bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BYTES))
