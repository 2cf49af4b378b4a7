"""Length distributions have the shape they name and stay below `upper`."""

import numpy as np
import pytest

from pdjax.workload.lengths import Empirical, Fixed, Lognormal, Uniform


def draw(length, count=20_000):
  rng = np.random.default_rng(0)
  return np.array([length.sample(rng) for _ in range(count)])


def test_fixed_is_always_the_same():
  assert set(draw(Fixed(7), 100)) == {7}


def test_uniform_covers_both_ends_evenly():
  values, counts = np.unique(draw(Uniform(3, 8)), return_counts=True)
  assert list(values) == [3, 4, 5, 6, 7, 8]
  assert counts.min() > 0.9 * counts.max()


def test_lognormal_has_its_median_and_mean():
  samples = draw(Lognormal(median=200, sigma=0.5, high=100_000))
  assert np.median(samples) == pytest.approx(200, rel=0.03)
  assert samples.mean() == pytest.approx(200 * np.exp(0.5**2 / 2), rel=0.03)
  assert np.log(samples).std() == pytest.approx(0.5, rel=0.03)


def test_lognormal_is_clipped_at_both_ends():
  samples = draw(Lognormal(median=100, sigma=2.0, low=50, high=300))
  assert samples.min() == 50
  assert samples.max() == 300


def test_lognormal_without_sigma_is_its_median():
  assert set(draw(Lognormal(median=12, sigma=0), 100)) == {12}


def test_empirical_gives_what_was_seen_as_often_as_it_was_seen():
  samples = draw(Empirical((5, 5, 5, 90)))
  assert set(samples) == {5, 90}
  assert (samples == 5).mean() == pytest.approx(0.75, rel=0.03)


@pytest.mark.parametrize('length', [Fixed(7), Uniform(3, 8), Lognormal(50, 1.5, high=99), Empirical((2, 40, 11))])
def test_no_sample_exceeds_upper_and_some_reach_it(length):
  samples = draw(length, 5000)
  assert samples.max() == length.upper
  assert samples.min() >= 1
  assert type(length.sample(np.random.default_rng(0))) is int


@pytest.mark.parametrize(
  ('make', 'found'),
  [
    (lambda: Fixed(0), 'tokens=0'),
    (lambda: Fixed(2.5), 'tokens=2.5'),
    (lambda: Uniform(0, 5), 'low=0'),
    (lambda: Uniform(6, 5), 'low=6 above high=5'),
    (lambda: Lognormal(0, 1), 'median=0'),
    (lambda: Lognormal(10, -1), 'sigma=-1'),
    (lambda: Lognormal(10, float('nan')), 'sigma=nan'),
    (lambda: Lognormal(10, 1, low=9, high=8), 'low=9 above high=8'),
    (lambda: Empirical(()), r'samples=\(\), expected at least one length'),
    (lambda: Empirical((3, 0)), r'samples\[1\]=0'),
  ],
)
def test_impossible_lengths_are_refused_with_their_value(make, found):
  with pytest.raises(ValueError, match=found):
    make()
