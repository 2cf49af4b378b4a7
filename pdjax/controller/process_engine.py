"""The backend whose workers are in processes of their own: sends them orders, and brings their news into one order.

It computes nothing and never loads JAX. KV goes from process to process: the source offers it under a number, and as
soon as that is heard here the target is told to pull it.
"""

import dataclasses
import functools
import itertools
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from pdjax.controller.peer import Peer
from pdjax.serving.batch import NOBODY
from pdjax.serving.events import Comeback, Done, Event, Failed, Trip, WorkerBack, WorkerLost
from pdjax.serving.mailbox import Interrupt, Mailbox
from pdjax.serving.orders import AbandonOrder, EndOrder, LeaveOrder, Order, StepOrder, TransferOrder
from pdjax.serving.peers import (
  Gathered,
  Message,
  News,
  Offered,
  PeerLost,
  Pull,
  Settle,
  StartClock,
  Submit,
  TransferFailed,
  Written,
)
from pdjax.types.handshake import HandshakeError

_QUICK_TRIES = 3  # of bringing a worker back, before requests wait no longer than their patience
_PAUSE_S = 1.0  # before the next, where something else was wrong than that the process ended
_LONGEST_PAUSE_S = 60.0  # between later ones, each of which comes after twice the pause of the one before


@dataclasses.dataclass(frozen=True, slots=True)
class Revived:
  """A lost worker in its new process.

  Attributes:
    incarnation: The incarnation that it begins.
    clock_s: The time on its clock when the controller's shows 0.
    comeback: The time that it took, in parts.
  """

  incarnation: int
  clock_s: float
  comeback: Comeback | None = None


@dataclasses.dataclass(frozen=True)
class _Heard:
  """News of one of a worker's processes, with the time at which it came."""

  worker: str
  process: int
  news: News
  heard_s: float


@dataclasses.dataclass(frozen=True)
class _Gone:
  """A worker's process is gone."""

  worker: str
  process: int
  error: str
  ended_s: float


@dataclasses.dataclass(frozen=True)
class _Returned:
  """A worker has a process again, which knows the others."""

  worker: str
  process: int
  revived: Revived
  ended_s: float


@dataclasses.dataclass(frozen=True)
class _NotBack:
  """So far nobody could bring a worker back; it may still come."""

  worker: str
  error: str
  ended_s: float


@dataclasses.dataclass
class Remote:
  """A worker as the controller knows it.

  Attributes:
    peer: Its process.
    incarnation: Its number; a failed step begins another one in the same process.
    process: The number of processes it has had.
    up: Whether it takes orders.
    returning: Whether it is lost, and a new process will be there before long.
    lost: The reason why its last process is gone, or why there is no new one.
    clock_s: The time on its clock when the controller's shows 0.
  """

  peer: Peer
  incarnation: int
  clock_s: float
  process: int = 1
  up: bool = True
  returning: bool = False
  lost: str = ''


@dataclasses.dataclass
class RemoteTransfer:
  """A transfer that is not over, as the controller knows it.

  Attributes:
    number: Its number, see `pdjax.serving.peers`.
    order: Its order.
    pulling: Whether the target was told to pull it.
    ready_s: The time at which its pieces were ready to leave, once that was heard.
  """

  number: int
  order: TransferOrder
  pulling: bool = False
  ready_s: float | None = None


class ProcessEngine:
  """Carries orders out in other processes.

  Attributes:
    workers: The workers as the controller knows them, by name.
    places: The same, and places that only hold pages.
  """

  def __init__(
    self,
    peers: Mapping[str, Peer],
    incarnations: Mapping[str, int],
    clocks_s: Mapping[str, float],
    revive: Callable[[str, int], Revived] | None = None,
    closed: Callable[[], None] = lambda: None,
  ):
    """Serve with processes that know one another.

    Args:
      peers: The process of each worker.
      incarnations: The incarnation of each worker.
      clocks_s: The time on each process's clock when the controller's shows 0.
      revive: Makes a new process, known to the others, in which a lost worker begins an incarnation. It always ends,
        and raises whatever went wrong. `HandshakeError` is final; otherwise it is tried again until `close`, with
        growing pauses after the first tries. None lets a lost worker be lost for good.
      closed: Called when all is over.
    """
    self.workers = {name: Remote(peer, incarnations[name], clocks_s[name]) for name, peer in peers.items()}
    self.places = self.workers
    self._revive = revive
    self._closed_all = closed
    self._mailbox = Mailbox()
    self._transfers: dict[int, RemoteTransfer] = {}  # by number
    self._first_number = self._next_number = 1  # of this run, and beyond all that there were
    self._clock = threading.Lock()
    self._start_s = 0.0
    self._closing = threading.Event()
    self._failure: Exception | None = None
    self._threads = [
      threading.Thread(target=self._listen, args=(name,), name=f'pdjax-{name}', daemon=True) for name in peers
    ]
    for thread in self._threads:
      thread.start()

  def start_clock(self) -> None:
    """Let a run begin now, at 0 s; of an earlier one nothing is heard or written any more.

    Raises:
      ValueError: if the engine is closed.
    """
    if self._closing.is_set():
      raise ValueError('the engine is closed, and nothing would come of a run; deploy the config again.')
    self._first_number = self._next_number
    before = self._mailbox.collect(-math.inf)[1]
    with self._clock:
      self._start_s = self._mailbox.start_clock()
      for remote in self.workers.values():
        remote.peer.tell(StartClock(self._start_s + remote.clock_s))
    down: dict[str, _Heard] = {}  # workers that began no other incarnation yet in their process
    for item in before:  # what happened between two runs
      match item:
        case _Gone():
          self._lose(item)
        case _Returned():
          self._come_back(item)
        case _NotBack():
          self._stop_waiting(item)
        case _Heard(news=TransferFailed()):
          self._hear(item.worker, item.news, item.heard_s)
        case _Heard(news=WorkerLost()):
          down[item.worker] = item
        case _Heard(news=WorkerBack(incarnation=incarnation)):
          down.pop(item.worker, None)
          if item.process == self.workers[item.worker].process:
            self.workers[item.worker].incarnation = incarnation
        case Interrupt():
          self._mailbox.post(lambda _: Interrupt())
    for transfer in [*self._transfers.values()]:
      self._settle(transfer)
    for item in down.values():
      self._mailbox.post(functools.partial(_Heard, item.worker, item.process, item.news))
    for name, remote in self.workers.items():
      if not remote.up:
        self._mailbox.post(functools.partial(self._describe_lost, name))

  def fail(self, error: Exception) -> None:
    """From any thread: end the wait under way, and have every further one raise this; nothing can be served now."""
    self._failure = error
    self._mailbox.interrupt(lambda now_s: None)

  def interrupt(self, note: Callable[[float], None]) -> None:
    """From any thread: call `note` with the time now and end the wait under way, or else the next."""
    self._mailbox.interrupt(note)

  def close(self) -> None:
    """End the processes and the threads."""
    self._closing.set()
    try:
      for remote in self.workers.values():
        remote.peer.close()
      for thread in self._threads:
        thread.join(10.0)
    finally:
      self._closed_all()

  def _post_ended(self, order: int) -> None:
    """An order is done that was told to processes and of which nothing else is heard."""
    began_s = self._mailbox.now_s()
    self._mailbox.post(lambda ended_s: Done(order, began_s, ended_s))

  def _describe_lost(self, worker: str, ended_s: float) -> WorkerLost:
    remote = self.workers[worker]
    return WorkerLost(worker, ended_s, remote.lost, remote.returning)

  # -------------------------------------------------------------------------- orders

  def submit(self, orders: Sequence[Order]) -> None:
    """Send the orders of one action; what goes wrong comes back as an event."""
    sent: dict[str, list[Order]] = {}
    for order in orders:
      number = self._number_of(order.id)
      self._next_number = max(self._next_number, number + 1)
      match order:
        case StepOrder():  # either side knows the batch
          sent.setdefault(order.worker, []).append(dataclasses.replace(order, batch=NOBODY))
        case LeaveOrder():
          sent.setdefault(order.worker, []).append(order)
          self._post_ended(order.id)
        case TransferOrder():
          self._transfers[number] = RemoteTransfer(number, order)
          sent.setdefault(order.source, []).append(order)
        case AbandonOrder():
          abandoned = self._transfers.get(self._number_of(order.transfer))
          if abandoned is not None:
            self._settle(abandoned)
          self._post_ended(order.id)
        case EndOrder():
          for name in self.workers:
            sent.setdefault(name, []).append(order)
          self._post_ended(order.id)
    for name, some in sent.items():
      self._tell(name, Submit(tuple(some), self._first_number))

  def _number_of(self, order: int) -> int:
    """The number of an order by its id."""
    return self._first_number + order

  def _tell(self, name: str, message: Message) -> None:
    remote = self.workers[name]
    if remote.up:  # what a lost worker was to do, failed with it
      remote.peer.tell(message)

  # -------------------------------------------------------------------------- news

  def wait(self, until_s: float) -> tuple[float, Sequence[Event]]:
    """Wait until an order ended, an interrupt or `until_s` has come, or raise what `fail` was called with."""
    if self._failure is not None:
      raise self._failure
    while True:
      now_s, items = self._mailbox.collect(until_s)
      events: list[Event] = []
      interrupted = False
      for item in items:
        match item:
          case _Heard():
            remote = self.workers[item.worker]
            if remote.up and item.process == remote.process:
              events += self._hear(item.worker, item.news, item.heard_s)
          case _Gone():
            events += self._lose(item)
          case _Returned():
            events.append(self._come_back(item))
          case _NotBack():
            events.append(self._stop_waiting(item))
          case Interrupt():
            interrupted = True
          case _:
            events.append(item)
      if events or interrupted or now_s >= until_s:
        return now_s, events

  def _hear(self, worker: str, news: News, heard_s: float) -> list[Event]:
    """Take in news of a worker; the events that the loop is to have of them."""
    match news:
      case Offered() | Gathered() | Written() | TransferFailed():
        transfer = self._transfers.get(news.number)
        return [] if transfer is None else self._hear_of(transfer, news, heard_s)
      case WorkerLost():
        self._drop_transfers(worker)
        return [dataclasses.replace(news, ended_s=heard_s)]
      case WorkerBack():
        self.workers[worker].incarnation = news.incarnation
        return [dataclasses.replace(news, ended_s=heard_s)]
      case Done() | Failed():
        order = news.order - self._first_number
        return [] if order < 0 else [dataclasses.replace(news, order=order, ended_s=heard_s)]  # else of an earlier run
    raise AssertionError(news)

  def _hear_of(self, transfer: RemoteTransfer, news: News, heard_s: float) -> list[Event]:
    """Take in news of a transfer that is not over; the events of them."""
    order = transfer.order
    match news:
      case Offered():
        transfer.pulling = True
        self._tell(order.target, Pull(transfer.number, order, news.manifest))
      case Gathered():
        transfer.ready_s = news.ready_s
      case Written():
        self._settle(transfer)
        # The thread that waits for one end may wake after the other's, and be heard of later.
        ready_s = min(news.arrived_s, news.pulled_s if transfer.ready_s is None else transfer.ready_s)
        trip = Trip(max(ready_s, news.pulled_s), news.arrived_s, news.pieces)
        return [Done(order.id, ready_s, heard_s, wire_bytes=news.wire_bytes, trip=trip)]
      case TransferFailed():
        transfer.pulling = transfer.pulling and news.pulled
        self._settle(transfer)
        return [Failed(order.id, heard_s, news.error, news.corrupt)]
    return []

  def _settle(self, transfer: RemoteTransfer) -> None:
    """A transfer is over: either end lets go of it. Orders that the target is told next find pages of their own.

    A pull that has begun is left to end, for one whose pieces are taken away never does.
    """
    source, target = transfer.order.source, transfer.order.target
    del self._transfers[transfer.number]
    pulled = transfer.pulling and self.workers[target].up
    for name in (source, target):
      self._tell(name, Settle(transfer.number, pulled))

  def _drop_transfers(self, worker: str) -> None:
    """End every transfer from or to a worker that was lost."""
    for transfer in [*self._transfers.values()]:
      if worker in (transfer.order.source, transfer.order.target):
        self._settle(transfer)

  # -------------------------------------------------------------------------- processes that end

  def _listen(self, name: str) -> None:
    """On a thread for each worker: post what its process tells, and see to it that there is another one."""
    remote = self.workers[name]
    incarnation = remote.incarnation  # the latest that was told of, of which the loop may hear later
    for process in itertools.count(1):
      try:
        while not self._closing.is_set():
          for news in remote.peer.listen():
            if isinstance(news, WorkerBack):
              incarnation = news.incarnation
            self._mailbox.post(functools.partial(_Heard, name, process, news))
        return
      except Exception as error:
        if self._closing.is_set():
          return
        message = describe_loss(error)
      self._mailbox.post(functools.partial(_Gone, name, process, message))
      revived = self._return(name, incarnation + 1, message)
      if revived is None:
        return
      incarnation = revived.incarnation
      with self._clock:  # of the run that is under way now
        remote.clock_s = revived.clock_s
        remote.peer.tell(StartClock(self._start_s + remote.clock_s))
      self._mailbox.post(functools.partial(_Returned, name, process + 1, revived))

  def _return(self, name: str, incarnation: int, message: str) -> Revived | None:
    """Have a new process made for a lost worker, to begin that incarnation in it; None if there will be none."""
    if self._revive is None:
      self._mailbox.post(functools.partial(_NotBack, name, f'it is lost and stays so: {message}'))
      return None
    begin = time.perf_counter()
    for tries in itertools.count(1):
      failed_s = time.perf_counter() - begin
      try:
        revived = self._revive(name, incarnation)
      except Exception as error:
        if self._closing.is_set():
          return None
        reason, is_final = describe_loss(error), isinstance(error, HandshakeError)
        pause_s = 0.0 if isinstance(error, PeerLost) else _PAUSE_S
      else:
        comeback = revived.comeback
        if comeback is not None:
          comeback = dataclasses.replace(comeback, tries=tries, failed_s=failed_s)
        return dataclasses.replace(revived, comeback=comeback)
      if tries == _QUICK_TRIES:
        reason = f'worker {name!r} did not come back in {tries} tries, of which the last: {reason}'
      if tries <= _QUICK_TRIES and (is_final or tries == _QUICK_TRIES):  # once: patience begins at each word of it
        self._mailbox.post(functools.partial(_NotBack, name, reason))
      if is_final:
        return None
      if tries >= _QUICK_TRIES:
        pause_s = min(_PAUSE_S * 2 ** (tries - _QUICK_TRIES + 1), _LONGEST_PAUSE_S)
      if self._closing.wait(pause_s):
        return None
    raise AssertionError

  def _come_back(self, item: _Returned) -> WorkerBack:
    remote, revived = self.workers[item.worker], item.revived
    remote.up, remote.returning, remote.process, remote.incarnation = True, False, item.process, revived.incarnation
    return WorkerBack(item.worker, item.ended_s, revived.incarnation, revived.comeback)

  def _stop_waiting(self, item: _NotBack) -> WorkerLost:
    remote = self.workers[item.worker]
    remote.returning, remote.lost = False, item.error
    return self._describe_lost(item.worker, item.ended_s)

  def _lose(self, gone: _Gone) -> list[Event]:
    remote = self.workers[gone.worker]
    if not remote.up or gone.process != remote.process:
      return []
    remote.up, remote.returning, remote.lost = False, self._revive is not None, gone.error
    self._drop_transfers(gone.worker)
    return [self._describe_lost(gone.worker, gone.ended_s)]


def describe_loss(error: Exception) -> str:
  """The message of an error for which a process is gone, or there is no new one."""
  return str(error) if isinstance(error, PeerLost | HandshakeError) else f'{type(error).__name__}: {error}'
