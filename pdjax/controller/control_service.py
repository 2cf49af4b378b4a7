"""Ray's control service, watched: without it no process begins, calls to Ray do not return, and Ray soon ends ours."""

import errno
import socket
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pdjax.controller.calls import call_within
from pdjax.types.cluster import DeviceError

T = TypeVar('T')

_EACH_S = 1.0  # from one look to the next
_CONNECT_S = 2.0
_AWAY_S = 6.0  # after which it is lost and not just busy; a minute after its loss Ray ends this process
_NOBODY = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)


class ControlService:
  """Looks every second whether somebody listens where a cluster's control service does.

  Args:
    address: Host and port.
  """

  def __init__(self, address: str):
    self.address = address
    self._lock = threading.Lock()
    self._error: DeviceError | None = None
    self._told: list[Callable[[DeviceError], None]] = []
    self._closed = threading.Event()
    threading.Thread(target=self._watch, name='pdjax-control-service', daemon=True).start()

  @property
  def is_lost(self) -> bool:
    """Whether nobody has listened there for a while."""
    return self._error is not None

  def check(self) -> None:
    """Raise `DeviceError` if it is lost."""
    if self._error is not None:
      raise self._error

  def when_lost(self, tell: Callable[[DeviceError], None]) -> None:
    """Call `tell` with the reason, from any thread, once it is lost: now, if it is."""
    with self._lock:
      self._told.append(tell)
      error = self._error
    if error is not None:
      tell(error)

  def call(self, do: Callable[[], T], limit_s: float) -> T:
    """Call Ray, where it may wait for its control service.

    Raises:
      DeviceError: if that is lost meanwhile.
      TimeoutError: if the call takes longer than so many seconds; its thread is left behind.
    """
    return call_within(do, limit_s, self.check)

  def close(self) -> None:
    """Look no more."""
    self._closed.set()

  def _watch(self) -> None:
    host, _, port = self.address.rpartition(':')
    away_s = None
    while not self._closed.wait(_EACH_S):
      look_s = time.monotonic()
      reason = _why_away(host.strip('[]'), int(port))
      away_s = None if reason is None else look_s if away_s is None else away_s
      if reason is not None and away_s is not None and time.monotonic() - away_s >= _AWAY_S:
        self._lose(
          f"Ray's control service at {self.address} is lost ({reason}, for {_AWAY_S:g} s), and without it no process "
          'can be started or watched; see what became of gcs_server there, and begin again once a cluster is there.'
        )
        return

  def _lose(self, message: str) -> None:
    error = DeviceError(message)
    with self._lock:
      self._error, told = error, self._told
    for tell in told:
      tell(error)


def _why_away(host: str, port: int) -> str | None:
  """The reason why nobody listens there, if it is known."""
  try:
    socket.create_connection((host, port), _CONNECT_S).close()
  except TimeoutError:
    return 'nobody answers'
  except OSError as error:
    if isinstance(error, ConnectionError) or error.errno in _NOBODY:
      return error.strerror or str(error)
  return None  # such as where this process has no more files to open
