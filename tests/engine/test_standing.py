"""A standing order on the side of a worker: which steps follow, and when no more do."""

import dataclasses
import threading
import types

import numpy as np
import pytest

from pdjax.engine.runner import Ran, Runner
from pdjax.engine.worker import Collected
from pdjax.serving.batch import LOOKAHEAD, NOBODY
from pdjax.serving.events import Decoded, Done, Ended, Failed
from pdjax.serving.mailbox import Mailbox
from pdjax.serving.orders import Join, StepOrder


class FakeWorker:
  """A worker whose steps end when a test says so.

  Attributes:
    given: The orders that were dispatched.
    ends: Of the steps whose number, from 0, is a key: the rows that end with them.
    refuses: Numbers of the steps that cannot be dispatched.
  """

  def __init__(self):
    self.spec = types.SimpleNamespace(name='w')
    self.incarnation, self.broken = 1, False
    self.given: list[StepOrder] = []
    self.ends: dict[int, tuple[int, ...]] = {}
    self.refuses: set[int] = set()
    self.forgotten: list[str] = []
    self._may_end = threading.Semaphore(0)

  def dispatch(self, order, after):
    if len(self.given) in self.refuses:
      raise RuntimeError('no more streams')
    self.given.append(order)
    return len(self.given) - 1

  def collect(self, order, number):
    self._may_end.acquire()
    size = len(order.batch)
    ended = tuple(Ended(row, 'stop') for row in self.ends.get(number, ()))
    return Collected((), Decoded(np.full((1, size), number), np.ones(size, np.int64), ended), 0)

  def leave_out(self, order):
    return lambda: None

  def forget(self, request):
    self.forgotten.append(request)

  def forget_all(self):
    pass

  def end_step(self):
    self._may_end.release()


class Side:
  """A runner, its worker, and what it told so far."""

  def __init__(self):
    self.worker, self.mailbox = FakeWorker(), Mailbox()
    self.runner = Runner(self.worker, self.mailbox)

  def run(self, order: StepOrder) -> None:
    self.runner.run(order)
    self.runner.top_up()

  def end(self, top_up: bool = True) -> list:
    """A step ends; what is told of it, and then others follow."""
    self.worker.end_step()
    return self.hear(top_up)

  def hear(self, top_up: bool = True) -> list:
    told = []
    for item in self.mailbox.collect(20.0)[1]:
      told += self.runner.hear(item) if isinstance(item, Ran) else [item]
    if top_up:
      self.runner.top_up()
    return told


@pytest.fixture
def side():
  one = Side()
  yield one
  for _ in range(100):
    one.worker.end_step()
  one.runner.close()


def standing(number: int, *left: int, before=NOBODY, reach: int | None = None) -> StepOrder:
  """An order that stands, of sequences that get so many tokens."""
  joins = tuple(Join(f'r{number}.{row}', row + len(before), 4, most, reach) for row, most in enumerate(left))
  batch = before.changed((), joins)
  return StepOrder(number, 'w', joins=joins, decodes=True, standing=True, batch=batch)


def to_come(told: list) -> list[int | None]:
  assert all(isinstance(one, Done) for one in told)
  return [one.to_come for one in told]


def test_two_steps_are_with_the_worker_until_the_last_that_brings_a_token(side):
  side.run(standing(7, 5, 3))
  assert len(side.worker.given) == LOOKAHEAD
  assert [to_come(side.end()) for _ in range(5)] == [[None], [None], [None], [1], [0]]
  assert len(side.worker.given) == 5 and {order.id for order in side.worker.given} == {7}
  first, *others = side.worker.given
  assert first.joins and not any(order.joins or order.leaves or order.growth for order in others)
  assert len({id(order.batch) for order in side.worker.given}) == 1


@pytest.mark.parametrize('most', [1, 2])
def test_a_short_one_is_over_with_its_last_token(side, most):
  side.run(standing(7, most))
  assert len(side.worker.given) == most
  assert [to_come(side.end()) for _ in range(most)] == [[1], [0]][-most:]


def test_none_follows_that_one_has_no_page_for(side):
  side.run(standing(7, 9, reach=7))  # it has 4 tokens cached, and pages for three steps
  assert [to_come(side.end()) for _ in range(3)] == [[None], [1], [0]]


def test_with_one_that_ends_the_step_that_is_there_is_the_last(side):
  side.worker.ends = {2: (1,)}
  side.run(standing(7, 9, 9))
  assert [to_come(side.end()) for _ in range(4)] == [[None], [None], [1], [0]]
  assert len(side.worker.given) == 4


def test_another_order_lets_none_follow_and_has_one_step_there_until_those_before_it_ended(side):
  side.run(standing(7, 9))
  side.end()
  side.run(standing(8, 9, before=side.worker.given[0].batch))
  assert [order.id for order in side.worker.given] == [7, 7, 7, 8]
  assert [to_come(side.end()) for _ in range(2)] == [[1], [0]]
  assert [order.id for order in side.worker.given] == [7, 7, 7, 8, 8]
  assert to_come(side.end()) == [None]


def test_what_is_answered_in_a_turn_comes_before_the_step_that_would_follow(side):
  side.run(standing(7, 9))
  assert to_come(side.end(top_up=False)) == [None]
  side.run(standing(8, 9, before=side.worker.given[0].batch))
  assert [order.id for order in side.worker.given] == [7, 7, 8]  # and none of 7 that the answer would have stood behind
  assert to_come(side.end()) == [0]


def test_an_order_that_goes_on_has_a_step_there_however_late_its_loop_is(side):
  side.run(standing(7, 9))
  for _ in range(2):
    side.worker.end_step()
  told = []
  while len(told) < 2:
    told += side.hear(top_up=False)
  assert to_come(told) == [None, None] and len(side.worker.given) == 3
  side.run(standing(8, 9, before=side.worker.given[0].batch))
  assert to_come(side.end()) == [0]


def test_one_that_ended_with_a_step_before_it_ends_the_next_order_too(side):
  side.run(standing(7, 9, 9))
  batch = side.worker.given[0].batch
  side.worker.ends = {1: (0,)}
  side.runner.run(dataclasses.replace(standing(8, 9, before=batch)))
  assert to_come(side.end()) == [1]
  assert to_come(side.end()) == [0]  # the end, of a sequence in the batch of order 8 too
  assert [order.id for order in side.worker.given] == [7, 7, 8]
  assert to_come(side.end()) == [0]


def test_an_order_that_was_given_before_anyone_there_knew_of_an_end_has_its_first_step_alone(side):
  side.run(standing(7, 9, 9))
  batch = side.worker.given[0].batch
  side.worker.ends = {0: (0,)}
  assert to_come(side.end()) == [1]
  side.run(standing(8, 9, before=batch))  # with the sequence that has ended, as nobody there has heard
  assert [order.id for order in side.worker.given] == [7, 7, 8]
  assert [to_come(side.end()) for _ in range(2)] == [[0], [0]]
  left = dataclasses.replace(standing(9), leaves=(0,), batch=side.worker.given[-1].batch.changed((0,), ()))
  side.run(left)
  assert [order.id for order in side.worker.given] == [7, 7, 8, 9, 9]


def test_whoever_leaves_is_let_go_of_and_none_follows(side):
  side.run(standing(7, 9, 9))
  side.runner.leave('r7.0')
  assert side.worker.forgotten == ['r7.0']
  assert [to_come(side.end()) for _ in range(2)] == [[1], [0]]


def test_a_step_that_cannot_be_handed_over_fails_the_order_behind_those_that_end_well(side):
  side.worker.refuses = {2}
  side.run(standing(7, 9))
  assert to_come(side.end()) == [None]
  told = side.end()
  while not any(isinstance(one, Failed) for one in told):
    told += side.hear()
  done, failed = told
  assert done.to_come == 1 and (failed.order, failed.error) == (7, 'RuntimeError: no more streams')
  assert len(side.worker.given) == 2


def test_nothing_of_a_run_before_goes_on_or_is_told(side):
  side.run(standing(7, 9))
  side.worker.end_step()
  side.worker.end_step()
  side.runner.end_run()
  assert side.hear() == [] and len(side.worker.given) == 2
  side.run(standing(8, 1))
  assert to_come(side.end()) == [0]
