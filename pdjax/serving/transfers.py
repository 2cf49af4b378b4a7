"""Transfers that are not over: the request of each, its attempts, and its times to be given up or tried again."""

import dataclasses

from pdjax.serving.orders import TransferOrder
from pdjax.serving.timers import Timers
from pdjax.types.faults import FaultSpec

_LONGEST_BACKOFF_S = 60.0
_MOST_DOUBLINGS = 64  # more come to no other wait, and in the end to no number


@dataclasses.dataclass(slots=True, eq=False)
class Attempt:
  """One try at a transfer.

  Attributes:
    order: The order.
    request: The request that needs its pages: the one that carries the prompt; None for a copy of cached
      blocks.
    number: The number of the try, from 1.
    abandoned: Whether nobody waits for it any more, but the backend has not confirmed that it is over.
    error: The reason, then.
  """

  order: TransferOrder
  request: str | None
  number: int = 1
  abandoned: bool = False
  error: str = 'abandoned'


class Transfers:
  """Every transfer under way, and those to be tried again, by the id of their order."""

  def __init__(self, timers: Timers, deadline_s: float, faults: FaultSpec):
    self._timers = timers
    self._deadline_s = deadline_s
    self._faults = faults
    self._under_way: dict[int, Attempt] = {}
    self._again: dict[int, Attempt] = {}
    self._behind: dict[int, list[int]] = {}  # by the step that computes what they move

  def __bool__(self) -> bool:
    return bool(self._under_way or self._again)

  def begin(self, order: TransferOrder, number: int, now_s: float, *, waits: bool) -> None:
    """Note an order handed over; its time runs from now, or if it waits for a step from the end of that."""
    self._under_way[order.id] = Attempt(order, order.request if order.copy is None else None, number)
    if waits:
      assert order.after is not None
      self._behind.setdefault(order.after, []).append(order.id)
    else:
      self._timers.set('deadline', order.id, now_s + self._deadline_s)

  def step_ended(self, order: int, now_s: float) -> None:
    """Let the time of those that waited for a step begin."""
    for name in self._behind.pop(order, ()):
      if name in self._under_way and not self._under_way[name].abandoned:
        self._timers.set('deadline', name, now_s + self._deadline_s)

  def orders_under_way(self) -> list[TransferOrder]:
    """The orders of transfers that are not over."""
    return [attempt.order for attempt in self._under_way.values()]

  def get(self, order: int) -> Attempt | None:
    """A transfer under way."""
    return self._under_way.get(order)

  def abandon(self, order: int) -> Attempt | None:
    """Wait for a transfer no longer; None if that was known or it is over."""
    attempt = self._under_way.get(order)
    if attempt is None or attempt.abandoned:
      return None
    attempt.abandoned = True
    self._timers.cancel('deadline', order)
    return attempt

  def end(self, order: int) -> Attempt:
    """A transfer is over, however it went."""
    self._timers.cancel('deadline', order)
    return self._under_way.pop(order)

  def try_again(self, attempt: Attempt, now_s: float) -> bool:
    """Note that an attempt that is over is to be repeated after a while; False if it was the last."""
    if attempt.number >= self._faults.max_attempts:
      return False
    self._again[attempt.order.id] = attempt
    backoff_s = self._faults.backoff_s
    wait_s = backoff_s * 2.0 ** min(attempt.number - 1, _MOST_DOUBLINGS)
    self._timers.set('retry', attempt.order.id, now_s + min(wait_s, max(backoff_s, _LONGEST_BACKOFF_S)))
    return True

  def take_again(self, order: int) -> Attempt | None:
    """The attempt that is to be repeated, if it still is; it is noted no longer."""
    self._timers.cancel('retry', order)
    return self._again.pop(order, None)

  def get_again(self, order: int) -> Attempt | None:
    """The attempt that is to be repeated, if it still is."""
    return self._again.get(order)

  def of(self, request: str) -> list[Attempt]:
    """Those under way that a request needs."""
    return [attempt for attempt in self._under_way.values() if attempt.request == request]

  def forget(self, request: str) -> None:
    """Do not try again what a request needs no longer."""
    for order in [order for order, attempt in self._again.items() if attempt.request == request]:
      self.take_again(order)

  def forget_worker(self, worker: str) -> list[Attempt]:
    """Do not try again the transfers from or to a worker; return those."""
    attempts = [one for one in self._again.values() if worker in (one.order.source, one.order.target)]
    for attempt in attempts:
      self.take_again(attempt.order.id)
    return attempts

  def hand_on(self, request: str, heir: str) -> None:
    """Another request needs from now on what this one did."""
    for attempt in (*self._under_way.values(), *self._again.values()):
      if attempt.request == request:
        attempt.request = heir
