"""The view of a policy can be read, is up to date, and leads to nothing that changes the cluster."""

from collections import deque
from collections.abc import Iterator, Mapping

import pytest

from pdjax.serving import Chunk, ClusterState, ClusterView, Step, Transfer, view
from pdjax.serving.actions import ALL
from pdjax.serving.books import Books
from pdjax.serving.page_allocator import PageAllocator, Staging
from pdjax.serving.place import Holdings, WorkerState
from pdjax.serving.requests import RequestState, Samples
from pdjax.serving.timers import Timers
from pdjax.serving.transfers import Transfers
from pdjax.types import Request, TransferSpec
from tests.serving.driver import Driver

CHANGES = (Books, ClusterState, Holdings, PageAllocator, Staging, Timers, Transfers)
VERBS = {
  name
  for kind in CHANGES
  for name, member in vars(kind).items()
  if callable(member) and not name.startswith('_') and kind is not ClusterState
} | {'apply', 'start', 'must', 'enter', 'finish'}  # fmt: skip
OWN = (RequestState, Samples)  # the lists and dictionaries in these are the books' own, read-only by their types


@pytest.fixture
def busy() -> Driver:
  """One request of each kind: decoding, moving, being prefilled, prefilled with samples that follow, waiting."""
  cluster = Driver(transfer=TransferSpec(granularity='chunk'))
  names = {'decoding': 4, 'moving': 4, 'several': 5, 'begun': 9, 'waiting': 3}
  for name, length in names.items():
    cluster.arrive(name, length, n=2 if name == 'several' else 1)
  step, _, _ = cluster.start(
    Step('prefill0', (Chunk('decoding', 0, 4, 'decode0'), Chunk('moving', 0, 4, 'decode0'), Chunk('several', 0, 5)))
  )
  transfers = [order for order in cluster.state.books.in_flight.values() if order.id != step.id]
  cluster.end(step, {'decoding': 1, 'moving': 1, 'several': 1})
  cluster.end(transfers[0])
  cluster.start(Step('decode0', decodes=ALL))
  cluster.start(Step('prefill0', (Chunk('begun', 0, 3),)))
  return cluster


def reachable(root: object) -> Iterator[tuple[str, object]]:
  """Everything public that is reachable from an object, with a way to it: attributes, members, methods."""
  seen: set[int] = set()
  todo = [('view', root)]
  while todo:
    way, one = todo.pop()
    if id(one) in seen:
      continue
    seen.add(id(one))
    yield way, one
    if isinstance(one, Mapping):
      todo += [(f'{way}[{key!r}]', value) for key, value in one.items()]
    elif isinstance(one, str | bytes | int | float | type | None):
      continue
    elif type(one).__module__.split('.')[0] == 'pdjax':
      todo += [(f'{way}.{name}', getattr(one, name)) for name in dir(one) if not name.startswith('_')]
    elif hasattr(one, '__iter__'):
      todo += [(f'{way}[{i}]', value) for i, value in enumerate(one)]


def culprits(root: object) -> list[str]:
  """Ways to what changes the cluster: its books, functions that do it, and containers that can be changed."""
  found = []
  own = {way for way, one in reachable(root) if isinstance(one, OWN)}
  for way, one in reachable(root):
    owner = way.rpartition('.')[0]
    if (
      isinstance(one, CHANGES)
      or (callable(one) and getattr(one, '__name__', '') in VERBS)
      or (isinstance(one, dict | list | set | deque) and owner not in own)
    ):
      found.append(way)
  return found


def test_nothing_that_is_reachable_from_a_view_changes_the_cluster(busy):
  found = [one for _, one in reachable(busy.view)]
  for kind in (RequestState, WorkerState, Samples, Step, Request):
    assert any(isinstance(one, kind) for one in found), 'the walk has not come that far'
  assert culprits(busy.view) == []
  assert {way.rpartition('.')[2] for way in culprits(busy.view.room())} == {'take'}  # of the scratch view alone
  assert len(culprits(busy.state)) > 10  # so it finds what there is to be found
  assert len(VERBS) > 20 and {'take', 'hold', 'reserve', 'give_back', 'try_again', 'cancel'} <= VERBS


def test_how_many_tokens_a_request_really_generates_is_nowhere_in_a_view():
  cluster = Driver()
  cluster.state.expect({'a': 7}.get)
  cluster.arrive('a', prompt_len=5, max_tokens=43)
  (step,) = cluster.start(Step('prefill0', (Chunk('a', 0, 5),)))
  assert step.chunks[0].limit == 7 and cluster.view.requests['a'].limit == 43
  assert cluster.view.workers['prefill0'].steps == (Step('prefill0', (Chunk('a', 0, 5),)),)
  numbers = {way: one for way, one in reachable(cluster.view) if isinstance(one, int)}
  assert 43 in numbers.values() and 7 not in numbers.values(), numbers


def test_a_view_can_be_read_and_not_written(busy):
  for name in ('requests', 'waiting', 'prefilled', 'workers'):
    with pytest.raises(TypeError):
      getattr(busy.view, name)['new'] = None
    with pytest.raises(AttributeError):
      getattr(busy.view, name).popitem()
  for name in ('now_s', 'model', 'waiting', 'workers', 'prefill_workers'):
    with pytest.raises(AttributeError):
      setattr(busy.view, name, None)
  for worker in busy.view.workers.values():
    for name in ('free_pages', 'free_slots', 'steps', 'num_steps'):
      with pytest.raises(AttributeError):
        setattr(worker, name, 99)
    for name in ('prefilling', 'decoding'):
      with pytest.raises(TypeError):
        getattr(worker, name)['new'] = None


def test_a_view_hands_on_the_books_own_objects_and_is_up_to_date(busy):
  one = ClusterView(busy.state.books)
  assert one.requests['begun'] is busy.state.books.requests['begun']
  assert one.workers['decode0'] is busy.state.workers['decode0']
  phases = {name: entry.phase.value for name, entry in one.requests.items()}
  assert phases == {
    'decoding': 'decoding', 'moving': 'moving', 'several': 'prefilled', 'several#1': 'following',
    'begun': 'prefilling', 'waiting': 'waiting',
  }  # fmt: skip
  assert list(one.waiting) == ['waiting'] and list(one.prefilled) == ['several']
  free = one.workers['decode0'].free_pages, one.workers['decode0'].free_slots
  busy.start(Transfer('several', 'decode0'))
  assert not one.prefilled
  taken = one.pages_needed('several', 'decode0', decodes=True), one.slots_needed('several')
  assert taken == (3, 2)  # five tokens and three more, of each: a full page shared, and one of its own
  assert (free[0] - one.workers['decode0'].free_pages, free[1] - one.workers['decode0'].free_slots) == (3, 2)


def test_a_view_knows_the_time_of_the_turn(busy):
  before = busy.view.now_s
  busy.now_s = before + 7.5
  busy.arrive('late')
  assert busy.view.now_s == before + 7.5
  busy.state.timers_due(before + 9.0)
  assert busy.view.now_s == before + 9.0


def test_the_books_objects_have_all_that_the_protocols_promise(busy):
  """Type checkers hold them up to it too; this finds what only has the name."""
  pairs = (view.RequestView, busy.state.books.requests['begun']), (view.WorkerView, busy.state.workers['decode0'])
  for protocol, one in pairs:
    promised = [name for name in vars(protocol) if not name.startswith('_')]
    assert len(promised) > 10 and all(hasattr(one, name) for name in promised)
