"""The cluster as policies see it: the requests, the workers, and what is free, to be read."""

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pdjax.serving.books import Books
from pdjax.serving.cached_view import CachedView
from pdjax.serving.orders import MAX_ORDERS
from pdjax.serving.page_allocator import PlacePages
from pdjax.serving.requests import Phase, RequestState
from pdjax.serving.seen import RequestView, WorkerView
from pdjax.types.model import ModelSpec
from pdjax.types.transfer import TransferSpec

Kept = TypeVar('Kept')


class Room:
  """A scratch view of what is free, so that one part of a decision cannot promise what another took."""

  def __init__(self, view: 'ClusterView'):
    self._view, self._books = view, view._books
    self._kept: dict[Any, Any] = {}
    self._pages: dict[str, dict[str, int]] = {}  # taken, by worker and cache kind
    self._slots: dict[str, int] = {}
    self._tokens: dict[str, int] = {}
    self._step_tokens: Mapping[str, int] = {}

  @property
  def caches(self) -> bool:
    """Whether anything is cached at all."""
    return self._view.caches

  def plan_steps(self, tokens: Mapping[str, int]) -> None:
    """Note how many prompt tokens at most a policy gives the steps of each worker, for whoever makes forecasts."""
    self._step_tokens = tokens

  def step_tokens(self, worker: str) -> int:
    """Most prompt tokens that a step of a worker takes."""
    most = self._view.workers[worker].spec.max_step_tokens
    return max(min(self._step_tokens.get(worker, most), most), 1)

  def pages(self, worker: str) -> int:
    """Free pages; of several cache kinds, the free memory in whole pages."""
    free, taken = self._view.workers[worker].free_pages, self._pages.get(worker)
    return free - self._place_pages(worker).pools.whole_pages(taken) if taken else free

  def slots(self, worker: str) -> int:
    """Free slots."""
    return len(self._books.holdings[worker].slots) - self._slots.get(worker, 0)

  def all_slots(self, workers: Sequence[WorkerView]) -> list[int]:
    """Free slots of each of some workers; at once, as a placement asks for many."""
    holdings, taken = self._books.holdings, self._slots
    return [len(holdings[worker.name].slots) - taken.get(worker.name, 0) for worker in workers]

  def all_queued_tokens(self, workers: Sequence[WorkerView]) -> list[int]:
    """As `queued_tokens` says, for each of some workers."""
    taken = self._tokens
    return [worker.queued_tokens + taken.get(worker.name, 0) for worker in workers]

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

  def fetchable_tokens(self, request: str, worker: str) -> tuple[int, WorkerView | None]:
    """Most tokens of a request's beginning that can be copied to a worker from one place, and that place.

    None of them, if nothing is cached, or the worker holds as many itself.
    """
    most, source = self.cached_tokens(request, worker), None
    if self._view.caches:
      for place in self._view.places.values():
        if place.up and (tokens := self._view.fetchable_tokens(request, place.name, worker)) > most:
          most, source = tokens, place
    return (0, None) if source is None else (most, source)

  def queued_tokens(self, worker: str) -> int:
    """Prompt tokens the worker was given and has not finished."""
    return self._books.workers[worker].queued_tokens + self._tokens.get(worker, 0)

  def fits(self, request: str, worker: str, *, decodes: bool, start: int | None = None) -> bool:
    """Whether the worker has pages (and slots, if it decodes there) for the request and its further samples now.

    A worker that is lost takes none, one that is draining only a request that is there already. What is cached there
    and held by others takes no room; what is cached and held by nobody is room for whoever needs it.

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
      name = worker.name
      if not worker.up or (worker.draining and name not in entry.pages):
        continue
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
    if entry.fetching:  # those that a copy has taken for it
      copies = [one for one in self._books.copies.values() if any(waiting is entry for waiting in one.entries)]
      shared += sum(len(one.pages) for one in copies if one.target == worker)
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


class ClusterView(CachedView):
  """The cluster as a policy sees it: the books as they are now, to be read.

  The requests and workers in it are the books' own, no copies, so a view costs nothing and is always up to date. Its
  mappings refuse to be changed, and for type checkers every field refuses. It does not tell how many tokens a request
  really generates.
  """

  def __init__(self, books: Books):
    """Look at these books."""
    super().__init__(books)
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
