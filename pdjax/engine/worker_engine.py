"""The part of one worker, or place that only holds pages, in a backend whose workers are in processes of their own."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from pdjax.engine.place import Place
from pdjax.engine.runner import After, Broken, Crashed, Keeper, Ran, Runner, crash_poster, describe, dispatch_in_turn
from pdjax.engine.under_way import Incoming, Landed, Missed, UnderWay
from pdjax.engine.waiters import Waiters
from pdjax.engine.worker import Worker
from pdjax.kv.transfer import CorruptError, Parcel
from pdjax.kv.transfer.cross_process import Offer, Receiver, Sender
from pdjax.serving.batch import NOBODY
from pdjax.serving.events import Failed
from pdjax.serving.mailbox import Mailbox
from pdjax.serving.orders import EndOrder, LeaveOrder, Order, StepOrder, TransferOrder
from pdjax.serving.peers import Gathered, News, Offered, TransferFailed, Written
from pdjax.types.handshake import Manifest


@dataclasses.dataclass(frozen=True)
class _Call:
  """Something that the thread which dispatches is asked to do."""

  do: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class _Outgoing:
  """A transfer under way from here, with its offer less the arrays."""

  sender: Sender
  offer: Offer


class StalledError(RuntimeError):
  """Too much is on its way already that nobody waits for any more."""


class WorkerEngine:
  """Runs the steps of one worker, if it is one, offers what leaves its pages and pulls what comes to them.

  One thread calls `wait` over and over; what others want of it they `call`, and it does that in their order.
  """

  def __init__(self, worker: Worker | Place, staging_bytes: float = math.inf):
    """Serve with a compiled worker, or a place that only holds pages.

    The handshake puts `senders` and `receivers` there, by the other's name and the cache kind.

    Args:
      worker: The worker, or the place.
      staging_bytes: Once pulls of so many bytes were given up and have not ended, others are refused: over a link that
        stands still they would take more and more memory, on either side.
    """
    self.worker = worker
    self._staging_bytes = staging_bytes
    self.senders: dict[tuple[str, str], Sender] = {}
    self.receivers: dict[tuple[str, str], Receiver] = {}
    self._mailbox = Mailbox()
    self._runner = Runner(worker, self._mailbox) if isinstance(worker, Worker) else None
    self._keeper: Keeper[Any] = self._runner or Keeper(worker, self._mailbox)
    self._waiters = Waiters('transfers', crash_poster(self._mailbox))
    self._incoming = Incoming({worker.spec.name: self._keeper}, self._mailbox, self._waiters)
    self._outgoing: dict[int, _Outgoing] = {}  # by number
    self._given_up: list[Parcel] = []  # whose pieces are not written, though they may still be on their way
    self._stopped = False
    self._batch = worker.incarnation, NOBODY

  def start_clock(self, start_s: float | None = None) -> None:
    """Let a run begin now, or one that began when this process's clock showed `start_s`.

    Steps that are under way are waited for; the controller knows their ends by numbers of an earlier run.
    """
    self._keeper.end_run()
    self._batch = self.worker.incarnation, NOBODY
    self._mailbox.start_clock(start_s)

  def call(self, do: Callable[[], None]) -> None:
    """From any thread: have the thread that dispatches do something."""
    self._mailbox.post(lambda _: _Call(do))

  def stop(self) -> None:
    """From any thread: end the wait under way, and do nothing more."""

    def note() -> None:
      self._stopped = True

    self.call(note)

  def close(self) -> None:
    """Wait for steps under way, and a while for transfers, and end the threads."""
    self._waiters.close()
    self._keeper.close()

  def wait(self, until_s: float) -> tuple[float, Sequence[News]]:
    """Wait until there is news or `until_s` has come, doing on the way what was asked for."""
    while True:
      if self._runner is not None:
        self._runner.top_up()
      now_s, items = self._mailbox.collect(until_s)
      news: list[News] = []
      for item in items:
        match item:
          case _Call():
            item.do()
          case Landed():
            self._write(item)
          case Missed(transfer, error, corrupt):
            news.append(TransferFailed(transfer.number, error, corrupt))
          case Ran():
            assert self._runner is not None
            news += self._runner.hear(item)
          case Broken():
            news += self._keeper.restart(item)
          case Crashed():
            raise item.error
          case _:
            news.append(item)
      if news or self._stopped or now_s >= until_s:
        return now_s, news

  # -------------------------------------------------------------------------- what the controller says

  def submit(self, orders: Sequence[Order], first_number: int) -> None:
    """Dispatch the orders of one action; those for an earlier incarnation of this worker are not heard of again.

    Args:
      orders: The orders.
      first_number: The number of an order whose id is 0.
    """
    incarnation, meant = self.worker.incarnation, list[Order]()
    for order in orders:
      match order:
        case StepOrder(incarnation=one):
          if one == incarnation:
            meant.append(self._with_batch(order))
        case TransferOrder(incarnations=(one, _)):
          if one == incarnation:
            meant.append(order)
        case LeaveOrder():
          assert self._runner is not None, 'nothing runs here'
          self._runner.leave(order.request)
        case EndOrder():
          self.worker.forget(order.request)
    dispatch_in_turn(meant, functools.partial(self._dispatch, first_number))

  def pull(self, number: int, order: TransferOrder, manifest: Manifest) -> None:
    """Begin to pull a transfer; one for another incarnation of this worker too, so that its source need not keep it."""
    pulled_s, pulled = self._mailbox.now_s(), False
    try:
      self._refuse_if_stalled(order.source)
      receiver = self.receivers[order.source, order.span.kind]
      parcel = receiver.pull(number, manifest, order.span)
      pulled = True
      self._incoming.add(UnderWay(number, order, parcel, receiver, pulled_s))
    except Exception as error:
      self._fail(number, error, pulled=pulled)

  def settle(self, number: int, pulled: bool) -> None:
    """Let go of a transfer, whichever end of it this is; pieces that arrive from now on are not written."""
    transfer = self._incoming.give_up(number)
    if transfer is not None:
      self._given_up = [one for one in (*self._given_up, transfer.parcel) if not one.is_there()]
    outgoing = self._outgoing.pop(number, None)
    self._waiters.forget(number)
    if outgoing is not None and not pulled:
      with contextlib.suppress(Exception):  # then some memory stays taken, and all goes on
        outgoing.sender.withdraw(outgoing.offer)

  # -------------------------------------------------------------------------- inside

  def _with_batch(self, order: StepOrder) -> StepOrder:
    """An order with the batch that it decodes, which stands here as the controller has it."""
    incarnation, batch = self._batch
    if incarnation != self.worker.incarnation:
      batch = NOBODY
    batch = batch.changed(order.leaves, order.joins)
    self._batch = self.worker.incarnation, batch
    return dataclasses.replace(order, batch=batch) if order.decodes else order

  def _dispatch(self, first_number: int, order: Order, after: After) -> None:
    number = first_number + order.id
    try:
      match order:
        case StepOrder():
          assert self._runner is not None, 'nothing runs here'
          self._runner.run(dataclasses.replace(order, id=number), after)
        case TransferOrder():
          self._offer(number, order)
    except Exception as error:  # whatever it is, the worker goes on and the controller learns of it
      if isinstance(order, TransferOrder):
        self._fail(number, error)
      else:
        self._tell(Failed(number, self._mailbox.now_s(), describe(error)))

  def _offer(self, number: int, order: TransferOrder) -> None:
    """Offer what is to be pulled."""
    sender = self.senders[order.target, order.span.kind]
    offer = sender.offer(number, order.span)
    self._outgoing[number] = _Outgoing(sender, offer.without_arrays())
    self._tell(Offered(number, offer.manifest))
    self._waiters.add(number, functools.partial(self._await_gathered, offer))

  def _await_gathered(self, offer: Offer) -> None:
    """On a thread of its own: block until the pieces can leave and say so."""
    try:
      offer.wait()
    except Exception as error:
      self._fail(offer.number, error)
      return
    self._tell(Gathered(offer.number, self._mailbox.now_s()))

  def _write(self, landed: Landed) -> None:
    transfer = landed.transfer
    if self._incoming.write(transfer):
      parcel = transfer.parcel
      told = Written(transfer.number, landed.began_s, landed.arrived_s, parcel.wire_bytes, parcel.num_pieces)
      self._tell(told)

  def _refuse_if_stalled(self, source: str) -> None:
    self._given_up = [one for one in self._given_up if not one.is_there()]
    stalled = sum(one.wire_bytes for one in self._given_up)
    if stalled >= self._staging_bytes:
      raise StalledError(
        f'pulls of {stalled} bytes that were given up have not ended, and staging_bytes is {self._staging_bytes}; see '
        f'whether the link to {source!r} or its process stands still.'
      )

  def _tell(self, news: News) -> None:
    self._mailbox.post(lambda _: news)

  def _fail(self, number: int, error: Exception, *, pulled: bool = True) -> None:
    self._tell(TransferFailed(number, describe(error), isinstance(error, CorruptError), pulled))
