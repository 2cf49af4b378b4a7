"""One policy, two backends: with the costs of a run on devices the simulator decides the same, action by action."""

import collections
import dataclasses
import itertools
import time
from collections.abc import Iterable

import pytest

from pdjax.engine.worker import Worker
from pdjax.kv.transfer import Parcel
from pdjax.policies import Colocated, Disaggregated
from pdjax.serving import Cancel, Phase, serve
from pdjax.serving.events import Done, Event, Started
from pdjax.serving.orders import EndOrder, LeaveOrder, Order, StepOrder, TransferOrder
from pdjax.simulator import Simulator
from pdjax.types import Request, SamplingParams
from pdjax.workload import Listed
from tests.engine.cluster import Cluster
from tests.tiny import prompt

# Each step and transfer takes as much longer, so that hosts do not count. No sum of chunks, with a wire or without,
# comes nearer to one of decode steps than a sixth of a step: a slow host changes no order of ends.
CHUNK_S, DECODE_S, WIRE_S = 0.08, 0.06, 0.07
MOST_TRIES = 10  # a host that is late by more than the least time between two ends tells them in another order


@dataclasses.dataclass(frozen=True)
class OneByOne(Disaggregated):
  """A prompt a step, so that no two transfers share the way, each of which begins when its prompt is told computed."""

  def order(self, waiting):
    return itertools.islice(waiting, 1)

  def target_of(self, view, room, entry, worker):
    return None


class Cancels:
  """Another policy that cancels a long request in the middle of its tokens, once the last prompt is computed."""

  decode_steps = 1

  def __init__(self, policy):
    self._policy = policy

  def decide(self, view):
    long, last = view.requests.get('r2'), view.requests.get('r4')
    if long is not None and long.phase is Phase.DECODING and last is not None and last.computed:
      return [Cancel('r2')]
    return self._policy.decide(view)


class Recorded:
  """The seconds that the steps of each worker and the transfers of each way took, one after another."""

  def __init__(self, events: Iterable[Event]):
    self.steps: dict[str, collections.deque[float]] = collections.defaultdict(collections.deque)
    self.transfers: dict[tuple[str, str], list[tuple[int, float]]] = collections.defaultdict(list)
    orders: dict[int, Order] = {}
    for event in events:
      if isinstance(event, Started):
        orders[event.order.id] = event.order
      elif isinstance(event, Done):
        order, seconds = orders[event.order], event.ended_s - event.began_s
        if isinstance(order, StepOrder):
          self.steps[order.worker].append(seconds)
        elif isinstance(order, TransferOrder):
          self.transfers[order.source, order.target].append((order.id, seconds))
    for way in self.transfers.values():
      way.sort()  # as they were handed over

  def step_seconds(self, model, worker, chunks, contexts, steps) -> float:
    left = self.steps[worker.name]
    return left.popleft() if left else DECODE_S  # where the host was late, there was another step fewer

  def transfer_seconds(self, model, source, target, num_bytes) -> float:
    return self.transfers[source.name, target.name].pop(0)[1]


def slow_down(monkeypatch) -> None:
  collect, wait = Worker.collect, Parcel.wait

  def collect_late(worker, order, pending):
    time.sleep(CHUNK_S if order.chunks else DECODE_S)
    return collect(worker, order, pending)

  def wait_late(parcel):
    time.sleep(WIRE_S)
    wait(parcel)

  monkeypatch.setattr(Worker, 'collect', collect_late)
  monkeypatch.setattr(Parcel, 'wait', wait_late)


def requests(longest: int = 7) -> list[Request]:
  """Prompts that all wait from the start."""
  lengths = ((9, 12), (5, 3), (14, longest), (6, 1), (11, 9))
  return [
    Request(f'r{i}', prompt(length, seed=i), SamplingParams(max_tokens=most, ignore_eos=True))
    for i, (length, most) in enumerate(lengths)
  ]


def actions(events: Iterable[Event]) -> list[Order]:
  """The orders of a run, without the tokens in them, which a simulator makes up."""
  return [_without_tokens(event.order) for event in events if isinstance(event, Started)]


def _without_tokens(order: Order) -> Order:
  if not isinstance(order, StepOrder):
    return order
  joins = tuple(
    dataclasses.replace(join, admission=dataclasses.replace(join.admission, tokens=(0,) * len(join.admission.tokens)))
    if join.admission is not None
    else join
    for join in order.joins
  )
  return dataclasses.replace(order, joins=joins)


def both(cluster: Cluster, policy, **lengths) -> tuple[list[Order], list[Order]]:
  """The orders of a run on devices, and those of a simulation at its costs; of several tries, the first alike."""
  for _ in range(MOST_TRIES):
    real, simulated = try_both(cluster, policy, **lengths)
    if real == simulated:
      break
  return real, simulated


def try_both(cluster: Cluster, policy, **lengths) -> tuple[list[Order], list[Order]]:
  """As `both`, a single try."""
  served = cluster.serve(requests(**lengths), policy)
  state = cluster.empty_state()
  for name, worker in state.workers.items():
    worker.incarnation = served.incarnations[name]
  simulator = Simulator(cluster.model, cluster.specs, Recorded(served.events))
  return actions(served.events), actions(serve(Listed(requests(**lengths)), policy, simulator, state))


@pytest.mark.parametrize(
  ('workers', 'policy'),
  [
    ('one_and_one', OneByOne(max_prefill_tokens=16)),
    ('one_and_one', OneByOne(max_prefill_tokens=16, decode_steps=4)),
    ('colocated', Colocated(token_budget=12)),
  ],
  ids=['disaggregated', 'fused steps', 'colocated'],
)
def test_the_simulator_decides_as_the_engine_did_at_the_same_costs(workers, policy, request, monkeypatch):
  cluster = request.getfixturevalue(workers)
  slow_down(monkeypatch)
  real, simulated = both(cluster, policy)
  assert simulated == real
  standing = [order for order in real if isinstance(order, StepOrder) and order.standing]
  assert bool(standing) == (policy.decode_steps == 1)


@pytest.mark.parametrize('ahead', ['all', 0])
@pytest.mark.parametrize(
  ('workers', 'policy'),
  [('one_and_one', OneByOne(max_prefill_tokens=16)), ('colocated', Colocated(token_budget=12))],
  ids=['disaggregated', 'colocated'],
)
def test_with_growth_and_a_cancel_it_does_too(workers, policy, ahead, request, monkeypatch):
  cluster = request.getfixturevalue(workers).changed(pages_ahead=ahead)
  slow_down(monkeypatch)
  real, simulated = both(cluster, Cancels(policy), longest=20)
  assert simulated == real
  ended = [order.request for order in real if isinstance(order, EndOrder)]
  left = [order.request for order in real if isinstance(order, LeaveOrder)]
  assert ended == left == ['r2']
  assert any(isinstance(order, StepOrder) and order.growth for order in real) == (ahead == 0)
