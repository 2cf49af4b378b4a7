"""Curves of latencies, against the percentiles of the report."""

import dataclasses

import pytest

from pdjax.metrics import charts
from pdjax.types.request import SLO
from tests.metrics.charts.drawn import drawn_rows


def test_dots_of_latencies_are_the_percentiles_of_the_report(few_requests, colocated):
  for metric in charts.METRICS:
    dots = drawn_rows(charts.latency(few_requests, colocated, metric=metric), layer=1)
    for report in (few_requests, colocated):
      stats = getattr(report, metric)
      mine = {dot['percentile']: dot['ms'] for dot in dots if dot['system'] == report.split}
      expected = {'p50': stats.p50_ms, 'p90': stats.p90_ms, 'p99': stats.p99_ms}
      assert mine == pytest.approx(expected, abs=2e-3)
  with pytest.raises(ValueError, match="'tfft' is unknown; choose one of ttft"):
    charts.latency(few_requests, metric='tfft')


def test_a_limit_is_drawn_where_the_axis_reaches_it(few_requests):
  for factor, drawn in ((0.5, True), (3.0, False)):
    limit = few_requests.ttft.p99_ms * factor
    limited = dataclasses.replace(few_requests, slo=SLO(ttft_ms=limit))
    assert charts.limit_ms(limited, metric='ttft') == (limit, drawn)
    assert len(charts.latency(limited).to_dict()['layer']) == (3 if drawn else 2)
