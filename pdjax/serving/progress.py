"""Progress: whether anything can still change where requests wait."""

import math

from pdjax.serving.actions import Reject
from pdjax.serving.books import Books
from pdjax.serving.checks import MOST_IDLE_WAKES, why_without_place
from pdjax.serving.lifecycle import finish_all
from pdjax.serving.requests import Phase
from pdjax.serving.roles import change_roles
from pdjax.serving.view import ClusterView


class StuckError(RuntimeError):
  """Requests wait for what can never come."""


def check(books: Books, view: ClusterView) -> bool:
  """Raise if requests are left although nothing is under way or due; see `ClusterState.check_progress`.

  Returns:
    Whether requests were ended, or are to be, that only a worker of another role could take.

  Raises:
    StuckError: naming the requests and the pages they need.
  """
  if books.in_flight or not books.requests:
    return False
  if books.transfers or (math.isfinite(books.timers.next_s) and books.idle_wakes < MOST_IDLE_WAKES):
    return False
  workers = books.workers.values()
  if not all(worker.up or worker.given_up for worker in workers):
    return False
  if _refuse_those_without_place(books, view):
    return True
  decoder = books.decode_workers[0].name
  waits = ', '.join(
    f'{name} ({entry.phase.value}, {view.describe_pages(name, decoder, decodes=True)} pages)'
    for name, entry in list(books.requests.items())[:8]
  )
  free = ', '.join(f'{worker.name} {worker.free_pages}/{worker.num_pages}' for worker in workers)
  woken = f' (the policy was woken {books.idle_wakes:,} times and did nothing)' if books.idle_wakes else ''
  other_roles = ', or give a worker another role' if any(len(worker.spec.roles) > 1 for worker in workers) else ''
  raise StuckError(
    f'{len(books.requests)} requests wait and no order is under way, so nothing can change{woken}: {waits}. '
    f'Free pages: {free}. The policy must start, move, preempt, reject or cancel them{other_roles}.'
  )


def _refuse_those_without_place(books: Books, view: ClusterView) -> bool:
  """Refuse requests that no worker could take in the role it has now, so that those that fit go on."""
  others = [worker.name for worker in books.workers.values() if len(worker.spec.roles) > 1]
  if not others:
    return False
  for entries in ([*books.prefilled.values()], [*books.waiting.values()]):  # an end may let a worker have its new role
    problems = [(entry, why_without_place(view, entry, now=True)) for entry in entries]
    for entry, problem in problems:
      error = f'{problem} Or let the policy give {" or ".join(others)} another role (SwitchRole).'
      if problem is not None and entry.phase is Phase.WAITING:
        books.must[entry.request.id] = Reject(entry.request.id, error)
      elif problem is not None:
        finish_all(books, entry, error)
    if any(problem is not None for _, problem in problems):
      change_roles(books)
      books.wakes = True
      return True
  return False
