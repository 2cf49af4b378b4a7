"""Every meaningful cell of the fault matrix on the simulator, whose pages hold what steps wrote there."""

import functools
from collections.abc import Sequence
from typing import Literal

import pytest

from pdjax.serving import ClusterState, serve
from pdjax.serving.events import Finished
from pdjax.simulator import Replay
from pdjax.types import Request, TransferSpec, WorkerSpec, decode_pool, prefill_pool
from tests.faults.injection import Again, Asking, Injector
from tests.faults.matrix import (
  CACHE,
  CACHED_POLICY,
  COLUMNS,
  FULL,
  HIT,
  POLICY,
  ROWS,
  VICTIM,
  Cell,
  Times,
  cells,
  mostly_slow,
)
from tests.faults.oracles import assert_blocks, assert_right, watched
from tests.faults.shadow import ShadowSimulator, plain_tokens
from tests.test_simulator import HandCost
from tests.tiny import SIZES, TINY

TIMES = Times(deadline_s=100.0, late_s=150.0, down_s=30.0, backoff_s=1.0, later_s=100.0)
WORKERS = prefill_pool(2, **SIZES | {'num_pages': 40}) + decode_pool(2, **SIZES | {'num_pages': 48})
PAGE_SIZE = 4


@functools.cache
def plain(request: Request) -> tuple[int, ...]:
  return plain_tokens(TINY, request)


def simulated(workers: Sequence[WorkerSpec], arrivals: Asking) -> ShadowSimulator:
  sizes = {worker.name: PAGE_SIZE for worker in workers}
  return ShadowSimulator(TINY, workers, HandCost(), page_sizes=sizes, slow_s=30.0)


def empty_state(cell: Cell, ahead: int | Literal['all'] = 'all') -> ClusterState:
  transfer = TransferSpec(deadline_s=cell.times.deadline_s, checksums=True)
  return ClusterState(
    TINY, cell.sized(WORKERS), PAGE_SIZE, transfer=transfer, faults=cell.faults, pages_ahead=ahead,
    prefix_cache=CACHE if cell.cached else None,
  )  # fmt: skip


@pytest.mark.parametrize('ahead', ['all', 1, 0])
@pytest.mark.parametrize(('row', 'column'), cells())
def test_cell(row, column, ahead):
  serve_cell(Cell(row, column, TIMES), ahead)


@pytest.mark.parametrize(('row', 'column', 'ahead'), [*mostly_slow([0]), *mostly_slow(['all', 1], quick=set())])
def test_cell_where_the_victim_finds_its_beginning_cached(row, column, ahead):
  serve_cell(Cell(row, column, TIMES, cached=True), ahead)


def serve_cell(cell: Cell, ahead: int | Literal['all']) -> None:
  column, policy = cell.column, CACHED_POLICY if cell.cached else POLICY
  arrivals = Asking(cell.requests)
  injector = Injector(simulated(cell.sized(WORKERS), arrivals), VICTIM)
  cell.set_up(injector, arrivals)
  state = empty_state(cell, ahead)
  full = 0
  events = []
  for event in watched(serve(arrivals, policy, injector, state), state, most_turns=2000):
    events.append(event)
    full += bool(injector.acted) and cell.is_full(state)
  ends = assert_right(events, arrivals.requests.values(), state, plain)
  assert injector.acted == 1, 'the moment never came'
  assert ends[VICTIM] in COLUMNS[column].ends
  others = {reason for name, reason in ends.items() if name.startswith(('other', 'greedy'))}
  assert others <= {'length'}
  assert full or ahead != 'all', 'there was room all the time'
  assert injector.now_s < 5000
  if cell.cached:
    (hit,) = (event.cached_tokens for event in events if isinstance(event, Finished) and event.request == VICTIM)
    assert hit == HIT or column in FULL or injector.seen.prefill is None
    assert_blocks(events, state)
  again = Replay(TINY, cell.sized(WORKERS), events)
  assert list(serve(Again(arrivals), policy, again, empty_state(cell, ahead))) == events


def test_the_table_has_every_cell_or_says_why_not():
  assert len(ROWS) == 8 and len(COLUMNS) == 19
  empty = {(row, column) for column, what in COLUMNS.items() for row in what.empty}
  assert all(len(reason) > 10 for what in COLUMNS.values() for reason in what.empty.values())
  assert {row for row, _ in empty} <= ROWS.keys()
  assert set(cells()) | empty == {(row, column) for row in ROWS for column in COLUMNS}
  assert not set(cells()) & empty
