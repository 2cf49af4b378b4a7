"""Steps with every number filled in: chunks, decodes, slots and the steps fused in one order."""

import pytest

from pdjax.serving import ALL, Chunk, Phase, Step
from pdjax.serving.orders import ChunkOrder, Join
from pdjax.types import colocated_pool
from tests.serving.driver import SIZES, Driver


def test_a_colocated_prompt_decodes_where_it_is_and_needs_no_admission():
  cluster = Driver(colocated_pool(1, **SIZES))
  request = cluster.arrive('a', prompt_len=5, max_tokens=3)
  (step,) = cluster.start(Step('both0', (Chunk('a', 0, 5),)))
  assert step.chunks == (ChunkOrder(request, 0, 5, pages={'kv': (0, 1)}, limit=3, slot=0, begins=True),)  # 5 + 2 tokens
  assert cluster.state.workers['both0'].decodable() == ['a']  # its first token stays on the device
  (decode,) = cluster.start(Step('both0', decodes=ALL))
  assert decode.joins == (Join('a', 0, context=5, left=2),)
  cluster.end(step, {'a': 1})
  (last,) = cluster.start(Step('both0', decodes=ALL))
  assert last.joins == () and last.batch is decode.batch
  assert cluster.state.workers['both0'].decodable() == []  # every token it may have is asked for
  cluster.end(decode, {'a': 1})
  cluster.end(last, {'a': 1}, {'a': 'length'})
  cluster.assert_idle()


def test_one_step_fuses_chunks_with_decodes():
  cluster = Driver(colocated_pool(1, **SIZES))
  cluster.arrive('a', prompt_len=4)
  cluster.end(cluster.start(Step('both0', (Chunk('a', 0, 4),)))[0], {'a': 1})
  request = cluster.arrive('b', prompt_len=12)
  (fused,) = cluster.start(Step('both0', (Chunk('b', 0, 8),), ALL))
  assert fused.chunks == (ChunkOrder(request, 0, 8, pages={'kv': (2, 3, 4, 5)}, limit=4, slot=None, begins=True),)
  assert fused.batch.requests == ('a',) and fused.steps == 1
  cluster.end(fused, {'a': 1})
  assert len(cluster.view.requests['a'].tokens) == 2 and cluster.phase('b') is Phase.PREFILLING
  assert list(cluster.state.workers['both0'].prefilling) == ['b']


def _decoding(*limits: int) -> Driver:
  """A colocated worker with a sequence for each `max_tokens`, first tokens delivered."""
  cluster = Driver(colocated_pool(1, **SIZES))
  chunks = []
  for index, limit in enumerate(limits):
    cluster.arrive(f'r{index}', prompt_len=4, max_tokens=limit)
    chunks.append(Chunk(f'r{index}', 0, 4))
  cluster.end(cluster.start(Step('both0', tuple(chunks)))[0], {f'r{i}': 1 for i in range(len(limits))})
  return cluster


@pytest.mark.parametrize('limits, steps, expected', [((3,), 8, 2), ((2, 4), 8, 3), ((2, 9), 4, 4)])
def test_steps_are_clipped_to_the_most_tokens_that_any_sequence_has_left(limits, steps, expected):
  (order,) = _decoding(*limits).start(Step('both0', decodes=ALL, steps=steps))
  assert order.steps == expected


def test_two_steps_in_flight_ask_for_no_more_tokens_than_are_left():
  cluster = _decoding(6)
  (first,) = cluster.start(Step('both0', decodes=ALL, steps=3))
  (second,) = cluster.start(Step('both0', decodes=ALL, steps=3))
  assert (first.steps, second.steps) == (3, 2)  # with the first token, six
  assert first.joins[0].context == 4 and second.batch is first.batch
  assert cluster.state.workers['both0'].decodable() == []


def test_a_sequence_asked_for_more_than_it_has_left_is_not_asked_again():
  cluster = _decoding(2, 9)
  (first,) = cluster.start(Step('both0', decodes=ALL, steps=4))
  (second,) = cluster.start(Step('both0', decodes=ALL, steps=4))
  assert first.batch.requests == ('r0', 'r1')
  assert second.batch.requests == ('r1',) and second.leaves == (0,)
  cluster.end(first, {'r0': 1, 'r1': 4}, {'r0': 'length'})
  cluster.end(second, {'r1': 4}, {'r1': 'length'})
  assert [len(one.tokens) for one in cluster.finished] == [2, 9]
  cluster.assert_idle()


def test_slots_bound_the_sequences_that_decode_at_once():
  cluster = _decoding(4, 4, 4, 4)
  cluster.arrive('e', prompt_len=1)
  assert cluster.view.room().pages('both0') > 0
  assert not cluster.view.room().fits('e', 'both0', decodes=True)
  assert cluster.view.room().fits('e', 'both0', decodes=False)


def test_orders_carry_the_slot_that_was_given_back():
  cluster = _decoding(2, 9)
  cluster.end(cluster.start(Step('both0', decodes=('r0',)))[0], {'r0': 1}, {'r0': 'length'})
  cluster.arrive('c')
  (order,) = cluster.start(Step('both0', (Chunk('c', 0, 6),)))
  assert order.chunks[0].slot == 2  # the longest free
  assert list(cluster.state.books.holdings['both0'].slots) == [3, 0]
