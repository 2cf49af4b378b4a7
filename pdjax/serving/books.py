"""The books: all that changes while a cluster serves, and how places are taken, held and let go."""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Collection, MutableMapping, Sequence
from typing import Any

from pdjax.cost.cost_model import CostModel, as_cost
from pdjax.cost.roofline import Roofline
from pdjax.cost.worker_cost import WorkerCost
from pdjax.serving.able import AbleWorkers
from pdjax.serving.actions import Abandon, Cancel, Leave, Reject, Resend
from pdjax.serving.copy_under_way import Copy
from pdjax.serving.events import Delivered, Done, Event, Finished, HitSide, PrefixHit
from pdjax.serving.orders import Order, PageCopies, PageNumbers, TransferOrder
from pdjax.serving.page_allocator import PlacePages
from pdjax.serving.place import Holdings, WorkerState
from pdjax.serving.prefixes import NOTHING, Found, Prefixes
from pdjax.serving.requests import RequestState, Samples
from pdjax.serving.timers import Timers
from pdjax.serving.transfers import Transfers
from pdjax.types.cluster import ways
from pdjax.types.faults import FaultSpec
from pdjax.types.model import ModelSpec
from pdjax.types.pools import Lane, PoolSpecs, lanes
from pdjax.types.prefix_cache import PrefixCache
from pdjax.types.transfer import TransferSpec
from pdjax.types.worker import WorkerSpec


class Books:
  """Requests, places and orders in flight; the functions of the files beside this one advance them.

  Attributes:
    model: The model served.
    transfer: The settings of transfers.
    faults: The answers to failures.
    finds_stops: Whether the backend finds stop strings.
    now_s: The time of the turn.
    workers: Each worker by name, in the order of the config.
    places: The same, and behind them the places that only hold pages.
    ways: Each cache kind on its way from one place to another, for those between which KV may travel.
    holdings: The pages, slots and staging of each, by its name.
    prefill_workers: Those that prefill now.
    decode_workers: Those that decode now.
    requests: Each unfinished request by id.
    waiting: Those of which nothing was started, in order of arrival, or of the key that a policy names.
    begun: Those whose prompt was begun and has tokens left to hand over, wherever it is.
    prefilled: Those whose prompt is computed and whose KV has nowhere to go yet, in order.
    samples: The samples of a prompt, by the id of each, ended or not.
    output_len: Tells how many tokens a request really generates, where a trace knows that, by its id.
    true_limits: Most tokens that a request really generates, by its id, where these are fewer than it may: for orders
      alone, since no policy can know.
    in_flight: Orders that have not ended, by id.
    must: The end of a request that is due whatever the policy, by its id.
    copies: Copies of cached blocks that are under way, by number.
    ended: Requests that were served to their end in this turn, and may have left something cached.
    moving: Sequences that have left where they decoded, each to be sent on to the worker that a policy named.
    due: Requests with tokens to send on that staging had no room for.
    staging_freed: Whether staging was freed since those that are due were last sent on.
    unsettled: Requests to be put where they belong now, looked at before anything else is asked or applied.
    tasks: Transfers to give up or to try again.
    delivered: Results that reached their requests since the loop last took them.
    finished: The requests that ended since the loop last took them.
    timers: The times at which something is due.
    transfers: Every transfer in flight, and those to be tried again.
    idle_wakes: Times in a row that the policy was woken and nothing else happened.
    pages_ahead: Pages that a sequence takes ahead of its tokens as it grows; None takes all that it may ever need.
    max_preemptions: Most times that a request is preempted; from then on it takes all pages that it may ever need.
    growing: Workers where sequences may take more pages than they have.
    told: The events that came of actions, and of the cache, since the loop last took them.
    gone: Sequences that left a worker's batch, of which it is to be told.
    caught_up: The events that a backend told when it was asked how far a standing step is, until the loop takes them.
    catches_up: Asks the backend for what it has not told yet of a worker's standing steps; None if it tells each.
    wakes: Whether anything happened that the policy is to be asked about.
    touched: Workers about which something changed since their use was last told.
    able_to_prefill: Workers that prefill and can be given another step.
    able_to_decode: Workers that decode and can be given another step that brings somebody a token.
    draining: Workers that are to have another role once they are empty.
    prefixes: The cached beginnings of prompts; None where nothing is kept.
  """

  def __init__(
    self,
    model: ModelSpec,
    workers: Sequence[WorkerSpec],
    page_size: int,
    transfer: TransferSpec,
    faults: FaultSpec,
    *,
    finds_stops: bool,
    pages_ahead: int | None = None,
    max_preemptions: int = 0,
    prefix_cache: PrefixCache | None = None,
    places: Sequence[WorkerSpec] = (),
    between: Collection[tuple[str, str]] | None = None,
    cost: CostModel = Roofline(),
  ):
    """Open them with every page free; see `ClusterState`."""
    self.model = model
    self.transfer = transfer
    self.faults = faults
    self.finds_stops = finds_stops
    self.pages_ahead = pages_ahead
    self.max_preemptions = max_preemptions
    self.now_s = 0.0
    self.touched: dict[str, None] = {}
    self.able_to_prefill = AbleWorkers(lambda worker: worker.role.prefills)
    self.able_to_decode = AbleWorkers(lambda worker: worker.role.decodes and worker.has_work)
    self._pools: dict[tuple[Any, ...], PoolSpecs] = {}
    self._cost = as_cost(cost)
    self.places: dict[str, WorkerState] = {}
    self.holdings: dict[str, Holdings] = {}
    for spec in (*workers, *places):
      self._add_place(dataclasses.replace(spec, page_size=spec.page_size or page_size))
    self.workers = {spec.name: self.places[spec.name] for spec in workers}
    self.prefill_workers, self.decode_workers = self.sides()
    if not self.prefill_workers or not self.decode_workers:
      missing = 'prefills' if not self.prefill_workers else 'decodes'
      raise ValueError(f'no worker {missing}; give the cluster at least one that does, or one with role "both".')
    self.ways: dict[tuple[str, str], tuple[Lane, ...]] = {}
    self._check_staging(between)
    self.told: list[Event] = []
    self.prefixes: Prefixes | None = None
    if prefix_cache is not None:
      specs = {name: place.spec for name, place in self.places.items()}
      pages = {name: one.pages for name, one in self.holdings.items()}
      self.prefixes = Prefixes(model, prefix_cache, specs, pages, lambda: self.now_s, self.told)
    self.requests: dict[str, RequestState] = {}
    self.waiting: MutableMapping[str, RequestState] = {}
    self.begun: dict[str, RequestState] = {}
    self.prefilled: dict[str, RequestState] = {}
    self.samples: dict[str, Samples] = {}
    self.output_len: Callable[[str], int | None] = lambda request: None
    self.true_limits: dict[str, int] = {}
    self.in_flight: dict[int, Order] = {}
    self.must: dict[str, Cancel | Reject] = {}
    self.copies: dict[int, Copy] = {}
    self.moving: dict[str, RequestState] = {}
    self.ended: dict[str, RequestState] = {}
    self.due: dict[str, RequestState] = {}
    self.staging_freed = False
    self.unsettled: deque[RequestState] = deque()
    self.tasks: list[Abandon | Resend] = []
    self.delivered: list[Delivered] = []
    self.finished: list[Finished] = []
    self.timers = Timers()
    self.transfers = Transfers(self.timers, transfer.deadline_s, faults)
    self.idle_wakes = 0
    self.growing: dict[str, None] = {}
    self.gone: list[Leave] = []
    self.caught_up: list[Done | Delivered] = []
    self.catches_up: Callable[[str], None] | None = None
    self.wakes = True
    self.draining: dict[str, None] = {}
    self._next_order = 0
    self._next_number = 0

  def _add_place(self, spec: WorkerSpec) -> None:
    if spec.name in self.places:
      raise ValueError(f'two places are named {spec.name!r}; give each a name of its own.')
    if not isinstance(spec.num_pages, int):
      raise ValueError(f"worker {spec.name!r} has num_pages='auto'; a backend replaces that by a count first.")
    alike = spec.page_size, spec.cached_dtype, spec.tp
    if alike not in self._pools:
      self._pools[alike] = PoolSpecs.of(self.model, spec)  # one object for all, by which requests know what they need
    pools = self._pools[alike]
    changed = functools.partial(self.look_at, spec.name)
    pages = PlacePages(pools, spec, changed)
    grows = self.pages_ahead is not None
    holdings = Holdings(pages, spec.max_sequences, self.transfer.staging_bytes, changed, grows=grows)
    self.holdings[spec.name] = holdings
    self.places[spec.name] = WorkerState(spec, holdings, len(self.places), WorkerCost(self._cost, self.model, spec))
    self.look_at(spec.name)

  def look_at(self, worker: str) -> None:
    """Note that something about a worker changed, so that it may have to do."""
    state = self.places[worker]
    self.touched[worker] = None
    self.able_to_prefill.look_at(state)
    self.able_to_decode.look_at(state)

  def sides(self) -> tuple[tuple[WorkerState, ...], tuple[WorkerState, ...]]:
    """Those that prefill and those that decode, by their roles now."""
    workers = self.workers.values()
    prefills = tuple(worker for worker in workers if worker.role.prefills)
    return prefills, tuple(worker for worker in workers if worker.role.decodes)

  def _check_staging(self, between: Collection[tuple[str, str]] | None) -> None:
    specs = {name: place.spec for name, place in self.places.items()}
    pairs = ways([*specs.values()]) if between is None else [(specs[one], specs[other]) for one, other in between]
    for source, target in pairs:
      found = self.ways[source.name, target.name] = lanes(self.model, source, target)
      for lane in found:
        if lane.unit_bytes > self.transfer.staging_bytes:
          unit = 'state' if lane.kind.has_state else f'unit of {lane.unit} tokens'
          raise ValueError(
            f'staging_bytes is {self.transfer.staging_bytes}, but one {unit} from {source.name!r} to {target.name!r} '
            f'has {lane.unit_bytes} bytes in {lane.kind.name!r}; raise TransferSpec.staging_bytes.'
          )

  def new_order_id(self) -> int:
    """The number of the next order."""
    self._next_order += 1
    return self._next_order - 1

  def new_request_number(self) -> int:
    """The position of the next request in the order of arrival."""
    self._next_number += 1
    return self._next_number - 1

  def true_limit(self, entry: RequestState) -> int:
    """Most tokens that a request really generates; what orders say of it."""
    return self.true_limits.get(entry.request.id, entry.limit)

  # -------------------------------------------------------------------------- take, hold, let go

  def reserve(self, entry: RequestState, worker: WorkerState, *, decodes: bool, found: Found = NOTHING) -> PageCopies:
    """Take a request's pages on a worker, and if it decodes there its slot and those of the samples that follow it.

    Args:
      entry: The request.
      worker: The worker.
      decodes: Whether it decodes there.
      found: The beginning of it that is cached there, held.

    Returns:
      The page that it begins by copying, as it has only its beginning in common; held until `release` of it.
    """
    holdings = self.holdings[worker.name]
    own = entry.own_pages(holdings.pages.pools, decodes=decodes)
    copies: PageCopies = {}
    if found.tokens:
      taken, copies = self._take_behind(worker.name, own, found)
    elif held := entry.pages.get(worker.name):  # it goes on to decode where it is
      more = holdings.pages.take({kind: max(count - len(held[kind]), 0) for kind, count in own.items()})
      taken = {kind: (*pages, *more[kind]) for kind, pages in held.items()}
    else:
      taken = holdings.pages.take(own)
    if not decodes:
      entry.pages[worker.name] = taken
      return copies
    self.settle_pages(entry, worker.name, taken)
    entry.target, entry.slot = worker.name, holdings.slots.popleft()
    for other in entry.followers.values():
      self._reserve_beside(entry, other, own, worker)
    return copies

  def _take_behind(self, worker: str, own: dict[str, int], found: Found) -> tuple[PageNumbers, PageCopies]:
    """Take the pages that a request needs beside those that are cached of its beginning."""
    (kind,) = own
    pages = self.holdings[worker].pages
    whole = found.tokens // pages.pools.by_kind[kind].page_size
    taken = pages.take({kind: own[kind] - whole})[kind]
    copies = {kind: tuple(zip(found.pages[whole:], taken, strict=False))} if len(found.pages) > whole else {}
    return {kind: (*found.pages[:whole], *taken)}, copies

  def hold_cached(self, entry: RequestState, worker: str, most: int, source: str | None = None) -> Found:
    """Hold whole pages that a worker has of a request's beginning, up to so many tokens; `source` computes it."""
    return NOTHING if self.prefixes is None else self.prefixes.hold(entry, worker, most, source)

  def tell_hit(self, entry: RequestState, place: str, tokens: int, side: HitSide) -> None:
    """Tell that a request which is new takes so many tokens that a place holds."""
    if tokens and entry.is_new:
      self.told.append(PrefixHit(self.now_s, entry.request.id, place, tokens, side))

  def release(self, worker: str, copies: PageCopies) -> None:
    """Let go of pages that were held to be copied."""
    if copies:
      self.drop(worker, {name: tuple(source for source, _ in pairs) for name, pairs in copies.items()})

  def _reserve_beside(self, entry: RequestState, other: RequestState, own: dict[str, int], worker: WorkerState) -> None:
    """Take the pages and slot of a further sample beside those of the one that carries its prompt."""
    holdings, pages = self.holdings[worker.name], entry.pages[worker.name]
    pools = holdings.pages.pools.by_kind
    num_shared = {name: entry.shared_pages(pool) for name, pool in pools.items()}
    new = holdings.pages.take({name: count - num_shared[name] for name, count in own.items()})
    shared = {name: pages[name][:count] for name, count in num_shared.items()}
    copied = {
      name: pages[name][count : count + 1] if pools[name].kind.grows else pages[name]
      for name, count in num_shared.items()
    }
    holdings.pages.hold(shared)
    holdings.pages.hold(copied)  # until they are copied, whatever becomes of their holder
    self.settle_pages(other, worker.name, {name: (*shared[name], *new[name]) for name in own})
    other.copies = {name: tuple(zip(copied[name], new[name], strict=False)) for name in own}
    other.target, other.slot = worker.name, holdings.slots.popleft()

  def settle_pages(self, entry: RequestState, worker: str, pages: PageNumbers) -> None:
    """Note the pages of a request where it decodes, and how many tokens they hold."""
    entry.pages[worker] = pages
    counts = {kind: len(numbers) for kind, numbers in pages.items()}
    entry.reach = self.holdings[worker].pages.pools.tokens_in(counts, entry.most_tokens)

  def release_copied(self, entry: RequestState) -> None:
    """Let go of the pages that a sample begins by copying."""
    if entry.copies:
      assert entry.target is not None
      self.release(entry.target, entry.copies)
      entry.copies = {}

  def release_slot(self, entry: RequestState) -> None:
    """Give back the slot of a request, if it has one."""
    if entry.slot is not None:
      assert entry.target is not None
      self.holdings[entry.target].slots.append(entry.slot)
      entry.slot = None

  def part(self, entry: RequestState) -> None:
    """Let a request decode no more; a standing step that it is in is to end."""
    assert entry.target is not None
    batch = self.holdings[entry.target].batch
    if batch.part(entry, self._next_order) and batch.standing is not None:
      self.gone.append(Leave(entry.request.id, entry.target))

  def catch_up_on(self, worker: str) -> Callable[[], None] | None:
    """A function that catches up on the standing steps of a worker; None if the backend tells each."""
    return None if self.catches_up is None else functools.partial(self.catches_up, worker)

  def leave(self, entry: RequestState, worker: str | None) -> None:
    """Let go of the pages and slot that a request holds on a worker."""
    if worker == entry.target and worker is not None:
      self.release_copied(entry)
      self.release_slot(entry)
      entry.target = None
    if worker in entry.pages:
      self.drop(worker, entry.pages.pop(worker))
      entry.stored.pop(worker, None)

  def drop(self, worker: str, pages: PageNumbers) -> None:
    """Let go of pages on a worker, where sequences may grow into them."""
    self.holdings[worker].pages.drop(pages)
    self.may_grow(worker)

  def may_grow(self, worker: str) -> None:
    """Have sequences on a worker look for pages before anything else takes them."""
    if self.pages_ahead is not None:
      self.growing[worker] = None

  def hold(self, order: TransferOrder) -> None:
    """Take the pages and staging that a transfer holds until it has ended."""
    source, target = self.holdings[order.source], self.holdings[order.target]
    source.pages.hold({order.span.kind: order.span.source_pages})
    target.pages.hold({order.span.kind: order.span.target_pages})
    source.staging_out.take(order.num_bytes)
    target.staging_in.take(order.num_bytes)

  def let_go(self, order: TransferOrder) -> None:
    """Give back the pages and staging that a transfer held."""
    source, target = self.holdings[order.source], self.holdings[order.target]
    self.drop(order.source, {order.span.kind: order.span.source_pages})
    self.drop(order.target, {order.span.kind: order.span.target_pages})
    source.staging_out.give_back(order.num_bytes)
    target.staging_in.give_back(order.num_bytes)
    self.staging_freed = bool(self.due or self.copies)
