"""Hypothesis drives the loop: requests come and go, transfers fail in every way, workers die, in any order."""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import get_args

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from experiments.faults.chaos import Chaos, End, Fault
from experiments.faults.engine_faults import FaultyEngine
from pdjax.serving import ClusterState, serve
from pdjax.serving.events import Arrived, Event, Finished, Turn, Withdrawn
from pdjax.types import FaultSpec, PrefixCache, Request, SamplingParams
from tests.faults.injection import Asking
from tests.faults.oracles import assert_blocks, assert_right, watched
from tests.faults.shadow import ShadowSimulator
from tests.faults.test_matrix_engine import begin_of_plain, cluster, engine_of
from tests.faults.test_matrix_simulated import plain as plain_on_simulator
from tests.faults.test_random_faults import CACHE, CLUSTERS
from tests.test_simulator import HandCost
from tests.tiny import TINY, prompt

FAULTS = FaultSpec(corruption='retry', max_attempts=50, backoff_s=0.01)


class Open(Asking):
  """Requests may come until it is closed."""

  shut = False

  @property
  def closed(self) -> bool:
    return self.shut and super().closed


class AnyFaults(RuleBasedStateMachine):
  """A run that goes on while rules let things happen, and must come to a good end when they stop."""

  num_events = num_cached = 0  # of all runs
  names: Sequence[str]
  lengths: Sequence[int] = range(1, 49)  # of prompts
  down_s: float

  def begin(self, name: str, cache: PrefixCache | None) -> None:
    """Start serving on the cluster of that name; sets `arrivals`, `state`, `backend` and `run`."""
    raise NotImplementedError

  def plain(self, request: Request) -> tuple[int, ...]:
    raise NotImplementedError

  @initialize(data=st.data())
  def start(self, data) -> None:
    self.faults: deque = deque()
    self.ends: deque = deque()
    self.events: list[Event] = []
    self.count = 0
    self.begin(data.draw(st.sampled_from(self.names)), data.draw(st.sampled_from((None, CACHE))))

  def take_fault(self):
    return self.faults.popleft() if self.faults else None

  def take_end(self):
    return self.ends.popleft() if self.ends else None

  @rule(
    data=st.data(),
    max_tokens=st.sampled_from((1, 3, 10)),
    n=st.sampled_from((1, 1, 2, 3)),
    turns=st.integers(0, 6),
  )
  def arrive(self, data, max_tokens, n, turns) -> None:
    sampling = SamplingParams(max_tokens=max_tokens, n=n, ignore_eos=True)
    length = data.draw(st.sampled_from(self.lengths))
    self.arrivals.push(Arrived(Request(f'r{self.count}', prompt(length, length), sampling, self.backend.now_s)))
    self.count += 1
    self.go_on(turns)

  @precondition(lambda self: self.count > 0)
  @rule(data=st.data(), turns=st.integers(0, 6))
  def withdraw(self, data, turns) -> None:
    names = [*self.state.view.requests, 'r0']
    self.arrivals.push(Withdrawn(data.draw(st.sampled_from(names))))
    self.go_on(turns)

  @rule(
    fault=st.sampled_from(get_args(Fault)),
    after=st.integers(0, 2),
    turns=st.integers(0, 6),
  )
  def break_a_transfer(self, fault, after, turns) -> None:
    self.faults.extend([None] * after + [fault])
    self.go_on(turns)

  @rule(end=st.sampled_from(get_args(End)), after=st.integers(0, 2), turns=st.integers(0, 6))
  def tell_an_end_wrongly(self, end, after, turns) -> None:
    self.ends.extend([None] * after + [end])
    self.go_on(turns)

  @rule(data=st.data(), stays_away=st.booleans(), turns=st.integers(0, 6))
  def lose_a_worker(self, data, stays_away, turns) -> None:
    worker = data.draw(st.sampled_from(list(self.state.workers)))
    self.backend.lose(worker, self.down_s if stays_away else 0.0)
    self.go_on(turns)

  @rule(turns=st.integers(1, 30))
  def go_on(self, turns) -> None:
    for _ in range(turns):
      for event in self.run:
        self.events.append(event)
        if isinstance(event, Turn):
          break

  def teardown(self) -> None:
    if not hasattr(self, 'run'):
      return
    self.faults.clear()
    self.ends.clear()
    self.arrivals.shut = True
    self.events += self.run
    ends = assert_right(self.events, self.arrivals.requests.values(), self.state, self.plain)
    assert set(ends.values()) <= {'length', 'cancelled'}
    if self.state.books.prefixes is not None:
      assert_blocks(self.events, self.state)
      AnyFaults.num_cached += sum(event.cached_tokens for event in self.events if isinstance(event, Finished))
    AnyFaults.num_events += len(self.events)


class OnSimulator(AnyFaults):
  names = tuple(CLUSTERS)
  down_s = 400.0  # much longer than `FaultSpec.patience_s`
  plain = staticmethod(plain_on_simulator)

  def begin(self, name: str, cache: PrefixCache | None) -> None:
    workers, policy, transfer = CLUSTERS[name]
    workers = [dataclasses.replace(one, page_size=one.page_size or 4) for one in workers]
    self.arrivals = Open([])
    sizes = {worker.name: worker.page_size for worker in workers}
    simulator = ShadowSimulator(TINY, workers, HandCost(), page_sizes=sizes, slow_s=30.0)
    self.backend = Chaos(simulator, self.take_fault, self.take_end, late_s=130.0, patience_s=200.0)
    transfer = dataclasses.replace(transfer, deadline_s=100.0, checksums=True)
    faults = dataclasses.replace(FAULTS, backoff_s=1.0)
    self.state = ClusterState(TINY, workers, 4, transfer=transfer, faults=faults, prefix_cache=cache)
    self.run = watched(serve(self.arrivals, policy, self.backend, self.state), self.state, most_turns=100_000)


class OnEngine(AnyFaults):
  names = ('2P2D',)
  lengths = (1, 9, 17, 40)
  down_s = 0.05

  plain = staticmethod(begin_of_plain)

  def begin(self, name: str, cache: PrefixCache | None) -> None:
    ours = cluster().changed(faults=FAULTS, prefix_cache=cache)
    self.arrivals = Open([])
    self.open = contextlib.ExitStack()
    engine, self.state = self.open.enter_context(engine_of(ours))
    self.backend = Chaos(FaultyEngine(engine), self.take_fault, self.take_end, late_s=0.5, patience_s=0.02)
    run = serve(self.arrivals, ours.config.policy, self.backend, self.state)
    self.run = watched(run, self.state, most_turns=10_000)

  def teardown(self) -> None:
    try:
      super().teardown()
    finally:
      if hasattr(self, 'open'):
        self.open.close()


def drive(machine: type[AnyFaults], examples: int, steps: int) -> int:
  """Run it so often; how many events there were."""
  before = AnyFaults.num_events
  run_state_machine_as_test(
    machine,
    settings=settings(
      max_examples=examples,
      stateful_step_count=steps,
      deadline=None,
      derandomize=True,
      suppress_health_check=list(HealthCheck),
    ),
  )
  return AnyFaults.num_events - before


def test_the_simulator_comes_to_a_good_end_whatever_fails():
  assert drive(OnSimulator, examples=60, steps=40) >= 10_000 and AnyFaults.num_cached >= 500


def test_the_engine_comes_to_a_good_end_whatever_fails():
  assert drive(OnEngine, examples=8, steps=15) >= 300


@pytest.mark.slow
def test_the_simulator_comes_to_a_good_end_for_long():
  assert drive(OnSimulator, examples=1500, steps=80) >= 500_000
