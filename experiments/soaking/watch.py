"""Watches a soak: says every few seconds how it goes, and what is open if nothing happens any more."""

import threading
import time
from collections.abc import Callable

import psutil

from experiments.faults.kinds import grouped
from experiments.soaking.soak import Soak, Tally

_POLL_S = 0.2
_MOST_S = 1.0  # that one look counts for


class Hang(RuntimeError):
  """Nothing happened for too long; the message says what is open."""


def watch(
  soak: Soak,
  seconds: float,
  say: Callable[[str], None],
  every_s: float = 5.0,
  patience_s: float = 60.0,
  until: Callable[[], bool] = lambda: False,
) -> None:
  """Let a soak run for so long; what was begun then is served to its end.

  Args:
    soak: The soak.
    seconds: Seconds that it goes on.
    say: Told every `every_s` seconds how it goes, in a line.
    every_s: Seconds between two lines.
    patience_s: Seconds without any change after which it hangs.
    until: Whether it may end before.

  Raises:
    Hang: if it hangs; its threads go on waiting.
  """
  begin_s = soak.moved_s = time.monotonic()
  raised: list[BaseException] = []

  def run() -> None:
    try:
      soak.run(lambda: time.monotonic() >= begin_s + seconds or until())
    except BaseException as error:
      raised.append(error)

  thread = threading.Thread(target=run, name='soak', daemon=True)
  thread.start()
  told_s = now_s = seen_s = begin_s
  idle_s = 0.0
  while thread.is_alive():
    thread.join(_POLL_S)
    before_s, now_s = now_s, time.monotonic()
    # While this process is stopped as a whole nothing can happen, so such a gap counts as a single look.
    idle_s = idle_s + min(now_s - before_s, _MOST_S) if soak.moved_s == seen_s else 0.0
    seen_s = soak.moved_s
    if idle_s >= patience_s:
      raise Hang(f'nothing happened for {patience_s:g} s in {soak.describe_open()}')
    if now_s - told_s >= every_s:
      told_s = now_s
      say(f'{now_s - begin_s:5.0f} s  {soak.where}: {describe(soak.tally)}')
  if raised:
    raise raised[0]


def describe(tally: Tally) -> str:
  """The state of a soak, in a line."""
  groups = ', '.join(f'{count:,} {name}' for name, count in grouped(tally.faults).items() if count)
  memory = psutil.Process().memory_info().rss / 2**20
  return (
    f'{tally.requests:,} requests ended, {tally.faults.total():,} faults ({groups or "none yet"}), '
    f'{tally.counts["wrong tokens"]} wrong tokens, {tally.counts["stream differs"]} streams that differ, '
    f'{tally.counts["wrong end"]} wrong ends, {tally.counts["leak"]} leaks, {tally.counts["breakdown"]} breakdowns, '
    f'{tally.counts["log probabilities"]} wrong log probabilities, {tally.counts["log"]} wrong logs, '
    f'{tally.late} late by themselves, '
    f'{memory:,.0f} MiB'
  )
