"""A worker's Ray actor, as its controller sees it: calls for orders, for news, and for signs of life."""

import contextlib
import itertools
import math
import threading
import time
import types
from collections.abc import Callable
from typing import Any

from pdjax.controller.control_service import ControlService
from pdjax.serving.peers import Message, News, PeerLost

_LISTEN_S = 5.0  # of one call that waits for news
_PULSE_S = 1.0  # from one look at whether a process lives to the next, while an answer is waited for
_KILL_S = 2.0
_CLOSE_S = 10.0  # until a process has ended its threads
GROUPS = {'orders': 1, 'news': 1, 'control': 4, 'pulse': 1}  # threads for each kind of call


class RayPeer:
  """A worker's actor, as its controller sees it.

  Args:
    name: The worker's name.
    start: Starts an actor by a name that none had before.
    ray: Ray.
    service: Ray's control service. Once that is lost, what is asked raises a DeviceError.
    silence_s: Seconds without a sign of life after which it counts as lost.
    start_s: Seconds until an actor must be there.
  """

  def __init__(
    self,
    name: str,
    start: Callable[[str], Any],
    ray: types.ModuleType,
    service: ControlService,
    silence_s: float,
    start_s: float,
  ):
    self.name = name
    self._start = start
    self._ray = ray
    self._service = service
    self._silence_s = silence_s
    self._start_s = start_s
    self._lock = threading.Lock()
    self._numbers = itertools.count(1)
    self._closed = False
    self._begin()

  def _begin(self) -> None:
    if self._closed:
      raise PeerLost(f'worker {self.name!r} gets no new process: all is being closed.')
    name = f'{self.name}-{next(self._numbers)}'
    try:
      actor = self._service.call(lambda: self._start(name), self._start_s)
    except TimeoutError:
      raise PeerLost(
        f"worker {self.name!r} gets no process: Ray's control service at {self._service.address} has not answered for "
        f'{self._start_s:g} s'
      ) from None
    with self._lock:
      self._actor, self._counts = actor, itertools.count()
      self._is_there = self._is_silent = False

  def _await_start(self) -> None:
    """Wait until the process is there: before that it cannot tell that it lives."""
    if self._is_there:
      return
    ray, actor = self._ray, self._actor
    try:
      ready = actor.__ray_ready__.remote()
      if not self._wait([ready], self._start_s):
        self._is_silent = True
        raise PeerLost(f'the process of worker {self.name!r} was not there after {self._start_s:g} s')
      ray.get(ready)
    except (ray.exceptions.RayError, ValueError) as error:
      raise PeerLost(f'there is no process for worker {self.name!r}: {_first_line(error)}') from error
    self._is_there = actor is self._actor

  def ask(self, method: str, *args: Any) -> Any:
    """Call a method of its `WorkerProcess` and wait for the answer, however long that takes while it lives."""
    self._await_start()
    return self._answer('control', method, *args)

  def tell(self, message: Message) -> None:
    """Send a message; a process that is gone shows in `listen`."""
    with self._lock, contextlib.suppress(self._ray.exceptions.RayError):
      _method(self._actor, 'take', 'orders', num_returns=0).remote(next(self._counts), message)

  def listen(self) -> tuple[News, ...]:
    """Wait until something happened there, or a while."""
    return self._answer('news', 'listen', _LISTEN_S)

  def restart(self) -> None:
    """Have Ray start another process in the place of the lost one."""
    self._kill()  # one that lives still, but can do nothing, has the devices
    try:
      self._begin()
    except (self._ray.exceptions.RayError, ValueError) as error:
      raise PeerLost(f'there is no new process for worker {self.name!r}: {_first_line(error)}') from error
    self._await_start()

  def close(self) -> None:
    """End the process, for good."""
    self._closed = True
    if not self._is_silent:
      with contextlib.suppress(Exception):
        self._ray.get(_method(self._actor, 'call', 'control').remote('close'), timeout=_CLOSE_S)
    self._kill()

  def _kill(self) -> None:
    actor = self._actor
    with contextlib.suppress(Exception):
      self._service.call(lambda: self._ray.kill(actor), _KILL_S)

  def _answer(self, group: str, method: str, *args: Any) -> Any:
    """Call a method and wait for its answer; while there is none, for signs of life."""
    actor = self._actor
    answer = _method(actor, 'call', group).remote(method, *args)
    while not self._wait([answer], math.inf if math.isinf(self._silence_s) else _PULSE_S):
      pulse = _method(actor, 'pulse', 'pulse').remote()
      found = self._wait([answer, pulse], self._silence_s)
      if not found:
        self._is_silent = actor is self._actor
        raise PeerLost(f'the process of worker {self.name!r} has not answered for {self._silence_s:g} s')
      if pulse in found:
        self._get(pulse)  # of a process that is gone it raises
    return self._get(answer)

  def _wait(self, answers: list[Any], seconds: float) -> list[Any]:
    """Those of the answers that are there once one is, or after so long."""
    until_s = time.monotonic() + seconds
    while True:
      self._service.check()
      left_s = until_s - time.monotonic()
      found, _ = self._ray.wait(answers, timeout=max(min(left_s, _PULSE_S), 0.0))
      if found or left_s <= _PULSE_S:
        return found

  def _get(self, answer: Any) -> Any:
    try:
      return self._ray.get(answer)
    except self._ray.exceptions.RayTaskError as error:
      raise error.cause from None
    except self._ray.exceptions.RayError as error:
      raise PeerLost(f'the process of worker {self.name!r} is gone ({_first_line(error)})') from error


def _method(actor: Any, name: str, group: str, **options: Any) -> Any:
  return getattr(actor, name).options(concurrency_group=group, **options)


def _first_line(error: BaseException) -> str:
  text = str(error).strip()
  return text.splitlines()[0] if text else type(error).__name__
