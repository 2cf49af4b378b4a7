"""Transfers under way whose pieces are to be written into pages of this process."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax

from pdjax.engine.runner import Keeper, describe
from pdjax.engine.waiters import Waiters
from pdjax.kv.transfer import CorruptError, Parcel
from pdjax.serving.mailbox import Mailbox
from pdjax.serving.orders import TransferOrder


class Way(Protocol):
  """The end of a transport that writes what it brings."""

  def receive(self, parcel: Parcel) -> jax.Array:
    """Write a parcel whose pieces are there into the target's pool; an array that is ready when it is written."""


@dataclasses.dataclass(frozen=True, eq=False)
class UnderWay:
  """A transfer whose pieces are under way to this process.

  Attributes:
    number: Its number. Within one process that is the id of its order, which one of another run may have too; between
      processes see `pdjax.serving.peers`.
    order: Its order.
    parcel: Its pieces.
    way: The transport that writes them.
    began_s: The time at which they began to travel; None takes the one at which they can leave their devices.
  """

  number: int
  order: TransferOrder
  parcel: Parcel
  way: Way
  began_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Landed:
  """The pieces of a transfer are on the target's devices, to be written."""

  transfer: UnderWay
  began_s: float
  arrived_s: float


@dataclasses.dataclass(frozen=True)
class Missed:
  """The pieces of a transfer did not arrive, or not those that were sent."""

  transfer: UnderWay
  error: str
  corrupt: bool
  ended_s: float


class Incoming:
  """Waits for the pieces of transfers, for each on a thread of its own, and writes what was not given up meanwhile.

  It posts a `Landed` or a `Missed` for each; whoever empties the mailbox brings the first back, to `write`. All but the
  waiting is for the thread that dispatches.

  Args:
    keepers: Of the places that are targets, by name.
    mailbox: The mailbox to which it posts.
    waiters: The threads that wait.
  """

  def __init__(self, keepers: Mapping[str, Keeper[Any]], mailbox: Mailbox, waiters: Waiters):
    self._keepers = keepers
    self._mailbox = mailbox
    self._waiters = waiters
    self._under_way: dict[int, UnderWay] = {}  # by number

  @property
  def under_way(self) -> tuple[UnderWay, ...]:
    """Those that are neither over nor given up."""
    return tuple(self._under_way.values())

  def add(self, transfer: UnderWay) -> None:
    """Wait for the pieces of a transfer; if there can be no thread for that, raise and let it be none of these."""
    self._waiters.add(transfer, functools.partial(self._await, transfer))
    self._under_way[transfer.number] = transfer

  def give_up(self, number: int) -> UnderWay | None:
    """Let nothing be written that still lands of a transfer; None if it is over, or none of these."""
    transfer = self._under_way.pop(number, None)
    if transfer is not None:
      transfer.parcel.abandoned = True
      self._waiters.forget(transfer)
    return transfer

  def end(self, transfer: UnderWay) -> bool:
    """Note that a transfer is over; whether it was still waited for, itself and not one of another run."""
    if self._under_way.get(transfer.number) is not transfer:
      return False
    del self._under_way[transfer.number]
    return True

  def write(self, transfer: UnderWay) -> bool:
    """Write what has landed; whether that is done: the transfer is over then, and steps from now on find it there."""
    keeper = self._keepers[transfer.order.target]
    incarnation = keeper.place.incarnation
    if not self.end(transfer) or transfer.order.incarnations[1] != incarnation:
      return False  # it was given up, or the worker was lost meanwhile
    try:
      written = transfer.way.receive(transfer.parcel)
    except Exception as error:
      keeper.post_broken(incarnation, describe(error))
      return False
    keeper.begin_after(written)
    return True

  def _await(self, transfer: UnderWay) -> None:
    """On a thread of its own: block until the pieces are there and say so."""
    try:
      transfer.parcel.wait_gathered()
      began_s = self._mailbox.now_s() if transfer.began_s is None else transfer.began_s
      transfer.parcel.wait()
    except Exception as error:
      message, corrupt = describe(error), isinstance(error, CorruptError)
      self._mailbox.post(lambda ended_s: Missed(transfer, message, corrupt, ended_s))
      return
    self._mailbox.post(lambda arrived_s: Landed(transfer, began_s, arrived_s))
