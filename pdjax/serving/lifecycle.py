"""A request's way: it arrives, is put where it belongs, hands its prompt on, and ends once."""

from collections.abc import MutableMapping, Sequence

from pdjax.serving.actions import Cancel, Reject
from pdjax.serving.books import Books
from pdjax.serving.checks import PolicyError, check_id, find_request, why_unfit, why_without_place
from pdjax.serving.copies import spoil_copies
from pdjax.serving.events import Finished, Result
from pdjax.serving.keyed_queue import KeyedQueue
from pdjax.serving.orders import EndOrder
from pdjax.serving.requests import Phase, RequestState, Samples, add_tokens, enter, give_up_row
from pdjax.serving.tasks import give_up
from pdjax.serving.view import ClusterView
from pdjax.types.request import SERVED, FinishReason, Request

_IN_BATCH = (Phase.DECODING, Phase.LEAVING)

# ---------------------------------------------------------------------------- arriving


def arrive(books: Books, request: Request) -> None:
  """File a request with all its samples as waiting, or to be refused if it can never run.

  Raises:
    ValueError: if one of that id is being served.
  """
  context_len = books.model.context_len
  limit = max(request.token_limit(context_len), 1)
  entries = {sample.id: RequestState(sample, limit, pages_ahead=books.pages_ahead) for sample in request.samples()}
  for name in entries:
    if name in books.requests or name in books.samples:
      raise ValueError(f'request {name!r} is being served already; ids must be unique.')
  true_limits = {name: max(one.request.token_limit(context_len, books.output_len), 1) for name, one in entries.items()}
  books.true_limits |= {name: true_limit for name, true_limit in true_limits.items() if true_limit < limit}
  for one in entries.values():
    one.number = books.new_request_number()
  books.requests |= entries
  entry = entries[request.id]
  if len(entries) > 1:
    following = {name: one for name, one in entries.items() if one is not entry}
    samples = Samples(tuple(entries), entries, entry, following)
    books.samples |= dict.fromkeys(entries, samples)
    for one in entries.values():
      one.samples = samples
    for one in samples.following.values():
      enter(one, Phase.FOLLOWING)
  problem = why_unfit(ClusterView(books), entry, finds_stops=books.finds_stops)
  if problem:
    books.must[request.id] = Reject(request.id, problem)
  else:
    books.waiting[request.id] = entry


def file(queue: MutableMapping[str, RequestState], entry: RequestState) -> None:
  """Put a request into a queue; one that was begun again before those that came after it."""
  if isinstance(queue, KeyedQueue):
    queue[entry.request.id] = entry
    return
  later = [] if entry.is_new else [other for other in queue.values() if other.number > entry.number]
  queue[entry.request.id] = entry
  for other in later:
    queue[other.request.id] = queue.pop(other.request.id)


# ---------------------------------------------------------------------------- tokens, and where it belongs


def got(books: Books, entry: RequestState | None, result: Result) -> bool:
  """Add the result of a step to its request, which may end with it; return whether it came in time.

  An error ends those with it that wait for the prompt, which need not be computed to its end.
  """
  if entry is None or books.requests.get(result.request) is not entry or entry.phase is Phase.ENDING:
    return False
  add_tokens(entry, result.tokens)
  if result.error is not None:
    finish_all(books, entry, result.error)
    return True
  entry.computed = True
  if result.finish_reason is not None:
    finish(books, entry, result.finish_reason)
  elif entry.samples is not None or entry.phase is not Phase.DECODING:
    books.unsettled.append(entry)
  return True


def settle(books: Books, entry: RequestState) -> None:
  """Put a request whose prompt is computed where it belongs now."""
  if entry.phase is Phase.DECODING and not entry.followers:
    return
  if not entry.computed or entry.phase in (Phase.PREFILLED, Phase.ENDING, Phase.FINISHED):
    return
  if entry.target is None:
    enter(entry, Phase.PREFILLED)
    assert entry.worker is not None
    is_as_before = not any(worker.given_up for worker in books.workers.values())
    if (is_as_before and not books.workers[entry.worker].ever_decodes) or not refuse_unfit(books, entry):
      file(books.prefilled, entry)
  elif entry.transfers or entry.request.id in books.due:
    enter(entry, Phase.MOVING)
  else:
    followers = entry.followers
    for one in (entry, *followers.values()):
      _begin_decoding(books, one, entry.worker)
    followers.clear()


def _begin_decoding(books: Books, entry: RequestState, source: str | None) -> None:
  assert entry.target is not None
  entry.source, entry.computed = source, True
  if entry.phase is not Phase.DECODING:
    enter(entry, Phase.DECODING)
    holdings = books.holdings[entry.target]
    holdings.batch.enter(entry, holdings.steps)
    books.may_grow(entry.target)
  if entry.worker is not None and entry.worker != entry.target:
    if books.prefixes is not None and entry.computed:
      books.prefixes.note_computed(entry, entry.target, entry.worker, entry.prefill_len)
    books.leave(entry, entry.worker)


def note_decoded(books: Books, entry: RequestState) -> None:
  """Let others find what a request leaves behind where it decoded, its row given up."""
  source = entry.source or entry.worker
  if books.prefixes is None or source is None or not (entry.phase in _IN_BATCH or entry.keeps):
    return
  if entry.target is not None and entry.target in entry.pages and books.workers[entry.target].up:
    books.prefixes.note_decoded(entry, entry.target, source)


# ---------------------------------------------------------------------------- ending


def refuse_unfit(books: Books, entry: RequestState) -> bool:
  """End a request with an error if nobody is left who can serve it; return whether it was ended."""
  problem = why_without_place(ClusterView(books), entry)
  if problem is not None:
    finish_all(books, entry, problem)
  return problem is not None


def finish_all(books: Books, entry: RequestState, error: str) -> None:
  """End a request with an error, and those with it that wait for its prompt."""
  for other in reversed(list(entry.followers.values())):
    finish(books, other, 'error', error)
  finish(books, entry, 'error', error)


def finish(books: Books, entry: RequestState, reason: FinishReason, error: str | None = None) -> None:
  """End a request: take it out of every queue and let go of all that it holds."""
  name = entry.request.id
  unschedule(books, entry)
  give_up_row(entry)
  if reason in SERVED:
    note_decoded(books, entry)
    if books.prefixes is not None and entry.is_cached:
      books.ended[name] = entry
  elif reason == 'error' and books.prefixes is not None:
    spoil_copies(books, books.prefixes.spoil(entry))
  if entry.samples is None or name != entry.samples.ids[0]:
    books.must.pop(name, None)
  for place, pages in entry.pages.items():
    books.drop(place, pages)
  entry.pages = {}
  books.release_copied(entry)
  books.release_slot(entry)
  enter(entry, Phase.FINISHED)
  del books.requests[name]
  books.true_limits.pop(name, None)
  books.transfers.forget(name)
  if reason in ('cancelled', 'error'):
    give_up(books, name, error or reason)
  if entry.samples is not None:
    _sample_ended(books, name, entry.samples)
  books.finished.append(Finished(books.now_s, name, reason, tuple(entry.tokens), error, entry.cached_tokens))


def _sample_ended(books: Books, name: str, samples: Samples) -> None:
  del samples.living[name]
  if not samples.living:
    for one in samples.ids:
      del books.samples[one]
    books.must.pop(samples.ids[0], None)


def withdraw(books: Books, request: str) -> None:
  """See to the end of what its user no longer wants."""
  samples = books.samples.get(request)
  entries = [entry for entry in _meant_by(books, request) if entry.phase is not Phase.ENDING]
  if not entries or (request if samples is None else samples.ids[0]) in books.must:
    return
  _unschedule_all(books, entries)
  for entry in entries:
    books.must.pop(entry.request.id, None)
  books.must[request] = Cancel(request)


def start_end(books: Books, action: Cancel | Reject) -> tuple[EndOrder, ...]:
  """The orders that end a request with all its samples, or one of them.

  Raises:
    PolicyError: if there is no such request, it is ending already, or is refused although it was begun.
  """
  reason: FinishReason = 'cancelled' if isinstance(action, Cancel) else 'rejected'
  check_id(action, action.request)
  entries = _meant_by(books, action.request)
  if not entries:
    find_request(ClusterView(books), action, action.request)
  entries = [entry for entry in entries if entry.phase is not Phase.ENDING]
  if not entries:
    raise PolicyError(f'{action!r}: the request is being ended already.')
  if isinstance(action, Reject) and entries[0].phase is not Phase.WAITING:
    raise PolicyError(
      f'{action!r}: the request is {entries[0].phase.value}; only a waiting one can be rejected, cancel it.'
    )
  _unschedule_all(books, entries)
  for entry in entries:
    give_up_row(entry)
    enter(entry, Phase.ENDING)
    give_up(books, entry.request.id, reason)
  return tuple(EndOrder(books.new_order_id(), entry.request.id, reason, action.reason) for entry in entries)


def _meant_by(books: Books, name: str) -> list[RequestState]:
  """The request of this id, or all its samples, that have not ended."""
  samples = books.samples.get(name)
  if samples is not None and name == samples.ids[0]:
    return list(samples.living.values())
  return [books.requests[name]] if name in books.requests else []


# ---------------------------------------------------------------------------- out of the queues


def _unschedule_all(books: Books, entries: Sequence[RequestState]) -> None:
  """As `unschedule`, the carrier of a prompt last, so that nobody is left to hand it on to."""
  for entry in reversed(entries):
    unschedule(books, entry)


def unschedule(books: Books, entry: RequestState) -> None:
  """Take a request out of every queue a policy looks at; a prompt that others wait for is handed on to one."""
  name = entry.request.id
  if entry.samples is not None:
    entry.samples.following.pop(name, None)
    if entry.computed and entry.followers:
      _hand_on(books, entry, entry.samples)
  books.waiting.pop(name, None)
  books.prefilled.pop(name, None)
  books.due.pop(name, None)
  books.moving.pop(name, None)
  books.begun.pop(name, None)
  if entry.worker is not None and books.holdings[entry.worker].prefilling.pop(name, None) is not None:
    books.workers[entry.worker].queued_tokens -= entry.prompt_left
  if entry.target is not None:
    books.part(entry)


def _hand_on(books: Books, entry: RequestState, samples: Samples) -> None:
  """Let the first follower carry the computed prompt in place of one that ends."""
  heir = next(iter(samples.following.values()))
  del samples.following[heir.request.id]
  samples.carrier = heir
  heir.worker, heir.started, heir.sent = entry.worker, entry.started, entry.sent
  heir.computed, heir.transfers, heir.tokens_due = True, entry.transfers, entry.tokens_due
  books.transfers.hand_on(entry.request.id, heir.request.id)
  if entry.request.id in books.due:
    books.due[heir.request.id] = heir
  if entry.worker is not None and entry.worker != entry.target:
    heir.pages[entry.worker] = entry.pages.pop(entry.worker)
    if entry.target is not None:
      # What is sent goes on into the same pages, of which the others copy the last; what the heir had ends instead.
      books.release_copied(heir)
      heir.pages[entry.target], entry.pages[entry.target] = entry.pages[entry.target], heir.pages[entry.target]
      heir.reach = entry.reach
  books.unsettled.append(heir)
