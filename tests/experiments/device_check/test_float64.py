"""The answers that kernels are held against are the textbook's, and nothing wrong counts as right."""

import math

import numpy as np
import pytest

from experiments.device_check.float64 import Sequences, attend, error
from tests.pallas_kernels.dense import attend_with_sum


@pytest.mark.parametrize(
  'options', [{}, {'sliding_window': 5}, {'soft_cap': 2.0}, {'sliding_window': 3, 'sinks': True}]
)
def test_attention_is_the_textbook_one_token_at_a_time(options):
  rng = np.random.default_rng(0)
  options = options | ({'sinks': rng.standard_normal(6)} if 'sinks' in options else {})
  sequences = Sequences.random(rng, [23], 2, 8, 4, 'float32')
  q = rng.standard_normal((9, 6, 8))
  position = np.arange(-2, 7) + 14
  position[:2] = -1
  out, lse = attend(q, sequences.keys[0], sequences.values[0], position, **options)
  for row, place in enumerate(position):
    keys, values = (tokens[: place + 1] for tokens in (sequences.keys[0], sequences.values[0]))
    expected, total = attend_with_sum(q[row], keys, values, 8**-0.5, **options)
    np.testing.assert_allclose(out[row], expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse[row], total, rtol=1e-12)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
def test_pages_hold_the_sequences_and_nan_in_all_other_places(dtype):
  sequences = Sequences.random(np.random.default_rng(1), [5, 0, 9], 2, 8, 4, dtype)
  stored = sequences.pages.astype(np.float64) * (1 if sequences.scales is None else sequences.scales[..., None])
  for row, length in enumerate((5, 0, 9)):
    in_order = np.moveaxis(stored[sequences.tables[row]], 3, 1).reshape(-1, 2, 2, 8)
    np.testing.assert_allclose(in_order[:length, 0], sequences.keys[row])
    np.testing.assert_allclose(in_order[:length, 1], sequences.values[row])
    assert np.isnan(in_order[length:]).all()
  assert np.isfinite(stored).all(axis=(1, 2, 4)).sum() == 14  # places that some sequence has


def test_what_is_not_a_number_is_never_near_enough():
  expected = np.array([1.0, 2.0, -np.inf])
  assert error(expected, expected) == 0
  assert error(np.array([1.0, 2.2, -np.inf]), expected) == pytest.approx(0.2 / math.sqrt(5))
  for wrong in ([np.nan, 2, -np.inf], [1, 2, np.nan], [1, 2, np.inf], [1, 2, 0], [1, 2]):
    assert not error(np.array(wrong), expected) <= 1e9
  assert error(np.ones(3), np.zeros(3)) == math.inf
