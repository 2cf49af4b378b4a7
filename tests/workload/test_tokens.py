"""Random prompts are cheap, repeatable sequences."""

import pytest

from pdjax.workload.tokens import RandomTokens


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
