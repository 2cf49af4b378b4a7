"""As much of Ray as a peer needs, with threads in the place of processes, which may be stopped or be gone."""

import concurrent.futures
import contextlib
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

from pdjax.types.cluster import DeviceError


class RayError(Exception):
  """As Ray's."""


class RayTaskError(RayError):
  """As Ray's: what a method raised."""

  def __init__(self, cause: Exception):
    super().__init__(str(cause))
    self.cause = cause


EXCEPTIONS = types.SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)


class Actor:
  """A process that does what it is told, on a thread for each call.

  Args:
    methods: What `call` calls, by name.
    is_there: Set once the process is.
  """

  def __init__(self, methods: dict[str, Callable[..., Any]], is_there: threading.Event | None = None):
    self._methods = methods
    self._is_there = is_there
    self.stopped = threading.Event()  # as by SIGSTOP
    self.asked: list[str] = []
    self._open: list[concurrent.futures.Future] = []

  def gone(self) -> None:
    """End it: all that is waited for raises."""
    for answer in self._open:
      if not answer.done():
        answer.set_exception(RayError('The actor died unexpectedly before finishing this task.'))

  def __getattr__(self, name: str) -> Any:
    if name == '__ray_ready__':
      return types.SimpleNamespace(remote=functools.partial(self._remote, 'start'))
    return types.SimpleNamespace(
      options=lambda **_: types.SimpleNamespace(remote=functools.partial(self._remote, name))
    )

  def _remote(self, kind: str, *args: Any) -> concurrent.futures.Future:
    answer: concurrent.futures.Future = concurrent.futures.Future()
    self._open.append(answer)
    self.asked.append(args[0] if kind == 'call' else kind)
    threading.Thread(target=self._run, args=(answer, kind, args), daemon=True).start()
    return answer

  def _run(self, answer: concurrent.futures.Future, kind: str, args: tuple) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # it is gone meanwhile
      if kind == 'start':
        if self._is_there is not None:
          self._is_there.wait(60.0)
        answer.set_result(None)
        return
      try:
        found = self._methods[args[0]](*args[1:]) if kind == 'call' else None
      except Exception as error:
        answer.set_exception(RayTaskError(error))
        return
      if not self.stopped.is_set():
        answer.set_result(found)


class Service:
  """A control service that answers, until it is lost.

  Args:
    address: Where.
  """

  def __init__(self, address: str = '10.0.0.1:6379'):
    self.address = address
    self.lost = threading.Event()

  @property
  def is_lost(self) -> bool:
    return self.lost.is_set()

  def check(self) -> None:
    if self.lost.is_set():
      raise DeviceError("Ray's control service is lost")

  def call(self, do: Callable[[], Any], limit_s: float) -> Any:
    self.check()
    return do()

  def close(self) -> None:
    pass


class FakeRay(types.SimpleNamespace):
  """The part of Ray itself that a peer asks for."""

  def __init__(self):
    self.killed: list[Actor] = []
    super().__init__(exceptions=EXCEPTIONS)

  def wait(self, answers, timeout=None):
    done, _ = concurrent.futures.wait(answers, timeout, concurrent.futures.FIRST_COMPLETED)
    return [one for one in answers if one in done], [one for one in answers if one not in done]

  def get(self, answer, timeout=None):
    return answer.result(timeout)

  def kill(self, actor: Actor) -> None:
    self.killed.append(actor)
    actor.gone()
