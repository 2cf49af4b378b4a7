"""Tasks of the books themselves: transfers to give up, and transfers to try again."""

import dataclasses
import math

from pdjax.serving.actions import Abandon, Leave, Resend, WakeAt
from pdjax.serving.books import Books
from pdjax.serving.checks import PolicyError
from pdjax.serving.orders import AbandonOrder, LeaveOrder, TransferOrder
from pdjax.types.checks import is_number


def take_tasks(books: Books) -> list[Abandon | Resend]:
  """Transfers to give up, and else one to try again if staging has room for it; then this is asked again."""
  tasks: list[Abandon | Resend] = []
  wait: list[Abandon | Resend] = []
  for task in books.tasks:
    if isinstance(task, Abandon):
      tasks += [task] if books.transfers.get(task.transfer) else []
    elif (attempt := books.transfers.get_again(task.transfer)) is not None:
      order = attempt.order
      room = books.holdings[order.source].staging_out, books.holdings[order.target].staging_in
      if tasks or min(one.free_bytes for one in room) < order.num_bytes:
        wait.append(task)
      else:
        tasks.append(task)
  if len(wait) < len(books.tasks) and books.due:
    books.staging_freed = True  # what was kept free for a transfer may be taken
  books.tasks = wait
  return tasks


def is_kept_free(books: Books, source: str, target: str) -> bool:
  """Whether staging is for a transfer that is to be tried again: what is new would take its room for ever."""
  again = [books.transfers.get_again(task.transfer) for task in books.tasks if isinstance(task, Resend)]
  return any(one and (one.order.source == source or one.order.target == target) for one in again)


def abandon(books: Books, order: int, error: str) -> bool:
  """Ask for a transfer's end; return whether that was not asked for before."""
  attempt = books.transfers.abandon(order)
  if attempt is None:
    return False
  attempt.error = error
  books.tasks.append(Abandon(order))
  return True


def give_up(books: Books, request: str, error: str) -> None:
  """Ask for the end of every transfer of a request: none is needed any more."""
  books.transfers.forget(request)
  for attempt in books.transfers.of(request):
    abandon(books, attempt.order.id, error)


def start_abandon(books: Books, action: Abandon) -> AbandonOrder:
  """The order that gives a transfer up.

  Raises:
    PolicyError: if the transfer is not in flight, or is being given up already.
  """
  attempt = books.transfers.get(action.transfer)
  if attempt is None:
    raise PolicyError(f'{action!r}: no transfer of that id is under way.')
  if any(isinstance(order, AbandonOrder) and order.transfer == attempt.order.id for order in books.in_flight.values()):
    raise PolicyError(f'{action!r}: the transfer is being given up already.')
  books.transfers.abandon(action.transfer)
  return AbandonOrder(books.new_order_id(), action.transfer, attempt.order.source, attempt.order.target)


def start_resend(books: Books, action: Resend) -> TransferOrder:
  """The order that tries a transfer once more.

  Raises:
    PolicyError: if the transfer is not to be tried again.
  """
  attempt = books.transfers.take_again(action.transfer)
  if attempt is None:
    raise PolicyError(f'{action!r}: no transfer of that id is to be tried again.')
  before = attempt.order
  after = before.after if before.after in books.in_flight else None
  assert attempt.request is not None, 'a copy is not tried again'
  order = dataclasses.replace(before, id=books.new_order_id(), request=attempt.request, after=after)
  books.hold(order)
  books.transfers.begin(order, attempt.number + 1, books.now_s, waits=after is not None)
  return order


def start_leave(books: Books, action: Leave) -> LeaveOrder:
  """The order that tells a worker that a sequence has left its batch."""
  return LeaveOrder(books.new_order_id(), action.request, action.worker)


def start_wake(books: Books, action: WakeAt) -> None:
  """Have the policy woken at that time; of the times it named since it was last woken, the earliest counts.

  Raises:
    PolicyError: if it is no later time.
  """
  at_s = action.at_s
  if not is_number(at_s) or not books.now_s < at_s < math.inf:
    raise PolicyError(f'{action!r}: it is {books.now_s!r} s now; name a later time in seconds, and a finite one.')
  books.timers.set('wake', 'policy', min(float(at_s), books.timers.due_s('wake', 'policy')))
