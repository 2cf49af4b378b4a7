"""Moving a sequence that decodes to another worker: it leaves its batch, its KV travels, and it goes on there."""

from pdjax.serving.actions import Leave, Transfer
from pdjax.serving.books import Books
from pdjax.serving.checks import (
  PolicyError,
  check_decodes,
  check_takes_new,
  find_way,
  why_without_place,
)
from pdjax.serving.lifecycle import file, note_decoded, unschedule
from pdjax.serving.orders import LeaveOrder, StepOrder
from pdjax.serving.requests import Phase, RequestState, enter, give_up_row, leave_steps
from pdjax.serving.tasks import start_leave
from pdjax.serving.view import ClusterView


def start_move(books: Books, view: ClusterView, action: Transfer, entry: RequestState) -> tuple[LeaveOrder]:
  """Have a request that decodes leave its batch, to go on at another worker.

  Raises:
    PolicyError: if it cannot be moved yet, or that worker does not decode or is the same, there is no way to
      it, or it could never have room.
  """
  target = books.workers[action.target]
  assert entry.target is not None
  if not entry.can_move:
    raise PolicyError(
      f'{action!r}: its prompt is not all computed yet, or it is a further sample that no step has decoded yet; wait '
      'until `can_move` says so.'
    )
  if target.name == entry.target:
    raise PolicyError(f'{action!r}: it decodes there already; name another worker.')
  check_decodes(action, target)
  check_takes_new(action, target)
  find_way(view, action, entry.target, target.name)
  if not view.could_fit(entry.request.id, target.name, decodes=True):
    raise PolicyError(
      f'{action!r}: {target.name!r} has {view.capacity(target.name)} pages in all, too few for it; name another worker.'
    )
  leaves = Leave(entry.request.id, entry.target)
  unschedule(books, entry)
  books.gone = [one for one in books.gone if one != leaves]  # it is told now
  entry.goes_to = target.name
  enter(entry, Phase.LEAVING)
  goes = leave_now(books, entry)
  assert goes, 'a worker that could take it was just named'
  return (start_leave(books, leaves),)


def leave_now(books: Books, entry: RequestState) -> bool:
  """Let a request that has left its batch be as one whose tokens were just computed there, once no step has it.

  Returns:
    Whether that is so, and it can be sent on; if not, a step is in flight, or nobody is left that could take it.
  """
  name, place = entry.request.id, entry.target
  assert place is not None
  if steps := [order for order in books.in_flight.values() if isinstance(order, StepOrder) and order.has(name)]:
    for order in steps:
      books.holdings[order.worker].batch.leaving[name] = entry
    return True
  give_up_row(entry)
  note_decoded(books, entry)
  if books.prefixes is not None:
    making = books.prefixes.making
    entry.unlike = entry.unlike or making.made_of(entry.source or place, place) != making.made_of(place, place)
  books.release_copied(entry)
  books.release_slot(entry)
  leave_steps(entry)
  entry.worker, entry.target, entry.source, entry.computed, entry.admitted = place, None, None, True, False
  entry.delivered = tuple(entry.tokens)
  entry.started, entry.tokens_due, entry.sent, entry.growth, entry.reach = entry.prefill_len, 0, {}, {}, 0
  entry.found, entry.hits, entry.fetchable = {}, {}, {}
  enter(entry, Phase.PREFILLED)
  if why_without_place(ClusterView(books), entry) is not None:
    return False
  file(books.prefilled, entry)
  books.moving[name] = entry
  return True


def take_moves(books: Books, view: ClusterView) -> list[Transfer]:
  """The transfers of sequences that can leave, to where a policy wanted them, if there still is room."""
  moves = []
  room = view.room()
  for name, entry in books.moving.items():
    assert entry.goes_to is not None
    decodes = books.workers[entry.goes_to].role.decodes  # it may have another role by now
    if decodes and name in books.prefilled and room.fits(name, entry.goes_to, decodes=True):
      room.take(name, entry.goes_to, decodes=True)
      moves.append(Transfer(name, entry.goes_to))
  books.moving.clear()
  return moves
