"""Roles that follow the load: one worker more for the phase that is short of them, and no swinging."""

import dataclasses

import pytest

from configs.changing_load_simulated import get_config
from pdjax import launch
from pdjax.policies import Disaggregated, FollowLoad
from pdjax.serving import ALL, Chunk, Step, SwitchRole, Transfer
from pdjax.serving.events import WorkerLost
from pdjax.serving.orders import StepOrder
from pdjax.types import Role, decode_pool, prefill_pool
from tests.serving.driver import SIZES, Driver
from tests.switching import EITHER
from tests.test_simulator import HandCost

POLICY = FollowLoad(Disaggregated(max_prefill_tokens=16, moves_on=True), wait_s=2.0, dwell_s=4.0)


def cluster(prefill: int, decode: int, **sizes) -> Driver:
  sizes = SIZES | sizes | {'may_become': EITHER}
  return Driver(prefill_pool(prefill, **sizes) + decode_pool(decode, **sizes), cost=HandCost())


def switches(driver: Driver, policy=POLICY) -> list[SwitchRole]:
  return [one for one in policy.decide(driver.view) if isinstance(one, SwitchRole)]


def keep_waiting(driver: Driver, waited_s: float) -> None:
  """A request that has waited, where every prefill worker has all that it may have."""
  driver.arrive('waits', 6)
  driver.now_s += waited_s
  driver.arrive('last', 6)


def decode(driver: Driver, name: str, worker: str = 'decode0', max_tokens: int = 9) -> None:
  """A request that decodes at a worker."""
  driver.arrive(name, 4, max_tokens)
  step, transfer = driver.start(Step('prefill0', (Chunk(name, 0, 4, worker),)))
  driver.end(step, {name: 1})
  driver.end(transfer)


def compute(driver: Driver) -> StepOrder:
  """A sequence that has the only slot, and the step of another's prompt, not ended."""
  decode(driver, 'a')
  driver.arrive('b', 4)
  (step,) = driver.start(Step('prefill1', (Chunk('b', 0, 4),)))
  return step


def test_a_decode_worker_prefills_where_the_next_request_has_waited_for_long():
  driver = cluster(1, 3)
  driver.now_s = 10.0
  keep_waiting(driver, 1.9)
  assert switches(driver) == []
  driver.now_s += 0.1
  driver.arrive('later', 2)
  assert switches(driver) == [SwitchRole('decode0', Role.PREFILL)]


def test_the_emptiest_one_changes_and_those_that_stay_have_room_for_all():
  driver = cluster(1, 2, max_sequences=2)
  for name, worker in (('a', 'decode0'), ('b', 'decode0'), ('c', 'decode1')):
    decode(driver, name, worker)
  driver.now_s = 20.0
  keep_waiting(driver, 3.0)
  assert switches(driver) == []  # three sequences, and two slots would be left
  driver = cluster(1, 2, max_sequences=4)
  for name, worker in (('a', 'decode0'), ('b', 'decode0'), ('c', 'decode1')):
    decode(driver, name, worker)
  driver.now_s = 20.0
  keep_waiting(driver, 3.0)
  assert switches(driver) == [SwitchRole('decode1', Role.PREFILL)]


def test_a_prefill_worker_decodes_where_a_computed_prompt_has_nowhere_to_go():
  driver = cluster(3, 1, max_sequences=1)
  step = compute(driver)
  driver.now_s = 10.0
  driver.end(step, {'b': 1})
  assert driver.view.prefilled.keys() == {'b'}
  assert switches(driver) == [SwitchRole('prefill0', Role.DECODE)]
  keep_waiting(driver, 1.0)
  assert switches(driver) == []  # prefill cannot do without it


def test_a_computed_prompt_that_has_room_by_now_calls_for_nothing():
  driver = cluster(3, 1, max_sequences=1)
  step = compute(driver)
  driver.end(step, {'b': 1})
  (step,) = driver.start(Step('decode0', decodes=ALL))
  driver.now_s = 10.0
  driver.end(step, {'a': 1}, {'a': 'length'})
  assert POLICY.decide(driver.view) == [Transfer('b', 'decode0')]


def test_a_lost_worker_is_not_the_one_that_changes():
  driver = cluster(3, 1, max_sequences=1)
  step = compute(driver)
  driver.now_s = 10.0
  driver.end(step, {'b': 1})
  driver.apply(WorkerLost('prefill0', driver.now_s, 'gone', returning=True))
  assert switches(driver) == [SwitchRole('prefill2', Role.DECODE)]


def test_a_step_that_is_too_slow_calls_for_decode_too():
  driver = cluster(2, 1)
  for name in 'abc':
    driver.now_s += 4.0
    decode(driver, name)
  assert switches(driver, dataclasses.replace(POLICY, tpot_s=0.75)) == []  # a quarter of a second each
  assert switches(driver, dataclasses.replace(POLICY, tpot_s=0.7)) == [SwitchRole('prefill0', Role.DECODE)]


def test_after_a_change_nothing_changes_for_a_while_nor_while_one_drains():
  driver = cluster(1, 3)
  driver.now_s = 10.0
  keep_waiting(driver, 3.0)
  (first,) = switches(driver)
  driver.start(first)  # it is empty, and so has its role at once
  assert driver.state.workers['decode0'].role is Role.PREFILL and switches(driver) == []
  driver.now_s += 3.9
  driver.arrive('more', 2)
  assert switches(driver) == []
  driver.now_s += 0.1
  driver.arrive('even more', 2)
  assert switches(driver) == [SwitchRole('decode1', Role.PREFILL)]


def test_no_side_is_left_without_a_worker_and_none_takes_a_role_that_it_may_not():
  driver = cluster(1, 1)
  driver.now_s = 10.0
  keep_waiting(driver, 9.0)
  assert switches(driver) == []
  fixed = Driver(prefill_pool(1, **SIZES) + decode_pool(2, **SIZES), cost=HandCost())
  fixed.now_s = 10.0
  keep_waiting(fixed, 9.0)
  assert switches(fixed) == []


@pytest.mark.parametrize('follows', [False, True])
def test_where_the_load_turns_more_requests_meet_their_limits(follows):
  report = launch.simulate(get_config(phase_s=10.0, follows=follows)).report
  assert report.failed == 0 and bool(report.role_changes) == follows
  assert (report.goodput_share > 0.9) == follows
