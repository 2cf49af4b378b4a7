"""KV between any two meshes, page sizes, granularities and transports: each two of them together, tokens and bytes."""

import dataclasses
import itertools

import pytest

from experiments.check_transfers import Case, Pools, check, covering, product

CASES = covering(product())


@pytest.fixture(scope='module')
def pools():
  return Pools()


@pytest.mark.parametrize('case', CASES, ids=lambda case: '-'.join(map(str, dataclasses.astuple(case))))
def test_tokens_are_those_of_a_plain_loop_and_every_byte_is_counted(pools, case):
  assert pools.differing(case) == {}


def test_each_two_values_meet_that_can():
  def meetings(cases: list[Case]) -> set:
    return {pair for case in cases for pair in itertools.combinations(enumerate(dataclasses.astuple(case)), 2)}

  assert meetings(CASES) == meetings(product()) and len(CASES) < 30


def test_a_case_that_ends_in_an_error_is_wrong_even_one_without_words(monkeypatch):
  def differing(self, case):
    if case is CASES[1]:
      raise AssertionError
    return {'r5': ((1,), (2,))} if case is CASES[2] else {}

  monkeypatch.setattr(Pools, 'differing', differing)
  assert check(CASES[:4]) == [(CASES[1], 'AssertionError()'), (CASES[2], {'r5': ((1,), (2,))})]
