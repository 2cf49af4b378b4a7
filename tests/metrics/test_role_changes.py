"""What log, report, page, trace and charts tell of workers that took other roles."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from pdjax import launch
from pdjax.metrics import Report, charts
from pdjax.metrics.colours import PHASES
from pdjax.metrics.event_json import event_to_json
from pdjax.metrics.page import render_html
from pdjax.metrics.perfetto import trace_events
from pdjax.metrics.table import render
from pdjax.metrics.timeline import read_timeline
from pdjax.metrics.wording import headline
from pdjax.recording import RunResult
from pdjax.serving.events import RoleChanged
from pdjax.types import Role, WorkerSpec
from pdjax.workload import Given
from tests.metrics.charts.drawn import drawn_rows
from tests.switching import EITHER, TakeTurns, under_load
from tests.tiny import config

PREFILL, DECODE = Role.PREFILL, Role.DECODE


@pytest.fixture(scope='module')
def run() -> RunResult:
  """A hundred simulated requests while one of three workers changes sides, over and over."""
  run = config('1P2D', workload=Given(under_load(100)))
  workers = [dataclasses.replace(one, may_become=EITHER) for one in run.workers]
  return launch.simulate(dataclasses.replace(run, workers=workers, policy=TakeTurns()))


@pytest.fixture(scope='module')
def changed(run) -> Report:
  return run.report


def test_a_line_of_the_log_has_the_roles_and_when_it_was_asked_for():
  line = json.loads(json.dumps(event_to_json(RoleChanged(3.5, 'd', PREFILL, DECODE, 2.25))))
  assert line == {
    'event': 'RoleChanged', 'now_s': 3.5, 'worker': 'd', 'role': 'prefill', 'before': 'decode', 'asked_s': 2.25,
  }  # fmt: skip


def test_a_worker_has_at_any_time_the_role_that_it_last_took():
  events = [RoleChanged(2.0, 'd', PREFILL, DECODE, 1.0), RoleChanged(4.0, 'd', DECODE, PREFILL, 3.0)]
  timeline, worker = read_timeline(events), WorkerSpec('d', DECODE)
  assert [timeline.role(worker, at_s) for at_s in (0.0, 1.9, 2.0, 3.9, 4.0)] == [
    DECODE, DECODE, PREFILL, PREFILL, DECODE,
  ]  # fmt: skip
  assert timeline.role(worker) is DECODE and timeline.role(WorkerSpec('p', PREFILL)) is PREFILL


def test_the_report_has_every_change_and_the_cluster_at_both_ends(run, changed):
  found = [event for event in run.events if isinstance(event, RoleChanged)]
  assert len(found) >= 6 and changed.role_changes == tuple(found)
  first, *_, last = changed.to_json()['role_changes']
  assert first == {
    'worker': found[0].worker, 'at': found[0].now_s, 'drained': found[0].now_s - found[0].asked_s,
    'from': found[0].before.value, 'to': found[0].role.value,
  }  # fmt: skip
  assert changed.split == '1P2D' and changed.last_split == ('2P1D' if len(found) % 2 else '1P2D')
  assert last['to'] == ('prefill' if len(found) % 2 else 'decode')
  json.dumps(changed.to_json(), allow_nan=False)


def test_table_page_and_headline_tell_of_them(changed):
  console = Console(width=100, record=True, file=io.StringIO())
  console.print(render(changed))
  words = f'{len(changed.role_changes)}, from 1P2D to {changed.last_split}'
  assert words in console.export_text() and words in render_html(changed)
  assert 'on 1P2D at first, with roles that changed, answered' in headline(changed)


def test_what_moves_pages_at_some_time_is_not_called_colocated(log):
  workers = [WorkerSpec('w', Role.BOTH), WorkerSpec('v', Role.BOTH)]
  assert 'colocated' in Report.from_events(log.events, workers=workers).handoff_account()
  log.events.append(RoleChanged(1.0, 'w', PREFILL, Role.BOTH, 0.5))
  assert 'colocated' not in Report.from_events(log.events, workers=workers).handoff_account()


def test_the_trace_has_an_instant_for_each_change_and_says_that_roles_are_the_first(changed):
  events = trace_events(changed)
  processes = {event['pid']: event['args']['name'] for event in events if event['name'] == 'process_name'}
  instants = [(processes[one['pid']].split()[0], one['name'], one['ts']) for one in events if one['ph'] == 'i']
  assert instants == [
    (one.worker, f'becomes {one.role.value}', round(one.now_s * 1e6, 3)) for one in changed.role_changes
  ]
  movers = {change.worker for change in changed.role_changes}
  for worker in changed.workers:
    first = f'{worker.role.value} at first' if worker.name in movers else worker.role.value
    assert f'{worker.name} ({first}, tp=1)' in processes.values()


def test_pages_in_use_have_the_colour_of_the_role_that_the_worker_had_then(changed):
  chart = charts.pages(changed)
  bars = [bar for bar in drawn_rows(chart) if bar['worker'] != 'waiting']
  start_s = changed.timeline.start_s
  specs = {worker.name: worker for worker in changed.workers}
  roles = {(bar['worker'], bar['role']) for bar in bars}
  assert {(change.worker, role.value) for change in changed.role_changes for role in EITHER} <= roles
  for bar in bars:
    middle_s = start_s + (bar['a'] + bar['b']) / 2
    assert bar['role'] == changed.timeline.role(specs[bar['worker']], middle_s).value
  scale = chart.to_dict()['layer'][0]['encoding']['color']['scale']
  assert dict(zip(scale['domain'], scale['range'], strict=True))['decode'] == PHASES['decode']


def test_a_run_in_which_no_role_changed_says_nothing_of_it(few_requests):
  assert few_requests.role_changes == () and few_requests.last_split == few_requests.split
  assert 'role changes' not in render_html(few_requests) and 'at first' not in headline(few_requests)
