"""Leaps over standing steps, unfolded: to the bit the steps that are told one by one, over random clusters."""

import dataclasses
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from pdjax.cost import CostBase, Roofline
from pdjax.metrics.timeline import read_timeline
from pdjax.policies import Colocated, Disaggregated
from pdjax.serving import Cancel, ClusterState, ClusterView, serve
from pdjax.serving.events import Decoded, Delivered, Done, Event, Started, Turn
from pdjax.serving.loop import Policy
from pdjax.serving.orders import StepOrder
from pdjax.simulator import Simulator
from pdjax.types import (
  ChipSpec,
  ModelSpec,
  Request,
  SamplingParams,
  WorkerSpec,
  colocated_pool,
  decode_pool,
  prefill_pool,
)
from pdjax.workload import Listed, RandomTokens

MODEL = ModelSpec(
  'tiny', num_layers=2, embed_dim=24, query_heads=6, kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=96, context_len=512
)  # fmt: skip
COST = Roofline(ChipSpec.generic_cpu())


@dataclasses.dataclass(frozen=True)
class Cluster:
  """A random cluster and workload, by its seed.

  Attributes:
    seed: Its number.
    ahead: Pages that sequences take ahead as they grow.
    looks: Whether the policy looks at every token in every decision.
    windows: Whether layers attend over a window.
    whole: Whether all takes whole seconds, so that much ends at one time.
  """

  seed: int
  ahead: Any = 'all'
  looks: bool = False
  windows: bool = False
  whole: bool = False

  def run(self, *, leaps: bool) -> list[Event]:
    """All that happens."""
    rng = random.Random(self.seed)
    sizes = {'max_sequences': rng.choice((2, 5, 16)), 'max_step_tokens': 64, 'num_pages': rng.choice((40, 90))}
    workers, policy = self._workers(rng, sizes)
    model = dataclasses.replace(MODEL, sliding_window=32) if self.windows else MODEL
    arrivals = Listed(self._requests(rng), self._lengths())
    state = ClusterState(model, workers, rng.choice((4, 16)), pages_ahead=self.ahead)
    if self.looks:
      policy = Looking(policy)
    cost = WholeSeconds() if self.whole else COST
    return list(serve(arrivals, policy, Simulator(model, workers, cost, leaps=leaps), state))

  def _workers(self, rng: random.Random, sizes: dict[str, Any]) -> tuple[tuple[WorkerSpec, ...], Policy]:
    if rng.random() < 0.3:
      return colocated_pool(rng.choice((1, 2)), **sizes), Colocated(token_budget=rng.choice((16, 48)))
    counts = rng.choice(((1, 1), (2, 1), (1, 2), (3, 2)))
    workers = prefill_pool(counts[0], **sizes) + decode_pool(counts[1], **sizes)
    return workers, Disaggregated(max_prefill_tokens=rng.choice((16, 64)))

  def _requests(self, rng: random.Random) -> list[Request]:
    requests, now_s = [], 0.0
    for index in range(30):
      now_s += rng.choice((0, 1, 4)) if self.whole else rng.expovariate(1 / rng.choice((1e-4, 2e-3)))
      sampling = SamplingParams(max_tokens=rng.choice((1, 2, 3, 20, 90)), n=rng.choice((1, 1, 1, 2)))
      requests.append(Request(f'r{index}', RandomTokens(rng.randint(1, 60), 90, index), sampling, arrival_s=now_s))
    return requests

  def _lengths(self) -> dict[str, int]:
    rng = random.Random(-self.seed)
    return {f'r{index}': rng.randint(1, 30) for index in range(0, 30, 3)}


class WholeSeconds(CostBase):
  """A step takes a second, or three with many sequences, a chunk two, a transfer one."""

  def step_seconds(self, model, worker, chunks, contexts, steps) -> float:
    return 2.0 if chunks else float(steps * self._seconds(contexts))

  def transfer_seconds(self, model, source, target, num_bytes) -> float:
    return 1.0

  def runs(self, model, worker):
    return lambda contexts, steps: np.arange(1, steps + 1) * float(self._seconds(contexts))

  def _seconds(self, contexts) -> int:
    return 3 if len(contexts) > 4 else 1


class Looking:
  """A policy that looks at all tokens, and cancels whoever has nine of more than fifty."""

  def __init__(self, policy: Policy):
    self._policy = policy
    self.moves_kv = policy.moves_kv

  def decide(self, view: ClusterView):
    for name, entry in view.requests.items():
      if len(entry.tokens) > 9 and entry.limit > 50 and entry.phase.value == 'decoding' and name[-1] in '2468':
        return [Cancel(name)]
    return self._policy.decide(view)


def unfolded(events: list[Event]) -> Iterator[Event]:
  """The events with each leap taken apart; `Turn` is left out, as a leap has none at the steps between."""
  orders = {event.order.id: event.order for event in events if isinstance(event, Started)}
  steps: list[tuple[Done, Delivered]] = []
  for event in events:
    match event:
      case Turn():
        continue
      case Done(order=order, decoded=Decoded(ends_s=ends_s)) if ends_s:
        assert isinstance(orders[order], StepOrder)
        steps = list(_steps_of(event))
      case Delivered() if steps:
        for done, decoded in steps:
          yield done
          yield dataclasses.replace(event, now_s=done.ended_s, decoded=decoded)
        steps = []
      case _:
        yield event


def _steps_of(leap: Done) -> Iterator[tuple[Done, Decoded]]:
  decoded = leap.decoded
  assert decoded is not None
  for step, ended_s in enumerate(decoded.ends_s):
    is_last = step == len(decoded.ends_s) - 1
    counts = (decoded.counts > step).astype(np.int64)
    one = Decoded(decoded.tokens[:1], counts, decoded.ended if is_last else ())
    wasted = len(counts) - int(counts.sum())
    to_come = leap.to_come if is_last else None
    yield Done(leap.order, leap.begin_s(step), ended_s, (), one, to_come, wasted), one


def _dones(events: Iterable[Event]) -> list[Done]:
  """The ends of steps, those of each order by their times: a leap is told when others may have been before its end."""
  return sorted((one for one in events if isinstance(one, Done)), key=lambda one: (one.order, one.ended_s))


CASES = [
  Cluster(seed, *fields)
  for seed, fields in enumerate(
    [
      ('all', False, False), (1, False, False), ('all', True, False), (0, True, False), ('all', False, True),
      ('all', False, False, True), (1, False, False, True), (0, True, False, True), ('all', True, False, True),
    ]
    * 8
  )
]  # fmt: skip


@pytest.mark.parametrize(
  'cluster', CASES, ids=lambda one: f'{one.seed}-{one.ahead}-{one.looks}-{one.windows}-{one.whole}'
)
def test_leaps_unfold_to_the_single_steps(cluster):
  leaps, single = cluster.run(leaps=True), cluster.run(leaps=False)
  folded = [event for event in leaps if isinstance(event, Done) and event.num_steps > 1]
  assert folded and not any(isinstance(event, Done) and event.num_steps > 1 for event in single)
  others = [event for event in single if not isinstance(event, Turn | Done | Delivered)]
  assert [
    event for event in leaps if not isinstance(event, Turn | Done | Delivered)
  ] == others  # each decision, each end
  apart = list(unfolded(leaps))
  by_order = [
    sorted((e for e in one if isinstance(e, Done)), key=lambda e: (e.order, e.ended_s)) for one in (apart, single)
  ]
  assert len(by_order[0]) == len(by_order[1])
  for one, other in zip(*by_order, strict=True):
    assert (one.order, one.began_s, one.ended_s, one.wasted_tokens) == (
      other.order, other.began_s, other.ended_s, other.wasted_tokens,
    )  # fmt: skip
    assert one.decoded == other.decoded and one.results == other.results
    assert one.to_come == other.to_come or other.to_come == 1  # which a leap to the last step passes over
  assert read_timeline(leaps).requests == read_timeline(single).requests  # each time of each token among it


def test_a_policy_is_not_asked_at_the_steps_of_one_that_stands():
  workers = prefill_pool(1, num_pages=64, max_step_tokens=64) + decode_pool(1, num_pages=64)
  requests = [Request(f'r{index}', RandomTokens(20, 90, index), SamplingParams(max_tokens=60)) for index in range(2)]
  asked: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
  for leaps, times in asked.items():

    class Noting(Disaggregated):
      def decide(self, view, times=times):
        times.append((view.now_s, view.workers['decode0'].num_steps))
        return super().decide(view)

    simulator = Simulator(MODEL, workers, COST, leaps=leaps)
    events = list(serve(Listed(requests), Noting(), simulator, ClusterState(MODEL, workers, 16)))
    steps = sum(one.num_steps for one in events if isinstance(one, Done) and one.decoded is not None)
    assert steps >= 59 > 2 * len(set(times))
  assert asked[True] == asked[False]


def test_a_backend_that_hides_the_leaps_of_another_has_none():
  class Hiding:
    def __init__(self, backend: Simulator):
      self.submit, self.wait = backend.submit, backend.wait

  workers = prefill_pool(1, num_pages=64, max_step_tokens=64) + decode_pool(1, num_pages=64)
  requests = [Request('r', RandomTokens(20, 90, 1), SamplingParams(max_tokens=60))]
  told = {}
  for wrap in (Hiding, lambda backend: backend):
    state = ClusterState(MODEL, workers, 16)
    events = list(serve(Listed(requests), Disaggregated(), wrap(Simulator(MODEL, workers, COST)), state))
    told[wrap] = [event.num_steps for event in events if isinstance(event, Done) and event.decoded is not None]
  hidden, leaping = told.values()
  assert set(hidden) == {1} and sum(hidden) == sum(leaping) == 59 and max(leaping) > 50
