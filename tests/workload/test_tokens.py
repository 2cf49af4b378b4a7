"""Random prompts are cheap, repeatable sequences."""

import pytest

from pdjax.workload.tokens import BlockTokens, RandomTokens


def test_the_length_is_known_without_drawing():
  assert len(RandomTokens(10**15, vocab_size=8, seed=0)) == 10**15


def test_equal_fields_give_equal_tokens_and_hashes():
  one, other = RandomTokens(50, 100, seed=3), RandomTokens(50, 100, seed=3)
  assert list(one) == list(other)
  assert one == other
  assert hash(one) == hash(other)


def test_another_seed_gives_other_tokens():
  assert list(RandomTokens(50, 1000, seed=3)) != list(RandomTokens(50, 1000, seed=4))


def test_indices_slices_and_iteration_agree():
  tokens = RandomTokens(20, 100, seed=1)
  everything = list(tokens)
  assert tokens[3:9] == tuple(everything[3:9])
  assert tokens[-1] == everything[-1]
  assert [tokens[i] for i in range(20)] == everything
  assert all(type(token) is int for token in everything)
  with pytest.raises(IndexError):
    tokens[20]


def test_tokens_cover_the_vocabulary_and_stay_inside():
  assert set(RandomTokens(1000, vocab_size=7, seed=0)) == set(range(7))


@pytest.mark.parametrize('fields', [{'length': -1}, {'vocab_size': 0}, {'seed': -1}])
def test_impossible_fields_are_refused(fields):
  with pytest.raises(ValueError, match=next(iter(fields))):
    RandomTokens(**{'length': 1, 'vocab_size': 1, 'seed': 0} | fields)


def test_blocks_of_one_id_have_the_same_tokens_wherever_they_are():
  one, other = BlockTokens(10, 1000, (7, 8, 9), 4, seed=1), BlockTokens(14, 1000, (2**64 - 1, 8, 7), 4, seed=2)
  assert one[:4] == other[8:12] and one[4:8] == other[4:8] and other[:4] not in (one[:4], one[4:8])
  assert BlockTokens(12, 1000, (7, 8, 9), 4)[:10] == one[:]  # the last may be cut short
  assert one[:] == BlockTokens(10, 1000, (7, 8, 9), 4, seed=5)[:] == tuple(one) and one == BlockTokens(
    10, 1000, (7, 8, 9), 4, seed=1
  )
  assert len(one) == len(one[:]) == 10 and all(type(token) is int and 0 <= token < 1000 for token in one)


def test_tokens_behind_the_last_block_and_of_other_tenants_are_others():
  ours, theirs = (BlockTokens(20, 1000, (7, 8), 4, seed=seed) for seed in (1, 2))
  assert ours[:8] == theirs[:8] and ours[8:] != theirs[8:] and ours[8:] == RandomTokens(12, 1000, 1)[:]
  ann, bob = (BlockTokens(8, 1000, (7, 8), 4, tenant) for tenant in ('ann', 'bob'))
  assert ann[:] == BlockTokens(8, 1000, (7, 8), 4, 'ann')[:] and len({ours[:8], ann[:], bob[:]}) == 3


def test_the_tokens_of_an_id_are_those_of_every_process_and_version():
  assert BlockTokens(4, 49152, (978, 7402), 2, 'a')[:] == (40016, 19681, 4750, 9808)


def test_a_long_prompt_of_blocks_costs_nothing_until_it_is_read():
  assert len(BlockTokens(10**15, 8, (1, 2), 16)) == 10**15
