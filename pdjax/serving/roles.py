"""Roles: how a worker gets another one, once nothing of the old one is left there."""

from pdjax.serving.actions import SwitchRole
from pdjax.serving.books import Books
from pdjax.serving.checks import PolicyError, find_worker
from pdjax.serving.events import RoleChanged
from pdjax.serving.view import ClusterView
from pdjax.types.worker import Role


def start_switch(books: Books, view: ClusterView, action: SwitchRole) -> None:
  """Have a worker drain, or call that off.

  Raises:
    PolicyError: if it has that role, may not take it, or would leave nobody who goes on to prefill or to decode.
  """
  find_worker(view, action, action.worker)
  worker = books.workers[action.worker]
  if action.role not in worker.spec.roles:
    raise PolicyError(
      f'{action!r}: the roles of worker {worker.name!r} are {", ".join(worker.spec.roles)}; name one of them, or give '
      'its spec may_become.'
    )
  role = Role(action.role)
  if role is (worker.draining or worker.role):
    raise PolicyError(
      f'{action!r}: worker {worker.name!r} {"is draining to have" if worker.draining else "has"} that role already; '
      'look at its `role` and `draining` first.'
    )
  if role is worker.role:
    worker.draining = None
    del books.draining[worker.name]
    return
  _check_that_some_are_left(books, action, role)
  if worker.draining is None:
    worker.drains_from_s = books.now_s
  worker.draining = role
  books.draining[worker.name] = None


def _check_that_some_are_left(books: Books, action: SwitchRole, role: Role) -> None:
  """Raise unless another worker goes on with what this one would give up: while it drains, and after that.

  So prompts that are computed always have somewhere to go, and no two workers wait for each other to be empty.
  """
  worker = books.workers[action.worker]
  for phase, word in (('prefills', 'prefill'), ('decodes', 'decode')):
    if not getattr(worker.role, phase) or getattr(role, phase):
      continue
    staying = (
      other
      for other in books.workers.values()
      if other is not worker and not other.given_up and getattr(other.role, phase)
    )
    if not any(other.draining is None or getattr(other.draining, phase) for other in staying):
      raise PolicyError(
        f'{action!r}: no other worker goes on to {word}; wait until one has that role, or give it to one first.'
      )


def change_roles(books: Books) -> None:
  """Give workers that have drained, and are empty now, the role that they are to have."""
  for name in [name for name in books.draining if books.workers[name].is_empty]:
    worker = books.workers[name]
    assert worker.draining is not None
    before, worker.role, worker.draining = worker.role, worker.draining, None
    worker.role_since_s = books.now_s
    del books.draining[name]
    books.prefill_workers, books.decode_workers = books.sides()
    books.wakes = True
    books.look_at(name)
    books.told.append(RoleChanged(books.now_s, name, worker.role, before, worker.drains_from_s))
