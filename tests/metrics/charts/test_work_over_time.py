"""The work of workers over time, against the spans of the report."""

import pytest

from pdjax.metrics import charts
from tests.metrics.charts.drawn import drawn_rows


def _seconds(report, kind):
  return sum(span.ended_s - span.began_s for span in report.timeline.spans if span.kind == kind)


@pytest.mark.parametrize('run', ['few_requests', 'colocated'])
def test_every_step_of_a_short_run_is_a_bar(run, request):
  report = request.getfixturevalue(run)
  assert charts.slot_seconds(report) is None
  bars = drawn_rows(charts.gantt(report))
  for kind in ('prefill', 'decode', 'fused'):
    mine = [bar for bar in bars if bar['kind'] == kind]
    assert len(mine) == sum(span.kind == kind for span in report.timeline.spans)
    assert sum(bar['b'] - bar['a'] for bar in mine) == pytest.approx(_seconds(report, kind), abs=1e-4)
  rows = {worker.name: row for row, worker in enumerate(report.workers)}
  assert all(rows[bar['worker']] < bar['lo'] < bar['hi'] < rows[bar['worker']] + 1 for bar in bars)
  assert all(bar['b'] <= report.duration_s + 1e-6 for bar in bars)


def test_a_transfer_is_seen_at_both_its_ends(few_requests):
  lines = drawn_rows(charts.gantt(few_requests), layer=1)
  transfers = [span for span in few_requests.timeline.spans if span.kind == 'transfer']
  assert len(lines) == 2 * len(transfers) > 0
  assert {int(line['lo']) for line in lines} == {0, 1}
  assert {line['requests'] for line in lines} == {span.requests[0] for span in transfers}


def test_slots_of_a_long_run_hold_the_time_that_its_steps_took(many_requests):
  slot_s = charts.slot_seconds(many_requests)
  bars = drawn_rows(charts.gantt(many_requests))
  assert len(many_requests.timeline.spans) > charts.MAX_BARS >= len(bars)
  for kind in ('prefill', 'decode'):
    mine = [bar for bar in bars if bar['kind'] == kind]
    assert sum(bar['share'] * slot_s for bar in mine) == pytest.approx(_seconds(many_requests, kind), rel=1e-3)
    assert sum(bar['count'] for bar in mine) == sum(s.steps for s in many_requests.timeline.spans if s.kind == kind)
    assert all(bar['hi'] - bar['lo'] == pytest.approx(0.62 * bar['share'], abs=2e-4) for bar in mine)
