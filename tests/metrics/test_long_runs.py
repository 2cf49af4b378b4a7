"""Reports and pages take memory by the requests of a run, however many seconds it lasts."""

import dataclasses
import tracemalloc

import pytest

import pdjax
from pdjax.metrics import charts, draw
from pdjax.metrics.counters import prometheus_text
from pdjax.workload import Given
from tests import tiny

COUNT = 200
EPOCH_S = 1_764_547_200.0
ARRIVALS_S = {
  'a request in four months': [number * 1e7 for number in range(COUNT)],
  'an epoch among zeros': [0.0] * (COUNT - 1) + [EPOCH_S],
  'epochs': [EPOCH_S + 0.01 * number for number in range(COUNT)],
  'milliseconds': [10.0 * number for number in range(COUNT)],
}


def simulated(arrivals_s: list[float]) -> pdjax.RunResult:
  sampling = pdjax.SamplingParams(max_tokens=8)
  requests = [
    pdjax.Request(f'r{number}', tiny.prompt(20, number), sampling, arrival_s)
    for number, arrival_s in enumerate(arrivals_s)
  ]
  return pdjax.simulate(tiny.config(workload=Given(requests)))


def peak_bytes(result: pdjax.RunResult, folder) -> int:
  """Memory that its report, charts, page, trace and counters take at most."""
  tracemalloc.start()
  report = pdjax.Report.from_events(result.events, workers=result.workers)
  report.save(folder)
  draw(report, folder)
  charts.overview(report).to_dict()
  for metric in charts.METRICS:
    charts.latency(report, metric=metric).to_dict()
  prometheus_text(report.timeline)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  return peak


@pytest.fixture(scope='module')
def usual(tmp_path_factory) -> int:
  result = simulated([0.01 * number for number in range(COUNT)])
  folder = tmp_path_factory.mktemp('usual')
  peak_bytes(result, folder)  # loads what draws
  return peak_bytes(result, folder)


@pytest.mark.parametrize('kind', ARRIVALS_S)
def test_a_run_of_years_takes_the_memory_of_one_of_seconds(kind, usual, tmp_path):
  result = simulated(ARRIVALS_S[kind])
  assert peak_bytes(result, tmp_path) < 1.5 * usual
  report = result.report
  assert report.completed == COUNT and 1 <= report.max_concurrent_requests <= COUNT
  assert {'report.json', 'report.html', 'trace.json'} <= {path.name for path in tmp_path.iterdir()}
  assert len(report.timeline.occupancy) <= 4 * len(result.events)


def test_a_workload_of_one_request_in_four_months_is_simulated_and_reported(tmp_path):
  workload = pdjax.Poisson(requests_per_s=1e-7, num_requests=COUNT, prompt=pdjax.Fixed(20), output=pdjax.Fixed(8))
  result = pdjax.simulate(dataclasses.replace(tiny.config(), workload=workload), workdir=tmp_path)
  assert result.report.completed == COUNT and result.report.duration_s > 1e8
