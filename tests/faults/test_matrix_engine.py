"""The fault matrix on devices: a tiny random model, compiled once, over a transport that fails on demand."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import pytest

from experiments.faults.engine_faults import FaultyEngine, FaultyWay, fresh
from pdjax.engine.engine import Engine
from pdjax.serving import ClusterState
from pdjax.serving.events import Finished, Started
from pdjax.serving.orders import StepOrder
from pdjax.types import Request
from tests.engine.cluster import Cluster
from tests.engine.conftest import shared
from tests.engine.plain import generate
from tests.engine.test_replay import replay_from
from tests.faults.injection import Again, Asking, Injector
from tests.faults.matrix import CACHE, CACHED_POLICY, COLUMNS, FULL, HIT, VICTIM, Cell, Times, cells, mostly_slow
from tests.faults.oracles import assert_blocks, assert_right
from tests.tiny import TINY

TIMES = Times(deadline_s=0.4, late_s=0.6, down_s=0.1, backoff_s=0.01, later_s=0.1)
BOUND_S = 20.0


@functools.cache
def cluster() -> Cluster:
  """Two workers of each kind, whose transfers are checked and can be made to fail."""
  ours = shared('2P2D')
  ours = ours.changed(transfer=dataclasses.replace(ours.transfer, deadline_s=TIMES.deadline_s, checksums=True))
  ours.transports = {way: FaultyWay(one) for way, one in ours.transports.items()}
  return ours


@contextlib.contextmanager
def engine_of(ours: Cluster) -> Iterator[tuple[Engine, ClusterState]]:
  """An engine that runs on the cluster's workers, and the state to serve with."""
  with fresh(ours.transports.values(), ours.workers.values()):
    engine, state = Engine(list(ours.workers.values()), ours.transports), ours.empty_state()
    for name, worker in ours.workers.items():
      worker.forget_all()
      state.workers[name].incarnation = worker.incarnation
    engine.start_clock()
    with contextlib.closing(engine):
      yield engine, state


def plain(request: Request) -> tuple[int, ...]:
  return generate(TINY, dataclasses.replace(request, id='alone', arrival_s=0.0, sample_of=None))[0]


def begin_of_plain(request: Request) -> tuple[int, ...]:
  """The same for requests of up to ten tokens, all that begin alike worked out at once."""
  longest = dataclasses.replace(request.sampling, max_tokens=10, n=1, seed=0)  # the likeliest, so the seed is nothing
  return plain(dataclasses.replace(request, sampling=longest))[: request.sampling.max_tokens]


MOST_TRIES = 4  # on a busy machine others may end before the moment that a cell waits for


@pytest.mark.parametrize(('row', 'column'), cells())
def test_cell(row, column):
  assert any(serve_cell(row, column) for _ in range(MOST_TRIES)), 'the moment never came'


@pytest.mark.parametrize(('row', 'column', 'ahead'), mostly_slow((0, 1)))
def test_cell_where_pages_grow(row, column, ahead):
  assert any(serve_cell(row, column, ahead) for _ in range(MOST_TRIES)), 'the moment never came'


@pytest.mark.parametrize(('row', 'column', 'ahead'), [*mostly_slow([0]), *mostly_slow(['all'], quick=set())])
def test_cell_where_the_victim_finds_its_beginning_cached(row, column, ahead):
  assert any(serve_cell(row, column, ahead, cached=True) for _ in range(MOST_TRIES)), 'the moment never came'


def serve_cell(row: str, column: str, ahead: int | Literal['all'] = 'all', cached: bool = False) -> bool:
  """Serve once and check all that holds for every run; whether the moment came, and then what holds for the cell."""
  cell = Cell(row, column, TIMES, cached)
  arrivals = Asking(cell.requests)
  injectors = []

  def wrap(engine) -> Injector:
    injectors.append(Injector(FaultyEngine(engine), VICTIM))
    cell.set_up(injectors[0], arrivals)
    return injectors[0]

  ours = cluster().changed(faults=cell.faults, pages_ahead=ahead, prefix_cache=CACHE if cached else None)
  ours.specs = tuple(cell.sized(ours.specs))
  with fresh(ours.transports.values(), ours.workers.values()):
    served = ours.serve((), CACHED_POLICY if cached else ours.config.policy, arrivals=arrivals, wrap=wrap)
  (injector,) = injectors
  orders = [event.order for event in served.events if isinstance(event, Started)]
  grown = any(order.growth for order in orders if isinstance(order, StepOrder))
  assert grown or ahead != 0, 'nothing grew'
  assert not (grown and ahead == 'all')
  ends = assert_right(served.events, arrivals.requests.values(), served.state, plain)
  hits = {event.request: event.cached_tokens for event in served.events if isinstance(event, Finished)}
  found = hits[VICTIM] == HIT or column in FULL or injector.seen.prefill is None
  if not injector.acted or (cached and not found):  # what is to be found may not be there yet
    return False
  if cached:
    assert_blocks(served.events, served.state)
  assert injector.acted == 1
  assert ends[VICTIM] in COLUMNS[column].ends
  assert {reason for name, reason in ends.items() if name.startswith(('other', 'greedy'))} <= {'length'}
  assert injector.now_s < BOUND_S
  assert replay_from(ours, served, served.events, Again(arrivals)) == served.events
  return True
