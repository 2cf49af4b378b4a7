"""Sending: the transfers of a prompt to the worker that will decode it, as far as there is staging memory for them."""

from collections.abc import Sequence

from pdjax.serving.actions import Chunk, Transfer
from pdjax.serving.blocks import Blocks
from pdjax.serving.books import Books
from pdjax.serving.checks import (
  PolicyError,
  check_decodes,
  check_takes_new,
  check_up,
  describe_needs,
  find_request,
  find_way,
  find_worker,
)
from pdjax.serving.copies import start_copy
from pdjax.serving.moving import start_move
from pdjax.serving.orders import LeaveOrder, TransferOrder
from pdjax.serving.place import WorkerState
from pdjax.serving.requests import Phase, RequestState, enter
from pdjax.serving.tasks import is_kept_free
from pdjax.serving.view import ClusterView
from pdjax.types.pools import Lane
from pdjax.types.span import Span

LayerGroup = tuple[int, int]  # the first, and the one after the last


def reserve_target(books: Books, entry: RequestState, target: WorkerState) -> None:
  """Take pages and a slot where a prompt that another worker computes is to decode; what is there is not sent."""
  found = books.hold_cached(entry, target.name, entry.prefill_len, entry.worker)
  copies = books.reserve(entry, target, decodes=True, found=found)
  assert not copies, 'what is sent has whole pages'
  if found.tokens:
    (kind,) = entry.pages[target.name]
    entry.sent[kind] = found.tokens
    if entry.goes_to is None:  # else it moves, and was told of
      books.tell_hit(entry, target.name, found.tokens, 'decode')


def send_chunk(books: Books, chunk: Chunk, worker: WorkerState, step: int) -> list[TransferOrder]:
  """The transfers of what a chunk completes: units of both page sizes, once they are to travel."""
  if chunk.send_to is None:
    return []
  entry = books.requests[chunk.request]
  if not entry.prompt_left or books.transfer.granularity != 'request':
    entry.tokens_due = entry.started
  entry.last_step = step
  return send_due(books, entry, step, _layer_groups(books, chunk, worker))


def _layer_groups(books: Books, chunk: Chunk, worker: WorkerState) -> Sequence[LayerGroup | None]:
  """The groups of layers in which a chunk that begins now travels; None for all of them at once."""
  transfer, is_last = books.transfer, books.requests[chunk.request].prompt_left == 0
  groups = transfer.step_groups(worker.role, books.model.num_layers)
  if not groups or transfer.layered_from is None or chunk.length < transfer.layered_from:
    return (None,)
  return groups if is_last or transfer.granularity == 'layers' else (None,)


def send_due(
  books: Books, entry: RequestState, after: int | None, groups: Sequence[LayerGroup | None] = (None,)
) -> list[TransferOrder]:
  """Transfers of what can be sent on, as far as staging has room; the rest is due until some is freed."""
  assert entry.worker is not None and entry.target is not None
  source, target = books.workers[entry.worker], books.workers[entry.target]
  parts: list[tuple[Lane, int, int]] = []  # of which kind, from which entry on, how many
  is_left = False
  for lane in books.ways[source.name, target.name]:
    more, left = _fitting(books, entry, source, target, lane, parts)
    parts += more
    is_left = is_left or left > 0
  if is_left:
    books.due[entry.request.id] = entry
  else:
    books.due.pop(entry.request.id, None)
  return [
    _move(books, entry, source, target, lane, start, entries, after, layers)
    for layers in groups
    for lane, start, entries in parts
    if lane.kind.num_layers(layers)
  ]


def _fitting(
  books: Books,
  entry: RequestState,
  source: WorkerState,
  target: WorkerState,
  lane: Lane,
  before: Sequence[tuple[Lane, int, int]],
) -> tuple[list[tuple[Lane, int, int]], int]:
  """The parts of one cache kind for which staging has room beside others, and the entries that are left."""
  name, unit, unit_bytes = lane.kind.name, lane.unit, lane.unit_bytes
  staging_out, staging_in = books.holdings[source.name].staging_out, books.holdings[target.name].staging_in
  free = min(staging_out.free_bytes, staging_in.free_bytes) - sum(one.num_bytes(count) for one, _, count in before)
  # Half of it at most, so that one part is gathered while another is on the wire.
  most = max(unit_bytes, books.transfer.staging_bytes // 2)
  sent = entry.sent.get(name, 0)
  left = lane.sendable(entry.tokens_due, entry.prefill_len) - sent
  parts = []
  while left > 0 and not is_kept_free(books, source.name, target.name):
    units = min(-(-left // unit), min(free, most) // unit_bytes)
    if units < 1:
      break
    parts.append((lane, sent, units * unit))
    free -= units * unit_bytes
    entries = min(units * unit, left)
    sent = entry.sent[name] = sent + entries
    left -= entries
  return parts, left


def sendable(books: Books) -> list[Transfer]:
  """The transfers due of requests, as far as staging has room for some of each."""
  return [Transfer(name, entry.target) for name, entry in books.due.items() if entry.target and _has_room(books, entry)]


def _has_room(books: Books, entry: RequestState) -> bool:
  assert entry.worker is not None and entry.target is not None
  free = min(books.holdings[entry.worker].staging_out.free_bytes, books.holdings[entry.target].staging_in.free_bytes)
  return any(lane.unit_bytes <= free for lane in books.ways[entry.worker, entry.target])


def _move(
  books: Books,
  entry: RequestState,
  source: WorkerState,
  target: WorkerState,
  lane: Lane,
  start: int,
  entries: int,
  after: int | None,
  layers: LayerGroup | None,
) -> TransferOrder:
  """The transfer of so many entries of one cache kind, whole units."""
  name, end = lane.kind.name, start + entries
  ours, theirs = entry.pages[source.name][name], entry.pages[target.name][name]
  if lane.kind.grows:
    ours = ours[start // lane.source_page_size : -(-end // lane.source_page_size)]
    theirs = theirs[start // lane.target_page_size : -(-end // lane.target_page_size)]
  order = TransferOrder(
    books.new_order_id(), entry.request.id, source.name, target.name,
    Span(ours, theirs, start, entries, layers, name), after,
    (source.incarnation, target.incarnation), lane.num_bytes(entries, layers),
  )  # fmt: skip
  books.hold(order)
  entry.transfers += 1
  return order


def start_transfer(books: Books, view: ClusterView, action: Transfer) -> tuple[TransferOrder | LeaveOrder, ...]:
  """The orders that move a request, as far as staging has room for it now, or copy blocks.

  Raises:
    PolicyError: if that cannot be done; see `start_copy`, `start_move` and `_send_prompt`.
  """
  if isinstance(action.request, Blocks):
    return start_copy(books, view, action)
  find_request(view, action, action.request)
  find_worker(view, action, action.target)
  entry = books.requests[action.request]
  here = entry.target if entry.phase is Phase.DECODING else entry.worker
  if action.source not in (None, here):
    raise PolicyError(f'{action!r}: the request is at {here!r} and not at {action.source!r}; leave source out.')
  if entry.phase is Phase.DECODING:
    return start_move(books, view, action, entry)
  return _send_prompt(books, view, action, entry)


def _send_prompt(books: Books, view: ClusterView, action: Transfer, entry: RequestState) -> tuple[TransferOrder, ...]:
  """The orders that move a computed prompt, or what of it is due and staging has room for now.

  Raises:
    PolicyError: if the request cannot be moved, or its target has no room.
  """
  name, target = entry.request.id, books.workers[action.target]
  if name in books.due and entry.target == action.target:
    return tuple(send_due(books, entry, entry.last_step if entry.last_step in books.in_flight else None))
  if entry.phase is not Phase.PREFILLED:
    raise PolicyError(
      f'{action!r}: the request is {entry.phase.value}; only one that is prefilled, or decodes, can be moved.'
    )
  assert entry.worker is not None
  check_decodes(action, target)
  if target.name == entry.worker:
    check_up(action, target)
  else:
    check_takes_new(action, target)
    find_way(view, action, entry.worker, target.name)
  room = view.room()
  if not room.fits(name, target.name, decodes=True):
    raise PolicyError(
      f'{action!r}: it needs {describe_needs(view, name, target.name, decodes=True)} on {target.name!r}, '
      f'which has {room.pages(target.name)} pages and {room.slots(target.name)} slots left.'
    )
  del books.prefilled[name]
  enter(entry, Phase.MOVING)
  entry.tokens_due = entry.prefill_len
  if target.name == entry.worker:
    books.reserve(entry, target, decodes=True)
    books.unsettled.append(entry)
    return ()
  reserve_target(books, entry, target)
  orders = tuple(send_due(books, entry, None))
  if not orders and name not in books.due:  # all of it is there already
    books.unsettled.append(entry)
  return orders


def transfer_ended(books: Books, order: TransferOrder) -> RequestState | None:
  """Let go of what a transfer held; return the request that needed it, if it has not ended."""
  books.let_go(order)
  request = books.transfers.end(order.id).request
  assert request is not None, 'a part of a copy ends elsewhere'
  entry = books.requests.get(request)
  if entry is not None:
    entry.transfers -= 1
  return entry
