"""What a policy says of itself is read in one place, whatever its class."""

import dataclasses

import pytest

from pdjax.policies import Colocated, Disaggregated, PolicyBase, as_policy


class Plain:
  def decide(self, view):
    return [view]


class Still(Plain):
  moves_kv = False
  decode_steps = 3


@pytest.mark.parametrize(
  ('policy', 'moves_kv', 'decode_steps'),
  [
    (Disaggregated(), True, 1),
    (Disaggregated(decode_steps=4), True, 4),
    (Colocated(decode_steps=2), False, 2),
    (Plain(), True, 1),
    (Still(), False, 3),
  ],
)
def test_what_a_policy_leaves_unsaid_is_filled_in(policy, moves_kv, decode_steps):
  whole = as_policy(policy)
  assert (whole.moves_kv, whole.decode_steps) == (moves_kv, decode_steps)
  assert (whole is policy) == isinstance(policy, PolicyBase)


def test_a_plain_policy_decides_as_before():
  assert as_policy(Plain()).decide('state') == ['state']


def test_a_policy_of_the_base_may_set_its_members_as_fields_and_must_decide():
  @dataclasses.dataclass(frozen=True)
  class Mine(PolicyBase):
    decode_steps: int = 8

    def decide(self, view):
      return []

  assert as_policy(Mine(4)).decode_steps == 4 and as_policy(Mine()).moves_kv

  class Nothing(PolicyBase):
    pass

  with pytest.raises(TypeError, match='decide'):
    Nothing()
