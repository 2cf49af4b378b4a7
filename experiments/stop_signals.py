"""Signals that ask a command to end: the first lets it put its answers away, a second ends it at once."""

import os
import signal
import types

_NAMES = ('SIGINT', 'SIGTERM', 'SIGHUP')


class Stopped(KeyboardInterrupt):
  """A signal asked the command to end; its name is the message."""


class StopSignals:
  """Has SIGINT, SIGTERM and SIGHUP raise `Stopped` in the main thread, in a `with` statement, until they are held.

  A second signal ends the process at once, whatever it is doing. What ignored a signal before, as a shell has it for
  commands in the background, goes on ignoring it.

  Attributes:
    received: The first that came; None while there was none.
  """

  def __init__(self) -> None:
    self.received: signal.Signals | None = None
    self._held = False
    self._before: dict[int, object] = {}

  def __enter__(self) -> 'StopSignals':
    for name in _NAMES:
      number = getattr(signal, name, None)  # Windows has no SIGHUP
      if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
        self._before[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *error: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)  # type: ignore[arg-type]

  def hold(self) -> None:
    """From now on a first signal is only remembered: what is being written is short, and is to be whole."""
    self._held = True

  @property
  def exit_code(self) -> int | None:
    """What a shell tells of a process that the signal ended, such as 143 for SIGTERM; None if none came."""
    return None if self.received is None else 128 + self.received

  def _handle(self, number: int, frame: types.FrameType | None) -> None:
    if self.received is not None:
      os._exit(128 + number)
    self.received = signal.Signals(number)
    if not self._held:
      raise Stopped(self.received.name)
