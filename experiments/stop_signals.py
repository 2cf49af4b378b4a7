"""Signals that ask a command to end: the first lets it put its answers away, a second ends it at once."""

import os
import signal
import sys
import threading
import time
import types
from typing import Any

_NAMES = ('SIGINT', 'SIGTERM', 'SIGHUP')
_SAME_S = 0.1  # `timeout` sends its signal twice, to the process and to its group
_AGAIN_S = 0.05


class Stopped(KeyboardInterrupt):
  """A signal asked the command to end; its name is the message."""


class StopSignals:
  """Has SIGINT, SIGTERM and SIGHUP raise `Stopped` in the main thread, in a `with` statement, until they are held.

  A `Stopped` that comes where Python lets no exception through, as in a callback of the garbage collector, is raised
  again a moment later. A second signal ends the process at once, whatever it is doing, even if the main thread is not
  in Python for a while, as when it compiles. What ignored a signal before, as a shell has it for commands in the
  background, goes on ignoring it.

  Attributes:
    received: The first that came; None while there was none.
  """

  def __init__(self) -> None:
    self.received: signal.Signals | None = None
    self._held = self._raises_again = False
    self._own = 0  # signals that are no second one, but the first raised again
    self._before: dict[int, object] = {}

  def __enter__(self) -> 'StopSignals':
    for name in _NAMES:
      number = getattr(signal, name, None)  # Windows has no SIGHUP
      if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
        self._before[number] = signal.signal(number, self._handle)
    heard, self._told = os.pipe()
    os.set_blocking(self._told, False)
    self._fd_before = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
    self._thread = threading.Thread(target=self._listen, args=(heard,), name='stop-signals', daemon=True)
    self._thread.start()
    self._hook_before, sys.unraisablehook = sys.unraisablehook, self._lost
    return self

  def __exit__(self, *error: object) -> None:
    sys.unraisablehook = self._hook_before
    for number, handler in self._before.items():
      signal.signal(number, handler)  # type: ignore[arg-type]
    signal.set_wakeup_fd(self._fd_before)
    os.close(self._told)
    self._thread.join()

  def hold(self) -> None:
    """From now on a first signal is only remembered: what is being written is short, and is to be whole."""
    self._held = True

  def note(self, error: BaseException) -> None:
    """Take an error for the signal that it stands for, if any: Ray, while it begins, raises SystemExit for SIGTERM."""
    if isinstance(error, SystemExit) and error.code == signal.SIGTERM:
      self.received = self.received or signal.SIGTERM

  @property
  def exit_code(self) -> int | None:
    """The exit code of a process that the signal ended, such as 143 for SIGTERM; None if none came."""
    return None if self.received is None else 128 + self.received

  def _listen(self, heard: int) -> None:
    """On a thread of its own: end the process with the second signal, of which the main thread may hear late."""
    first_s = None
    while numbers := os.read(heard, 1):
      if self._own:
        self._own -= 1
      elif numbers[0] in self._before:
        now_s = time.monotonic()
        first_s = now_s if first_s is None else first_s
        if now_s - first_s > _SAME_S:
          os._exit(128 + numbers[0])
    os.close(heard)

  def _handle(self, number: int, frame: types.FrameType | None) -> None:
    if self.received is None or self._raises_again:
      self.received, self._raises_again = self.received or signal.Signals(number), False
      if not self._held:
        raise Stopped(self.received.name)

  def _lost(self, unraisable: Any) -> None:
    """Python could not raise something where it came."""
    if not isinstance(unraisable.exc_value, Stopped):
      self._hook_before(unraisable)
      return
    timer = threading.Timer(_AGAIN_S, self._raise_again)  # not here, where it would be lost again
    timer.daemon = True
    timer.start()

  def _raise_again(self) -> None:
    if self.received is not None and not self._held:
      self._raises_again = True
      self._own += 1
      # to the main thread itself: a signal that another thread gets wakes no call in which that one sleeps
      main = threading.main_thread().ident
      assert main is not None
      signal.pthread_kill(main, self.received)
