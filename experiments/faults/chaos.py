"""A backend under which anything may go wrong at any time, as its user says."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from pdjax.serving.events import Done, Event, Failed, WorkerBack, WorkerLost
from pdjax.serving.orders import Order, TransferOrder

Fault = Literal['refused', 'fails', 'stalls', 'slow', 'corrupts', 'permutes']  # of a transfer
End = Literal['late', 'twice', 'lost']  # how the completion of one is told


class Breakable(Protocol):
  """A backend of which a worker can be lost and a transfer can fail.

  Attributes:
    fault_of: Says what is to happen to a transfer: a `Fault`, another one that the backend knows, or None.
  """

  fault_of: Callable[[TransferOrder], Any]

  def submit(self, orders: Sequence[Order]) -> None:
    """Begin the orders of one action; see `pdjax.serving.Backend`."""

  def wait(self, until_s: float) -> tuple[float, Sequence[Event]]:
    """Wait until something happened or `until_s` has come; see `pdjax.serving.Backend`."""

  def lose(self, worker: str) -> tuple[WorkerLost, WorkerBack]:
    """Let a worker begin another incarnation; return the events that tell of it."""


class Chaos:
  """Stands between a loop and a backend.

  Args:
    backend: Carries out what it can.
    fault: Draws the fault of the next transfer, see `Breakable`.
    end: Draws the `End` of the next completion of one, or None.
    late_s: Seconds by which a late one is late.
    patience_s: Waits end after so long, so that whoever drives the loop gets a word in.
  """

  def __init__(
    self,
    backend: Breakable,
    fault: Callable[[], Any],
    end: Callable[[], End | None],
    late_s: float,
    patience_s: float = float('inf'),
  ):
    self.backend = backend
    self.now_s = 0.0
    self._end = end
    self._late_s = late_s
    self._patience_s = patience_s
    self._transfers: set[int] = set()
    self._later: list[tuple[float, Event]] = []
    backend.fault_of = lambda order: fault()

  def lose(self, worker: str, down_s: float) -> None:
    """A worker dies now and is being brought back, until then."""
    lost, back = self.backend.lose(worker)
    self._later += [(self.now_s, dataclasses.replace(lost, returning=down_s > 0)), (self.now_s + down_s, back)]

  def submit(self, orders: Sequence[Order]) -> None:
    """Begin the orders of one action; see `pdjax.serving.Backend`."""
    self._transfers |= {order.id for order in orders if isinstance(order, TransferOrder)}
    self.backend.submit(orders)

  def wait(self, until_s: float) -> tuple[float, list[Event]]:
    """Wait until there is something to tell or `until_s` has come; see `pdjax.serving.Backend`."""
    until_s = min([until_s, self.now_s + self._patience_s, *(due_s for due_s, _ in self._later)])
    self.now_s, events = self.backend.wait(until_s)
    told: list[Event] = []
    for event in events:
      end = self._end_of(event) if isinstance(event, Done) and event.order in self._transfers else None
      if end in (None, 'twice'):
        told.append(event)
      if end in ('twice', 'late') and isinstance(event, Done):
        late = Done(
          event.order, event.began_s, event.ended_s + self._late_s, wire_bytes=event.wire_bytes, trip=event.trip
        )
        self._later.append((late.ended_s, late))
    told += [event for due_s, event in self._later if due_s <= self.now_s]
    self._later = [item for item in self._later if item[0] > self.now_s]
    return self.now_s, self._in_order(told)

  def _end_of(self, done: Done) -> End | None:
    """The `End` of the completion of a transfer, or None."""
    return self._end()

  def _in_order(self, events: list[Event]) -> list[Event]:
    """The events in the order in which the loop hears them."""
    return sorted(events, key=told_when)


def told_when(event: Event) -> tuple[float, int]:
  """A key for the order of a backend: by end and order; it learns last that a worker is gone."""
  return (event.ended_s, event.order) if isinstance(event, Done | Failed) else (math.inf, 0)
