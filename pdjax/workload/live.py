"""Live: requests that threads submit and withdraw while the loop runs."""

import collections
import dataclasses
import math
import threading
from collections.abc import Callable, Sequence

from pdjax.serving.events import Arrived, Finished, Withdrawn
from pdjax.types.request import Request

Interrupt = Callable[[Callable[[float], None]], None]


class Live:
  """A queue that any thread feeds; a request arrives when it is submitted, whatever its own `arrival_s` says.

  The loop sleeps while there is nothing to do. If a policy holds requests back while nothing is under way, a request
  that comes later may free them (a policy may wait for a full batch), so this is no error at once, as it is where all
  requests are known. But nobody may wait for ever without a word: after `patience_s` without any change, or at once
  when the queue is closed, the loop's `StuckError` names those that are held and what they need.

  Args:
    interrupt: Calls what it is given with the time of the run, and wakes the backend: `Engine.interrupt`.
    patience_s: Seconds for which a policy may hold requests back while nothing happens.
  """

  def __init__(self, interrupt: Interrupt, patience_s: float = 10.0):
    self._interrupt = interrupt
    self._patience_s = patience_s
    self._lock = threading.Lock()
    self._closing = False
    self._arrival_s: dict[str, float] = {}  # of every request there ever was
    self._arriving: collections.deque[Request] = collections.deque()
    self._leaving: collections.deque[str] = collections.deque()
    self._quiet_until_s = math.inf

  # -------------------------------------------------------------------------- for any thread

  def submit(self, request: Request) -> None:
    """Let a request arrive now.

    An id is never used twice: steps under way may still bring tokens for one that has ended, and the log would tell
    two requests as one.

    Raises:
      ValueError: if its id, or that of one of its samples, was used before.
      RuntimeError: if the queue is closed.
    """
    with self._lock:
      if self._closing:
        raise RuntimeError(f'request {request.id!r} is submitted to a closed queue, expected it before close().')
      names = [sample.id for sample in request.samples()]
      for name in names:
        if name in self._arrival_s:
          raise ValueError(f'the request id {name!r} was used before, expected a new one; an id stays in the log.')

      def note(now_s: float) -> None:
        self._arrival_s.update(dict.fromkeys(names, now_s))
        self._arriving.append(dataclasses.replace(request, arrival_s=now_s))

      self._interrupt(note)

  def knows(self, request: str) -> bool:
    """Whether an id was used."""
    return request in self._arrival_s

  def withdraw(self, request: str) -> None:
    """Say that nobody wants a submitted request, or one of its samples, any more; once it has ended this does nothing.

    What the policy has answered by now may still be started, such as one chunk or one decode call of it; nothing that
    it answers later.
    """
    self._interrupt(lambda _: self._leaving.append(request))

  def close(self) -> None:
    """Take no more requests; the loop ends once those submitted have ended."""
    with self._lock:
      self._closing = True
    self._interrupt(lambda _: None)

  # -------------------------------------------------------------------------- for the loop

  @property
  def closed(self) -> bool:
    return self._closing and not self._arriving

  def next_s(self) -> float:
    if self._arriving:
      return self._arriving[0].arrival_s
    if self._leaving:
      return 0.0
    return math.inf if self._closing else self._quiet_until_s

  def due(self, now_s: float, finished: Sequence[Finished] = ()) -> list[Arrived | Withdrawn]:
    events: list[Arrived | Withdrawn] = []
    while self._arriving and self._arriving[0].arrival_s <= now_s:
      events.append(Arrived(self._arriving.popleft()))
    for _ in range(len(self._leaving)):
      request = self._leaving.popleft()
      if self._arrival_s[request] <= now_s:
        events.append(Withdrawn(request))
      else:
        self._leaving.append(request)  # it arrives in the next turn, and leaves then
    quiet = now_s >= self._quiet_until_s and not events and not finished
    self._quiet_until_s = math.inf if quiet else now_s + self._patience_s
    return events

  def output_len(self, request_id: str) -> int | None:
    return None
