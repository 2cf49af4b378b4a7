"""The backend on devices: dispatches orders to workers and transports, and collects what has ended in one queue."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pdjax.engine.place import Place
from pdjax.engine.runner import After, Broken, Crashed, Keeper, Ran, Runner, crash_poster, describe, dispatch_in_turn
from pdjax.engine.under_way import Incoming, Landed, Missed, UnderWay
from pdjax.engine.waiters import Waiters
from pdjax.engine.worker import Worker
from pdjax.kv.transfer import Transport
from pdjax.serving.events import Done, Event, Failed, Trip
from pdjax.serving.mailbox import Interrupt, Mailbox
from pdjax.serving.orders import AbandonOrder, EndOrder, LeaveOrder, Order, StepOrder, TransferOrder


class Engine:
  """Carries orders out on devices.

  Every program that touches pages is dispatched by the thread that calls `submit` and `wait`, so the order on each
  device is that of decisions. Beside it each worker has a thread that waits for its steps in that order, and each
  transfer has one while it is under way; they post what ended, and when, to one mailbox.
  """

  def __init__(
    self,
    workers: Sequence[Worker],
    transports: Mapping[tuple[str, str, str], Transport],
    places: Sequence[Place] = (),
  ):
    """Serve with compiled workers, places, and a transport for every (source, target, cache kind) of orders."""
    self.workers = {worker.spec.name: worker for worker in workers}
    self.places: dict[str, Place] = {one.spec.name: one for one in (*workers, *places)}
    self._transports = transports
    self._mailbox = Mailbox()
    self._closed = False
    self._runners = {worker.spec.name: Runner(worker, self._mailbox) for worker in workers}
    self._keepers: dict[str, Keeper[Any]] = {
      **self._runners,
      **{place.spec.name: Keeper(place, self._mailbox) for place in places},
    }
    self._waiters = Waiters('transfers', crash_poster(self._mailbox))
    self._incoming = Incoming(self._keepers, self._mailbox, self._waiters)

  def start_clock(self) -> None:
    """Let a run begin now, at 0 s; of an earlier one nothing is heard or written any more.

    Steps that are under way are waited for, transfers are given up, and a worker whose pages are gone gets new ones.

    Raises:
      ValueError: if the engine is closed.
    """
    if self._closed:
      raise ValueError('the engine is closed, and nothing would come of a run; deploy the config again.')
    for transfer in self._incoming.under_way:
      self._incoming.give_up(transfer.number)
    for keeper in self._keepers.values():
      keeper.end_run()
    before = self._mailbox.collect(-math.inf)[1]
    for item in before:
      match item:
        case Broken():
          self._keepers[item.worker].restart(item)
        case Crashed():
          raise item.error
    self._mailbox.start_clock()
    if any(isinstance(item, Interrupt) for item in before):
      self._mailbox.post(lambda _: Interrupt())

  def interrupt(self, note: Callable[[float], None]) -> None:
    """From any thread: call `note` with the time now and end the wait under way, or else the next.

    A turn at time t comes after all that was noted up to t, and before all that is noted later.
    """
    self._mailbox.interrupt(note)

  def close(self) -> None:
    """Wait for steps under way, and a while for transfers, and end the threads."""
    self._closed = True
    self._waiters.close()
    for keeper in self._keepers.values():
      keeper.close()

  def submit(self, orders: Sequence[Order]) -> None:
    """Dispatch the orders of one action; what goes wrong comes back as an event."""
    dispatch_in_turn(orders, self._dispatch)

  def wait(self, until_s: float) -> tuple[float, Sequence[Event]]:
    """Wait until an order ended, an interrupt or `until_s` has come; pieces that landed are written on the way."""
    while True:
      for runner in self._runners.values():
        runner.top_up()
      now_s, items = self._mailbox.collect(until_s)
      events: list[Event] = []
      interrupted = False
      for item in items:
        match item:
          case Landed():
            self._write(item)
          case Missed(transfer, error, corrupt, ended_s):
            if self._incoming.end(transfer):
              events.append(Failed(transfer.order.id, ended_s, error, corrupt))
          case Ran():
            events += self._runners[item.worker].hear(item)
          case Broken():
            events += self._restart(item)
          case Crashed():
            raise item.error
          case Interrupt():
            interrupted = True
          case _:
            events.append(item)
      if events or interrupted or now_s >= until_s:
        return now_s, events

  def _dispatch(self, order: Order, after: After) -> None:
    if self._is_stale(order):
      return  # for an incarnation of a worker that is over, and with it all its orders, as the loop is about to learn
    try:
      match order:
        case StepOrder():
          self._runners[order.worker].run(order, after)
        case TransferOrder():
          self._send(order)
        case EndOrder():
          for worker in self.workers.values():
            worker.forget(order.request)
          self._post_ended(order)
        case LeaveOrder():
          self._runners[order.worker].leave(order.request)
          self._post_ended(order)
        case AbandonOrder():  # its gather was dispatched before all that its pages are given to next
          self._incoming.give_up(order.transfer)
          self._post_ended(order)
    except Exception as error:  # whatever it is, the loop goes on and the requests learn of it
      message = describe(error)
      self._mailbox.post(lambda ended_s: Failed(order.id, ended_s, message))

  def _post_ended(self, order: Order) -> None:
    began_s = self._mailbox.now_s()
    self._mailbox.post(lambda ended_s: Done(order.id, began_s, ended_s))

  def _is_stale(self, order: Order) -> bool:
    match order:
      case StepOrder():
        return order.incarnation != self.workers[order.worker].incarnation
      case TransferOrder():
        current = self.places[order.source].incarnation, self.places[order.target].incarnation
        return order.incarnations != current
    return False

  def _restart(self, broken: Broken) -> list[Event]:
    """Give a worker whose pages are gone new ones, and up all transfers from it and to it."""
    events = self._keepers[broken.worker].restart(broken)
    for transfer in self._incoming.under_way if events else ():
      if broken.worker in (transfer.order.source, transfer.order.target):
        self._incoming.give_up(transfer.number)
    return events

  # -------------------------------------------------------------------------- transfers

  def _send(self, order: TransferOrder) -> None:
    transport = self._transports[order.source, order.target, order.span.kind]
    self._incoming.add(UnderWay(order.id, order, transport.send(order.span), transport))

  def _write(self, landed: Landed) -> None:
    transfer, began_s = landed.transfer, landed.began_s
    if not self._incoming.write(transfer):
      return
    order, parcel = transfer.order, transfer.parcel
    trip = Trip(began_s, landed.arrived_s, parcel.num_pieces)
    self._mailbox.post(lambda ended_s: Done(order.id, began_s, ended_s, wire_bytes=parcel.wire_bytes, trip=trip))
