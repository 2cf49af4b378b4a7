"""Recovery: deadlines and lost places, and how a request begins again without what was lost."""

from pdjax.serving.actions import Leave, Preempt, Resend
from pdjax.serving.books import Books
from pdjax.serving.checks import PolicyError, find_request, why_without_place
from pdjax.serving.copies import forget_target, give_up_copies, part_ended
from pdjax.serving.events import Preempted, TimerDue, WorkerBack, WorkerLost
from pdjax.serving.lifecycle import file, finish, finish_all, note_decoded, refuse_unfit, settle, unschedule
from pdjax.serving.moving import leave_now
from pdjax.serving.orders import AbandonOrder, Order, StepOrder, TransferOrder
from pdjax.serving.requests import Phase, RequestState, enter, give_up_row, leave_steps
from pdjax.serving.sending import transfer_ended
from pdjax.serving.steps import step_ended
from pdjax.serving.tasks import abandon, give_up, start_leave
from pdjax.serving.view import ClusterView


def look_again(books: Books) -> None:
  """Put every unsettled request where it belongs now, and those that this unsettles."""
  while books.unsettled:
    entry = books.unsettled.popleft()
    if entry.phase is Phase.RESTARTING:
      begin_again(books, entry)
    elif entry.phase is Phase.LEAVING:
      if not leave_now(books, entry):
        _restart(books, entry, 'the worker that it was to go on at is lost')
    else:
      settle(books, entry)


# ---------------------------------------------------------------------------- deadlines and transfers


def timer_due(books: Books, event: TimerDue) -> bool:
  """Do what a timer was set for; return whether that counts."""
  match event:
    case TimerDue(_, 'deadline', int(order)):
      return abandon(books, order, f'the transfer did not end within {books.transfer.deadline_s:g} s')
    case TimerDue(_, 'wake'):
      pass  # the policy is asked, as something happened
    case TimerDue(_, 'retry', int(order)):
      books.tasks.append(Resend(order))
    case TimerDue(_, 'patience', str(name)):
      books.places[name].given_up = True
      for entry in [*books.waiting.values(), *books.prefilled.values()]:
        if entry.goes_to is None or entry.phase is not Phase.PREFILLED:
          refuse_unfit(books, entry)
        elif problem := why_without_place(ClusterView(books), entry):
          _restart(books, entry, problem)
  return True


def transfer_failed(books: Books, order: TransferOrder, error: str, *, corrupt: bool) -> None:
  """See to the request of a transfer that is over and did not end well, as the fault settings say."""
  if order.copy is not None:
    part_ended(books, order, arrived=False)
    return
  attempt = books.transfers.get(order.id)
  entry = transfer_ended(books, order)
  if entry is None or entry.phase is Phase.ENDING:
    return
  if entry.phase is Phase.RESTARTING:
    begin_again(books, entry)
    return
  assert attempt is not None
  answer = books.faults.corruption if corrupt else books.faults.transfer
  if answer == 'fail':
    finish_all(books, entry, error)
  elif answer == 'retry' and books.transfers.try_again(attempt, books.now_s):
    entry.transfers += 1
  else:
    _restart(books, entry, error)


# ---------------------------------------------------------------------------- lost places


def lose(books: Books, event: WorkerLost) -> None:
  """Take note that a worker's pages are gone, and see to all that were there."""
  worker = books.places[event.worker]
  worker.up, worker.lost = False, event.error
  if books.prefixes is not None:
    books.prefixes.lose(worker.name)
  books.look_at(worker.name)
  if event.returning:
    books.timers.cancel('patience', worker.name)
  else:
    books.timers.set('patience', worker.name, books.now_s + books.faults.patience_s)
  forget_target(books, worker.name)
  for order in [order for order in books.in_flight.values() if worker.name in _places(order)]:
    del books.in_flight[order.id]
    if isinstance(order, StepOrder):
      step_ended(books, order)
    elif isinstance(order, TransferOrder) and order.copy is not None:
      part_ended(books, order, arrived=False)
    elif isinstance(order, TransferOrder):
      transfer_ended(books, order)
  give_up_copies(books, worker.name)
  books.holdings[worker.name].batch.lose()
  for attempt in books.transfers.forget_worker(worker.name):
    if attempt.request is not None:
      books.requests[attempt.request].transfers -= 1
  for entry in [entry for entry in books.requests.values() if worker.name in entry.pages]:
    lose_work(books, entry, worker.name, event.error)
    look_again(books)  # who is handed a prompt on may be the next


def _places(order: Order) -> tuple[str, ...]:
  """The workers that an order needs."""
  match order:
    case StepOrder():
      return (order.worker,)
    case TransferOrder() | AbandonOrder():
      return order.source, order.target
  return ()


def come_back(books: Books, event: WorkerBack) -> bool:
  """Take note of a worker's next incarnation; return whether that is news."""
  worker = books.places[event.worker]
  if event.incarnation <= worker.incarnation:
    return False  # told late, of an incarnation that is over or known
  if worker.up:  # so that nobody waits for the one before it
    error = f'worker {worker.name!r} began another incarnation'
    lose(books, WorkerLost(worker.name, event.ended_s, error, returning=True))
  worker.incarnation, worker.up, worker.lost, worker.given_up = event.incarnation, True, '', False
  books.timers.cancel('patience', worker.name)
  books.look_at(worker.name)
  return True


def lose_work(books: Books, entry: RequestState, worker: str, error: str) -> None:
  """See to a request, as the fault settings say, of which a worker's work is gone, done or to be done."""
  if entry.phase in (Phase.FINISHED, Phase.WAITING, Phase.ENDING, Phase.FOLLOWING):
    return  # it ended, or was begun again, with one before it; the end of the others is under way
  if entry.phase is Phase.RESTARTING:
    begin_again(books, entry)
  elif books.faults.worker == 'fail':
    finish_all(books, entry, error)
  elif entry.target == worker and _is_whole(books, entry):
    _lose_target(books, entry, error)
  else:
    _restart(books, entry, error)


def _is_whole(books: Books, entry: RequestState) -> bool:
  """Whether all that was computed of a prompt is still where it was, and can be sent from there."""
  if entry.worker is None or entry.phase not in (Phase.PREFILLING, Phase.MOVING):
    return False
  source = books.workers[entry.worker]
  return source.up and not source.role.decodes and entry.worker in entry.pages


def _lose_target(books: Books, entry: RequestState, error: str) -> None:
  """Keep a prompt where it is computed; a place to decode is to be found anew."""
  if not _count_attempt(books, entry):
    finish_all(books, entry, error)
    return
  for one in (entry, *entry.followers.values()):
    books.leave(one, one.target)
  books.due.pop(entry.request.id, None)
  entry.tokens_due, entry.sent = 0, {}
  if entry.phase is Phase.MOVING:
    books.unsettled.append(entry)


# ---------------------------------------------------------------------------- beginning again


def _count_attempt(books: Books, entry: RequestState) -> bool:
  """Whether a request may be begun once more."""
  entry.attempts += 1
  return entry.attempts <= books.faults.max_attempts


def _restart(books: Books, entry: RequestState, error: str) -> None:
  """Begin a request again, and each of those that wait for its prompt by itself."""
  followers = entry.followers
  group = [entry, *followers.values()]
  followers.clear()
  for one in group:
    if not _count_attempt(books, one):
      finish(books, one, 'error', error)
      continue
    unschedule(books, one)
    enter(one, Phase.RESTARTING)
    give_up(books, one.request.id, error)
    one.transfers = len(books.transfers.of(one.request.id))
    begin_again(books, one)


def start_preempt(books: Books, view: ClusterView, action: Preempt) -> tuple[Order, ...]:
  """Have a request that decodes wait again, without its pages.

  Raises:
    PolicyError: if it does not decode, or was preempted as often as one may be.
  """
  find_request(view, action, action.request)
  entry = books.requests[action.request]
  if action.how != 'recompute':
    raise PolicyError(f"{action!r}: how is {action.how!r}, expected 'recompute'.")
  if entry.phase is not Phase.DECODING:
    raise PolicyError(f'{action!r}: the request is {entry.phase.value}; only a decoding one can be preempted.')
  if entry.preemptions >= books.max_preemptions:
    raise PolicyError(
      f'{action!r}: it was preempted {entry.preemptions} times, and max_preemptions is {books.max_preemptions}; '
      'preempt another, or raise that.'
    )
  assert entry.target is not None
  books.told.append(Preempted(books.now_s, action.request, entry.target, entry.prompt_len + entry.num_tokens - 1))
  entry.preemptions += 1
  if entry.preemptions == books.max_preemptions:
    entry.pages_ahead = None  # so that it ends the next time
  leaves = Leave(action.request, entry.target)
  unschedule(books, entry)
  entry.keeps = True
  books.gone = [one for one in books.gone if one != leaves]  # it is told now, before the request may begin again there
  enter(entry, Phase.RESTARTING)
  begin_again(books, entry)
  return (start_leave(books, leaves),)


def begin_again(books: Books, entry: RequestState) -> None:
  """Let a request wait like one that has just come, in its old place, once no order is about it any more."""
  name = entry.request.id
  steps = [order for order in books.in_flight.values() if isinstance(order, StepOrder) and order.has(name)]
  for order in steps:
    books.holdings[order.worker].batch.leaving[name] = entry
  if entry.transfers or steps:
    return
  give_up_row(entry)
  if entry.keeps:
    note_decoded(books, entry)
    entry.keeps = False
  books.leave(entry, entry.target)
  for place in list(entry.pages):
    books.leave(entry, place)
  entry.worker, entry.started, entry.tokens_due, entry.sent, entry.first_in_flight = None, 0, 0, {}, False
  entry.stored, entry.hits, entry.found, entry.fetchable = {}, {}, {}, {}
  entry.copies_asked, entry.fetched, entry.goes_to, entry.source, entry.unlike = {}, {}, None, None, False
  leave_steps(entry)
  entry.computed = entry.admitted = False
  entry.growth = {}
  entry.delivered = tuple(entry.tokens)
  enter(entry, Phase.WAITING)
  if not refuse_unfit(books, entry):
    file(books.waiting, entry)
