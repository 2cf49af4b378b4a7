"""Resources of a process between two sessions, which must not grow: device arrays, open files and threads."""

import gc
import threading
import time

import jax
import psutil

_SLACK = {'device arrays': 8, 'open files': 8, 'threads': 2}  # of a library that is used late for the first time


class Resources:
  """Compares what is held with what was held at first.

  Args:
    settled: Looks before the one that counts as first.
  """

  def __init__(self, settled: int):
    self._settled = settled
    self._first: dict[str, int] = {}

  def grown(self, wait_s: float) -> list[str]:
    """Resources beyond those held at first, in sentences; what ends within `wait_s` seconds does not count.

    Each is told once: from then on it counts as held at first.
    """
    if self._settled > 0:
      self._settled -= 1
      return []
    deadline_s = time.monotonic() + wait_s
    while True:
      held = _held()
      self._first = self._first or held
      grown = [name for name, count in held.items() if count > self._first[name] + _SLACK[name]]
      if not grown or time.monotonic() >= deadline_s:
        break
      time.sleep(0.05)
    told = [f'{name} were {self._first[name]} after the first sessions, and are {held[name]}.' for name in grown]
    self._first |= {name: held[name] for name in grown}
    return told


def _held() -> dict[str, int]:
  gc.collect()  # what only a cycle holds is not lost
  counts = {'device arrays': len(jax.live_arrays()), 'threads': threading.active_count()}
  return counts | {'open files': psutil.Process().num_fds()}
