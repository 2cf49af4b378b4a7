"""The length from which on a chunk is predicted to travel faster layer by layer."""

import dataclasses

import pytest

from pdjax.cost import Roofline
from pdjax.cost.granularity import choose_granularity
from pdjax.types import ModelSpec, TransferSpec, colocated_pool, decode_pool, prefill_pool
from pdjax.types.hardware import ChipSpec, LinkSpec

MODEL = ModelSpec.smollm2_135m()
ONE_OF_EACH = prefill_pool(1, page_size=1) + decode_pool(1, page_size=1)
TOKEN_BYTES = MODEL.cached_token_bytes('float32')


def _cost(dispatch_s: float, token_s: float = 1e-6) -> Roofline:
  """A link that takes `token_s` a token."""
  chip = dataclasses.replace(ChipSpec.generic_cpu(), step_overhead_s=dispatch_s)
  return Roofline(chip, LinkSpec(TOKEN_BYTES / token_s, 0.0, source='a test'))


def test_layers_pay_once_the_wire_time_they_hide_exceeds_what_more_programs_cost():
  # Of five groups, four fifths of n · 10 µs are hidden at the price of four transfers, 210 µs each: n > 105.
  assert choose_granularity(TransferSpec(), MODEL, ONE_OF_EACH, _cost(5e-6, 10e-6)) == TransferSpec(layers_from=128)


def test_chunks_travel_whole_where_no_length_would_gain():
  assert choose_granularity(TransferSpec(), MODEL, ONE_OF_EACH, _cost(1.0)).granularity == 'chunk'
  assert choose_granularity(TransferSpec(layer_groups=1), MODEL, ONE_OF_EACH, _cost(0.0)).granularity == 'chunk'
  assert choose_granularity(TransferSpec(), MODEL, colocated_pool(2, page_size=1), _cost(0.0)).granularity == 'chunk'


def test_workers_that_may_come_to_prefill_count():
  workers = colocated_pool(2, page_size=1, may_become=('prefill',))
  assert choose_granularity(TransferSpec(), MODEL, workers, _cost(5e-6, 10e-6)) == TransferSpec(layers_from=128)


@pytest.mark.parametrize('spec', [TransferSpec(granularity='layers'), TransferSpec(layers_from=7)])
def test_what_the_config_says_is_kept(spec):
  assert choose_granularity(spec, MODEL, ONE_OF_EACH, _cost(1.0)) == spec
