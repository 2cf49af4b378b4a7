"""A cluster whose every action and event a test makes by hand."""

import itertools
from collections.abc import Mapping

from pdjax.serving import ALL, Chunk, ClusterState, ClusterView, Phase, Step, Transfer
from pdjax.serving.actions import Action
from pdjax.serving.events import Arrived, Done, Event, Failed, Finished, Result, TimerDue
from pdjax.serving.orders import EndOrder, Order, StepOrder, TransferOrder
from pdjax.types import (
  FaultSpec,
  ModelSpec,
  PrefixCache,
  Request,
  SamplingParams,
  TransferSpec,
  WorkerSpec,
  colocated_pool,
  decode_pool,
  prefill_pool,
)
from pdjax.types.faults import ALL_FAIL

TINY = ModelSpec(
  name='tiny', num_layers=2, embed_dim=24, query_heads=6, kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=96,
  context_len=64, eos_token_ids=(1,),
)  # fmt: skip
SIZES = {'max_sequences': 4, 'max_step_tokens': 32, 'max_chunks': 4, 'num_pages': 16}
ONE_OF_EACH = prefill_pool(1, **SIZES) + decode_pool(1, **SIZES)
TWO_AND_TWO = prefill_pool(2, **SIZES) + decode_pool(2, **SIZES)
TWICE = FaultSpec(max_attempts=2, backoff_s=4.0)


class Driver:
  """Starts actions and ends their orders; tokens are 7, and nothing is tried twice, unless a test says otherwise."""

  def __init__(
    self,
    workers: tuple[WorkerSpec, ...] = ONE_OF_EACH,
    page_size: int = 4,
    model: ModelSpec = TINY,
    transfer: TransferSpec = TransferSpec(),
    faults: FaultSpec = ALL_FAIL,
    prefix_cache: PrefixCache | None = None,
    moves_anywhere: bool = False,
    **options,
  ):
    if moves_anywhere:
      options['between'] = [*itertools.permutations((one.name for one in (*workers, *options.get('places', ()))), 2)]
    self.state = ClusterState(model, workers, page_size, transfer, faults=faults, prefix_cache=prefix_cache, **options)
    self.now_s = 0.0
    self.finished: list[Finished] = []

  @property
  def view(self) -> ClusterView:
    return self.state.view

  def arrive(self, name: str, prompt_len: int = 6, max_tokens: int = 4, prompt=None, **sampling) -> Request:
    prompt = tuple(range(2, 2 + prompt_len)) if prompt is None else prompt
    request = Request(name, prompt, SamplingParams(max_tokens=max_tokens, **sampling), arrival_s=self.now_s)
    self.apply(Arrived(request))
    return request

  def apply(self, event: Event) -> None:
    self.state.apply(event, self.now_s)
    self.finished += self.state.take_finished()

  def start(self, action: Action) -> tuple[Order, ...]:
    return self.state.start(action)

  def must(self) -> tuple[Order, ...]:
    """Start whatever has to be done regardless of the policy."""
    return tuple(order for action in self.state.must() for order in self.state.start(action))

  def end(self, order: Order, brings: Mapping[str, int] | None = None, finish: Mapping[str, str] | None = None) -> None:
    """An order ended well; a step brings so many tokens to each request, and may finish some."""
    results = [Result(name, (7,) * count, (finish or {}).get(name)) for name, count in (brings or {}).items()]
    self.now_s += 1.0
    self.apply(Done(order.id, self.now_s - 1.0, self.now_s, tuple(results)))

  def reject_unfit(self) -> Finished:
    """End the one request that must be refused; how it finished."""
    (order,) = self.must()
    assert isinstance(order, EndOrder)
    self.end(order)
    return self.finished[-1]

  def phase(self, name: str) -> Phase:
    return self.state.view.requests[name].phase

  def free_pages(self, place: str) -> int:
    return self.state.books.places[place].free_pages

  def assert_idle(self) -> None:
    """Nothing is left: every page and every slot is free, and no order or request is known."""
    for name, worker in self.state.books.places.items():
      holdings = self.state.books.holdings[name]
      assert worker.free_pages == worker.num_pages, f'{worker.name} kept pages'
      for staging in (holdings.staging_out, holdings.staging_in):
        assert staging.free_bytes == staging.num_bytes, f'{worker.name} kept staging'
      assert sorted(holdings.slots) == list(range(worker.spec.max_sequences))
      assert not worker.num_steps and not worker.prefilling and not worker.decoding
      assert worker.queued_tokens == 0, f'{worker.name} counts {worker.queued_tokens} tokens that nobody waits for'
    assert not self.state.unfinished and not self.state.view.waiting and not self.state.view.prefilled
    assert not self.state.books.due and not self.state.books.unsettled
    assert not self.state.books.copies and not self.state.books.moving


def snapshot(state: ClusterState) -> dict:
  """Everything a state holds, to compare before and after."""
  workers = {
    name: (
      tuple(state.books.holdings[name].pages.by_kind['kv'].free()),
      tuple(state.books.holdings[name].pages.by_kind['kv']._holders),
      tuple(state.books.holdings[name].slots),
      tuple((one.order, one.step, one.batch.requests, one.ahead) for one in state.books.holdings[name].steps),
      tuple(worker.prefilling),
      tuple(worker.decoding),
      worker.queued_tokens,
    )
    for name, worker in state.workers.items()
  }
  requests = {name: repr(entry) for name, entry in state.view.requests.items()}
  books = state.books
  queues = (tuple(books.waiting), tuple(books.prefilled), tuple(books.in_flight), books._next_order)
  return {'workers': workers, 'requests': requests, 'queues': queues}


def end_well(cluster: Driver, order: Order) -> None:
  """An order ends well; a step brings a token to each request with its last chunk or a decode in it."""
  brings = {}
  if isinstance(order, StepOrder):
    brings = {chunk.request.id: 1 for chunk in order.chunks if chunk.is_last}
    brings |= dict.fromkeys(order.batch.requests, 1)
  cluster.end(order, brings)


# ---------------------------------------------------------------------------- one request in each phase


def _waiting() -> tuple[Driver, list[Order]]:
  cluster = Driver()
  cluster.arrive('a', prompt_len=10)
  return cluster, []


def _prefilling() -> tuple[Driver, list[Order]]:
  cluster, _ = _waiting()
  first = cluster.start(Step('prefill0', (Chunk('a', 0, 4, 'decode0'),)))
  return cluster, [*first, *cluster.start(Step('prefill0', (Chunk('a', 4, 4, 'decode0'),)))]


def _last_chunk() -> tuple[Driver, list[Order]]:
  cluster, _ = _waiting()
  return cluster, [*cluster.start(Step('prefill0', (Chunk('a', 0, 10, 'decode0'),)))]


def _prefilled() -> tuple[Driver, list[Order]]:
  cluster, _ = _waiting()
  cluster.end(cluster.start(Step('prefill0', (Chunk('a', 0, 10),)))[0], {'a': 1})
  return cluster, []


def _moving() -> tuple[Driver, list[Order]]:
  cluster, _ = _prefilled()
  return cluster, [*cluster.start(Transfer('a', 'decode0'))]


def _decoding() -> tuple[Driver, list[Order]]:
  cluster, (transfer,) = _moving()
  cluster.end(transfer)
  return cluster, [cluster.start(Step('decode0', decodes=ALL))[0] for _ in range(2)]


def _colocated() -> tuple[Driver, list[Order]]:
  cluster = Driver(colocated_pool(1, **SIZES))
  cluster.arrive('a', prompt_len=10)
  chunk = cluster.start(Step('both0', (Chunk('a', 0, 10),)))
  return cluster, [*chunk, *cluster.start(Step('both0', decodes=ALL))]


SETUPS = {
  Phase.WAITING: _waiting,
  Phase.PREFILLING: _prefilling,
  'last chunk': _last_chunk,
  Phase.PREFILLED: _prefilled,
  Phase.MOVING: _moving,
  Phase.DECODING: _decoding,
  'colocated': _colocated,
}


# ---------------------------------------------------------------------------- failures


def moving(faults: FaultSpec = TWICE, prompt_len: int = 10, **options) -> tuple[Driver, TransferOrder]:
  """A prompt with its first token delivered, on its way."""
  cluster = Driver(faults=faults, transfer=TransferSpec(deadline_s=10.0), **options)
  cluster.arrive('a', prompt_len=prompt_len)
  cluster.end(cluster.start(Step('prefill0', (Chunk('a', 0, prompt_len),)))[0], {'a': 1})
  (transfer,) = cluster.start(Transfer('a', 'decode0'))
  return cluster, transfer


def decoding(count: int = 3, **options) -> Driver:
  """A request with so many tokens, in a slot of `decode0`."""
  cluster, transfer = moving(**{'workers': TWO_AND_TWO} | options)
  cluster.end(transfer)
  for _ in range(count - 1):
    cluster.end(cluster.start(Step('decode0', decodes=ALL))[0], {'a': 1})
  return cluster


def due(cluster: Driver, now_s: float) -> list[TimerDue]:
  """Let it be that late; what was due."""
  cluster.now_s = now_s
  timers = cluster.state.timers_due(now_s)
  for event in timers:
    cluster.apply(event)
  return timers


def fail(cluster: Driver, order: Order, **fields) -> None:
  """An order fails."""
  cluster.apply(Failed(order.id, cluster.now_s, 'boom', **fields))
