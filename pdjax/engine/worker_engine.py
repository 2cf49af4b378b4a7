"""One worker's part of an engine whose workers are in processes of their own."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from pdjax.engine.engine import Engine, describe
from pdjax.engine.worker import Worker
from pdjax.kv.transfer import CorruptError, Parcel
from pdjax.kv.transfer.cross_process import Offer, Receiver, Sender
from pdjax.serving.orders import EndOrder, Order, StepOrder, TransferOrder
from pdjax.serving.peers import Gathered, News, Offered, TransferFailed, Written
from pdjax.types.handshake import Manifest


@dataclasses.dataclass(frozen=True)
class _Call:
  """Something that the thread which dispatches is asked to do."""

  do: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class _Arrived:
  """Pulled pieces are on this worker's devices, to be written into its pages."""

  number: int
  order: TransferOrder
  pulled_s: float
  arrived_s: float


class StalledError(RuntimeError):
  """Too much is on its way already that nobody waits for any more."""


class WorkerEngine(Engine):
  """Runs the passes of one worker, offers what leaves it and pulls what comes to it.

  One thread calls `wait` over and over; what others want of it they `call`, and it does that in their order.
  """

  def __init__(self, worker: Worker, staging_bytes: float = math.inf):
    """Serve with a compiled worker; `senders` and `receivers` are put there by the handshake, by the other's name.

    Args:
      worker: The worker.
      staging_bytes: Once pulls of so many bytes were given up and have not ended, others are refused: over a link that
        stands still they would take more and more memory, on either side.
    """
    super().__init__([worker], {})
    self.worker = worker
    self._staging_bytes = staging_bytes
    self.senders: dict[str, Sender] = {}
    self.receivers: dict[str, Receiver] = {}
    self._numbers: dict[int, int] = {}  # of the transfers that are being dispatched, by order
    self._offers: dict[int, tuple[Sender, Offer]] = {}
    self._pulls: dict[int, Parcel] = {}  # whose pieces are to be written
    self._given_up: list[Parcel] = []  # whose pieces are not, though they may still be on their way
    self._stopped = False

  def start_clock_at(self, start_s: float) -> None:
    """Let a run begin that began when this process's clock showed so much."""
    self._mailbox.start_clock(start_s)
    self._free_from_s = dict.fromkeys(self.workers, 0.0)

  def call(self, do: Callable[[], None]) -> None:
    """From any thread: have the thread that dispatches do something."""
    self._mailbox.post(lambda _: _Call(do))

  def stop(self) -> None:
    """From any thread: end the wait under way, and do nothing more."""

    def note() -> None:
      self._stopped = True

    self.call(note)

  def wait(self, until_s: float) -> tuple[float, Sequence[Any]]:
    """Wait until there is news or `until_s` has come, doing on the way what was asked for."""
    while True:
      now_s, items = super().wait(until_s)
      news: list[News] = []
      for item in items:
        match item:
          case _Call():
            item.do()
          case _Arrived():
            self._write(item)
          case _:
            news.append(item)
      if news or self._stopped or now_s >= until_s:
        return now_s, news

  # -------------------------------------------------------------------------- what the controller says

  def take(self, orders: Sequence[Order], numbers: dict[int, int]) -> None:
    """Dispatch the orders of one action; those for an earlier life of this worker are not heard of again."""
    life, meant = self.worker.incarnation, []
    for order in orders:
      match order:
        case StepOrder(incarnation=one) | TransferOrder(incarnations=(one, _)):
          if one == life:
            meant.append(order)
        case EndOrder():
          self.worker.forget(order.request)
    self._numbers = numbers
    self.submit(meant)

  def pull(self, number: int, order: TransferOrder, manifest: Manifest) -> None:
    """Begin to pull a transfer; one for another life of this worker too, so that its source need not keep it."""
    pulled_s = self._mailbox.now_s()
    try:
      self._refuse_if_stalled(order.source)
      parcel = self.receivers[order.source].pull(number, manifest, order.span)
    except Exception as error:
      self._fail(number, error, pulled=False)
      return
    self._pulls[number] = parcel
    self._transfers.add(number, functools.partial(self._await, number, order, parcel, pulled_s))

  def settle(self, number: int, pulled: bool) -> None:
    """Let go of a transfer, whichever end of it this is; pieces that arrive from now on are not written."""
    if number in self._pulls:
      self._given_up = [one for one in (*self._given_up, self._pulls.pop(number)) if not one.is_there()]
    self._transfers.forget(number)
    sender, offer = self._offers.pop(number, (None, None))
    if sender is not None and offer is not None and not pulled:
      with contextlib.suppress(Exception):  # then some memory stays taken, and all goes on
        sender.withdraw(offer)

  # -------------------------------------------------------------------------- inside

  def _refuse_if_stalled(self, source: str) -> None:
    self._given_up = [one for one in self._given_up if not one.is_there()]
    stalled = sum(one.wire_bytes for one in self._given_up)
    if stalled >= self._staging_bytes:
      raise StalledError(
        f'pulls of {stalled} bytes that were given up have not ended, and staging_bytes is {self._staging_bytes}; see '
        f'whether the link to {source!r} or its process stands still.'
      )

  def _is_stale(self, order: Order) -> bool:
    return False  # `take` has looked, as far as one can from here

  def _tell(self, news: News) -> None:
    self._mailbox.post(lambda _: news)

  def _fail(self, number: int, error: Exception, *, pulled: bool = True) -> None:
    self._tell(TransferFailed(number, describe(error), isinstance(error, CorruptError), pulled))

  def _send(self, order: TransferOrder) -> None:
    """Offer what is to be pulled."""
    number = self._numbers[order.id]
    try:
      sender = self.senders[order.target]
      offer = sender.offer(number, order.span)
    except Exception as error:
      self._fail(number, error)
      return
    self._offers[number] = sender, offer.without_arrays()
    self._tell(Offered(number, offer.manifest))
    self._transfers.add(number, functools.partial(self._watch_offer, number, offer))

  def _watch_offer(self, number: int, offer: Offer) -> None:
    """On a thread of its own: block until the pieces can leave and say so."""
    try:
      offer.wait()
    except Exception as error:
      self._fail(number, error)
      return
    self._tell(Gathered(number, self._mailbox.now_s()))

  def _await(self, number: int, order: TransferOrder, parcel: Parcel, pulled_s: float) -> None:
    """On a thread of its own: block until the pieces are there and say so."""
    try:
      parcel.wait()
    except Exception as error:
      self._fail(number, error)
      return
    self._mailbox.post(lambda arrived_s: _Arrived(number, order, pulled_s, arrived_s))

  def _write(self, arrived: _Arrived) -> None:
    """Write what has arrived. Passes dispatched from now on find it, so the transfer has ended."""
    life, name = self.worker.incarnation, self.worker.spec.name
    if arrived.number not in self._pulls or arrived.order.incarnations[1] != life:
      return
    parcel = self._pulls.pop(arrived.number)
    try:
      written = self.receivers[arrived.order.source].receive(parcel)
    except Exception as error:
      self._post_broken(name, life, describe(error))
      return
    self._passes[name].add(functools.partial(self._note_written, name, life, written.block_until_ready))
    self._tell(Written(arrived.number, arrived.pulled_s, arrived.arrived_s, parcel.wire_bytes, parcel.num_pieces))
