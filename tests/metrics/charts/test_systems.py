"""The names of runs that one chart compares."""

from pdjax.metrics import charts
from tests.metrics.charts.drawn import drawn_rows


def test_two_runs_on_like_clusters_stay_two_curves(few_requests):
  curves = drawn_rows(charts.latency(few_requests, few_requests))
  assert {row['system'] for row in curves} == {'1P1D', '1P1D (2)'}
