"""A state in, a list of actions out."""

import dataclasses

import pytest

from pdjax.policies import Disaggregated
from pdjax.serving import ALL, STANDING, Chunk, Phase, Step, Transfer
from pdjax.types import colocated_pool, decode_pool, prefill_pool
from tests.serving.driver import SIZES, Driver, snapshot

POLICY = Disaggregated(max_prefill_tokens=16)


def _carry_out(cluster: Driver, policy=POLICY) -> list:
  """Decide once and start what was decided."""
  return [order for action in policy.decide(cluster.view) for order in cluster.start(action)]


def test_nothing_is_wanted_of_an_empty_cluster():
  assert POLICY.decide(Driver().view) == []


def test_deciding_changes_nothing():
  cluster = Driver()
  for index in range(6):
    cluster.arrive(f'r{index}', prompt_len=9)
  before = snapshot(cluster.state)
  assert POLICY.decide(cluster.view) == POLICY.decide(cluster.view) != []
  assert snapshot(cluster.state) == before


def test_prompts_are_packed_in_order_of_arrival_up_to_the_budget():
  cluster = Driver()
  for name, prompt_len in (('z', 5), ('a', 7), ('m', 9), ('b', 2)):
    cluster.arrive(name, prompt_len, max_tokens=2)
  assert POLICY.decide(cluster.view) == [
    Step('prefill0', (Chunk('z', 0, 5, 'decode0'), Chunk('a', 0, 7, 'decode0'), Chunk('m', 0, 4, 'decode0')))
  ]


def test_a_prompt_that_was_begun_goes_on_before_others_begin():
  cluster = Driver()
  cluster.arrive('long', prompt_len=20)
  _carry_out(cluster)
  cluster.arrive('short', prompt_len=3)
  assert POLICY.decide(cluster.view) == [
    Step('prefill0', (Chunk('long', 16, 4, 'decode0'), Chunk('short', 0, 3, 'decode0')))
  ]


def test_a_worker_is_given_two_steps_and_no_third():
  cluster = Driver()
  cluster.arrive('long', prompt_len=50, max_tokens=8)
  assert len(_carry_out(cluster)) == len(_carry_out(cluster)) == 2  # each a step and a transfer
  assert POLICY.decide(cluster.view) == []


def test_the_workers_own_limits_bound_a_step():
  sizes = SIZES | {'max_step_tokens': 8, 'max_chunks': 2}
  cluster = Driver(prefill_pool(1, **sizes) + decode_pool(1, **SIZES))
  for name, prompt_len in (('a', 2), ('b', 3), ('c', 2)):
    cluster.arrive(name, prompt_len)
  assert POLICY.decide(cluster.view) == [Step('prefill0', (Chunk('a', 0, 2, 'decode0'), Chunk('b', 0, 3, 'decode0')))]
  cluster = Driver(prefill_pool(1, **sizes) + decode_pool(1, **SIZES))
  cluster.arrive('a', prompt_len=30)
  assert POLICY.decide(cluster.view) == [Step('prefill0', (Chunk('a', 0, 8, 'decode0'),))]


def test_prompts_go_to_the_prefill_worker_with_the_shortest_queue():
  cluster = Driver(prefill_pool(2, **SIZES) + decode_pool(1, **SIZES))
  for name, prompt_len in (('a', 12), ('b', 4), ('c', 5), ('d', 2)):
    cluster.arrive(name, prompt_len, max_tokens=1)
  assert POLICY.decide(cluster.view) == [
    Step('prefill0', (Chunk('a', 0, 12),)),
    Step('prefill1', (Chunk('b', 0, 4), Chunk('c', 0, 5), Chunk('d', 0, 2))),  # 0 + 4 + 5 < 12
  ]


def test_kv_goes_to_the_decode_worker_with_the_most_free_slots():
  cluster = Driver(prefill_pool(1, **SIZES) + decode_pool(2, **SIZES))
  for name in 'abc':
    cluster.arrive(name, prompt_len=3)
  assert POLICY.decide(cluster.view) == [
    Step('prefill0', (Chunk('a', 0, 3, 'decode0'), Chunk('b', 0, 3, 'decode1'), Chunk('c', 0, 3, 'decode0')))
  ]


def test_a_request_for_one_token_is_sent_nowhere():
  cluster = Driver()
  cluster.arrive('a', max_tokens=1)
  assert POLICY.decide(cluster.view) == [Step('prefill0', (Chunk('a', 0, 6),))]


def test_a_prompt_is_prefilled_although_there_is_no_room_to_decode_and_moves_when_there_is():
  cluster = Driver(prefill_pool(1, **SIZES) + decode_pool(1, **SIZES | {'max_sequences': 1}))
  cluster.arrive('a', max_tokens=2)
  cluster.arrive('b', max_tokens=2)
  decision = POLICY.decide(cluster.view)
  assert decision == [Step('prefill0', (Chunk('a', 0, 6, 'decode0'), Chunk('b', 0, 6)))]
  step, transfer = cluster.start(decision[0])
  cluster.end(step, {'a': 1, 'b': 1})
  assert POLICY.decide(cluster.view) == []  # the slot is kept for `a`
  cluster.end(transfer)
  assert POLICY.decide(cluster.view) == [Step('decode0', decodes=ALL, steps=STANDING)]
  (decode,) = _carry_out(cluster)
  assert POLICY.decide(cluster.view) == []
  cluster.end(decode, {'a': 1}, {'a': 'length'})
  assert POLICY.decide(cluster.view) == [Transfer('b', 'decode0')]


def test_room_that_some_wait_for_is_not_promised_to_later_prompts():
  cluster = Driver(prefill_pool(1, **SIZES) + decode_pool(1, **SIZES | {'num_pages': 6}))
  cluster.arrive('first', prompt_len=12, max_tokens=5)  # 4 pages
  step, transfer = _carry_out(cluster)
  cluster.end(step, {'first': 1})
  cluster.end(transfer)
  cluster.arrive('large', prompt_len=14, max_tokens=8)  # 6 pages
  (step,) = _carry_out(cluster, Disaggregated(decode_steps=1))[:1]
  cluster.end(step, {'large': 1})
  assert cluster.phase('large') is Phase.PREFILLED
  cluster.arrive('small', prompt_len=3, max_tokens=2)  # would fit
  assert Step('prefill0', (Chunk('small', 0, 3),)) in POLICY.decide(cluster.view)


def test_prompts_move_in_the_order_they_were_prefilled():
  cluster = Driver()
  for name in 'cab':
    cluster.arrive(name, max_tokens=8)
  chunks = tuple(Chunk(name, 0, 6) for name in 'bac')
  cluster.end(cluster.start(Step('prefill0', chunks))[0], {'b': 1, 'a': 1, 'c': 1})
  assert POLICY.decide(cluster.view) == [Transfer(name, 'decode0') for name in 'bac']


def test_the_first_that_fits_nowhere_is_not_overtaken_by_those_that_move():
  cluster = Driver(prefill_pool(1, **SIZES) + decode_pool(1, **SIZES | {'num_pages': 8}))
  for name, max_tokens in (('a', 11), ('b', 27), ('c', 2)):  # 4, 8 and 2 pages
    cluster.arrive(name, max_tokens=max_tokens)
  cluster.end(cluster.start(Step('prefill0', tuple(Chunk(n, 0, 6) for n in 'abc')))[0], {'a': 1, 'b': 1, 'c': 1})
  assert POLICY.decide(cluster.view) == [Transfer('a', 'decode0')]


def test_a_long_prompt_at_the_head_is_not_overtaken():
  cluster = Driver(prefill_pool(1, **SIZES | {'num_pages': 8}) + decode_pool(1, **SIZES))
  cluster.arrive('a', prompt_len=12, max_tokens=1)  # 3 of 8 pages
  (step,) = _carry_out(cluster)
  cluster.arrive('long', prompt_len=24, max_tokens=1)  # 6
  cluster.arrive('short', prompt_len=2, max_tokens=1)
  assert POLICY.decide(cluster.view) == []
  cluster.end(step, {'a': 1}, {'a': 'length'})
  assert POLICY.decide(cluster.view) == [Step('prefill0', (Chunk('long', 0, 16),))]


def _decoding(cluster: Driver, *names: str, max_tokens: int = 9) -> None:
  for name in names:
    cluster.arrive(name, prompt_len=3, max_tokens=max_tokens)
  step, *transfers = cluster.start(Step('prefill0', tuple(Chunk(name, 0, 3, 'decode0') for name in names)))
  cluster.end(step, dict.fromkeys(names, 1))
  for transfer in transfers:
    cluster.end(transfer)


def test_a_step_over_all_that_a_decode_worker_holds_stands_until_another_is_there():
  cluster = Driver()
  _decoding(cluster, 'a', 'b')
  assert POLICY.decide(cluster.view) == [Step('decode0', decodes=ALL, steps=STANDING)]
  _carry_out(cluster)
  assert POLICY.decide(cluster.view) == []
  _decoding(cluster, 'c')
  assert POLICY.decide(cluster.view) == [Step('decode0', decodes=ALL, steps=STANDING)]


@pytest.mark.parametrize('steps', [1, 4])
def test_no_more_than_two_steps_are_in_flight(steps):
  cluster = Driver()
  _decoding(cluster, 'a')
  for _ in range(2):
    cluster.start(Step('decode0', decodes=ALL, steps=steps))
  assert dataclasses.replace(POLICY, decode_steps=4).decide(cluster.view) == []


def test_decode_steps_are_fused_as_configured():
  cluster = Driver()
  _decoding(cluster, 'a')
  policy = dataclasses.replace(POLICY, decode_steps=4)
  assert policy.decide(cluster.view) == [Step('decode0', decodes=ALL, steps=4)]


def test_no_step_is_wanted_once_every_token_is_asked_for():
  cluster = Driver()
  _decoding(cluster, 'a', max_tokens=2)
  _carry_out(cluster)
  assert POLICY.decide(cluster.view) == []


def test_transfers_prefills_and_decodes_are_decided_together():
  cluster = Driver(prefill_pool(1, **SIZES) + decode_pool(2, **SIZES))
  _decoding(cluster, 'd')
  cluster.arrive('m')
  cluster.end(cluster.start(Step('prefill0', (Chunk('m', 0, 6),)))[0], {'m': 1})
  cluster.arrive('w', prompt_len=3)
  assert POLICY.decide(cluster.view) == [
    Transfer('m', 'decode1'),
    Step('prefill0', (Chunk('w', 0, 3),)),  # sent later: `m` was waiting for room before it
    Step('decode0', decodes=ALL, steps=STANDING),
  ]


def test_workers_of_both_roles_fuse_and_need_no_transfer():
  cluster = Driver(colocated_pool(1, **SIZES))
  cluster.arrive('a', prompt_len=4)
  assert POLICY.decide(cluster.view) == [Step('both0', (Chunk('a', 0, 4),))]
  (step,) = _carry_out(cluster)
  cluster.end(step, {'a': 1})
  cluster.arrive('b', prompt_len=5)
  assert POLICY.decide(cluster.view) == [Step('both0', (Chunk('b', 0, 5),), ALL)]


def test_a_worker_of_both_roles_may_send_what_it_cannot_decode():
  workers = colocated_pool(1, **SIZES | {'num_pages': 3}) + decode_pool(1, **SIZES)
  cluster = Driver(workers)
  cluster.arrive('a', prompt_len=12, max_tokens=9)  # 3 pages to prefill, 5 to decode
  assert POLICY.decide(cluster.view) == [Step('both0', (Chunk('a', 0, 12, 'decode0'),))]


def test_waiting_prompts_can_be_served_in_another_order():
  class ShortestFirst(Disaggregated):
    def order(self, waiting):
      return sorted(waiting, key=lambda entry: entry.request.prompt_len)

  cluster = Driver()
  for name, prompt_len in (('a', 9), ('b', 3), ('c', 6)):
    cluster.arrive(name, prompt_len, max_tokens=1)
  (step,) = ShortestFirst(max_prefill_tokens=10).decide(cluster.view)
  assert step.chunks == (Chunk('b', 0, 3), Chunk('c', 0, 6), Chunk('a', 0, 1))


class Last:
  """The last of those that have room."""

  def choose(self, request, workers, room):
    return workers[-1]


def test_a_decider_may_let_short_prompts_stay_where_they_are_prefilled():
  class LocalIfShort(Disaggregated):
    """Sends the KV of long prompts on, and lets a worker of both roles decode the short ones itself."""

    def target_of(self, view, room, entry, worker):
      stays = worker.role.decodes and entry.request.prompt_len < 5
      return None if stays else super().target_of(view, room, entry, worker)

  cluster = Driver(colocated_pool(1, **SIZES) + decode_pool(1, **SIZES))
  cluster.arrive('short', prompt_len=4)
  cluster.arrive('long', prompt_len=9)
  policy = LocalIfShort(max_prefill_tokens=32, place_decode=Last())  # the worker that does not prefill
  assert policy.decide(cluster.view) == [Step('both0', (Chunk('short', 0, 4), Chunk('long', 0, 9, 'decode0')))]
  first, *_ = cluster.start(*policy.decide(cluster.view))
  assert cluster.state.books.requests['short'].target == 'both0' and first.chunks[0].slot is not None
