"""Numbers in words: about three digits, and never 0 for what is not."""

import math

import pytest

from pdjax.metrics.numbers import digits_below, number, plain, short


@pytest.mark.parametrize(
  'value, as_number, as_short, as_plain',
  [
    (0.0, '0.0', '0.00', '0'),
    (1431.4, '1,431.4', '1,431', '1,431.4'),
    (9.996, '10.0', '10.0', '9.996'),
    (44.84, '44.8', '44.8', '44.84'),
    (7.284, '7.3', '7.28', '7.284'),
    (0.0999, '0.1', '0.10', '0.0999'),
    (0.0512, '0.1', '0.051', '0.0512'),
    (0.0035, '0.0035', '0.0035', '0.0035'),
    (0.00003, '0.00003', '0.00003', '0.00003'),
    (4.56e-6, '0.0000046', '0.0000046', '0.00000456'),  # 4.56 ns as milliseconds
    (1.24e-9, '1.2e-09', '1.2e-09', '1.24e-09'),
    (-0.004, '-0.004', '-0.004', '-0.004'),
    (-1431.4, '-1,431.4', '-1,431', '-1,431.4'),
    (math.inf, 'inf', 'inf', 'inf'),
  ],
)
def test_a_number_reads_well_at_any_size(value, as_number, as_short, as_plain):
  assert (number(value), short(value), plain(value)) == (as_number, as_short, as_plain)


def test_no_figure_reads_as_a_dash():
  assert number(None) == short(None) == '-'


@pytest.mark.parametrize(
  'whole, digits', [(None, 1), (0.0, 1), (812.5, 1), (1.0, 1), (0.5, 3), (0.099, 4), (3e-6, 8), (math.nan, 1)]
)
def test_parts_have_as_many_digits_as_a_small_whole_needs(whole, digits):
  assert digits_below(whole) == digits
