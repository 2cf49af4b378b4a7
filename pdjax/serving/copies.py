"""Copies of cached blocks from one place to another: what a policy asks for by `Transfer` of some `Blocks`."""

import dataclasses

from pdjax.serving.actions import SendOn, Transfer
from pdjax.serving.block_keys import KEY_BYTES
from pdjax.serving.blocks import Blocks
from pdjax.serving.books import Books
from pdjax.serving.checks import PolicyError, check_takes_new, check_up, find_place, find_way
from pdjax.serving.copy_under_way import Copy
from pdjax.serving.orders import TransferOrder
from pdjax.serving.prefixes import CopyPlan
from pdjax.serving.requests import RequestState
from pdjax.serving.tasks import is_kept_free
from pdjax.serving.view import ClusterView
from pdjax.types.span import Span


def start_copy(books: Books, view: ClusterView, action: Transfer) -> tuple[TransferOrder, ...]:
  """The orders that copy what a place holds of blocks to where they are not, as far as staging has room now.

  As many from the first one on as the target has free pages for; none if it has all that the source holds, or another
  copy brings it.

  Raises:
    PolicyError: if nothing is cached, a place is unknown, lost or draining, or there is no way between the two.
  """
  assert isinstance(action.request, Blocks)
  prefixes = books.prefixes
  if prefixes is None:
    raise PolicyError(f'{action!r}: nothing is cached; set prefix_cache=PrefixCache().')
  source, target = find_place(view, action, action.source), find_place(view, action, action.target)
  if source.name == target.name:
    raise PolicyError(f'{action!r}: source and target are one place; name another.')
  check_up(action, source)
  check_takes_new(action, target)
  find_way(view, action, source.name, target.name)
  blocks = action.request
  known = (books.requests.get(blocks.request), books.ended.get(blocks.request))
  entry = next((one for one in known if one is not None and one.number == blocks.number), None)
  if entry is not None:
    if books.ended.get(blocks.request) is entry:
      del books.ended[blocks.request]  # so that a policy is not asked of it again
    entry.copies_asked[target.name] = entry.copies_asked.get(target.name, 0) + 1
  plan = prefixes.plan_copy(blocks, source.name, target.name)
  if plan is None:
    return ()
  for copy in books.copies.values():
    if copy.target == target.name and copy.failed_at is None and _brings(copy, plan, prefixes.block_tokens):
      _wait_for(books, copy, entry)
      return ()
  ours, theirs = books.holdings[source.name].pages, books.holdings[target.name].pages
  theirs.hold({prefixes.kind: plan.before})  # before others take their place
  free = theirs.by_kind[prefixes.kind].num_free - books.holdings[target.name].wanted.get(prefixes.kind, 0)
  size = prefixes.page_tokens[target.name]
  end = min(plan.end, plan.start + max(free, 0) * size)
  if end <= plan.start or end <= plan.have:
    books.drop(target.name, {prefixes.kind: plan.before})
    return ()
  plan = dataclasses.replace(plan, end=end)
  ours.hold({prefixes.kind: plan.source_pages})
  pages = theirs.take({prefixes.kind: -(-(end - plan.start) // size)})[prefixes.kind]
  copy = Copy(blocks, plan, source.name, target.name, pages, plan.start)
  books.copies[number := books.new_order_id()] = copy
  _wait_for(books, copy, entry)
  return _send(books, number)


def _brings(copy: Copy, plan: CopyPlan, block_tokens: int) -> bool:
  """Whether a copy that is under way brings all that another would."""
  size = plan.end // block_tokens * KEY_BYTES
  return copy.plan.start <= plan.start and plan.end <= copy.plan.end and copy.plan.keys[:size] == plan.keys[:size]


def _wait_for(books: Books, copy: Copy, entry: RequestState | None) -> None:
  """Note that a request may begin behind what a copy brings."""
  if entry is not None and books.places[copy.target].role.prefills:
    entry.fetching += 1
    copy.entries.append(entry)


def send_on(books: Books, action: SendOn) -> tuple[TransferOrder, ...]:
  """The next orders of a copy for which staging had no room before."""
  return _send(books, action.copy) if action.copy in books.copies else ()


def waiting_copies(books: Books) -> list[SendOn]:
  """The copies that staging has room for some more of."""
  found = []
  for number, copy in books.copies.items():
    if copy.sent < copy.plan.end and copy.failed_at is None and _room(books, copy) >= 1:
      found.append(SendOn(number))
  return found


def _room(books: Books, copy: Copy) -> int:
  """Units that staging has room for now, beside what is to be tried again."""
  if is_kept_free(books, copy.source, copy.target):
    return 0
  (lane,) = books.ways[copy.source, copy.target]
  free = min(books.holdings[copy.source].staging_out.free_bytes, books.holdings[copy.target].staging_in.free_bytes)
  return free // lane.unit_bytes


def _send(books: Books, number: int) -> tuple[TransferOrder, ...]:
  """Transfers of what is left of a copy, each of at most half of the staging, while there is room."""
  copy = books.copies[number]
  plan, (lane,) = copy.plan, books.ways[copy.source, copy.target]
  source, target = books.places[copy.source], books.places[copy.target]
  most = max(books.transfer.staging_bytes // 2 // lane.unit_bytes, 1)
  orders = []
  while copy.sent < plan.end and copy.failed_at is None:
    units = min(-(-(plan.end - copy.sent) // lane.unit), most, _room(books, copy))
    if units < 1:
      break
    start, end = copy.sent, min(copy.sent + units * lane.unit, plan.end)
    first_ours, first_theirs = plan.start // lane.source_page_size, plan.start // lane.target_page_size
    ours = plan.source_pages[
      start // lane.source_page_size - first_ours : -(-end // lane.source_page_size) - first_ours
    ]
    theirs = copy.pages[start // lane.target_page_size - first_theirs : -(-end // lane.target_page_size) - first_theirs]
    order = TransferOrder(
      books.new_order_id(), copy.blocks.request, source.name, target.name,
      Span(ours, theirs, start, end - start, None, lane.kind.name), None,
      (source.incarnation, target.incarnation), lane.num_bytes(end - start), number,
    )  # fmt: skip
    books.hold(order)
    copy.under_way += 1
    copy.sent = end
    orders.append(order)
  return tuple(orders)


def part_ended(books: Books, order: TransferOrder, *, arrived: bool) -> None:
  """Take note that a transfer of a copy is over; the last one ends the copy."""
  assert order.copy is not None
  books.let_go(order)
  books.transfers.end(order.id)
  copy = books.copies[order.copy]
  copy.under_way -= 1
  if not arrived:
    copy.failed_at = min(order.span.start, copy.plan.end if copy.failed_at is None else copy.failed_at)
  if copy.is_over:
    _end(books, order.copy)


def spoil_copies(books: Books, blocks: Blocks) -> None:
  """Let nothing count that is on its way and begins like blocks that are spoilt."""
  assert books.prefixes is not None
  for copy in books.copies.values():
    keys = books.prefixes.making.keys_of(blocks, copy.plan.made)[:KEY_BYTES]
    if keys and keys == copy.plan.keys[:KEY_BYTES]:
      copy.failed_at = copy.plan.start


def forget_target(books: Books, place: str) -> None:
  """Let nothing count that has arrived at a place, which is lost."""
  for copy in books.copies.values():
    if place == copy.target:
      copy.failed_at = copy.plan.start


def give_up_copies(books: Books, place: str) -> None:
  """End the copies from or to a place that is lost, whose transfers are over."""
  for number, copy in [*books.copies.items()]:
    if place in (copy.source, copy.target):
      copy.failed_at = copy.sent if copy.failed_at is None else copy.failed_at
      _end(books, number)


def _end(books: Books, number: int) -> None:
  """Note what has arrived of a copy, and let go of what it held."""
  copy, prefixes = books.copies.pop(number), books.prefixes
  assert prefixes is not None
  plan, end = copy.plan, copy.plan.end if copy.failed_at is None else copy.failed_at
  prefixes.note_copied(copy.blocks, plan, copy.target, copy.pages, end)
  books.drop(copy.source, {prefixes.kind: plan.source_pages})
  books.drop(copy.target, {prefixes.kind: (*plan.before, *copy.pages)})
  for entry in copy.entries:
    entry.fetching -= 1
    entry.fetched[copy.target] = copy.source, plan.have
