"""The cluster as policies see it: the requests, the workers, and what is free, to be read."""

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from pdjax.serving.actions import Step
from pdjax.serving.block_making import Blocks
from pdjax.serving.books import Books
from pdjax.serving.orders import MAX_ORDERS
from pdjax.serving.page_allocator import PlacePages
from pdjax.serving.requests import Phase, RequestState
from pdjax.types.model import ModelSpec
from pdjax.types.request import Request
from pdjax.types.transfer import TransferSpec
from pdjax.types.worker import Role, WorkerSpec

Kept = TypeVar('Kept')


class RequestView(Protocol):
  """A request as a policy sees it: the books' own object, to be read."""

  @property
  def request(self) -> Request:
    """The request."""

  @property
  def limit(self) -> int:
    """Most tokens it may generate: its own `max_tokens`, or what is left of the model's context."""

  @property
  def phase(self) -> Phase:
    """The stage it has reached."""

  @property
  def worker(self) -> str | None:
    """The worker that prefills it."""

  @property
  def target(self) -> str | None:
    """The worker that decodes it; the same as `worker` when nothing moves."""

  @property
  def pages(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
    """Pages it holds, by worker and cache kind."""

  @property
  def started(self) -> int:
    """Prompt tokens handed to the worker."""

  @property
  def prefill_len(self) -> int:
    """Tokens to compute before it can decode: its prompt and, begun again, what was delivered but the last token."""

  @property
  def prompt_left(self) -> int:
    """Tokens of `prefill_len` that no step was given yet."""

  @property
  def tokens(self) -> Sequence[int]:
    """Tokens generated and delivered."""

  @property
  def num_tokens(self) -> int:
    """The number of `tokens`, for which none is taken out of where steps bring them."""

  @property
  def delivered(self) -> Sequence[int]:
    """The tokens it had when it was last begun again."""

  @property
  def tokens_left(self) -> int:
    """Tokens that may still be asked for, those under way not counted."""

  @property
  def can_step(self) -> bool:
    """Whether another decode step can bring it a token, and it has a page for that."""

  @property
  def preemptions(self) -> int:
    """Times it was preempted."""

  @property
  def computed(self) -> bool:
    """Whether its whole prompt is computed."""

  @property
  def attempts(self) -> int:
    """Times it was begun, this one counted."""

  @property
  def fetching(self) -> int:
    """Copies of its blocks that are under way from place to place."""

  @property
  def fetches(self) -> Mapping[str, int]:
    """Times that a copy of its blocks was asked for, by the place that it goes to."""

  @property
  def number(self) -> int:
    """Its position in the order of arrival."""

  @property
  def slots_needed(self) -> int:
    """Slots where it decodes: one, and one for each further sample that follows it."""


class PagesView(Protocol):
  """The pages and slots of a worker, as a policy sees them."""

  @property
  def page_size(self) -> int:
    """Tokens per page."""

  @property
  def num_pages(self) -> int:
    """Pages in all, free or not."""

  @property
  def free_pages(self) -> int:
    """Pages that nobody holds; of several cache kinds, the free memory in whole pages."""

  @property
  def cached_pages(self) -> int:
    """Pages that nobody holds and whose content is found again; they count as free."""

  @property
  def used_bytes(self) -> int:
    """Bytes of the cache that somebody holds, over all devices, copies counted once."""

  @property
  def num_bytes(self) -> int:
    """Bytes of the cache in all, held or not, over all devices, copies counted once."""

  @property
  def free_slots(self) -> int:
    """Slots in which no sequence stands."""


class WorkerView(PagesView, Protocol):
  """A worker as a policy sees it: the books' own object, to be read."""

  @property
  def spec(self) -> WorkerSpec:
    """The worker as the config has it."""

  @property
  def name(self) -> str:
    """Its name."""

  @property
  def role(self) -> Role:
    """The phases it runs now; `spec` has those that it began with, and which it may take."""

  @property
  def ever_prefills(self) -> bool:
    """Whether it prefills in any of its roles."""

  @property
  def ever_decodes(self) -> bool:
    """Whether it decodes in any of its roles."""

  @property
  def draining(self) -> Role | None:
    """The role that it is to have once it is empty; until then it takes no new request. None if it keeps its own."""

  @property
  def steps(self) -> Sequence[Step]:
    """Steps in flight, oldest first, as the policy asked for them."""

  @property
  def num_steps(self) -> int:
    """The number of steps in flight."""

  @property
  def prefilling(self) -> Mapping[str, RequestView]:
    """Prompts begun here with tokens left to hand over, in order."""

  @property
  def decoding(self) -> Mapping[str, RequestView]:
    """Sequences in its slots."""

  @property
  def queued_tokens(self) -> int:
    """Prompt tokens of requests begun here that are not computed yet."""

  @property
  def incarnation(self) -> int:
    """The number of its incarnation, from 1."""

  @property
  def up(self) -> bool:
    """Whether it takes orders: it was not lost, or is back."""

  @property
  def lost(self) -> str:
    """The error it was lost with; empty while it is up."""

  @property
  def given_up(self) -> bool:
    """Whether nobody waits for it to come back any more."""

  def decodable(self) -> list[str]:
    """Sequences that another decode step can bring a token, and that have a page for it."""

  @property
  def has_work(self) -> bool:
    """Whether another step can bring a sequence a token that no step in flight brings it."""

  @property
  def is_standing(self) -> bool:
    """Whether a standing step goes on here until something changes."""

  @property
  def is_short(self) -> bool:
    """Whether sequences here would decode and none can for want of pages, with no step under way to free some."""


class Room:
  """A scratch view of what is free, so that one part of a decision cannot promise what another took."""

  def __init__(self, view: 'ClusterView'):
    self._view, self._books = view, view._books
    self._kept: dict[Any, Any] = {}
    self._pages: dict[str, dict[str, int]] = {}  # taken, by worker and cache kind
    self._slots: dict[str, int] = {}
    self._tokens: dict[str, int] = {}

  def pages(self, worker: str) -> int:
    """Free pages; of several cache kinds, the free memory in whole pages."""
    free, taken = self._view.workers[worker].free_pages, self._pages.get(worker)
    return free - self._place_pages(worker).pools.whole_pages(taken) if taken else free

  def slots(self, worker: str) -> int:
    """Free slots."""
    return len(self._books.holdings[worker].slots) - self._slots.get(worker, 0)

  def orders(self, worker: str) -> int:
    """Steps that may still be handed over; none to a worker that is lost."""
    place = self._books.workers[worker]
    return MAX_ORDERS - place.num_steps if place.up else 0

  def cached_tokens(self, request: str, worker: str) -> int:
    """Tokens at the beginning of a request that a worker holds; see `ClusterView.cached_tokens`.

    Of one whose prompt is computed, or that waits where a worker only decodes, those that need not be sent there.
    """
    books = self._books
    source = books.requests[request].worker
    if source is None and not books.workers[worker].role.prefills and books.prefill_workers:
      source = books.prefill_workers[0].name
    return self._view.cached_tokens(request, worker, source)

  def queued_tokens(self, worker: str) -> int:
    """Prompt tokens the worker was given and has not finished."""
    return self._books.workers[worker].queued_tokens + self._tokens.get(worker, 0)

  def fits(self, request: str, worker: str, *, decodes: bool, start: int | None = None) -> bool:
    """Whether the worker has pages (and slots, if it decodes there) for the request and its further samples now.

    A worker that is lost or draining takes none. What is cached there and held by others takes no room; what is cached
    and held by nobody is room for whoever needs it.

    Args:
      request: The request.
      worker: The worker.
      decodes: Whether it decodes there.
      start: The token at which its first chunk is to start there; None is behind all that is cached.
    """
    return bool(self.fitting(request, (self._view.workers[worker],), decodes=decodes, start=start))

  def fitting(
    self, request: str, workers: Iterable[WorkerView], *, decodes: bool, start: int | None = None
  ) -> list[WorkerView]:
    """Those of some workers that have room, as `fits` says."""
    entry, found, all_holdings, pools = self._books.requests[request], [], self._books.holdings, None
    slots_needed = entry.slots_needed if decodes else 0
    needed: Mapping[str, int] = {}
    for worker in workers:
      if not worker.up or worker.draining:
        continue
      name = worker.name
      holdings = all_holdings[name]
      if decodes and slots_needed > len(holdings.slots) - self._slots.get(name, 0):
        continue
      if holdings.pages.pools is not pools:  # one object for all workers that are alike
        pools = holdings.pages.pools
        needed = entry.pages_needed(pools, decodes=decodes)
      here = needed
      if held := entry.pages.get(name):  # it would go on where it is
        here = {kind: max(count - len(held[kind]), 0) for kind, count in needed.items()}
      taken = self._pages.get(name)
      if holdings.wanted:  # by those that decode there
        taken = {kind: holdings.wanted.get(kind, 0) + (taken[kind] if taken else 0) for kind in needed}
      if holdings.pages.fits(here, taken):
        found.append(worker)
      elif shared := self._shared(entry, name, start):
        (kind,) = here
        if holdings.pages.fits({kind: here[kind] - shared}, taken):
          found.append(worker)
    return found

  def kept(self, key: Any, make: Callable[[], Kept]) -> Kept:
    """The answer of `make`, made once until something more is taken; for what a decision needs again and again."""
    if key not in self._kept:
      self._kept[key] = make()
    return self._kept[key]

  def take(self, request: str, worker: str, *, decodes: bool, start: int | None = None) -> None:
    """Count the request's pages, and its slots if it decodes there, as taken; see `fits`."""
    self._kept.clear()
    taken = self._pages.setdefault(worker, {})
    entry = self._books.requests[request]
    shared, held = self._shared(entry, worker, start), entry.pages.get(worker, {})
    for kind, pages in self._view.kind_pages_needed(request, worker, decodes=decodes).items():
      taken[kind] = taken.get(kind, 0) + max(pages - shared - len(held.get(kind, ())), 0)
    if decodes:
      self._slots[worker] = self._slots.get(worker, 0) + self._view.slots_needed(request)

  def _shared(self, entry: RequestState, worker: str, start: int | None) -> int:
    """Pages that the request finds at a worker and others hold."""
    prefixes = self._books.prefixes
    if prefixes is None or worker in entry.pages:
      return 0
    return prefixes.shared_pages(entry, worker, entry.prefill_len if start is None else start)

  def take_tokens(self, worker: str, tokens: int) -> None:
    """Count prompt tokens as given to the worker."""
    self._kept.clear()
    self._tokens[worker] = self._tokens.get(worker, 0) + tokens

  def _place_pages(self, worker: str) -> PlacePages:
    return self._view._books.holdings[worker].pages


class ClusterView:
  """The cluster as a policy sees it: the books as they are now, to be read.

  The requests and workers in it are the books' own, no copies, so a view costs nothing and is always up to date. Its
  mappings refuse to be changed, and for type checkers every field refuses. It does not tell how many tokens a request
  really generates.
  """

  def __init__(self, books: Books):
    """Look at these books."""
    self._books = books
    self._workers: Mapping[str, WorkerView] = types.MappingProxyType(books.workers)
    self._places: Mapping[str, WorkerView] = types.MappingProxyType(books.places)
    self._ended: Mapping[str, RequestView] = types.MappingProxyType(books.ended)
    self._requests: Mapping[str, RequestView] = types.MappingProxyType(books.requests)
    self._begun: Mapping[str, RequestView] = types.MappingProxyType(books.begun)
    self._prefilled: Mapping[str, RequestView] = types.MappingProxyType(books.prefilled)

  @property
  def now_s(self) -> float:
    """The time of the turn: seconds since the clock started."""
    return self._books.now_s

  @property
  def model(self) -> ModelSpec:
    """The model served."""
    return self._books.model

  @property
  def transfer(self) -> TransferSpec:
    """The settings of transfers."""
    return self._books.transfer

  @property
  def workers(self) -> Mapping[str, WorkerView]:
    """Each worker by name, in the order of the config."""
    return self._workers

  @property
  def places(self) -> Mapping[str, WorkerView]:
    """Each place by name: the workers, and behind them those that only hold pages (`ServingConfig.places`)."""
    return self._places

  @property
  def prefill_workers(self) -> Sequence[WorkerView]:
    """Those that prefill now; one that is draining goes on with the prompts it has."""
    return self._books.prefill_workers

  @property
  def decode_workers(self) -> Sequence[WorkerView]:
    """Those that decode now; one that is draining goes on with the sequences it has."""
    return self._books.decode_workers

  @property
  def able_to_prefill(self) -> Sequence[WorkerView]:
    """Those that prefill and can be given another step, in the order of the config; kept, not searched."""
    return self._books.able_to_prefill.found()

  @property
  def able_to_decode(self) -> Sequence[WorkerView]:
    """Those that decode and can be given another step that brings a sequence a token; as `able_to_prefill`."""
    return self._books.able_to_decode.found()

  @property
  def requests(self) -> Mapping[str, RequestView]:
    """Each unfinished request by id."""
    return self._requests

  @property
  def waiting(self) -> Mapping[str, RequestView]:
    """Those of which nothing was started, in order of arrival, or of the `waiting_key` that the policy names."""
    return types.MappingProxyType(self._books.waiting)

  @property
  def begun(self) -> Mapping[str, RequestView]:
    """Those whose prompt was begun and has tokens left to hand over, wherever it is."""
    return self._begun

  @property
  def prefilled(self) -> Mapping[str, RequestView]:
    """Those whose prompt is computed and whose KV has nowhere to go yet, in order."""
    return self._prefilled

  @property
  def ended(self) -> Mapping[str, RequestView]:
    """Requests that were served to their end in this turn and left blocks where they were; none without a cache."""
    return self._ended

  def room(self) -> Room:
    """A fresh scratch view of what is free."""
    return Room(self)

  def pages_needed(self, request: str, worker: str, *, decodes: bool) -> int:
    """Pages of a worker that a request takes when it begins there.

    They are for the prompt and, with `decodes`, for all the tokens it may generate but the last, or for those that it
    takes pages ahead for.

    With further samples that follow it, theirs too: all but those of the prompt's full pages. Of several cache kinds,
    the memory for all of them in whole pages.
    """
    pools = self._books.holdings[worker].pages.pools
    return pools.whole_pages(self.kind_pages_needed(request, worker, decodes=decodes))

  def cached_tokens(self, request: str, worker: str, source: str | None = None) -> int:
    """Tokens at the beginning of a request that a worker holds; its first chunk may start behind them.

    A chunk that starts further on starts at what is cached, with as many tokens: others may have taken some of the
    pages since a policy looked.

    Args:
      request: The request.
      worker: The worker.
      source: The worker that prefills it, where it is another.

    Raises:
      KeyError: if there is no such request or worker.
    """
    prefixes, entry = self._books.prefixes, self._books.requests.get(request)
    if entry is None or worker not in self._workers or (source is not None and source not in self._workers):
      known = 'an unfinished request' if entry is None else f'workers, which are {", ".join(self._workers)}'
      raise KeyError(f'cached_tokens({request!r:.80}, {worker!r:.80}, {source!r:.80}), expected the name of {known}.')
    return 0 if prefixes is None else prefixes.hit(entry, worker, source)

  def fetchable_tokens(self, request: str, place: str, worker: str) -> int:
    """Tokens at the beginning of a request that a worker could begin behind, were they copied to it from a place.

    Raises:
      KeyError: if there is no such request, place or worker.
    """
    prefixes, entry = self._books.prefixes, self._books.requests.get(request)
    if entry is None or place not in self._places or worker not in self._workers:
      raise KeyError(
        f'fetchable_tokens({request!r:.80}, {place!r:.80}, {worker!r:.80}), expected the names of an unfinished '
        f'request, a place and a worker, of {", ".join(self._places)}.'
      )
    return 0 if prefixes is None or not self.has_way(place, worker) else prefixes.fetchable(entry, place, worker)

  def blocks(self, request: str) -> Blocks:
    """The blocks of a request that is unfinished, or has `ended`, by which `Transfer` copies what a place holds of it.

    They are those of its prompt and of what it has generated, whoever holds them.

    Raises:
      KeyError: if there is no such request, or nothing is cached.
    """
    entry = self._books.requests.get(request) or self._books.ended.get(request)
    if entry is None or self._books.prefixes is None:
      known = (
        'a request that is unfinished or has ended in this turn' if entry is None else 'a config with prefix_cache'
      )
      raise KeyError(f'blocks({request!r:.80}), expected {known}.')
    return self._books.prefixes.making.blocks(entry)

  def has_way(self, source: str, target: str) -> bool:
    """Whether pages may travel from one place to another."""
    return self._books.is_way(source, target)

  @property
  def caches(self) -> bool:
    """Whether prefixes are kept (`ServingConfig.prefix_cache`)."""
    return self._books.prefixes is not None

  def may_be_cached(self, tokens: int) -> bool:
    """Whether so many tokens of a beginning may be found: prefixes are kept, and they are whole blocks."""
    prefixes = self._books.prefixes
    return prefixes is not None and tokens >= 0 and tokens % prefixes.block_tokens == 0

  @property
  def grows(self) -> bool:
    """Whether sequences take pages as they grow, so that they may come to lack some."""
    return self._books.pages_ahead is not None

  @property
  def max_preemptions(self) -> int:
    """Most times that one request is preempted."""
    return self._books.max_preemptions

  def could_fit(self, request: str, worker: str, *, decodes: bool) -> bool:
    """Whether a worker has as many pages in all as the request may ever need there, free or not."""
    pages = self._books.holdings[worker].pages
    return pages.could_fit(self._books.requests[request].most_pages(pages.pools, decodes=decodes))

  def capacity(self, worker: str) -> str:
    """The pages of a worker in words, of each cache kind if there are several."""
    return self._books.holdings[worker].pages.capacity

  def describe_pages(self, request: str, worker: str, *, decodes: bool, ever: bool = False) -> str:
    """The pages of a worker that the request needs, in words, of each cache kind if there are several.

    They are those that it takes when it begins there, or with `ever` all that it may ever need.
    """
    pools, entry = self._books.holdings[worker].pages.pools, self._books.requests[request]
    return pools.describe((entry.most_pages if ever else entry.pages_needed)(pools, decodes=decodes))

  def kind_pages_needed(self, request: str, worker: str, *, decodes: bool) -> Mapping[str, int]:
    """As `pages_needed`, by cache kind."""
    pools = self._books.holdings[worker].pages.pools
    return self._books.requests[request].pages_needed(pools, decodes=decodes)

  def slots_needed(self, request: str) -> int:
    """Slots where it decodes: one, and one for each further sample that follows it."""
    return self._books.requests[request].slots_needed


__all__ = ['ClusterView', 'Phase', 'RequestView', 'Room', 'WorkerView']
