"""Claims about several charts at once: runs beside one another, of any length, and of nothing."""

import dataclasses

import numpy as np
import pytest

from pdjax.metrics import Report, charts
from pdjax.metrics.timeline import Timeline
from pdjax.types.worker import WorkerSpec
from tests.metrics.charts.drawn import drawn_rows


def test_runs_beside_one_another_share_seconds_and_heights(few_requests, many_requests):
  for chart in (charts.gantt, charts.pages):
    alone = [chart(run).to_dict() for run in (few_requests, many_requests)]
    together = [chart(run, beside=(few_requests, many_requests)).to_dict() for run in (few_requests, many_requests)]
    ends_s = [
      [spec['layer'][0]['encoding']['x']['scale']['domain'][1] for spec in specs] for specs in (alone, together)
    ]
    assert ends_s[0] == [few_requests.duration_s, many_requests.duration_s]
    assert ends_s[1] == [max(ends_s[0])] * 2
  few, many = (
    [bar for bar in drawn_rows(charts.pages(run, beside=(few_requests, many_requests))) if bar['worker'] != 'waiting']
    for run in (few_requests, many_requests)
  )
  heights = [(bar['hi'] - bar['lo']) / bar['share'] for bar in (*few, *many) if bar['share'] > 0.05]
  assert max(heights) - min(heights) < 0.02 * max(heights)
  assert (
    drawn_rows(charts.pages(few_requests))[0]['lo'] != few[0]['lo'] or drawn_rows(charts.pages(many_requests)) != many
  )


@pytest.mark.parametrize('scale', [1.0, 1e-3, 1e-6, 1e-9])
def test_a_run_of_any_length_is_drawn_at_its_own_size(disaggregated, stamps, scale):
  """The picture of a run whose every time is so much shorter is the same, but for the numbers at its axes."""

  def shapes(factor):
    shrunk = type(stamps)(**{name: getattr(stamps, name) * factor for name in stamps.__dataclass_fields__})
    report = Report.from_events(disaggregated(shrunk), workers=[WorkerSpec('p', 'prefill'), WorkerSpec('d', 'decode')])
    seconds = [(bar['a'], bar['b']) for layer in (0, 1) for bar in drawn_rows(charts.gantt(report), layer)]
    ms = [[row['ms'] for row in drawn_rows(charts.latency(report, metric='itl'), layer)] for layer in (0, 1)]
    parts = [(bar['from'], bar['to'], bar['ms']) for bar in drawn_rows(charts.account(report))]
    ends = [charts.gantt(report).to_dict()['layer'][0]['encoding']['x']['scale']['domain'][1]]
    return [np.array(rows) / factor for rows in (seconds, *ms, parts, ends)]

  for drawn, expected in zip(shapes(scale), shapes(1.0), strict=True):
    np.testing.assert_allclose(drawn, expected, rtol=1e-5, atol=2e-6)


def test_a_run_of_nothing_can_be_drawn(few_requests):
  nothing = dataclasses.replace(
    Report.from_events([], workers=few_requests.workers), timeline=Timeline(), utilisation=()
  )
  for chart in (charts.gantt(nothing), charts.pages(nothing), charts.account(nothing), charts.latency(nothing)):
    assert chart.to_dict()['layer']
