"""An injector between a loop and its backend lets things go wrong at the worst moment, on either backend."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from experiments.faults.chaos import Breakable, Fault, told_when
from pdjax.serving.events import Arrived, Done, Event, Finished, Withdrawn
from pdjax.serving.orders import AbandonOrder, Order, StepOrder, TransferOrder
from pdjax.types import Request
from pdjax.workload import Listed


class Asking(Listed):
  """Requests that were listed and some that come of what happens; it remembers its answers, so that they can be
  given again.
  """

  def __init__(self, requests: Iterable[Request]):
    super().__init__(requests)
    self.requests: dict[str, Request] = {}
    self.answers: list[list[Arrived | Withdrawn]] = []
    self._next: list[list[Arrived | Withdrawn]] = []

  @property
  def closed(self) -> bool:
    return super().closed and not self._next

  def next_s(self) -> float:
    return 0.0 if self._next else super().next_s()

  def push(self, *events: Arrived | Withdrawn) -> None:
    """Say this when next asked; what is pushed by another call, the time after that."""
    self._next.append(list(events))

  def due(self, now_s: float, finished: Sequence[Finished] = ()) -> list[Arrived | Withdrawn]:
    events = super().due(now_s, finished)
    if self._next:
      events += self._next.pop(0)
    for event in events:
      if isinstance(event, Arrived):
        self.requests |= {one.id: one for one in event.request.samples()}
    self.answers.append(events)
    return events


class Again:
  """What arrivals answered, once more."""

  def __init__(self, arrivals: Asking):
    self._answers = list(arrivals.answers)
    self._output_len = arrivals.output_len

  @property
  def closed(self) -> bool:
    return not any(self._answers)

  def next_s(self) -> float:
    return math.inf if self.closed else 0.0

  def due(self, now_s: float, finished: Sequence[Finished] = ()) -> list[Arrived | Withdrawn]:
    return self._answers.pop(0) if self._answers else []

  def output_len(self, request_id: str) -> int | None:
    return self._output_len(request_id)


@dataclasses.dataclass
class Seen:
  """The orders and events of the victim, as the backend was told and has told of them."""

  victim: str
  prefill: str | None = None
  decode: str | None = None
  tokens: int = 0
  tries: dict[object, int] = dataclasses.field(default_factory=dict)  # at each of its transfers
  open: dict[int, TransferOrder] = dataclasses.field(default_factory=dict)
  ended: list[Done] = dataclasses.field(default_factory=list)  # of its transfers
  computed: bool = False

  def index(self, order: TransferOrder) -> int:
    """The index of an order among the victim's transfers; a further try at one has the same."""
    return list(self.tries).index(what_of(order))

  def is_first_try(self, order: TransferOrder) -> bool:
    """Whether a transfer is not tried again."""
    return self.tries[what_of(order)] == 1


def what_of(order: TransferOrder) -> object:
  """The part of a request that a transfer moves."""
  return order.span.start, order.span.layers


class Injector:
  """Tells at which moment the victim is, and lets a column of the matrix act then, once.

  Attributes:
    moment: Whether it is the moment, asked of each order and each event.
    act: The act that follows.
    on_transfer: The fault of a transfer of the victim.
    on_done: The events in place of the end of a transfer of the victim, each so many seconds later.
  """

  def __init__(self, backend: Breakable, victim: str):
    self.backend = backend
    self.seen = Seen(victim)
    self.moment: Callable[[Seen, Order | Event], bool] = lambda seen, what: False
    self.act: Callable[[Injector], None] = lambda injector: None
    self.on_transfer: Callable[[Seen, TransferOrder], Fault | None] = lambda seen, order: None
    self.on_done: Callable[[Seen, TransferOrder, Done], list[tuple[float, Event]]] = lambda seen, order, done: [
      (0, done)
    ]
    self.acted = 0
    self.now_s = 0.0
    self._orders: dict[int, Order] = {}
    self._later: list[tuple[float, Event]] = []
    backend.fault_of = self._fault_of

  def lose(self, worker: str, down_s: float) -> None:
    """A worker dies now, and is back so much later."""
    lost, back = self.backend.lose(worker)
    self.say(lost)
    self.say(back, down_s)

  def say(self, event: Event, after_s: float = 0.0) -> None:
    """Tell the loop this, then."""
    if isinstance(event, Done) and after_s:  # a turn before it is told must not find it, in a replay either
      event = dataclasses.replace(event, ended_s=self.now_s + after_s)
    self._later.append((self.now_s + after_s, event))

  def orders_of(self, worker: str) -> list[int]:
    """The steps that a worker was given."""
    return [id for id, one in self._orders.items() if isinstance(one, StepOrder) and one.worker == worker]

  def submit(self, orders: Sequence[Order]) -> None:
    for order in orders:
      self._orders[order.id] = order
      self._note(order)
    self.backend.submit(orders)
    for order in orders:
      self._look(order)

  def wait(self, until_s: float) -> tuple[float, list[Event]]:
    self.now_s, events = self.backend.wait(min([until_s, *(due_s for due_s, _ in self._later)]))
    told: list[Event] = []
    for event in events:
      order = self._orders.get(event.order) if isinstance(event, Done) else None
      mine = isinstance(order, TransferOrder) and order.id in self.seen.open
      self._note_end(order, event)
      self._look(event)
      if mine and isinstance(event, Done):
        for after_s, one in self.on_done(self.seen, order, event):
          self.say(one, after_s)
      else:
        told.append(event)
    told += [event for due_s, event in self._later if due_s <= self.now_s]
    self._later = [item for item in self._later if item[0] > self.now_s]
    return self.now_s, sorted(told, key=told_when)

  def _look(self, what: Order | Event) -> None:
    if not self.acted and self.moment(self.seen, what):
      self.acted += 1
      self.act(self)

  def _fault_of(self, order: TransferOrder) -> Fault | None:
    return self.on_transfer(self.seen, order) if order.request == self.seen.victim else None

  def _note(self, order: Order) -> None:
    seen = self.seen
    match order:
      case StepOrder():
        if any(chunk.request.id == seen.victim for chunk in order.chunks):
          seen.prefill = order.worker
        if seen.victim in order.batch.requests:
          seen.decode = order.worker
      case TransferOrder() if order.request == seen.victim:
        seen.decode = order.target
        seen.open[order.id] = order
        seen.tries[what_of(order)] = seen.tries.get(what_of(order), 0) + 1
      case AbandonOrder():
        seen.open.pop(order.transfer, None)

  def _note_end(self, order: Order | None, event: Event) -> None:
    seen = self.seen
    if isinstance(order, StepOrder):
      seen.computed |= any(chunk.request.id == seen.victim and chunk.is_last for chunk in order.chunks)
    if isinstance(event, Done):
      seen.tokens += sum(len(result.tokens) for result in event.results if result.request == seen.victim)
      if event.decoded is not None and isinstance(order, StepOrder) and seen.victim in order.batch.requests:
        seen.tokens += int(event.decoded.counts[order.batch.requests.index(seen.victim)])
      if seen.open.pop(event.order, None) is not None:
        seen.ended.append(event)
