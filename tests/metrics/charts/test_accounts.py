"""Bars of the account, against the means of the report."""

import pytest

from pdjax.metrics import Report, charts
from pdjax.types.worker import WorkerSpec
from tests.metrics.charts.drawn import drawn_rows


def test_bars_of_the_account_end_where_the_means_are(few_requests, colocated):
  totals = drawn_rows(charts.account(few_requests, colocated), layer=1)
  ends = {total['bar']: total['to'] for total in totals}
  assert ends == pytest.approx(
    {
      'TTFT · 1P1D': few_requests.ttft.mean_ms, 'TTFT · 2C': colocated.ttft.mean_ms,
      'hand-off · 1P1D': few_requests.handoff.mean_ms, 'hand-off · 2C': colocated.handoff.mean_ms,
    },
    abs=2e-3,
  )  # fmt: skip


def test_an_account_of_nothing_has_no_figures(few_requests):
  nothing = Report.from_events([], workers=few_requests.workers)
  assert [total['ms'] for total in drawn_rows(charts.account(nothing), layer=1)] == ['-', '-']


def test_the_account_of_a_short_run_adds_up_to_a_reader(disaggregated, stamps):
  shrunk = type(stamps)(**{name: getattr(stamps, name) * 1e-6 for name in stamps.__dataclass_fields__})
  report = Report.from_events(disaggregated(shrunk), workers=[WorkerSpec('p', 'prefill'), WorkerSpec('d', 'decode')])
  assert report.ttft_account() == 'TTFT 0.000813 = queue 0.000250 + prefill 0.000563 ms'
  assert [total['ms'] for total in drawn_rows(charts.account(report), layer=1)] == ['0.00081', '0.00075']
  assert '1 of 1 requests completed in 0.0000018 s' in str(report)
