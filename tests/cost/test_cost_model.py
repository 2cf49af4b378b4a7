"""What a cost model says of its machine is read in one place, whatever its class."""

import dataclasses

import pytest

from pdjax.cost import CostBase, Roofline, as_cost
from pdjax.types import ChipSpec


class Plain:
  def step_seconds(self, model, worker, chunks, contexts, steps):
    return len(chunks) + 0.5

  def transfer_seconds(self, model, source, target, num_bytes):
    return num_bytes / 10


class OnHost(Plain):
  chip = ChipSpec.generic_cpu()
  shared_host = True
  dispatch_s = 0.25


def _said(cost):
  whole = as_cost(cost)
  return whole.chip, whole.calibrated, whole.shared_host, whole.dispatch_s


def test_what_a_cost_model_leaves_unsaid_is_filled_in():
  assert _said(Plain()) == (None, False, False, 0.0)
  assert _said(OnHost()) == (OnHost.chip, False, True, 0.25)
  chip = dataclasses.replace(ChipSpec.generic_cpu(), calibrated=True)
  assert _said(Roofline(chip, shared_host=True)) == (chip, True, True, chip.step_overhead_s)
  assert as_cost(roofline := Roofline()) is roofline


def test_a_plain_cost_model_predicts_as_before():
  whole = as_cost(Plain())
  assert whole.step_seconds(None, None, [(0, 1)], [], 1) == 1.5
  assert whole.transfer_seconds(None, None, None, 5) == 0.5


class OfTokens(Plain):
  def transfer_seconds(self, model, source, target, tokens):
    return tokens / 10


class Half:
  def step_seconds(self, model, worker, chunks, contexts, steps):
    return 1.0


@pytest.mark.parametrize(
  'cost, message',
  [
    (
      OfTokens(),
      'OfTokens.transfer_seconds takes model, source, target, tokens, expected .*num_bytes; .*is told',
    ),
    (Half(), 'cost is a Half without transfer_seconds'),
    (Plain, 'cost is the class Plain, expected one of its objects; call it'),
  ],
)
def test_what_is_no_cost_model_is_refused_by_name(cost, message):
  with pytest.raises(ValueError, match=message):
    as_cost(cost)


def test_a_cost_model_of_the_base_may_set_its_members_as_fields_and_must_predict():
  @dataclasses.dataclass(frozen=True)
  class Mine(CostBase):
    dispatch_s: float
    calibrated: bool = True

    def step_seconds(self, *args):
      return 1.0

    def transfer_seconds(self, *args):
      return 1.0

  assert _said(Mine(0.5)) == (None, True, False, 0.5)

  class Half(CostBase):
    def step_seconds(self, *args):
      return 1.0

  with pytest.raises(TypeError, match='transfer_seconds'):
    Half()
