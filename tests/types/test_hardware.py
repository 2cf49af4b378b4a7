"""Figures of chips and links that cannot be are refused, before a simulation makes times of them."""

import math

import pytest

from pdjax.types.hardware import ChipSpec, LinkSpec

CHIP = {'name': 'chip', 'flops_per_s': 1e12, 'memory_bytes_per_s': 1e9, 'memory_bytes': 1e9}


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('flops_per_s', 0.0), ('flops_per_s', math.nan), ('memory_bytes_per_s', -1.0), ('memory_bytes', math.nan),
    ('matmul_efficiency', 0.0), ('matmul_efficiency', math.nan), ('memory_efficiency', 1.5),
    ('step_overhead_s', -1e-3), ('step_overhead_s', math.inf), ('step_overhead_s', math.nan),
  ],
)  # fmt: skip
def test_a_chip_that_cannot_be_is_refused(field, value):
  with pytest.raises(ValueError, match=f"ChipSpec 'chip' has {field}={value}, expected"):
    ChipSpec(**CHIP | {field: value})


def test_a_chip_of_an_unknown_dtype_is_refused():
  with pytest.raises(ValueError, match="'chip' has dtype='int8', expected one of 'float32', 'bfloat16', 'float16'"):
    ChipSpec(**CHIP, dtype='int8')


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('bytes_per_s', 0.0),
    ('bytes_per_s', math.nan),
    ('latency_s', -1.0),
    ('latency_s', math.inf),
    ('latency_s', math.nan),
  ],
)
def test_a_link_that_cannot_be_is_refused(field, value):
  with pytest.raises(ValueError, match=f'LinkSpec has {field}={value}, expected'):
    LinkSpec(**{field: value})


def test_what_takes_no_time_and_has_room_for_all_can_be():
  ChipSpec(**CHIP | dict.fromkeys(('flops_per_s', 'memory_bytes_per_s', 'memory_bytes'), math.inf), step_overhead_s=0.0)
  LinkSpec(math.inf, 0.0)
