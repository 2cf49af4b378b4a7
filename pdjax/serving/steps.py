"""Steps: how a `Step` becomes a `StepOrder` with every number filled in, and what its end brings."""

from collections.abc import Sequence

import numpy as np

from pdjax.serving import lifecycle, sending
from pdjax.serving.actions import STANDING, Chunk, Step
from pdjax.serving.batch import LOOKAHEAD, NOBODY
from pdjax.serving.books import Books
from pdjax.serving.checks import check_step, decodes_there
from pdjax.serving.events import Decoded, Delivered, Done, Result
from pdjax.serving.orders import Admission, ChunkOrder, Growth, Join, Order, PageCopies, StepOrder
from pdjax.serving.place import Decoding, Holdings, WorkerState
from pdjax.serving.prefixes import NOTHING, Found
from pdjax.serving.requests import Phase, RequestState, StepInFlight, enter
from pdjax.serving.view import ClusterView

_LEFT = (Phase.RESTARTING, Phase.LEAVING)
_OVER = (Phase.RESTARTING, Phase.ENDING, Phase.FINISHED)


def start_step(books: Books, view: ClusterView, step: Step) -> tuple[Order, ...]:
  """The order of a step and the transfers that leave with it.

  Raises:
    PolicyError: if the worker cannot take it; nothing is reserved then.
  """
  named = check_step(view, step)
  worker, holdings = books.workers[step.worker], books.holdings[step.worker]
  step_id = books.new_order_id()
  stands, steps = step.steps is STANDING, 1 if step.steps is STANDING else step.steps
  assert isinstance(steps, int)
  joining: list[RequestState] = []
  if step.decodes:
    joining = _choose(books, holdings.batch, holdings, named, step_id)  # before any begins here with these chunks
    steps = _fitting_steps(books, holdings.batch, joining, steps, step_id, stands=stands)
  chunk_orders = []
  transfers = []
  found = _hold_cached(books, step, worker)  # before any takes pages from them
  for chunk, one in zip(step.chunks, found, strict=True):
    chunk_orders.append(_start_chunk(books, chunk, worker, one))
    transfers += sending.send_chunk(books, chunk, worker, step_id)
  groups = books.transfer.step_groups(worker.role, books.model.num_layers) if step.chunks else ()
  order = _order_of(books, holdings, step_id, step, tuple(chunk_orders), joining, steps, stands, groups)
  holdings.steps[-1].computing = tuple(books.requests[chunk.request] for chunk in step.chunks)
  return order, *transfers


def _choose(
  books: Books, batch: Decoding, holdings: Holdings, named: Sequence[str] | None, order: int
) -> list[RequestState]:
  """Take out of the batch whom a step does not decode, or none can bring a token; the sequences that are to join."""
  if named is not None:
    wanted = {name: batch.entries[name] for name in named}
    for other in [entry for entry in batch.members.values() if entry.request.id not in wanted]:
      batch.pause(other, order)
    return [entry for name, entry in wanted.items() if name in batch.outside]
  joining = [entry for entry in batch.outside.values() if entry.can_step]
  if books.pages_ahead is not None:
    pausing = [entry for entry in batch.members.values() if not entry.can_step]
  elif batch.standing is None:
    in_flight = sum(one.ahead for one in holdings.steps)
    slots = batch.rows.exhausted(batch.batch, in_flight)
    pausing = [batch.members[slot] for slot in slots if slot in batch.members and batch.members[slot].tokens_left < 1]
  else:
    pausing = []  # a step that stands ends when one of them does, and whoever has ended by then is no trouble
  for entry in pausing:
    batch.pause(entry, order)
  return joining


def _fitting_steps(
  books: Books, batch: Decoding, joining: list[RequestState], steps: int, order: int, *, stands: bool
) -> int:
  """As many of the steps as somebody gets tokens of, and has pages for; who has not is paused."""
  if steps > 1:
    entries = (*batch.members.values(), *joining)
    if entries and not any(entry.tokens_left >= steps for entry in entries):  # mostly the first has as many left
      steps = max(entry.tokens_left for entry in entries)
  if books.pages_ahead is None or stands:
    return steps

  def ahead(entry: RequestState) -> int:  # steps that it has pages for; none are written past its last token
    return steps if entry.reach >= entry.most_tokens else entry.reach + 1 - entry.next_tokens

  entries = (*batch.members.values(), *joining)
  steps = min(steps, max(map(ahead, entries), default=steps))
  for entry in [entry for entry in batch.members.values() if ahead(entry) < steps]:
    batch.pause(entry, order)
  joining[:] = [entry for entry in joining if ahead(entry) >= steps]
  return steps


def _order_of(
  books: Books,
  holdings: Holdings,
  step_id: int,
  step: Step,
  chunks: tuple[ChunkOrder, ...],
  joining: list[RequestState],
  steps: int,
  stands: bool,
  groups: tuple[tuple[int, int], ...],
) -> StepOrder:
  """The order of a step whose chunks and joining sequences are known, noted as the worker's last."""
  worker, batch = books.workers[step.worker], holdings.batch
  joins: tuple[Join, ...] = ()
  leaves: tuple[int, ...] = ()
  growth: tuple[Growth, ...] = ()
  if step.decodes:
    grown = [*batch.grown.values(), *(entry for entry in joining if entry.admitted and entry.growth)]
    growth = tuple(_growth(entry) for entry in grown)
    batch.grown.clear()
    joins = tuple(_join(books, entry) for entry in joining)
    for entry in joining:
      batch.join(entry, step_id)
    leaves = batch.change(joins)
    if books.pages_ahead is not None:
      books.may_grow(worker.name)
  decodes = bool(step.decodes and batch.batch)
  order = StepOrder(
    step_id, worker.name, chunks, joins, leaves, growth, decodes, steps if decodes else 1, stands, worker.incarnation,
    groups, batch.batch if decodes else NOBODY,
  )  # fmt: skip
  ahead = LOOKAHEAD if stands else order.steps if decodes else 0
  holdings.steps.append(StepInFlight(step_id, step, order.batch, batch.rows.owners(order.batch), ahead, stands))
  batch.standing = None
  books.look_at(worker.name)
  if stands:
    batch.stand(step_id, books.catch_up_on(worker.name))
  return order


def _join(books: Books, entry: RequestState) -> Join:
  """The part of an order by which a sequence joins the batch."""
  assert entry.slot is not None and entry.target is not None
  limit, num_tokens, in_flight = books.true_limit(entry), entry.num_tokens, entry.steps_in_flight
  admission = None
  if not entry.admitted:
    entry.admitted = True
    admission = Admission(entry.request, entry.pages[entry.target], tuple(entry.tokens), limit, entry.copies)
    entry.growth = {}
    books.release_copied(entry)  # whatever is written there from now on is written after the copy
  context, left = entry.prompt_len + num_tokens + in_flight - 1, max(limit - num_tokens - in_flight, 0)
  return Join(entry.request.id, entry.slot, context, left, _reach(entry), admission)


def _growth(entry: RequestState) -> Growth:
  assert entry.slot is not None
  growth, entry.growth = entry.growth, {}
  return Growth(entry.slot, growth, _reach(entry))


def _reach(entry: RequestState) -> int | None:
  return None if entry.reach >= entry.most_tokens else entry.reach


def _hold_cached(books: Books, step: Step, worker: WorkerState) -> list[Found]:
  """Hold what is cached of each request that a step begins, as far as its chunk starts behind it.

  A page with only its beginning in common is held too where all that the step takes leaves one over.
  """
  found = []
  prefixes, entries = books.prefixes, [books.requests[chunk.request] for chunk in step.chunks]
  for chunk, entry in zip(step.chunks, entries, strict=True):
    begins = entry.phase is Phase.WAITING and chunk.start > 0
    found.append(books.hold_cached(entry, worker.name, chunk.start) if begins else NOTHING)
  if prefixes is None or all(one.tokens == chunk.start for chunk, one in zip(step.chunks, found, strict=True)):
    return found
  pages = books.holdings[worker.name].pages
  spare = pages.by_kind[prefixes.kind].num_free
  for chunk, entry, one in zip(step.chunks, entries, found, strict=True):
    if entry.phase is Phase.WAITING:
      needed = entry.pages_needed(pages.pools, decodes=decodes_there(worker, chunk))
      spare -= needed[prefixes.kind] - len(one.pages)
  for index, (chunk, entry) in enumerate(zip(step.chunks, entries, strict=True)):
    if entry.phase is Phase.WAITING and chunk.start > found[index].tokens:
      before = pages.by_kind[prefixes.kind].num_free
      found[index] = prefixes.hold_part(entry, worker.name, found[index], chunk.start, spare)
      spare -= before - pages.by_kind[prefixes.kind].num_free
  return found


def _start_chunk(books: Books, chunk: Chunk, worker: WorkerState, found: Found) -> ChunkOrder:
  entry, holdings = books.requests[chunk.request], books.holdings[worker.name]
  copies: PageCopies = {}
  begins = entry.phase is Phase.WAITING
  if begins:
    del books.waiting[chunk.request]
    enter(entry, Phase.PREFILLING)
    entry.worker = entry.prefilled_by = worker.name
    entry.started = entry.computed_to = found.tokens
    if entry.is_new:
      entry.cached_tokens = found.tokens
      source, had = entry.fetched.get(worker.name, (worker.name, found.tokens))
      books.tell_hit(entry, worker.name, min(had, found.tokens), 'prefill')
      books.tell_hit(entry, source, found.tokens - min(had, found.tokens), 'prefill')
    holdings.prefilling[chunk.request] = books.begun[chunk.request] = entry
    worker.queued_tokens += entry.prompt_left
    copies = books.reserve(entry, worker, decodes=decodes_there(worker, chunk), found=found)
    if chunk.send_to is not None:
      sending.reserve_target(books, entry, books.workers[chunk.send_to])
  stays, start = entry.target == worker.name, entry.started
  entry.started += chunk.length
  slot = None
  if entry.prompt_left == 0:
    del holdings.prefilling[chunk.request], books.begun[chunk.request]
    entry.first_in_flight = not entry.delivered
    if stays and not entry.delivered:  # its next token can be computed before its first is known: both stay there
      enter(entry, Phase.DECODING)
      entry.admitted, slot = True, entry.slot
      holdings.batch.enter(entry, holdings.steps)
      books.may_grow(worker.name)
  pages, limit = entry.pages[worker.name], books.true_limit(entry)
  entry.growth = {}
  books.release(worker.name, copies)  # whatever is written there from now on is written after the copy
  return ChunkOrder(entry.request, start, chunk.length, pages, limit, slot, entry.delivered, copies, begins)


def step_ended(books: Books, order: StepOrder) -> None:
  """Take note that a step is over, however it went."""
  worker, holdings = books.workers[order.worker], books.holdings[order.worker]
  first = holdings.steps.popleft()
  assert first.order == order.id, f'order {order.id} of {worker.name!r} ended before order {first.order}'
  first.ahead = 0
  if holdings.batch.standing == order.id:
    _stands_no_more(books, worker.name)
  books.look_at(worker.name)
  if not any(one.standing for one in holdings.steps):
    holdings.batch.rows.catch_up = None
  books.transfers.step_ended(order.id, books.now_s)
  books.may_grow(worker.name)
  for chunk in order.chunks:
    worker.queued_tokens -= chunk.length
    if chunk.is_last and (entry := books.requests.get(chunk.request.id)):
      entry.first_in_flight = False


def _stands_no_more(books: Books, worker: str) -> None:
  """The standing step of a worker is over, or is to end: it may be given another, and its sequences pages."""
  books.holdings[worker].batch.standing = None
  books.look_at(worker)
  books.may_grow(worker)


def step_done(books: Books, order: StepOrder, event: Done) -> bool:
  """Take note of a step that ended well, or of steps of one that stands, and of what they brought.

  Returns:
    Whether anything changed that a policy is to be asked about.
  """
  holdings = books.holdings[order.worker]
  step, is_last = holdings.steps[0], event.to_come == 0
  assert step.order == order.id, f'order {order.id} of {order.worker!r} tells of steps before order {step.order}'
  if is_last:
    step_ended(books, order)
  else:
    step.ahead = LOOKAHEAD if event.to_come is None else event.to_come
    if event.to_come is not None and holdings.batch.standing == order.id:
      _stands_no_more(books, order.worker)
  late_rows: frozenset[int] = frozenset()
  if event.decoded is not None:
    late_rows = _take(books, holdings.batch, step, event.decoded)
  batch, standing = holdings.batch, holdings.batch.standing
  if standing is not None and standing != order.id and any(map(batch.has, event.ended(step.batch))):
    _stands_no_more(books, order.worker)  # the worker lets it end, as one of its sequences has
  for chunk, computing in zip(order.chunks, step.computing, strict=True):
    _note_computed(books, chunk, computing, order.worker)
  in_time: list[Result] = []
  late: list[Result] = []
  computing_of = {entry.request.id: entry for entry in step.computing}
  for result in event.results:
    entry = computing_of.get(result.request, books.requests.get(result.request))
    (in_time if lifecycle.got(books, entry, result) else late).append(result)
  if event.results or event.decoded is not None:
    decoding = NOBODY if event.decoded is None else step.batch
    books.delivered.append(
      Delivered(books.now_s, order.id, tuple(in_time), tuple(late), decoding, event.decoded, late_rows)
    )
  if event.decoded is not None:
    for end in event.decoded.ended:
      if end.row not in late_rows and (entry := books.requests.get(step.batch.requests[end.row])) is not None:
        lifecycle.finish(books, entry, end.finish_reason, end.error)
  for chunk in order.chunks:
    entry = books.requests.get(chunk.request.id)
    if entry is not None and (chunk.restores or entry.phase is Phase.RESTARTING):
      entry.computed = entry.computed or chunk.restores
      books.unsettled.append(entry)
  if is_last:
    books.unsettled.extend(one for one in holdings.batch.leaving.values() if one.phase in _LEFT)
    holdings.batch.leaving.clear()
  was_replaced = len(holdings.steps) > 1
  return is_last or event.decoded is None or bool(event.decoded.ended) or not (event.to_come is None or was_replaced)


def _note_computed(books: Books, chunk: ChunkOrder, entry: RequestState, worker: str) -> None:
  """Note what a chunk has brought into the pages of a request, if all before it is there and it goes on."""
  if entry.worker != worker or entry.computed_to != chunk.start or entry.phase in _OVER:
    return
  entry.computed_to += chunk.length
  if books.prefixes is not None and worker in entry.pages:
    books.prefixes.note_computed(entry, worker, worker, entry.computed_to)


def _take(books: Books, batch: Decoding, step: StepInFlight, decoded: Decoded) -> frozenset[int]:
  """Add the tokens of steps to their sequences; the rows of those for which they are late."""
  assert decoded.counts.shape == (len(step.batch),) and decoded.tokens.shape[1] == len(step.batch)
  here = batch.rows.add(step.batch, step.owners, decoded.tokens, decoded.counts)
  if here is None:
    return frozenset()
  got = decoded.counts > 0
  if decoded.texts:
    got = got | np.array([bool(text) for text in decoded.texts])
  for end in decoded.ended:
    got[end.row] = True
  return frozenset(np.flatnonzero(got & ~here).tolist())
