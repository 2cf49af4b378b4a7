"""Actions that are due whatever the policy wants."""

from pdjax.serving.actions import Action
from pdjax.serving.books import Books
from pdjax.serving.copies import waiting_copies
from pdjax.serving.moving import take_moves
from pdjax.serving.sending import sendable
from pdjax.serving.tasks import take_tasks
from pdjax.serving.view import ClusterView


def actions_due(books: Books, view: ClusterView) -> list[Action]:
  """Refusals, ends of what was withdrawn, transfers to be tried again or given up, and what else is to be sent on."""
  actions: list[Action] = [*take_tasks(books), *books.must.values(), *books.gone]
  books.must.clear()
  books.gone.clear()
  if books.moving:
    actions += take_moves(books, view)
  if books.staging_freed and not actions:
    books.staging_freed = False
    return [*sendable(books), *waiting_copies(books)]
  return actions
