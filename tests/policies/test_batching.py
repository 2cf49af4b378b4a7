"""One step of each worker filled with prompt chunks: within its budget, in order, and placed request by request."""

import pytest

from pdjax.policies import FewestQueuedTokens
from pdjax.policies.batching import fill_prefills
from pdjax.serving import Chunk, Step
from pdjax.serving.view import Room
from pdjax.types import colocated_pool, decode_pool, prefill_pool
from tests.serving.driver import SIZES, Driver

TWO_AND_ONE = prefill_pool(2, **SIZES) + decode_pool(1, **SIZES)


def nowhere(entry, worker) -> None:
  """Let every prompt stay where it is prefilled."""


class Chosen:
  """A worker for each request by its id; notes the workers it had to choose from."""

  def __init__(self, **workers: str):
    self._workers = workers
    self.asked: list[tuple[str, list[str]]] = []

  def choose(self, request, workers, room):
    names = [worker.name for worker in workers]
    self.asked.append((request.request.id, names))
    wanted = self._workers[request.request.id]
    return workers[names.index(wanted) if wanted in names else 0]


def fill(
  cluster: Driver,
  budget: int | dict[str, int] = 100,
  placement=FewestQueuedTokens(),
  target_of=nowhere,
  names=None,
  room: Room | None = None,
) -> dict[str, list[Chunk]]:
  """Chunks for all workers that prefill; `names` are those that wait, in an order of their own."""
  view = cluster.view
  workers = view.prefill_workers
  budgets = budget if isinstance(budget, dict) else {worker.name: budget for worker in workers}
  waiting = view.waiting.values() if names is None else [view.waiting[name] for name in names]
  return fill_prefills(view, room or view.room(), workers, budgets, waiting, placement, target_of).chunks


# ---------------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
  ('budget', 'expected'),
  [
    (0, []),
    (5, [Chunk('a', 0, 5)]),
    (6, [Chunk('a', 0, 6)]),
    (9, [Chunk('a', 0, 6), Chunk('b', 0, 3)]),
    (100, [Chunk('a', 0, 6), Chunk('b', 0, 26)]),  # a step takes 32 tokens
  ],
)
def test_the_last_prompt_gets_what_the_budget_leaves(budget, expected):
  cluster = Driver()
  cluster.arrive('a', prompt_len=6)
  cluster.arrive('b', prompt_len=30)
  assert fill(cluster, budget) == {'prefill0': expected}


def test_each_worker_has_a_budget_of_its_own():
  cluster = Driver(TWO_AND_ONE)
  for name in 'abc':
    cluster.arrive(name, prompt_len=8)
  placement = Chosen(a='prefill1', b='prefill1', c='prefill0')
  assert fill(cluster, {'prefill0': 3, 'prefill1': 12}, placement) == {
    'prefill0': [Chunk('c', 0, 3)],
    'prefill1': [Chunk('a', 0, 8), Chunk('b', 0, 4)],
  }
  assert placement.asked[-1] == ('c', ['prefill0'])  # the other's step is full


def test_a_step_takes_no_more_chunks_than_its_worker_allows():
  cluster = Driver(prefill_pool(1, **SIZES | {'max_chunks': 2}) + decode_pool(1, **SIZES))
  for name in 'abc':
    cluster.arrive(name, prompt_len=2)
  assert fill(cluster) == {'prefill0': [Chunk('a', 0, 2), Chunk('b', 0, 2)]}


# ---------------------------------------------------------------------------- order


def test_prompts_that_were_begun_go_on_where_they_are_before_others_begin():
  cluster = Driver(TWO_AND_ONE)
  for name in ('moves', 'stays', 'new'):
    cluster.arrive(name, prompt_len=12)
  cluster.start(Step('prefill1', (Chunk('moves', 0, 5, 'decode0'), Chunk('stays', 0, 4))))
  assert fill(cluster, 16, Chosen(new='prefill1')) == {
    'prefill0': [],
    'prefill1': [Chunk('moves', 5, 7, 'decode0'), Chunk('stays', 4, 8), Chunk('new', 0, 1)],
  }


def test_a_begun_prompt_that_decodes_where_it_is_is_sent_nowhere():
  cluster = Driver(colocated_pool(1, **SIZES))
  cluster.arrive('a', prompt_len=9)
  cluster.start(Step('both0', (Chunk('a', 0, 4),)))
  assert fill(cluster, 3) == {'both0': [Chunk('a', 4, 3)]}


def test_once_the_budget_is_used_up_no_other_prompt_goes_on_or_begins():
  cluster = Driver()
  for name in ('begun', 'next'):
    cluster.arrive(name, prompt_len=20)
  cluster.start(Step('prefill0', (Chunk('begun', 0, 4), Chunk('next', 0, 4))))
  cluster.arrive('new', prompt_len=2)
  placement = Chosen(new='prefill0')
  assert fill(cluster, 16, placement) == {'prefill0': [Chunk('begun', 4, 16)]}
  assert placement.asked == []


def test_waiting_prompts_begin_in_the_order_given():
  cluster = Driver()
  for name in 'abc':
    cluster.arrive(name, prompt_len=4)
  assert fill(cluster, 6, names='cab') == {'prefill0': [Chunk('c', 0, 4), Chunk('a', 0, 2)]}


def test_nobody_overtakes_the_first_that_fits_nowhere():
  cluster = Driver(prefill_pool(2, **SIZES | {'num_pages': 8}) + decode_pool(1, **SIZES))
  for name, prompt_len in (('a', 12), ('b', 12), ('large', 24), ('small', 2)):  # 3, 3, 6 and 1 of 8 pages
    cluster.arrive(name, prompt_len)
  assert fill(cluster) == {'prefill0': [Chunk('a', 0, 12)], 'prefill1': [Chunk('b', 0, 12)]}
  assert fill(cluster, names=('a', 'b', 'small')) == {
    'prefill0': [Chunk('a', 0, 12), Chunk('small', 0, 2)],
    'prefill1': [Chunk('b', 0, 12)],
  }


# ---------------------------------------------------------------------------- places


def test_a_placement_is_asked_of_all_workers_and_again_of_those_with_room_where_it_chose_one_without():
  (small,), (_, large) = prefill_pool(1, **SIZES | {'num_pages': 4}), prefill_pool(2, **SIZES)
  cluster = Driver((small, large, *decode_pool(1, **SIZES)))
  for name, prompt_len in (('short', 4), ('long', 20), ('other', 4)):
    cluster.arrive(name, prompt_len)
  placement = Chosen(short='prefill0', long='prefill0', other='prefill0')  # or the first that it may
  assert fill(cluster, placement=placement) == {
    'prefill0': [Chunk('short', 0, 4), Chunk('other', 0, 4)],
    'prefill1': [Chunk('long', 0, 20)],
  }
  both = ['prefill0', 'prefill1']
  assert placement.asked == [('short', both), ('long', both), ('long', ['prefill1']), ('other', both)]


def test_a_placement_sees_the_tokens_that_prompts_before_it_were_given():
  cluster = Driver(TWO_AND_ONE)
  for name, prompt_len in (('a', 12), ('b', 4), ('c', 5), ('d', 5)):
    cluster.arrive(name, prompt_len)
  room = cluster.view.room()
  assert fill(cluster, {'prefill0': 7, 'prefill1': 30}, room=room) == {
    'prefill0': [Chunk('a', 0, 7)],
    'prefill1': [Chunk('b', 0, 4), Chunk('c', 0, 5), Chunk('d', 0, 5)],
  }
  assert room.queued_tokens('prefill0') == 12  # the whole prompt, of which this step takes a part
  assert room.queued_tokens('prefill1') == 14


def test_room_is_taken_where_a_prompt_is_computed_and_where_its_kv_is_to_go():
  cluster = Driver(TWO_AND_ONE)
  cluster.arrive('sent', prompt_len=6, max_tokens=4)  # 2 pages, and 3 to decode
  cluster.arrive('kept', prompt_len=6, max_tokens=4)
  room = cluster.view.room()
  chunks = fill(
    cluster,
    placement=Chosen(sent='prefill0', kept='prefill1'),
    target_of=lambda entry, worker: 'decode0' if entry.request.id == 'sent' else None,
    room=room,
  )
  assert chunks == {'prefill0': [Chunk('sent', 0, 6, 'decode0')], 'prefill1': [Chunk('kept', 0, 6)]}
  assert [room.pages(name) for name in ('prefill0', 'prefill1', 'decode0')] == [14, 14, 13]
  assert [room.slots(name) for name in ('prefill0', 'prefill1', 'decode0')] == [4, 4, 3]


def test_a_prompt_that_stays_on_a_worker_of_both_roles_needs_a_slot_and_one_that_is_sent_on_needs_none():
  cluster = Driver(colocated_pool(1, **SIZES | {'max_sequences': 1}) + decode_pool(1, **SIZES))
  for name in 'abc':
    cluster.arrive(name, prompt_len=4)
  assert fill(cluster) == {'both0': [Chunk('a', 0, 4)]}
  sent = fill(cluster, target_of=lambda entry, worker: None if entry.request.id == 'a' else 'decode0')
  assert sent == {'both0': [Chunk('a', 0, 4), Chunk('b', 0, 4, 'decode0'), Chunk('c', 0, 4, 'decode0')]}


def test_a_target_is_asked_of_the_worker_that_is_chosen_and_may_depend_on_it():
  cluster = Driver(TWO_AND_ONE)
  cluster.arrive('a', prompt_len=4)
  cluster.arrive('b', prompt_len=4)
  asked = []

  def target_of(entry, worker):
    asked.append((entry.request.id, worker.name))
    return 'decode0' if worker.name == 'prefill1' else None

  chunks = fill(cluster, 4, Chosen(a='prefill0', b='prefill1'), target_of)
  assert chunks == {'prefill0': [Chunk('a', 0, 4)], 'prefill1': [Chunk('b', 0, 4, 'decode0')]}
  assert asked == [('a', 'prefill0'), ('b', 'prefill1')]
