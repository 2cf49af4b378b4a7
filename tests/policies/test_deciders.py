"""Where a prompt is computed: on the worker that decodes it, or on one that only prefills."""

import dataclasses

import pytest

from pdjax.policies import (
  AlwaysLocal,
  AlwaysRemote,
  Disaggregated,
  SoonestFirst,
  SoonestFirstToken,
  StickyPrefix,
  UncachedThreshold,
)
from pdjax.policies.forecast import first_token_seconds
from pdjax.serving import ALL, STANDING, Chunk, Step
from pdjax.types import PrefixCache, Role, WorkerSpec, prefill_pool
from tests.serving.driver import SIZES, Driver
from tests.test_simulator import HandCost


def cluster(prefill: int = 1, decode: int = 1, **options) -> Driver:
  """Workers that only prefill, and others that may prefill what they decode."""
  both = tuple(WorkerSpec(f'decode{number}', Role.BOTH, **SIZES) for number in range(decode))
  return Driver(prefill_pool(prefill, **SIZES) + both, cost=HandCost(), **options)


def policy(decider, **options) -> Disaggregated:
  return Disaggregated(max_prefill_tokens=16, decider=decider, **options)


def chunks(driver: Driver, decider, **options) -> dict[str, list[tuple[str, str | None]]]:
  """The prompts that a decision begins, and where they are sent, by worker."""
  steps = [one for one in policy(decider, **options).decide(driver.view) if isinstance(one, Step)]
  return {one.worker: [(chunk.request, chunk.send_to) for chunk in one.chunks] for one in steps if one.chunks}


def served(driver: Driver, name: str, length: int, worker: str, max_tokens: int = 1) -> None:
  """A request that has ended and left its blocks at a worker."""
  driver.arrive(name, length, max_tokens)
  (step, *_) = driver.start(Step(worker, (Chunk(name, 0, length),)))
  driver.end(step, {name: 1}, {name: 'length'})


def test_the_fixed_rules_send_every_prompt_one_way():
  driver = cluster()
  for name in 'ab':
    driver.arrive(name, 6)
  assert chunks(driver, AlwaysLocal()) == {'decode0': [('a', None), ('b', None)]}
  assert chunks(driver, AlwaysRemote()) == {'prefill0': [('a', 'decode0'), ('b', 'decode0')]}


def test_a_threshold_counts_what_no_decode_worker_has_cached():
  driver = cluster(prefix_cache=PrefixCache(block_tokens=4))
  served(driver, 'before', 12, 'decode0')
  driver.arrive('same', 14)
  driver.arrive('other', prompt=tuple(range(40, 46)))
  assert chunks(driver, UncachedThreshold(2)) == {'decode0': [('same', None)], 'prefill0': [('other', 'decode0')]}
  assert chunks(driver, UncachedThreshold(1)) == {'prefill0': [('same', 'decode0'), ('other', 'decode0')]}
  assert chunks(driver, UncachedThreshold(6)) == {'decode0': [('same', None), ('other', None)]}


def test_without_the_other_kind_of_worker_every_rule_takes_what_there_is():
  driver = Driver(cost=HandCost())
  driver.arrive('a', 6)
  for rule in (AlwaysLocal(), UncachedThreshold(64), SoonestFirstToken()):
    assert chunks(driver, rule) == {'prefill0': [('a', 'decode0')]}


def test_who_waits_for_a_worker_is_overtaken_at_none_that_it_may_go_to_and_elsewhere_by_all():
  driver = cluster()
  driver.arrive('long', 32)
  for _ in range(2):
    driver.start(policy(AlwaysRemote()).decide(driver.view)[0])  # the prefill worker has two steps now
  driver.arrive('remote', 9)
  driver.arrive('remote too', 8)
  driver.arrive('local', 3)
  assert chunks(driver, UncachedThreshold(6)) == {'decode0': [('local', None)]}


def test_the_soonest_first_token_decides_and_the_next_finds_a_longer_queue():
  driver = cluster()
  for name in 'abc':
    driver.arrive(name, 4)  # a second a token: local and remote in turns, of equals the first
  assert chunks(driver, SoonestFirstToken()) == {
    'decode0': [('a', None), ('c', None)], 'prefill0': [('b', 'decode0')],
  }  # fmt: skip


def test_a_worker_that_decodes_is_later_by_the_steps_that_it_has():
  driver = cluster()
  driver.arrive('first', 4, max_tokens=9)
  (step, *_) = driver.start(Step('decode0', (Chunk('first', 0, 4),)))
  driver.end(step, {'first': 1})
  driver.start(Step('decode0', decodes=ALL, steps=STANDING))
  driver.arrive('next', 4)
  room = driver.view.room()
  entry = driver.view.requests['next']
  seconds = {name: first_token_seconds(entry, worker, room) for name, worker in driver.view.workers.items()}
  assert seconds == {'prefill0': 4.0, 'decode0': 1.5 * 0.25 + 4.0 + 0.25}
  assert chunks(driver, SoonestFirstToken()) == {'prefill0': [('next', 'decode0')]}


def test_what_another_place_holds_counts_as_fetched():
  driver = cluster(prefix_cache=PrefixCache(block_tokens=4), moves_anywhere=True)
  served(driver, 'before', 16, 'decode0')
  driver.arrive('again', 17)
  room = driver.view.room()
  entry = driver.view.requests['again']
  seconds = {name: first_token_seconds(entry, worker, room) for name, worker in driver.view.workers.items()}
  assert seconds == {'prefill0': 16 * 0.5 + 1.0, 'decode0': 1.0}


def test_where_no_room_is_left_to_decode_a_prompt_is_computed_elsewhere():
  driver = cluster()
  for number in range(4):  # every slot
    driver.arrive(f'r{number}', 1, max_tokens=9)
  (step, *_) = driver.start(Step('decode0', tuple(Chunk(f'r{number}', 0, 1) for number in range(4))))
  driver.arrive('next', 4)
  driver.end(step, {f'r{number}': 1 for number in range(4)})
  assert chunks(driver, SoonestFirstToken()) == {'prefill0': [('next', None)]}


def test_a_prompt_that_its_side_could_never_take_goes_to_the_other():
  both = (WorkerSpec('decode0', Role.BOTH, **SIZES),)
  driver = Driver(prefill_pool(1, **SIZES | {'num_pages': 4}) + both, cost=HandCost())
  driver.arrive('long', 20)  # 5 pages
  driver.arrive('short', 6)
  assert chunks(driver, AlwaysRemote()) == {'decode0': [('long', None)], 'prefill0': [('short', 'decode0')]}


def test_a_prompt_of_more_samples_than_its_side_has_slots_goes_to_the_other():
  both = (WorkerSpec('decode0', Role.BOTH, **SIZES | {'max_sequences': 2}), WorkerSpec('decode1', Role.DECODE, **SIZES))
  driver = Driver((*prefill_pool(1, **SIZES), *both), cost=HandCost())
  driver.arrive('many', 4, n=4, temperature=1.0)
  driver.arrive('one', 4)
  assert chunks(driver, AlwaysLocal()) == {'prefill0': [('many', 'decode1')], 'decode0': [('one', None)]}


def test_without_a_worker_that_only_prefills_a_prompt_is_sent_where_there_is_room():
  both = WorkerSpec('both0', Role.BOTH, **SIZES | {'num_pages': 3})
  driver = Driver((both, WorkerSpec('decode0', Role.DECODE, **SIZES)), cost=HandCost())
  driver.arrive('long', 12, max_tokens=9)  # 3 pages, and 5 with its answer
  for rule in (AlwaysLocal(), SoonestFirstToken()):
    assert chunks(driver, rule) == {'both0': [('long', 'decode0')]}


def test_what_comes_free_is_kept_for_a_computed_prompt_that_waits_for_room():
  driver = cluster()
  for name in 'abcd':  # every slot
    driver.arrive(name, 1, max_tokens=9)
  (step, *_) = driver.start(Step('decode0', tuple(Chunk(name, 0, 1) for name in 'abcd')))
  driver.end(step, dict.fromkeys('abcd', 1))
  driver.arrive('waits', 4, n=2, temperature=1.0)
  (step,) = driver.start(Step('prefill0', (Chunk('waits', 0, 4),)))
  driver.end(step, {'waits': 1})
  (step,) = driver.start(Step('decode0', decodes=ALL))
  driver.end(step, dict.fromkeys('abcd', 1), {'a': 'length'})  # one slot is free, and it needs two
  driver.arrive('later', 1)
  assert chunks(driver, AlwaysLocal()) == {}
  (step,) = driver.start(Step('decode0', decodes=ALL))
  driver.end(step, dict.fromkeys('bcd', 1), {'b': 'length', 'c': 'length'})
  assert chunks(driver, AlwaysLocal()) == {'decode0': [('later', None)]}


def test_a_prefix_is_stuck_to_until_its_worker_is_saturated():
  driver = cluster(prefill=2, prefix_cache=PrefixCache(block_tokens=4))
  served(driver, 'before', 12, 'prefill1')
  driver.arrive('busy', prompt=tuple(range(40, 50)), max_tokens=1)
  driver.start(Step('prefill1', (Chunk('busy', 0, 2),)))
  driver.arrive('same', 13, max_tokens=1)
  sticky = {'place_prefill': StickyPrefix(saturated_tokens=0)}
  assert list(chunks(driver, AlwaysRemote(), **sticky)) == ['prefill1']  # 10 tokens to do, less 12 that are cached
  driver.arrive('more', prompt=tuple(range(50, 56)), max_tokens=1)
  driver.start(Step('prefill1', (Chunk('more', 0, 2),)))
  view = driver.view
  entry, workers = view.requests['same'], view.prefill_workers[:2]
  chosen = [StickyPrefix(saturated_tokens=most).choose(entry, workers, view.room()).name for most in (0, 3, 4)]
  assert chosen == ['prefill0', 'prefill0', 'prefill1']  # 16 to do, less 12


@dataclasses.dataclass(frozen=True)
class Unlike(HandCost):
  """One worker is four times as fast."""

  def step_seconds(self, model, worker, chunks, contexts, steps):
    return super().step_seconds(model, worker, chunks, contexts, steps) / (4 if worker.name == 'prefill1' else 1)


def test_of_unlike_workers_the_one_that_is_sooner_is_chosen_though_it_has_more_to_do():
  driver = Driver((*prefill_pool(2, **SIZES), WorkerSpec('decode0', Role.DECODE, **SIZES)), cost=Unlike())
  driver.arrive('before', 12, max_tokens=1)
  driver.start(Step('prefill1', (Chunk('before', 0, 12),)))
  driver.arrive('next', 6, max_tokens=1)
  view = driver.view
  assert (
    SoonestFirst().choose(view.requests['next'], view.prefill_workers, view.room()).name == 'prefill1'
  )  # 4.5 s < 6 s


def test_a_threshold_is_a_count():
  with pytest.raises(ValueError, match='UncachedThreshold has tokens=-1, expected'):
    UncachedThreshold(-1)
