"""Laws that hold however a run went: the right tokens, every page back, every request ended once, in bounded time."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from pdjax.serving import ClusterState
from pdjax.serving.block_keys import split
from pdjax.serving.events import AllBlocksCleared, BlockRemoved, BlockStored, Delivered, Event, Finished, Turn
from pdjax.serving.invariants import check
from pdjax.serving.orders import TransferOrder
from pdjax.types import Request
from tests.engine.cluster import assert_all_is_free


def watched(events: Iterable[Event], state: ClusterState, most_turns: int) -> Iterator[Event]:
  """The events, with the pages looked at in every turn; raises where there are more turns than a run can need."""
  turns = 0
  for event in events:
    if isinstance(event, Turn):
      turns += 1
      assert turns <= most_turns, f'{turns} turns, and no end'
      assert_held(state)
      check(state.books)
    yield event


def assert_held(state: ClusterState) -> None:
  """No page of a transfer that is not over is free, and none can be taken from it."""
  for order in state.books.in_flight.values():
    if isinstance(order, TransferOrder):
      for worker, pages in ((order.source, order.span.source_pages), (order.target, order.span.target_pages)):
        free = state.books.holdings[worker].pages.by_kind[order.span.kind].free()
        assert not set(pages) & set(free), f'{order} lost pages on {worker}'


def assert_blocks(events: Iterable[Event], state: ClusterState) -> None:
  """Whoever follows the events of blocks knows what each place holds."""
  prefixes = state.books.prefixes
  assert prefixes is not None
  held: dict[str, set[bytes]] = {name: set() for name in state.books.places}
  for event in events:
    match event:
      case BlockStored(_, place, keys, parent):
        new = split(keys)
        assert not held[place] & {*new}, 'a block is stored twice'
        assert parent == bytes(16) or parent not in new
        held[place] |= {*new}
      case BlockRemoved(_, place, keys):
        assert held[place] >= {*split(keys)}
        held[place] -= {*split(keys)}
      case AllBlocksCleared(_, place):
        held[place].clear()
  for name, keys in held.items():
    assert prefixes.index.num_blocks(name) == len(keys)
    assert prefixes.index.hit(name, prefixes.index.find(b''.join(keys))) == len(keys)


def assert_right(
  events: Iterable[Event],
  requests: Iterable[Request],
  state: ClusterState,
  plain: Callable[[Request], tuple[int, ...]],
) -> dict[str, str]:
  """Hold a run up to what must be; how each request ended."""
  events = tuple(events)
  ends = [event for event in events if isinstance(event, Finished)]
  assert Counter(end.request for end in ends) == Counter(one.id for one in requests), 'each ends once'
  delivered: dict[str, list[int]] = {}
  for event in events:
    if isinstance(event, Delivered):
      for result in event.results:
        delivered.setdefault(result.request, []).extend(result.tokens)
  by_id = {one.id: one for one in requests}
  for end in ends:
    expected = plain(by_id[end.request])
    if end.finish_reason in ('length', 'stop'):
      assert end.tokens == expected, f'{end.request} got {end.tokens}, not {expected}'
      assert tuple(delivered[end.request]) == expected, 'nothing is delivered twice'
    else:
      assert end.tokens == expected[: len(end.tokens)], f'{end.request} got {end.tokens}, not of {expected}'
  assert_all_is_free(state)
  assert not state.books.transfers
  assert state.next_timer_s == math.inf or not all(place.up for place in state.books.places.values())
  return {end.request: end.finish_reason for end in ends}
