"""Threads that wait for devices: for one worker's steps in order, and for transfers side by side."""

import queue
import threading
from collections.abc import Callable, Hashable

_GRACE_S = 5.0


class Waiters:
  """Threads that each run one job at a time, as many as there are jobs that block: none waits for another's end.

  Args:
    name: Of the threads.
    crashed: Told what a job raised.
  """

  def __init__(self, name: str, crashed: Callable[[BaseException], None]):
    self._name = name
    self._crashed = crashed
    self._jobs: queue.SimpleQueue[tuple[Hashable, Callable[[], None]] | None] = queue.SimpleQueue()
    self._condition = threading.Condition()
    self._left: set[Hashable] = set()  # jobs whose end is waited for
    self._running: set[threading.Thread] = set()
    self._threads: list[threading.Thread] = []
    self._idle = 0

  def add(self, key: Hashable, job: Callable[[], None]) -> None:
    """Run this at once, on a thread that is idle or else on a new one.

    Raises:
      RuntimeError: if there can be no new thread; then it is as if nothing had been added.
    """
    with self._condition:
      if self._idle:
        self._idle -= 1
      else:
        thread = threading.Thread(target=self._run, name=f'pdjax-{self._name}', daemon=True)
        thread.start()
        self._threads.append(thread)
      self._left.add(key)
    self._jobs.put((key, job))

  def forget(self, key: Hashable) -> None:
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
      del item, key, job  # while it waits for the next it holds no device memory


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

  def drain(self) -> None:
    """Wait until all that was added before has run."""
    drained = threading.Event()
    self.add(drained.set)
    drained.wait()

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
