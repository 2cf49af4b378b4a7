"""A compiled cluster that serves one set of requests after another, and checks after each what holds for every run."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax

from experiments.faults.leaks import leaks
from pdjax.completions import complete
from pdjax.config import ServingConfig
from pdjax.engine.build import build_engine
from pdjax.engine.engine import Engine
from pdjax.metrics import Report
from pdjax.serving.events import Done, Event, Started, Turn
from pdjax.serving.invariants import check
from pdjax.serving.loop import Arrivals, Backend, Policy, serve
from pdjax.serving.orders import TransferOrder
from pdjax.serving.state import ClusterState
from pdjax.types import Completion, ModelSpec, PrefixCache, Request
from pdjax.types.cache import wire_dtype
from pdjax.workload.arrivals import Listed
from tests.engine.nan_pages import NaNPages
from tests.engine.plain import Cached
from tests.in_turns import Settled, Turns
from tests.tiny import byte_tokenizer

DEADLINE_S = 60.0  # of a run that takes well under a second: past it, something hangs

compiled: list[str] = []  # the thread of every program that XLA compiled in this process
jax.monitoring.register_event_duration_secs_listener(
  lambda event, seconds, **_: compiled.append(threading.current_thread().name) if 'backend_compile' in event else None
)


@dataclasses.dataclass(frozen=True)
class Served:
  """The outcome of a run."""

  events: tuple[Event, ...]
  completions: tuple[Completion, ...]
  report: Report
  requests: tuple[Request, ...]
  policy: Policy
  incarnations: dict[str, int]  # of the places, as it began
  state: ClusterState

  @functools.cached_property
  def by_id(self) -> dict[str, Completion]:
    return {completion.request.id: completion for completion in self.completions}

  def tokens(self) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (one.token_ids, one.finish_reason) for name, one in self.by_id.items()}

  def transfers(self) -> list[tuple[TransferOrder, Done]]:
    """Each transfer that ended well."""
    orders = {event.order.id: event.order for event in self.events if isinstance(event, Started)}
    pairs = [(orders[event.order], event) for event in self.events if isinstance(event, Done)]
    return [(order, done) for order, done in pairs if isinstance(order, TransferOrder)]


class Cluster:
  """Workers of a config, built and compiled once."""

  def __init__(self, config: ServingConfig):
    assert config.model is not None
    self.config = config
    self.model: ModelSpec = config.model
    built = build_engine(config, self.model, Cached(self.model), tokenizer=byte_tokenizer())
    built.backend.close()
    self.specs, self.transfer, self.warm_up = built.workers, built.transfer, built.warm_up
    self.workers = built.backend.workers
    self.holders = built.places
    self.places = {spec.name: built.backend.places[spec.name] for spec in built.places}
    self.transports = built.backend._transports

  def only(self, *names: str) -> 'Cluster':
    """Some of the workers as a cluster of their own."""
    part = object.__new__(Cluster)
    part.__dict__ |= self.__dict__
    part.holders, part.places = (), {}
    part.specs = tuple(spec for spec in self.specs if spec.name in names)
    part.workers = {name: self.workers[name] for name in names}
    part.transports = {way: one for way, one in self.transports.items() if set(way[:2]) <= set(names)}
    return part

  def changed(self, **fields) -> 'Cluster':
    """The same workers under a config of which some fields differ, such as `faults`."""
    other = object.__new__(Cluster)
    other.__dict__ |= self.__dict__
    other.config = dataclasses.replace(self.config, **fields)
    other.transfer = fields.get('transfer', self.transfer)
    return other

  def empty_state(self, num_pages: int | None = None) -> ClusterState:
    """Nothing has arrived yet; the workers may have another number of pages."""
    config = self.config
    specs = [dataclasses.replace(spec, num_pages=num_pages or spec.num_pages) for spec in self.specs]
    return ClusterState(
      self.model, specs, config.page_size, self.transfer, faults=config.faults, pages_ahead=config.pages_ahead,
      max_preemptions=config.max_preemptions, prefix_cache=config.cache_of(self.model), places=self.holders,
      between=[(source.name, target.name) for source, target in config.ways((*self.specs, *self.holders))],
      cost=config.cost,
    )  # fmt: skip

  def serve(
    self,
    requests: Iterable[Request],
    policy: Policy | None = None,
    prepare: Callable[[Engine], None] = lambda engine: None,
    arrivals: Arrivals | None = None,
    wrap: Callable[[Engine], Backend] = lambda engine: engine,
  ) -> Served:
    """Serve requests; `prepare` may tamper with the engine before its clock starts, `arrivals` withdraw some.

    `wrap` may put something between the engine and the loop. With a prefix cache, free pages are full of NaN all the
    time, and the books are looked at in every turn.
    """
    state = self.empty_state()
    if isinstance(requests, Turns):
      arrivals = arrivals or Settled(requests, state)
    requests = tuple(requests)
    policy = policy or self.config.policy
    engine = Engine(list(self.workers.values()), self.transports, list(self.places.values()))
    incarnations = {name: place.incarnation for name, place in engine.places.items()}
    for name, place in engine.places.items():
      place.forget_all()
      state.books.places[name].incarnation = place.incarnation
    backend: Backend = Impatient(wrap(engine))
    asked_for = isinstance(self.config.prefix_cache, PrefixCache)  # and not only kept by default
    nan_pages = NaNPages(backend, engine.places, state) if asked_for else None
    compiled_before = len(compiled)
    try:
      prepare(engine)
      engine.start_clock()
      events = tuple(looked_at(serve(arrivals or Listed(requests), policy, nan_pages or backend, state), state))
    finally:
      engine.close()
      if nan_pages is not None:
        nan_pages.clean()
    assert nan_pages is None or nan_pages.num_filled
    on = compiled[compiled_before:]
    assert not on, f'something was compiled while the clock ran, on {on}'
    report = Report.from_events(events, workers=self.specs, places=self.holders)
    served = Served(events, complete(events, has_text=True), report, requests, policy, incarnations, state)
    assert_all_is_free(state)
    if served.report.failed == 0:
      assert not any(worker.followed.ids for worker in self.workers.values()), 'a worker remembers what has ended'
    self._check_bytes(served)
    return served

  def _check_bytes(self, served: Served) -> None:
    specs = {spec.name: spec for spec in (*self.specs, *self.holders)}
    moved: list[tuple[int, int]] = []
    copied = 0
    for order, done in served.transfers():
      dtype = wire_dtype(specs[order.source].kv_dtype, specs[order.target].kv_dtype)
      first, stop = order.span.bounds(self.model.num_layers)
      layer_bytes = self.model.cached_token_bytes(dtype) // self.model.num_layers
      moved.append((order.span.tokens * (stop - first) * layer_bytes, done.wire_bytes))
      assert done.wire_bytes == order.num_bytes
      copied += done.wire_bytes if order.copy is not None else 0
      assert done.began_s <= done.trip.wire_began_s <= done.trip.arrived_s <= done.ended_s and done.trip.pieces > 0
    assert all(expected == actual for expected, actual in moved), moved
    assert served.report.wire_bytes == sum(actual for _, actual in moved) - copied
    assert sum(one.bytes for one in served.report.copies) == copied


def looked_at(events: Iterable[Event], state: ClusterState) -> Iterator[Event]:
  """The events; where something is cached, the books are looked at after every turn."""
  for event in events:
    if isinstance(event, Turn) and state.books.prefixes is not None:
      check(state.books)
    yield event


def assert_all_is_free(state: ClusterState) -> None:
  """Every page and every slot is back, and nothing is left to do."""
  assert leaks(state) == []


class Impatient:
  """An engine that does not wait for ever."""

  def __init__(self, engine: Backend, deadline_s: float = DEADLINE_S):
    self._engine = engine
    self._deadline_s = deadline_s

  def submit(self, orders) -> None:
    self._engine.submit(orders)

  def wait(self, until_s: float) -> tuple[float, Sequence[Event]]:
    now_s, events = self._engine.wait(min(until_s, self._deadline_s))
    if now_s >= self._deadline_s:
      raise TimeoutError(f'nothing ended within {self._deadline_s} s.')
    return now_s, events


def live_pages(request: Request, page_size: int) -> int:
  """Pages that hold a prompt's keys and values."""
  return -(-request.prompt_len // page_size)
