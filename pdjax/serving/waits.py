"""Waits that look like a mistake: where the next request is long in coming, its time may be in another unit."""

from absl import logging

_MOST_FIRST_S = 60.0
_MOST_LATER_S = 3600.0  # users may think for minutes


def tell_of_long_wait(now_s: float, arrives_s: float) -> bool:
  """Warn if nothing comes for long: more than a minute from the start of a run, or an hour later on.

  Args:
    now_s: The time now; 0 is the start.
    arrives_s: The time the next request arrives; infinite if nobody knows.

  Returns:
    Whether there was a warning.
  """
  if not (_MOST_LATER_S if now_s else _MOST_FIRST_S) < arrives_s - now_s < float('inf'):
    return False
  logging.warning(
    'nothing is left to do until the next request arrives, %s s after the start of the run: is its arrival_s an '
    'epoch or milliseconds? It counts seconds from the start.',
    arrives_s,
  )
  return True
