"""One queue of what has ended, stamped as it is posted, with the clock of the run."""

import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

_GRACE_S = 5.0


@dataclasses.dataclass(frozen=True)
class Interrupt:
  """Ends a wait; what it is about was noted elsewhere."""


class Mailbox:
  """Collects what any thread posts.

  Stamps are taken under the lock under which the queue is emptied: what a turn at time t finds is exactly what was
  stamped up to t, so that a replay can tell turns from ends alone. No two stamps are equal.
  """

  def __init__(self):
    self._condition = threading.Condition()
    self._items: list[Any] = []
    self._start_s = time.perf_counter()
    self._last_s = 0.0

  def start_clock(self, start_s: float | None = None) -> float:
    """Let the run begin now, at 0 s, or when `time.perf_counter` showed `start_s`; what it showed at 0 s."""
    with self._condition:
      self._start_s, self._last_s = time.perf_counter() if start_s is None else start_s, 0.0
      return self._start_s

  def forget_all_but(self, kinds: tuple[type, ...]) -> None:
    """Drop what was posted and not collected, except for items of some types."""
    with self._condition:
      self._items = [item for item in self._items if isinstance(item, kinds)]

  def now_s(self) -> float:
    """Seconds since the run began."""
    return time.perf_counter() - self._start_s

  def post(self, make: Callable[[float], Any]) -> None:
    """Add `make(stamp)`."""
    with self._condition:
      self._items.append(make(self._stamp()))
      self._condition.notify()

  def interrupt(self, note: Callable[[float], None]) -> None:
    """Call `note` with a stamp and add an `Interrupt` with it."""

    def make(stamp_s: float) -> Interrupt:
      note(stamp_s)
      return Interrupt()

    self.post(make)

  def collect(self, until_s: float) -> tuple[float, list[Any]]:
    """Wait until something is there or `until_s` has come; the time, and everything posted so far."""
    with self._condition:
      while not self._items and (left_s := until_s - self.now_s()) > 0:
        self._condition.wait(min(left_s, threading.TIMEOUT_MAX) if math.isfinite(left_s) else None)
      items, self._items = self._items, []
      return self._stamp(), items

  def _stamp(self) -> float:
    self._last_s = max(self.now_s(), math.nextafter(self._last_s, math.inf))
    return self._last_s


class Waiters:
  """Threads that each run one job at a time, as many as there are jobs that block: none waits for another's end.

  Args:
    name: Of the threads.
    crashed: Told what a job raised.
  """

  def __init__(self, name: str, crashed: Callable[[BaseException], None]):
    self._name = name
    self._crashed = crashed
    self._jobs: queue.SimpleQueue[tuple[int, Callable[[], None]] | None] = queue.SimpleQueue()
    self._condition = threading.Condition()
    self._left: set[int] = set()  # jobs whose end is waited for
    self._running: set[threading.Thread] = set()
    self._threads: list[threading.Thread] = []
    self._idle = 0

  def add(self, key: int, job: Callable[[], None]) -> None:
    """Run this at once, on a thread that is idle or else on a new one."""
    with self._condition:
      self._left.add(key)
      if self._idle:
        self._idle -= 1
      else:
        self._threads.append(threading.Thread(target=self._run, name=f'pdjax-{self._name}', daemon=True))
        self._threads[-1].start()
    self._jobs.put((key, job))

  def forget(self, key: int) -> None:
    """Wait no longer for the end of a job; if it never ends, its thread is lost, and what it holds."""
    with self._condition:
      self._left.discard(key)
      self._condition.notify_all()

  def close(self) -> None:
    """Wait a while for the jobs that are left, all but forgotten ones, and end the threads."""
    with self._condition:
      self._condition.wait_for(lambda: not self._left, _GRACE_S)  # one that never ends must not hide why all is closed
      lost = set(self._running)
    for _ in self._threads:
      self._jobs.put(None)
    for thread in self._threads:
      if thread not in lost:
        thread.join()

  def _run(self) -> None:
    while (item := self._jobs.get()) is not None:
      key, job = item
      with self._condition:
        wanted = key in self._left
        self._running.add(threading.current_thread())
      try:
        if wanted:
          job()
      except BaseException as error:
        self._crashed(error)
      with self._condition:
        self._running.remove(threading.current_thread())
        self._left.discard(key)
        self._idle += 1
        self._condition.notify_all()
      del item, job  # while it waits for the next it holds no device memory


class Waiter:
  """A thread that runs jobs in order; each blocks until something is ready and posts it.

  Args:
    name: Of the thread.
    crashed: Told what a job raised; those after it run all the same.
  """

  def __init__(self, name: str, crashed: Callable[[BaseException], None]):
    self._crashed = crashed
    self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._run, name=f'pdjax-{name}', daemon=True)
    self._thread.start()

  def add(self, job: Callable[[], None]) -> None:
    """Run this after all that was added before."""
    self._jobs.put(job)

  def close(self) -> None:
    """Run what is left, then end the thread."""
    self._jobs.put(None)
    self._thread.join()

  def _run(self) -> None:
    while (job := self._jobs.get()) is not None:
      try:
        job()
      except BaseException as error:  # a thread that died would leave the loop waiting for ever
        self._crashed(error)
      del job  # while it waits for the next it holds no device memory
