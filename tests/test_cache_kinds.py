"""Cache kinds on the simulator: any mix of them is held and moved, counted to the byte."""

import dataclasses
import itertools
import math
import random
from collections import Counter

import pytest

import pdjax
from pdjax.cost import Roofline
from pdjax.serving import ClusterState, serve
from pdjax.serving.events import Done, Failed, Finished, Started, Turn
from pdjax.serving.orders import TransferOrder
from pdjax.simulator import Replay, Simulator
from pdjax.types import (
  CacheArray,
  CacheKind,
  FaultSpec,
  ModelSpec,
  Request,
  SamplingParams,
  TransferSpec,
  decode_pool,
  prefill_pool,
)
from pdjax.types.pools import PoolSpecs
from pdjax.workload import Listed
from tests.serving.driver import TINY

SIX = dataclasses.replace(TINY, num_layers=6, context_len=256)
MIXES = {
  'two': (*SIX.cache, CacheKind('other', (1, 4), (CacheArray('kv', (2, 2, 12), cut=1),), 20, page_size=8)),
  'three': (
    CacheKind('kv', (0, 2, 3), (CacheArray('kv', (2, 2, 8), cut=1),)),
    CacheKind('draft', (0, 1), (CacheArray('kv', (2, 2, 4), cut=1),), page_size=6),
    CacheKind('state', (4, 5), (CacheArray('s', (3, 5), dtype='float32'), CacheArray('conv', (7,))), 'request'),
  ),
  'windows': (CacheKind('window', (0, 1, 2), (CacheArray('kv', (2, 2, 8), cut=1),), 12),),
  'state': (CacheKind('state', (0,), (CacheArray('s', (64,), dtype='float32'),), 'request'),),
}


class Failing(Simulator):
  """A simulator some of whose transfers fail."""

  def __init__(self, *args, share: float, seed: int):
    super().__init__(*args)
    self._share, self._random = share, random.Random(seed)

  def _transfer_done(self, order, began_s):
    done = super()._transfer_done(order, began_s)
    if self._random.random() < self._share:
      return Failed(order.id, done.ended_s, 'the link broke')
    return done


@dataclasses.dataclass(frozen=True)
class Case:
  """Prompts of up to 100 tokens, some with several samples, on workers with unlike page sizes and dtypes."""

  mix: str
  granularity: str
  failing: float = 0.0
  staging_pages: int | None = None
  seed: int = 0

  @property
  def model(self) -> ModelSpec:
    return dataclasses.replace(SIX, cache_kinds=MIXES[self.mix])

  @property
  def workers(self):
    sizes = {'max_sequences': 6, 'max_step_tokens': 32, 'max_chunks': 4}
    return prefill_pool(2, page_size=16, num_pages=24, **sizes) + decode_pool(
      2, page_size=12, num_pages=40, kv_dtype='bfloat16', **sizes
    )

  @property
  def requests(self) -> list[Request]:
    draw = random.Random(self.seed)
    return [
      Request(
        f'r{index}', (2,) * draw.randint(1, 100),
        SamplingParams(max_tokens=draw.randint(2, 30), n=3 if index % 4 == 3 else 1), arrival_s=0.003 * index,
      )
      for index in range(24)
    ]  # fmt: skip

  def arrivals(self) -> Listed:
    return Listed(self.requests)

  def state(self) -> ClusterState:
    transfer = TransferSpec(granularity=self.granularity, layer_groups=3, deadline_s=math.inf)
    if self.staging_pages is not None:
      transfer = dataclasses.replace(
        transfer, staging_bytes=self.staging_pages * 16 * SIX.cached_token_bytes('float32')
      )
    return ClusterState(self.model, self.workers, 16, transfer, faults=FaultSpec(max_attempts=50, backoff_s=0.001))

  def run(self):
    """The events, with every place looked at in every turn."""
    simulator = Failing(self.model, self.workers, Roofline(), share=self.failing, seed=self.seed)
    state, events = self.state(), []
    for event in serve(self.arrivals(), policy(), simulator, state):
      events.append(event)
      if isinstance(event, Turn):
        check_places(state)
    assert all(not worker.used_bytes and worker.free_pages == worker.num_pages for worker in state.workers.values())
    return events


def policy():
  return pdjax.Disaggregated(max_prefill_tokens=24)


def check_places(state: ClusterState) -> None:
  """What is held at a place are the pages of requests and of transfers under way, and no more than it has room for."""
  for name, worker in state.workers.items():
    pools, held = PoolSpecs.of(state.view.model, worker.spec), Counter()
    pages = {kind: set() for kind in pools.by_kind}
    for entry in state.view.requests.values():
      for kind, numbers in entry.pages.get(name, {}).items():
        assert len(set(numbers)) == len(numbers)
        pages[kind] |= set(numbers)
      if entry.target == name:
        for kind, pairs in entry.copies.items():
          pages[kind] |= {source for source, _ in pairs}
    for order in state.books.in_flight.values():
      if isinstance(order, TransferOrder):
        pages[order.span.kind] |= set(order.span.source_pages if order.source == name else ())
        pages[order.span.kind] |= set(order.span.target_pages if order.target == name else ())
    held = {kind: len(numbers) for kind, numbers in pages.items()}
    assert worker.used_bytes == sum(count * pools.by_kind[kind].page_bytes for kind, count in held.items())
    assert pools.device_bytes(held) <= worker.num_pages * pools.page_bytes
    assert worker.free_pages == worker.num_pages - pools.whole_pages(held)


CASES = [
  *(Case(mix, granularity) for mix, granularity in itertools.product(MIXES, ('request', 'chunk', 'layers'))),
  *(Case(mix, 'chunk', failing=0.3, staging_pages=2, seed=index) for index, mix in enumerate(MIXES)),
]


@pytest.mark.parametrize('case', CASES, ids=lambda case: '-'.join(map(str, dataclasses.astuple(case))))
def test_every_mix_is_held_and_moved_to_the_byte(case):
  events = case.run()
  finished = [event for event in events if isinstance(event, Finished)]
  assert len(finished) == 24 + 2 * 6 and {event.finish_reason for event in finished} == {'length'}
  orders = {event.order.id: event.order for event in events if isinstance(event, Started)}
  arrived = Counter()
  for event in events:
    if isinstance(event, Done) and isinstance(order := orders[event.order], TransferOrder):
      assert event.wire_bytes == order.num_bytes > 0
      arrived[order.request.split('#')[0]] += event.wire_bytes
  assert arrived == {request.id: expected_bytes(case, request.prompt_len) for request in case.requests}


def expected_bytes(case: Case, prompt_len: int) -> int:
  """The bytes of a prompt on the wire, in bfloat16 and whole units, worked out by hand for each mix."""

  def units(entries: int, unit: int) -> int:
    return -(-entries // unit) * unit

  kv = units(prompt_len, 4)  # pages of 16 and of 12 tokens
  match case.mix:
    case 'two':
      return kv * 6 * 2 * 2 * 8 * 2 + units(min(prompt_len, 20), 8) * 2 * 2 * 2 * 12 * 2
    case 'three':
      state = 2 * (3 * 5 * 4 + 7 * 2)
      return kv * 3 * 2 * 2 * 8 * 2 + units(prompt_len, 6) * 2 * 2 * 2 * 4 * 2 + state
    case 'windows':
      return units(min(prompt_len, 12), 4) * 3 * 2 * 2 * 8 * 2
    case 'state':
      return 64 * 4
  raise AssertionError(case.mix)


def test_a_log_of_several_kinds_replays():
  case = Case('three', 'layers')
  events = case.run()
  replay = Replay(case.model, case.workers, events)
  again = list(serve(case.arrivals(), policy(), replay, case.state()))
  assert again == events


@pytest.mark.parametrize(
  'model, token_bytes, fixed_bytes',
  [
    (ModelSpec.gpt_oss_120b(), 36_864, 4_718_592),
    (ModelSpec.deepseek_v3(), 70_272, 0),
    (ModelSpec.llama3_70b(), 327_680, 0),
    (
      dataclasses.replace(
        ModelSpec.qwen3_8b(),
        cache_kinds=(
          CacheKind('state', tuple(range(24)), (CacheArray('s', (32, 128, 128), dtype='float32'),), 'request'),
        ),
      ),
      0,
      48 * 2**20,
    ),
  ],
  ids=['gpt-oss-120b', 'DeepSeek-V3', 'Llama-3-70B', 'recurrent'],
)
def test_published_bytes_move_and_are_held(model, token_bytes, fixed_bytes):
  """A token and a request of these architectures, in bfloat16."""
  prompt_len, output_len, page_size = 1600, 17, 16
  sizes = {'tp': 8, 'kv_dtype': 'bfloat16', 'max_step_tokens': 4096, 'page_size': page_size, 'num_pages': 4096}
  workers = prefill_pool(1, **sizes) + decode_pool(1, **sizes)
  state = ClusterState(model, workers, page_size, TransferSpec(granularity='chunk', staging_bytes=2**30))
  request = Request('a', (2,) * prompt_len, SamplingParams(max_tokens=output_len))
  moved, most = 0, dict.fromkeys(state.workers, 0)
  for event in serve(Listed([request]), policy(), Simulator(model, workers, Roofline(dtype_bytes=2)), state):
    moved += event.wire_bytes if isinstance(event, Done) else 0
    most |= {name: max(most[name], worker.used_bytes) for name, worker in state.workers.items()}
  assert moved == most['prefill0'] == prompt_len * token_bytes + fixed_bytes
  cached = -(-(prompt_len + output_len - 1) // page_size) * page_size
  assert most['decode0'] == cached * token_bytes + fixed_bytes


def test_kinds_leave_side_by_side_group_of_layers_by_group():
  case = Case('two', 'layers')
  orders = [
    event.order for event in case.run() if isinstance(event, Started) and isinstance(event.order, TransferOrder)
  ]
  by_step: dict[int, list] = {}
  for order in orders:
    if order.after is not None and order.span.layers is not None:
      by_step.setdefault(order.after, []).append((order.request, order.span.layers, order.span.kind))
  several = 0
  for sent in by_step.values():
    for request in dict.fromkeys(name for name, _, _ in sent):
      groups = [layers for name, layers, _ in sent if name == request]
      assert groups == sorted(groups)
      several += len(groups) > len(set(groups))
  assert several > 5  # groups in which both kinds left


def test_a_request_that_fits_by_its_bytes_but_not_by_the_pages_of_a_kind_is_refused():
  kinds = (*SIX.cache, CacheKind('draft', (0,), (CacheArray('kv', (2, 2, 1), cut=1),), page_size=64))
  model = dataclasses.replace(SIX, cache_kinds=kinds)
  sizes = {'max_sequences': 8, 'max_step_tokens': 64, 'page_size': 16}
  workers = prefill_pool(1, num_pages=16, **sizes) + decode_pool(1, num_pages=16, **sizes)
  request = Request('a', (2,) * 20, SamplingParams(max_tokens=4, n=8))  # wants eight of four pages of the draft
  state = ClusterState(model, workers, 16)
  (finished,) = {
    event.error for event in serve(Listed([request]), policy(), Simulator(model, workers, Roofline()), state)
    if isinstance(event, Finished)
  }  # fmt: skip
  assert 'need 10 (kv 9, draft 8) pages' in finished and 'has 16 (kv 16, draft 4) in all' in finished
