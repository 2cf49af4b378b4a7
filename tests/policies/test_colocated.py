"""Decodes first, then prompt chunks under a token budget."""

import dataclasses

import pytest

from pdjax.policies import Colocated
from pdjax.serving import ALL, STANDING, Chunk, PolicyError, Step
from pdjax.types import colocated_pool, decode_pool, prefill_pool
from tests.serving.driver import SIZES, Driver

POLICY = Colocated(token_budget=8)
SIZES = SIZES | {'num_pages': 32}


def _carry_out(cluster: Driver, policy=POLICY) -> list:
  return [order for action in policy.decide(cluster.view) for order in cluster.start(action)]


def _decoding(*names: str, max_tokens: int = 9, workers: int = 1) -> Driver:
  """A cluster whose worker both0 decodes these."""
  cluster = Driver(colocated_pool(workers, **SIZES))
  for name in names:
    cluster.arrive(name, prompt_len=2, max_tokens=max_tokens)
  cluster.end(cluster.start(Step('both0', tuple(Chunk(name, 0, 2) for name in names)))[0], dict.fromkeys(names, 1))
  return cluster


def test_nothing_is_wanted_of_an_empty_cluster():
  assert POLICY.decide(Driver(colocated_pool(2, **SIZES)).view) == []


def test_prompts_share_one_step_in_order_of_arrival():
  cluster = Driver(colocated_pool(1, **SIZES))
  for name in 'zab':
    cluster.arrive(name, prompt_len=3)
  assert POLICY.decide(cluster.view) == [Step('both0', (Chunk('z', 0, 3), Chunk('a', 0, 3), Chunk('b', 0, 2)))]


def test_decodes_come_first_and_prompts_get_what_the_budget_leaves():
  cluster = _decoding('a', 'b', 'c')
  cluster.arrive('long', prompt_len=20)
  assert POLICY.decide(cluster.view) == [Step('both0', (Chunk('long', 0, 5),), ALL)]


def test_decodes_that_eat_the_budget_leave_no_prompt_tokens():
  cluster = _decoding('a', 'b', 'c')
  cluster.arrive('w')
  for budget in (2, 3):
    assert Colocated(token_budget=budget).decide(cluster.view) == [Step('both0', decodes=ALL, steps=STANDING)]
  assert Colocated(token_budget=4).decide(cluster.view) == [Step('both0', (Chunk('w', 0, 1),), ALL)]


def test_a_prompt_that_was_begun_goes_on_before_others_begin():
  cluster = Driver(colocated_pool(1, **SIZES))
  cluster.arrive('long', prompt_len=13)
  _carry_out(cluster)
  cluster.arrive('short', prompt_len=2)
  assert POLICY.decide(cluster.view) == [Step('both0', (Chunk('long', 8, 5), Chunk('short', 0, 2)))]


def test_a_prompt_in_flight_is_decoded_in_the_next_step_already():
  cluster = Driver(colocated_pool(1, **SIZES))
  cluster.arrive('a', prompt_len=4)
  _carry_out(cluster)
  assert POLICY.decide(cluster.view) == [Step('both0', decodes=ALL, steps=STANDING)]
  _carry_out(cluster)
  assert POLICY.decide(cluster.view) == []  # two steps in flight


def test_steps_are_fused_only_where_no_prompt_has_work():
  policy = dataclasses.replace(POLICY, decode_steps=4)
  cluster = _decoding('a')
  assert policy.decide(cluster.view) == [Step('both0', decodes=ALL, steps=4)]
  cluster.arrive('w')
  assert policy.decide(cluster.view) == [Step('both0', (Chunk('w', 0, 6),), ALL, steps=1)]


def test_prompts_are_spread_over_the_workers_by_their_queues():
  cluster = Driver(colocated_pool(2, **SIZES))
  for name, prompt_len in (('a', 7), ('b', 3), ('c', 3), ('d', 5)):
    cluster.arrive(name, prompt_len)
  assert POLICY.decide(cluster.view) == [
    Step('both0', (Chunk('a', 0, 7),)),
    Step('both1', (Chunk('b', 0, 3), Chunk('c', 0, 3), Chunk('d', 0, 2))),
  ]


def test_a_worker_with_fewer_sequences_takes_the_next_of_equal_queues():
  cluster = _decoding('a', 'b', workers=2)
  cluster.arrive('w', prompt_len=3)
  assert POLICY.decide(cluster.view) == [Step('both0', decodes=ALL, steps=STANDING), Step('both1', (Chunk('w', 0, 3),))]


def test_a_prompt_begins_only_where_all_its_tokens_will_fit():
  cluster = Driver(colocated_pool(1, **SIZES | {'num_pages': 4}))
  cluster.arrive('a', prompt_len=4, max_tokens=5)  # 2 pages
  cluster.arrive('b', prompt_len=4, max_tokens=6)  # 3
  cluster.arrive('c', prompt_len=4, max_tokens=1)  # 1: fits, but `b` is not to be overtaken
  assert POLICY.decide(cluster.view) == [Step('both0', (Chunk('a', 0, 4),))]


def test_no_more_sequences_begin_than_there_are_slots():
  cluster = Driver(colocated_pool(1, **SIZES | {'max_sequences': 2}))
  for name in 'abc':
    cluster.arrive(name, prompt_len=2)
  assert POLICY.decide(cluster.view) == [Step('both0', (Chunk('a', 0, 2), Chunk('b', 0, 2)))]


def test_the_workers_own_limits_bound_a_step():
  cluster = Driver(colocated_pool(1, **SIZES | {'max_step_tokens': 5, 'max_chunks': 1}))
  cluster.arrive('a', prompt_len=9)
  assert POLICY.decide(cluster.view) == [Step('both0', (Chunk('a', 0, 5),))]
  cluster = Driver(colocated_pool(1, **SIZES | {'max_chunks': 1}))
  cluster.arrive('a', prompt_len=2)
  cluster.arrive('b', prompt_len=2)
  assert POLICY.decide(cluster.view) == [Step('both0', (Chunk('a', 0, 2),))]


def test_workers_of_one_role_are_refused_with_the_remedy():
  cluster = Driver(prefill_pool(1, **SIZES) + decode_pool(1, **SIZES))
  with pytest.raises(PolicyError, match=r'wants workers of role "both", .* prefill0, decode0; use colocated_pool'):
    POLICY.decide(cluster.view)


@pytest.mark.parametrize('field', ['token_budget', 'decode_steps'])
def test_a_policy_that_can_do_nothing_is_refused(field):
  with pytest.raises(ValueError, match=f'Colocated has {field}=0, expected at least 1'):
    Colocated(**{field: 0})


def test_nothing_is_ever_moved():
  cluster = _decoding('a', workers=2)
  cluster.arrive('b', prompt_len=9)
  for _ in range(4):
    actions = POLICY.decide(cluster.view)
    assert all(isinstance(action, Step) for action in actions)
    assert all(chunk.send_to is None for action in actions for chunk in action.chunks)
    for action in actions:
      cluster.start(action)
