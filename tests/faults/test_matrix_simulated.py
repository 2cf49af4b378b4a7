"""Every meaningful cell of the fault matrix on the simulator, whose pages hold what steps wrote there."""

import functools
from collections.abc import Sequence
from typing import Literal

import pytest

from pdjax.policies import Disaggregated
from pdjax.serving import ClusterState, serve
from pdjax.simulator import Replay
from pdjax.types import Request, TransferSpec, WorkerSpec, decode_pool, prefill_pool
from tests.faults.injection import Again, Asking, Injector
from tests.faults.matrix import COLUMNS, ROWS, VICTIM, Cell, Times, cells
from tests.faults.oracles import assert_right, watched
from tests.faults.shadow import ShadowSimulator, plain_tokens
from tests.test_simulator import HandCost
from tests.tiny import SIZES, TINY

TIMES = Times(deadline_s=100.0, late_s=150.0, down_s=30.0, backoff_s=1.0)
WORKERS = prefill_pool(2, **SIZES | {'num_pages': 40}) + decode_pool(2, **SIZES | {'num_pages': 48})
PAGE_SIZE = 4
POLICY = Disaggregated(max_prefill_tokens=16)


@functools.cache
def plain(request: Request) -> tuple[int, ...]:
  return plain_tokens(TINY, request)


def simulated(workers: Sequence[WorkerSpec], arrivals: Asking) -> ShadowSimulator:
  sizes = {worker.name: PAGE_SIZE for worker in workers}
  return ShadowSimulator(TINY, workers, HandCost(), page_sizes=sizes, slow_s=30.0)


def empty_state(cell: Cell, ahead: int | Literal['all'] = 'all') -> ClusterState:
  transfer = TransferSpec(deadline_s=cell.times.deadline_s, checksums=True)
  return ClusterState(TINY, cell.sized(WORKERS), PAGE_SIZE, transfer=transfer, faults=cell.faults, pages_ahead=ahead)


@pytest.mark.parametrize('ahead', ['all', 1, 0])
@pytest.mark.parametrize(('row', 'column'), cells())
def test_cell(row, column, ahead):
  cell = Cell(row, column, TIMES)
  arrivals = Asking(cell.requests)
  injector = Injector(simulated(cell.sized(WORKERS), arrivals), VICTIM)
  cell.set_up(injector, arrivals)
  state = empty_state(cell, ahead)
  full = 0
  events = []
  for event in watched(serve(arrivals, POLICY, injector, state), state, most_turns=2000):
    events.append(event)
    full += bool(injector.acted) and cell.is_full(state)
  ends = assert_right(events, arrivals.requests.values(), state, plain)
  assert injector.acted == 1, 'the moment never came'
  assert ends[VICTIM] in COLUMNS[column].ends
  others = {reason for name, reason in ends.items() if name.startswith(('other', 'greedy'))}
  assert others <= {'length'}
  assert full or ahead != 'all', 'there was room all the time'
  assert injector.now_s < 5000
  again = Replay(TINY, cell.sized(WORKERS), events)
  assert list(serve(Again(arrivals), POLICY, again, empty_state(cell, ahead))) == events


def test_the_table_has_every_cell_or_says_why_not():
  assert len(ROWS) == 8 and len(COLUMNS) == 19
  empty = {(row, column) for column, what in COLUMNS.items() for row in what.empty}
  assert all(len(reason) > 10 for what in COLUMNS.values() for reason in what.empty.values())
  assert {row for row, _ in empty} <= ROWS.keys()
  assert set(cells()) | empty == {(row, column) for row in ROWS for column in COLUMNS}
  assert not set(cells()) & empty
