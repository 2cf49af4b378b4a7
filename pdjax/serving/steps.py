"""Steps: how a `Step` becomes a `StepOrder` with every number filled in, and what its end brings."""

from pdjax.serving import lifecycle, sending
from pdjax.serving.actions import Chunk, Step
from pdjax.serving.books import Books
from pdjax.serving.checks import check_step
from pdjax.serving.events import Delivered, Done, Result
from pdjax.serving.orders import Admission, ChunkOrder, DecodeOrder, Order, StepOrder
from pdjax.serving.place import WorkerState
from pdjax.serving.requests import Phase, RequestState, enter
from pdjax.serving.view import ClusterView


def start_step(books: Books, view: ClusterView, step: Step) -> tuple[Order, ...]:
  """The order of a step and the transfers that leave with it.

  Raises:
    PolicyError: if the worker cannot take it; nothing is reserved then.
  """
  names = check_step(view, step)
  worker = books.workers[step.worker]
  decodes = [worker.decoding[name] for name in names]
  step_id = books.new_order_id()
  chunk_orders = []
  transfers = []
  for chunk in step.chunks:
    chunk_orders.append(_start_chunk(books, chunk, worker))
    transfers += sending.send_chunk(books, chunk, worker, step_id)
  groups = books.transfer.step_groups(worker.role, books.model.num_layers) if step.chunks else ()
  steps = step.steps
  if steps > 1 and not any(entry.tokens_left >= steps for entry in decodes):  # mostly the first has as many left
    steps = max(entry.tokens_left for entry in decodes)
  if books.pages_ahead is not None and decodes:
    steps, decodes = _within_reach(decodes, steps)
    books.may_grow(worker.name)
  decode_orders = _start_decodes(books, decodes, steps)
  order = StepOrder(step_id, worker.name, tuple(chunk_orders), decode_orders, steps, worker.incarnation, groups)
  books.holdings[worker.name].steps.append((step_id, step))
  return order, *transfers


def _start_chunk(books: Books, chunk: Chunk, worker: WorkerState) -> ChunkOrder:
  entry, holdings = books.requests[chunk.request], books.holdings[worker.name]
  if entry.phase is Phase.WAITING:
    del books.waiting[chunk.request]
    enter(entry, Phase.PREFILLING)
    entry.worker = worker.name
    holdings.prefilling[chunk.request] = entry
    worker.queued_tokens += entry.prompt_left
    books.reserve(entry, worker, decodes=worker.role.decodes and chunk.send_to is None)
    if chunk.send_to is not None:
      books.reserve(entry, books.workers[chunk.send_to], decodes=True)
  stays = entry.target == worker.name
  entry.started += chunk.length
  slot = None
  if entry.prompt_left == 0:
    del holdings.prefilling[chunk.request]
    entry.steps_in_flight += not entry.delivered
    if stays and not entry.delivered:  # its next token can be computed before its first is known: both stay there
      enter(entry, Phase.DECODING)
      entry.admitted, slot = True, entry.slot
      holdings.decoding[chunk.request] = entry
      books.may_grow(worker.name)
  pages, limit = entry.pages[worker.name], books.true_limit(entry)
  entry.growth = {}
  return ChunkOrder(entry.request, chunk.start, chunk.length, pages, limit, slot, entry.delivered)


def _within_reach(decodes: list[RequestState], steps: int) -> tuple[int, list[RequestState]]:
  """As many of the steps as some sequence has pages for, and the sequences that have: the others wait."""

  def ahead(entry: RequestState) -> int:  # steps that it has pages for; none are written past its last token
    return steps if entry.reach >= entry.most_tokens else entry.reach + 1 - entry.next_tokens

  steps = min(steps, max(map(ahead, decodes)))
  return steps, [entry for entry in decodes if ahead(entry) >= steps]


def _start_decodes(books: Books, decodes: list[RequestState], steps: int) -> tuple[DecodeOrder, ...]:
  orders = []
  for entry in decodes:
    assert entry.slot is not None and entry.target is not None
    admission = None
    if not entry.admitted:
      entry.admitted = True
      pages, limit = entry.pages[entry.target], books.true_limit(entry)
      admission = Admission(entry.request, pages, tuple(entry.tokens), limit, entry.copies)
      entry.growth = {}
      books.release_copied(entry)  # whatever is written there from now on is written after the copy
    context = entry.prompt_len + len(entry.tokens) + entry.steps_in_flight - 1
    if entry.growth:
      orders.append(DecodeOrder(entry.request.id, entry.slot, context, admission, entry.growth))
      entry.growth = {}
    else:
      orders.append(DecodeOrder(entry.request.id, entry.slot, context, admission))
    entry.steps_in_flight += steps
  return tuple(orders)


def step_ended(books: Books, order: StepOrder) -> None:
  """Take note that a step is over, however it went."""
  worker = books.workers[order.worker]
  first, _ = books.holdings[worker.name].steps.popleft()
  assert first == order.id, f'order {order.id} of {worker.name!r} ended before order {first}'
  books.transfers.step_ended(order.id, books.now_s)
  books.may_grow(worker.name)
  for chunk in order.chunks:
    worker.queued_tokens -= chunk.length
    if chunk.is_last and (entry := books.requests.get(chunk.request.id)):
      entry.steps_in_flight -= 1
  for decode in order.decodes:
    if entry := books.requests.get(decode.request):
      entry.steps_in_flight -= order.steps


def step_done(books: Books, order: StepOrder, event: Done) -> None:
  """Take note of a step that ended well, and of what it brought."""
  step_ended(books, order)
  in_time: list[Result] = []
  late: list[Result] = []
  for result in event.results:
    (in_time if lifecycle.got(books, result) else late).append(result)
  if event.results:
    results = tuple(in_time) if late else event.results
    books.delivered.append(Delivered(books.now_s, order.id, results, tuple(late)))
  for chunk in order.chunks:
    entry = books.requests.get(chunk.request.id)
    if entry is not None and (chunk.restores or entry.phase is Phase.RESTARTING):
      entry.computed = entry.computed or chunk.restores
      books.unsettled.append(entry)
  if len(event.results) < len(order.decodes) + len(order.chunks):  # some got nothing of the step
    for decode in order.decodes:
      entry = books.requests.get(decode.request)
      if entry is not None and entry.phase is Phase.RESTARTING:
        books.unsettled.append(entry)
