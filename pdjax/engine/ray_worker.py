"""The Ray actor in which a worker's process runs: JAX begins there, and not where this is imported."""

import threading
from typing import Any

from pdjax.serving.peers import Message


class RayWorker:
  """A worker's `WorkerProcess` as a Ray actor, which is told all in the order in which it was sent.

  Args:
    node_host: The address that a host of 'node' stands for; None for that of its node in the Ray cluster.
  """

  def __init__(self, node_host: str | None = None):
    self._node_host = node_host
    self._lock = threading.Lock()
    self._process: Any = None
    self._held: dict[int, Message] = {}
    self._next = 0

  def call(self, method: str, *args: Any) -> Any:
    """Call a method of the worker's process."""
    with self._lock:
      if self._process is None:
        import ray

        from pdjax.engine.worker_process import WorkerProcess  # JAX begins here

        self._process = WorkerProcess(node_host=self._node_host or ray.util.get_node_ip_address())
    return getattr(self._process, method)(*args)

  def pulse(self) -> None:
    """Answer at once, whatever else goes on here: a sign of life."""

  def take(self, count: int, message: Message) -> None:
    """Hand on messages in the order in which they are counted: Ray may bring two that overtook each other."""
    self._held[count] = message
    while self._next in self._held:
      due = self._held.pop(self._next)
      self._next += 1
      if self._process is not None:  # else it was meant for a process before this one
        self._process.take(due)
