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


def test_what_is_cached_stands_pale_behind_what_is_held(with_hits):
  report = with_hits.report
  bars = [bar for bar in drawn_rows(charts.pages(report)) if bar['worker'] == 'decode0']
  uses = [use for now in report.timeline.occupancy for use in now.workers if use.worker == 'decode0']
  pale, solid = ([bar for bar in bars if (bar['opacity'] < 1) is is_pale] for is_pale in (True, False))
  told = {(use.pages, use.cached) for use in uses[:-1]}  # the last is of the end
  assert {(bar['count'], bar['cached']) for bar in pale} == {(held, cached) for held, cached in told if cached}
  assert {(bar['count'], bar['cached']) for bar in solid} == {(held, cached) for held, cached in told if held}
  assert bars.index(pale[-1]) < bars.index(solid[0])  # drawn first
  (scale,) = {round((bar['hi'] - bar['lo']) / (bar['count'] + bar['cached']), 3) for bar in pale}
  assert all((bar['hi'] - bar['lo']) / bar['count'] == pytest.approx(scale, abs=2e-3) for bar in solid)
  most = max(use.cached for use in uses)
  labels = charts.pages(report).to_dict()['layer'][0]['encoding']['y']['axis']['labelExpr']
  assert f'["decode0", "peak {max(use.pages for use in uses)} of 64", "{most} cached"]' in labels


def test_without_a_cache_nothing_is_pale(few_requests):
  bars = drawn_rows(charts.pages(few_requests))
  assert bars and all(bar['opacity'] == 1 and 'cached' not in bar for bar in bars)
