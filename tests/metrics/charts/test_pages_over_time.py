"""Pages in use over time, against the occupancy of the report."""

import itertools

import numpy as np
import pytest

from pdjax.metrics import charts
from pdjax.metrics.charts import pages_over_time
from tests.metrics.charts.drawn import drawn_rows


def test_pages_in_use_are_those_of_the_log(few_requests):
  bars = [bar for bar in drawn_rows(charts.pages(few_requests)) if bar['worker'] == 'decode0']
  pages = [use.pages for now in few_requests.timeline.occupancy for use in now.workers if use.worker == 'decode0']
  assert max(bar['count'] for bar in bars) == max(pages) > 0
  assert all(one['b'] <= after['a'] for one, after in itertools.pairwise(bars))
  assert bars[0]['share'] == pytest.approx(bars[0]['count'] / few_requests.workers[1].num_pages, abs=1e-4)


def test_of_many_levels_every_slot_shows_its_peak():
  rng = np.random.default_rng(0)
  times_s = np.cumsum(rng.exponential(1.0, 1000))
  levels = [
    pages_over_time._Level(a, b, int(count), 1)
    for a, b, count in zip(times_s, times_s[1:], rng.integers(1, 50, 999), strict=False)
  ]
  slots = pages_over_time._highest(levels, 40)
  assert len(slots) <= 41
  for slot in slots:
    inside = [level.count for level in levels if level.at_s < slot.until_s - 1e-6 and level.until_s > slot.at_s + 1e-6]
    assert slot.count == max(inside)
  assert pages_over_time._highest(levels, 1000) is levels
