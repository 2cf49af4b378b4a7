"""Calls that may never return, on threads that nobody has to wait for."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar('T')

_LOOK_S = 0.5


def begin_call(do: Callable[[], T]) -> Future[T]:
  """Do something on a thread of its own, which does not keep this process from ending."""
  future: Future[T] = Future()

  def run() -> None:
    try:
      future.set_result(do())
    except BaseException as error:
      future.set_exception(error)

  threading.Thread(target=run, name='pdjax-call', daemon=True).start()
  return future


def call_within(do: Callable[[], T], limit_s: float, check: Callable[[], None] = lambda: None) -> T:
  """Do something and wait for it, but no longer than so many seconds; past them its thread is left behind.

  Args:
    do: The call.
    limit_s: The seconds.
    check: Called twice a second meanwhile; what it raises ends the wait.

  Raises:
    TimeoutError: if it takes longer.
  """
  until_s = time.monotonic() + limit_s
  future = begin_call(do)
  while not wait([future], min(_LOOK_S, max(until_s - time.monotonic(), 0.0))).done:
    check()
    if time.monotonic() >= until_s:
      raise TimeoutError(f'no answer for {limit_s:g} s')
  return future.result()
