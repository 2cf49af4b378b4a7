"""ClusterState: hands events and actions on to the files that know what they mean for the books."""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

from pdjax.cost import CostModel, Roofline
from pdjax.serving import copies, growth, lifecycle, progress, recovery, roles, sending, steps, tasks
from pdjax.serving.actions import (
  Abandon,
  Action,
  Cancel,
  Leave,
  Preempt,
  Reject,
  Resend,
  SendOn,
  Step,
  SwitchRole,
  Transfer,
  WakeAt,
)
from pdjax.serving.books import Books
from pdjax.serving.checks import NAMED_ACTIONS, PolicyError, waiting_key
from pdjax.serving.due import actions_due
from pdjax.serving.events import (
  Arrived,
  Done,
  Event,
  Failed,
  Finished,
  Occupancy,
  TimerDue,
  Withdrawn,
  WorkerBack,
  WorkerLost,
)
from pdjax.serving.keyed_queue import KeyedQueue
from pdjax.serving.occupancy import OccupancyWatch
from pdjax.serving.orders import AbandonOrder, EndOrder, Order, StepOrder, TransferOrder
from pdjax.serving.place import WorkerState
from pdjax.serving.view import ClusterView
from pdjax.types.faults import FaultSpec
from pdjax.types.model import ModelSpec
from pdjax.types.prefix_cache import PrefixCache
from pdjax.types.transfer import TransferSpec
from pdjax.types.worker import WorkerSpec


class ClusterState:
  """The cluster, advanced by events and by the orders that start.

  Attributes:
    books: All that changes.
    view: The same for policies, to be read.
  """

  def __init__(
    self,
    model: ModelSpec,
    workers: Sequence[WorkerSpec],
    page_size: int,
    transfer: TransferSpec = TransferSpec(),
    *,
    finds_stops: bool = True,
    faults: FaultSpec = FaultSpec(),
    pages_ahead: int | Literal['all'] = 'all',
    max_preemptions: int = 8,
    prefix_cache: PrefixCache | None = None,
    places: Sequence[WorkerSpec] = (),
    between: Collection[tuple[str, str]] | None = None,
    cost: CostModel = Roofline(),
  ):
    """Start with every page free.

    Args:
      model: The model served.
      workers: The cluster, `num_pages` filled in.
      page_size: Tokens per page of workers that have no page size of their own.
      transfer: The settings of transfers; with `granularity='auto'` and no `layers_from`, chunk by chunk.
      finds_stops: Whether the backend finds stop strings; requests that have some are refused otherwise.
      faults: The answers to failures.
      pages_ahead: Pages that a sequence takes ahead of its tokens as it grows, or 'all' that it may ever need.
      max_preemptions: Most times that one request is preempted.
      prefix_cache: The settings of the prefix cache; None keeps nothing.
      places: Places that only hold pages, `num_pages` filled in.
      between: The places between which pages may travel, by name; None is `ways` of them all.
      cost: The cost model by which policies predict (`WorkerView.cost`); a replay of their decisions needs the same.

    Raises:
      ValueError: if a worker's pages are still 'auto', names repeat, a phase has no worker, or the staging memory holds
        no page of a prefill worker.
    """
    self.books = Books(
      model, workers, page_size, transfer, faults, finds_stops=finds_stops,
      pages_ahead=None if pages_ahead == 'all' else pages_ahead, max_preemptions=max_preemptions,
      prefix_cache=prefix_cache, places=places, between=between, cost=cost,
    )  # fmt: skip
    self.view = ClusterView(self.books)
    self._occupancy = OccupancyWatch(self.books)

  @property
  def workers(self) -> dict[str, WorkerState]:
    """Each worker by name, as the books know it."""
    return self.books.workers

  @property
  def unfinished(self) -> bool:
    """Whether any request or order is left."""
    return bool(self.books.requests or self.books.in_flight)

  def must(self) -> list[Action]:
    """The actions due whatever the policy; see `actions_due`."""
    return actions_due(self.books, self.view)

  @property
  def next_timer_s(self) -> float:
    """The time of the next timer; infinity if none is set."""
    return self.books.timers.next_s

  def timers_due(self, now_s: float) -> list[TimerDue]:
    """The timers due by `now_s`; ask once a turn, when all that ended up to then was applied."""
    self.books.now_s = now_s
    return self.books.timers.take(now_s)

  def take_told(self) -> list[Event]:
    """The events that came of others and of actions since the last call: deliveries, preemptions, new roles, blocks."""
    books = self.books
    told: list[Event] = [*books.delivered, *books.caught_up, *books.told]
    if told:
      books.delivered, books.caught_up = [], []
      books.told.clear()
    return told

  def take_finished(self) -> tuple[Finished, ...]:
    """The requests that ended since the last call."""
    finished, self.books.finished = tuple(self.books.finished), []
    return finished

  def take_occupancy(self, now_s: float) -> Occupancy | None:
    """The use of pages and slots and the length of the queue, if any changed since the last call; ends the turn."""
    self.books.ended.clear()
    return self._occupancy.take(now_s)

  def check_progress(self) -> bool:
    """Raise if requests are left although nothing is under way or due, so that nothing can ever change.

    To be asked when no request is known to come. A policy that has itself woken over and over, and then does nothing,
    is taken to have nothing to do. If only workers of other roles could take some, they are refused; whether any are.

    Raises:
      StuckError: naming the requests and the pages they need.
    """
    return progress.check(self.books, self.view)

  def expect(self, output_len: Callable[[str], int | None]) -> None:
    """Have orders say how many tokens a request really generates, where a trace knows that, by its id."""
    self.books.output_len = output_len

  def order_waiting(self, policy: Any) -> None:
    """Keep the requests that wait in the order of the key that a policy names, if it names one."""
    if (key := waiting_key(policy)) is not None:
      self.books.waiting = KeyedQueue(key)

  def catch_up_with(self, backend: Any) -> None:
    """Have a backend that leaps over steps asked how far it is, whenever somebody looks at what they bring."""
    tell = getattr(backend, 'leap', lambda: None)()  # one that hides it leaps over nothing
    self.books.catches_up = None if tell is None else functools.partial(self._catch_up, tell)

  def _catch_up(self, tell: Callable[[str], Sequence[Done]], worker: str) -> None:
    books = self.books
    for event in tell(worker):
      before, books.delivered = books.delivered, []
      self._done(event)
      books.caught_up += [event, *books.delivered]
      books.delivered = before

  def take_wakes(self) -> bool:
    """Whether anything happened since the last call that the policy is to be asked about."""
    wakes, self.books.wakes = self.books.wakes, False
    return wakes

  def apply(self, event: Event, now_s: float) -> bool:
    """Apply an event to the books; return whether it counts: nothing does of an order that is over."""
    books = self.books
    books.now_s = now_s
    books.idle_wakes = books.idle_wakes + 1 if isinstance(event, TimerDue) and event.timer == 'wake' else 0
    counts = wakes = True
    match event:
      case Arrived(request):
        lifecycle.arrive(books, request)
      case Done():
        counts, wakes = self._done(event)
      case Failed():
        counts = self._failed(event)
      case TimerDue():
        counts = recovery.timer_due(books, event)
      case WorkerLost():
        recovery.lose(books, event)
      case WorkerBack():
        counts = recovery.come_back(books, event)
      case Withdrawn(request):
        lifecycle.withdraw(books, request)
    books.wakes = books.wakes or (counts and wakes)
    self._look_again()
    return counts

  def _look_again(self) -> None:
    """Put everyone where they belong, give those that decode pages before others, and drained workers their role."""
    books = self.books
    if books.unsettled:
      recovery.look_again(books)
    if books.growing:
      growth.grow(books)
    if books.draining:
      roles.change_roles(books)

  def _done(self, event: Done) -> tuple[bool, bool]:
    """Apply it; whether it counts, and whether the policy is to be asked."""
    books = self.books
    order = books.in_flight.get(event.order)
    if order is not None and (event.to_come == 0 or not isinstance(order, StepOrder)):
      del books.in_flight[event.order]
    match order:
      case StepOrder():
        return True, steps.step_done(books, order, event)
      case TransferOrder(copy=int()):
        copies.part_ended(books, order, arrived=True)
      case TransferOrder():
        if entry := sending.transfer_ended(books, order):
          books.unsettled.append(entry)
      case EndOrder():
        if ending := books.requests.get(order.request):
          error = order.reason if order.finish_reason == 'rejected' else None
          lifecycle.finish(books, ending, order.finish_reason, error)
      case AbandonOrder(_, transfer):
        if attempt := books.transfers.get(transfer):
          del books.in_flight[transfer]
          recovery.transfer_failed(books, attempt.order, attempt.error, corrupt=False)
    return order is not None, True

  def _failed(self, event: Failed) -> bool:
    books = self.books
    order = books.in_flight.pop(event.order, None)
    match order:
      case StepOrder():
        steps.step_ended(books, order)
        for name in order.requests:
          if entry := books.requests.get(name):
            recovery.lose_work(books, entry, order.worker, event.error)
            recovery.look_again(books)  # who is handed a prompt on may be the next
      case TransferOrder():
        recovery.transfer_failed(books, order, event.error, corrupt=event.corrupt)
      case EndOrder():
        if entry := books.requests.get(order.request):
          lifecycle.finish_all(books, entry, event.error)
      case AbandonOrder():
        raise AssertionError(f'{order} failed ({event.error}); it must not, for its pages cannot be given to others')
    return order is not None

  def start(self, action: Action) -> tuple[Order, ...]:
    """Reserve what an action needs and turn it into orders with every number filled in.

    Raises:
      PolicyError: if the cluster cannot do it; nothing is reserved then.
    """
    books = self.books
    orders: tuple[Order, ...] = ()
    match action:
      case Step():
        orders = steps.start_step(books, self.view, action)
      case Transfer():
        orders = sending.start_transfer(books, self.view, action)
      case Cancel() | Reject():
        orders = lifecycle.start_end(books, action)
      case Abandon():
        orders = (tasks.start_abandon(books, action),)
      case SendOn():
        orders = copies.send_on(books, action)
      case Resend():
        orders = (tasks.start_resend(books, action),)
      case Preempt():
        orders = recovery.start_preempt(books, self.view, action)
      case Leave():
        orders = (tasks.start_leave(books, action),)
      case SwitchRole():
        roles.start_switch(books, self.view, action)
      case WakeAt():
        tasks.start_wake(books, action)
      case _:
        raise PolicyError(f'{action!r} is no action; answer with {NAMED_ACTIONS}.')
    for order in orders:
      books.in_flight[order.id] = order
      if isinstance(order, TransferOrder) and books.transfers.get(order.id) is None:
        books.transfers.begin(order, 1, books.now_s, waits=order.after in books.in_flight)
    if orders:
      books.idle_wakes = 0
    self._look_again()
    return orders
