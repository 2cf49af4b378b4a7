"""The batch that stands, the rows of tokens, and the bounds that a backend keeps of it."""

import random

import numpy as np
import pytest

from pdjax.serving import ALL, STANDING, Cancel, Chunk, PolicyError, Step
from pdjax.serving.batch import NOBODY, TokenRows
from pdjax.serving.bounds import Bounds, most_steps
from pdjax.serving.orders import Growth, Join, StepOrder
from pdjax.types import colocated_pool
from tests.serving.driver import SIZES, Driver


def joins(*slots: int, left: int = 9, reach: int | None = None) -> tuple[Join, ...]:
  return tuple(Join(f's{slot}', slot, 10, left, reach) for slot in slots)


def test_those_that_join_stand_behind_those_that_stay():
  batch = NOBODY.changed((), joins(3, 1))
  assert batch.slots == (3, 1) and batch.requests == ('s3', 's1') and len(batch) == 2
  assert batch.changed((3,), joins(0, 3)).slots == (1, 0, 3)
  assert batch.changed((), ()) is batch and batch.changed((1, 3), ()) == NOBODY


def test_rows_hold_what_columns_brought_until_it_is_taken_out():
  """Random steps of one or several tokens, with sequences that leave and others that take their slots."""
  rng, rows = random.Random(3), TokenRows(6)
  expected: dict[int, list[int]] = {}
  batch = NOBODY
  for _ in range(400):
    leaves = tuple(slot for slot in batch.slots if rng.random() < 0.05)
    for slot in leaves:
      assert rows.count(slot) == len(expected[slot]) and rows.take(slot) == expected.pop(slot)
      rows.disown(slot)
    new = [slot for slot in range(6) if slot not in expected and rng.random() < 0.3]
    for slot in new:
      rows.own(slot, 1000)
      expected[slot] = []
    batch = batch.changed(leaves, joins(*new))
    if not len(batch):
      continue
    steps = rng.choice((1, 1, 3))
    tokens = np.array([[rng.randrange(1, 99) for _ in batch.slots] for _ in range(steps)], np.int32)
    counts = np.array([rng.randint(0, steps) for _ in batch.slots])
    owners = rows.owners(batch)
    gone = [slot for slot in batch.slots if rng.random() < 0.05]
    for slot in gone:  # while the step is in flight, and another takes the slot
      expected.pop(slot)
      rows.disown(slot)
      rows.own(slot, 1000)
    here = rows.add(batch, owners, tokens, counts)
    assert (here is None) == (not gone)
    for row, slot in enumerate(batch.slots):
      if slot in gone:
        assert here is not None and not here[row] and rows.count(slot) == 0
        expected[slot] = []
      else:
        expected[slot] += tokens[: counts[row], row].tolist()
    if expected and rng.random() < 0.1:
      slot = rng.choice(list(expected))
      assert rows.take(slot) == expected[slot] and rows.count(slot) == 0
      expected[slot] = []
  for slot, tokens in expected.items():
    assert rows.take(slot) == tokens


def test_tokens_that_are_all_alike_take_no_room_until_another_comes():
  rows, batch = TokenRows(2), NOBODY.changed((), joins(0, 1))
  for slot in (0, 1):
    rows.own(slot, 10**6)
  size = rows._tokens.size
  for _ in range(100):
    rows.add(batch, rows.owners(batch), np.broadcast_to(np.int32(0), (50, 2)), np.array([50, 7]))
  assert rows._tokens.size == size and (rows.count(0), rows.count(1)) == (5000, 700)
  rows.add(batch, rows.owners(batch), np.array([[4, 5]], np.int32), np.array([1, 1]))
  assert rows.take(0) == [0] * 5000 + [4] and rows.take(1) == [0] * 700 + [5]


def test_who_gets_nothing_more_is_found_by_what_is_left():
  rows, batch = TokenRows(3), NOBODY.changed((), joins(2, 0))
  rows.own(2, 5)
  rows.own(0, 3)
  assert rows.exhausted(batch, 2) == [] and rows.exhausted(batch, 3) == [0]
  rows.add(batch, rows.owners(batch), np.array([[7, 7], [7, 7]], np.int32), np.array([2, 2]))
  assert rows.exhausted(batch, 1) == [0] and rows.exhausted(batch, 3) == [2, 0]
  rows.skip(2, 2)
  assert rows.exhausted(batch, 1) == [2, 0]


@pytest.mark.parametrize(
  ('left', 'reach', 'most'), [((5, 3), None, 5), ((5, 3), 12, 2), ((2, 2), 12, 2), ((1, 1), 10, 1), ((0, 0), None, 1)]
)
def test_steps_follow_until_none_gets_a_token_or_one_lacks_a_page(left, reach, most):
  """Of sequences with 10 tokens cached; who ends before needs no further page."""
  bounds, new = Bounds(), tuple(Join(f's{row}', row, 10, one, reach) for row, one in enumerate(left))
  order = StepOrder(0, 'w', joins=new, decodes=True, batch=NOBODY.changed((), new))
  assert most_steps(bounds.change(order), bounds.steps) == most


def test_bounds_count_on_from_the_first_step_of_all_and_pages_widen_them():
  bounds, new = Bounds(), joins(0, 1, left=9, reach=12)
  batch = NOBODY.changed((), new)
  assert most_steps(bounds.change(StepOrder(0, 'w', joins=new, decodes=True, batch=batch)), 0) == 2
  bounds.steps += 2
  grown = StepOrder(1, 'w', growth=(Growth(0, {'kv': (3, (7,))}, 16), Growth(1, {'kv': (3, (8,))}, 15)), batch=batch)
  assert most_steps(bounds.change(grown), bounds.steps) == 3
  whole = StepOrder(2, 'w', leaves=(1,), growth=(Growth(0, {'kv': (4, (9,))}, None),), batch=batch.changed((1,), ()))
  assert most_steps(bounds.change(whole), bounds.steps) == 7


def test_no_order_stands_of_which_nobody_is_left():
  cluster = Driver(colocated_pool(1, **SIZES))
  cluster.arrive('a', prompt_len=4, max_tokens=9)
  cluster.end(cluster.start(Step('both0', (Chunk('a', 0, 4),)))[0], {'a': 1})
  cluster.start(Step('both0', decodes=ALL, steps=STANDING))
  assert cluster.view.workers['both0'].is_standing
  ends = cluster.start(Cancel('a'))
  assert not cluster.view.workers['both0'].is_standing
  with pytest.raises(PolicyError, match='nothing to do'):
    cluster.start(Step('both0', decodes=ALL, steps=STANDING))
  (leave,) = cluster.must()
  assert (leave.request, leave.worker) == ('a', 'both0')
  assert [one.request for one in ends] == ['a']
