"""No finite weight becomes infinite in silence, wherever weights are converted."""

import ml_dtypes
import numpy as np
import pytest

from pdjax.model.checkpoint import narrow
from pdjax.model.checkpoint.narrow import convert_weight, may_overflow

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LARGEST_BFLOAT16 = float(ml_dtypes.finfo(BFLOAT16).max)


@pytest.mark.parametrize('order', ['K', 'C'])
@pytest.mark.parametrize(
  ('source', 'target', 'value', 'is_refused', 'authority'),
  [
    (np.float32, np.float16, 1e6, True, 'the issue'),
    (np.float32, np.float16, -1e6, True, 'IEEE 754'),
    (np.float32, np.float16, 65519.0, False, 'IEEE 754: rounds to 65504, the largest'),
    (np.float32, np.float16, 65520.0, True, 'IEEE 754: half way, to even, which is infinite'),
    (BFLOAT16, np.float16, 1e5, True, 'IEEE 754'),
    (BFLOAT16, np.float16, 65280.0, False, 'IEEE 754'),
    (np.float32, BFLOAT16, 3.4e38, True, 'bfloat16 ends at 3.39e38, float32 at 3.40e38'),
    (np.float32, BFLOAT16, LARGEST_BFLOAT16, False, 'the largest'),
    (np.float32, BFLOAT16, 1e6, False, 'bfloat16 has the range of float32'),
    (np.float64, np.float32, 1e300, True, 'IEEE 754'),
    (np.float16, BFLOAT16, 65504.0, False, 'IEEE 754'),
    (np.float16, np.float32, 65504.0, False, 'IEEE 754'),
    (np.float32, np.float32, 3e38, False, 'nothing is converted'),
  ],
)
def test_a_finite_number_that_would_be_infinite_is_refused(source, target, value, is_refused, authority, order):
  weight = np.zeros((7, 5), source)
  weight[4, 2] = value
  weight[1, 1] = np.inf  # infinities and NaN of the file stay what they are
  weight[2, 2] = np.nan
  weight = weight.T
  if is_refused:
    wider = "bfloat16' or dtype='float32" if target == np.float16 else 'float32'
    with pytest.raises(ValueError, match=rf"weight 'up' holds .* at \[2, 4\] \(1 too large\).*dtype='{wider}'"):
      convert_weight(weight, target, 'up', order=order)
  else:
    found = convert_weight(weight, target, 'up', order=order)
    assert found.dtype == target and np.isfinite(found[2, 4])
    assert np.isposinf(found[1, 1]) and np.isnan(found[2, 2])


@pytest.mark.parametrize('value', [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize('target', [np.float16, BFLOAT16])
def test_what_is_not_finite_in_the_file_stays_as_it_is(value, target):
  found = convert_weight(np.array([1.0, value], np.float32), target, 'up')
  np.testing.assert_array_equal(np.asarray(found, np.float32), np.array([1.0, value], np.float32))


@pytest.mark.parametrize('place', [0, 1, 6, 7, 13, 14, 19])
def test_every_piece_is_looked_through(monkeypatch, place):
  monkeypatch.setattr(narrow, '_PIECE', 7)
  weight = np.zeros(20, np.float32)
  weight[place] = -1e6
  with pytest.raises(ValueError, match=rf'at \[{place}\]'):
    convert_weight(weight, np.float16, 'up')


def test_only_narrower_ranges_are_looked_through(monkeypatch):
  monkeypatch.setattr(narrow, '_has_infinity', lambda array: pytest.fail('nothing can overflow'))
  convert_weight(np.ones(3, np.float16), BFLOAT16, 'up')
  convert_weight(np.ones(3, BFLOAT16), np.float32, 'up')
  assert not may_overflow(np.float16, np.float16) and may_overflow(np.float32, BFLOAT16)
