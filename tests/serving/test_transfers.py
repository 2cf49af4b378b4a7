"""The time that a transfer has, and the time before it is tried again."""

import math

import pytest

from pdjax.serving import Chunk, Step
from pdjax.serving.timers import Timers
from pdjax.serving.transfers import Attempt, Transfers
from pdjax.types import FaultSpec, TransferSpec
from tests.serving.driver import TWICE, Driver, due, fail, moving


def test_the_time_of_a_transfer_begins_when_its_step_has_ended():
  cluster = Driver(faults=TWICE, transfer=TransferSpec(deadline_s=10.0))
  cluster.arrive('a', prompt_len=8)
  step, transfer = cluster.start(Step('prefill0', (Chunk('a', 0, 8, 'decode0'),)))
  assert cluster.state.next_timer_s == math.inf
  cluster.now_s = 500.0
  cluster.end(step, {'a': 1})
  assert cluster.state.next_timer_s == cluster.now_s + 10.0
  cluster.end(transfer)
  assert cluster.state.next_timer_s == math.inf


def test_each_try_waits_twice_as_long_as_the_one_before():
  cluster, order = moving(FaultSpec(max_attempts=4, backoff_s=1.0))
  for wait_s in (1.0, 2.0, 4.0):
    fail(cluster, order)
    assert cluster.state.next_timer_s == cluster.now_s + wait_s
    due(cluster, cluster.now_s + wait_s)
    (order,) = cluster.must()


@pytest.mark.parametrize(
  ('backoff_s', 'number', 'wait_s'),
  [(1.0, 6, 32.0), (1.0, 7, 60.0), (1.0, 5000, 60.0), (0.0, 5000, 0.0), (100.0, 9, 100.0), (1e308, 9, 1e308)],
)
def test_a_transfer_is_never_waited_for_longer_than_a_minute_before_it_is_tried_again(backoff_s, number, wait_s):
  timers = Timers()
  transfers = Transfers(timers, math.inf, FaultSpec(max_attempts=10_000, backoff_s=backoff_s))
  assert transfers.try_again(Attempt(moving()[1], 'a', number), 0.0) and timers.next_s == wait_s
