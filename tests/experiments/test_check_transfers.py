"""KV between any two meshes, page sizes, granularities and transports: each two of them together, tokens and bytes."""

import dataclasses
import itertools

import pytest

from experiments.check_transfers import Case, Pools, covering, product

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
