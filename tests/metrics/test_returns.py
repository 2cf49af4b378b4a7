"""The lines of a report on workers that were lost and came back."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from pdjax import launch
from pdjax.metrics import Report
from pdjax.metrics.page import render_html
from pdjax.metrics.table import render
from pdjax.serving.events import Comeback, WorkerBack, WorkerLost
from pdjax.types import WorkerSpec
from tests.tiny import config

WORKERS = (WorkerSpec('p', 'prefill', num_pages=8), WorkerSpec('d', 'decode', num_pages=8))
TOOK = Comeback(tries=1, failed_s=0.0, start_s=2.0, load_s=1.0, compile_s=4.0, connect_s=0.5)


@pytest.fixture
def report(log):
  """A worker comes back in a new process, another after two tries, a third time in the same process."""
  log.turn(0.0)
  log.arrive('r')
  log.turn(5.0)
  log.events += [
    WorkerLost('d', 2.0, 'it was killed', returning=True),
    WorkerLost('p', 2.5, 'it was killed too', returning=True),
    WorkerBack('d', 9.5, 2, TOOK),
    WorkerBack('p', 22.5, 2, dataclasses.replace(TOOK, tries=2, failed_s=12.5)),
    WorkerLost('d', 30.0, 'out of memory'),
    WorkerBack('d', 30.25, 3),
  ]
  log.finish('r', 'cancelled')
  return Report.from_events(log.events, workers=WORKERS)


def test_each_return_has_its_time_and_its_parts(report):
  first, second, third = report.returns
  assert (first.worker, first.lost_s, first.seconds, first.error) == ('d', 2.0, 7.5, 'it was killed')
  assert first.parts_s == {'process start': 2.0, 'weights': 1.0, 'compiling': 4.0, 'connecting': 0.5}
  assert sum(first.parts_s.values()) == first.seconds and sum(second.parts_s.values()) == second.seconds
  assert next(iter(second.parts_s)) == 'failed tries' and third.parts_s == {}
  assert report.to_json()['returns'][1] == {
    'worker': 'p', 'lost': 2.5, 'seconds': 20.0, 'error': 'it was killed too', 'tries': 2, 'parts': second.parts_s,
  }  # fmt: skip
  json.dumps(report.to_json(), allow_nan=False)


def test_table_text_and_page_tell_of_them(report):
  console = Console(width=100, record=True, file=io.StringIO())
  console.print(render(report))
  line = 'd was back after 7.5 s: process start 2.0, weights 1.0, compiling 4.0, connecting 0.5'
  for text in (console.export_text(), str(report)):
    assert line in text and 'd was back after 0.2 s, in the same process' in text
  assert '&#34;process start&#34;: 2.0' in render_html(report)


def test_the_page_tells_of_them_beside_what_workers_did():
  run = launch.simulate(config('1P1D'))
  comes_back = (WorkerLost('decode0', 2.0, 'it was killed', returning=True), WorkerBack('decode0', 9.5, 2, TOOK))
  page = render_html(Report.from_events((*run.events, *comes_back), workers=run.workers))
  assert 'decode0 was back after 7.5 s: process start 2.0, weights 1.0, compiling 4.0, connecting 0.5.' in page


def test_a_run_in_which_nobody_was_lost_says_nothing_of_it(log):
  report = Report.from_events(log.events, workers=WORKERS)
  assert report.returns == () and 'was back' not in str(report) and '&#34;returns&#34;' not in render_html(report)


def test_a_worker_that_never_came_back_is_noted_with_the_last_that_was_known(log):
  log.events += [
    WorkerLost('d', 1.0, 'gone', returning=True),
    WorkerLost('p', 2.0, 'gone too', returning=True),
    WorkerLost('d', 9.0, 'other weights'),
    WorkerBack('p', 9.5, 2),
    WorkerLost('p', 12.25, 'gone again', returning=True),
  ]
  report = Report.from_events(log.events, workers=WORKERS)
  lines = ('d was lost at 1.0 s and did not come back: other weights',
           'p was lost at 12.2 s and was not back when the run ended: gone again')  # fmt: skip
  assert report.notes[:2] == lines and [one.worker for one in report.returns] == ['p']
  console = Console(width=100, record=True, file=io.StringIO())
  console.print(render(report))
  for text in (console.export_text(), str(report), render_html(report), json.dumps(report.to_json())):
    assert all(line in text for line in lines)


def test_many_returns_are_cut_short_where_people_read(log):
  for incarnation in range(2, 14):
    log.events += [WorkerLost('d', float(incarnation), 'again'), WorkerBack('d', incarnation + 0.5, incarnation)]
  lines = Report.from_events(log.events, workers=WORKERS).return_lines()
  assert len(lines) == 9 and lines[-1] == '4 other returns; report.json has them all'
