"""The trace that ui.perfetto.dev opens: tracks, arrows and counters."""

import collections
import itertools
import json

import pytest

from pdjax.metrics import Report, perfetto
from pdjax.types.worker import Role, WorkerSpec

WORKERS = (WorkerSpec('p', Role.PREFILL, num_pages=8), WorkerSpec('d', Role.DECODE, num_pages=8))


def _of(events, phase):
  return [event for event in events if event['ph'] == phase]


def _enclosing(events, point):
  """The slice on the track of a flow's point that it lies in."""
  return [
    event
    for event in _of(events, 'X')
    if (event['pid'], event['tid']) == (point['pid'], point['tid'])
    and event['ts'] <= point['ts'] <= event['ts'] + event['dur']
  ]


@pytest.fixture(params=['few_requests', 'colocated'])
def report(request) -> Report:
  return request.getfixturevalue(request.param)


def test_every_order_is_a_slice_on_a_named_track(report):
  events = perfetto.trace_events(report)
  named = {(event['pid'], event['tid']) for event in _of(events, 'M')}
  slices = _of(events, 'X')
  assert sorted(event['args']['order'] for event in slices) == sorted(span.order for span in report.timeline.spans)
  assert {(event['pid'], event['tid']) for event in slices} <= named
  labels = [event['args']['name'] for event in _of(events, 'M') if event['name'] == 'process_name']
  assert len(set(labels)) == len(labels) == len(report.workers) + 1


def test_slices_of_a_track_do_not_overlap_and_times_ascend(report):
  events = [event for event in perfetto.trace_events(report) if event['ph'] != 'M']
  assert [event['ts'] for event in events] == sorted(event['ts'] for event in events)
  tracks = collections.defaultdict(list)
  for event in _of(events, 'X'):
    assert event['dur'] >= 0
    tracks[event['pid'], event['tid']].append(event)
  for track in tracks.values():
    for one, after in itertools.pairwise(track):
      assert one['ts'] + one['dur'] <= after['ts'] + 1e-3


def test_every_transfer_has_an_arrow_from_its_prefill_to_its_decode(few_requests):
  events = perfetto.trace_events(few_requests)
  kinds = {'s': 'prefill', 't': 'transfer', 'f': 'decode'}
  arrows = collections.defaultdict(list)
  for event in events:
    if event['ph'] in kinds:
      arrows[event['id']].append(event)
      assert [one['name'] for one in _enclosing(events, event)].count(kinds[event['ph']]) >= 1
  transfers = [span for span in few_requests.timeline.spans if span.kind == 'transfer']
  assert transfers and arrows.keys() == {span.order for span in transfers}
  for points in arrows.values():
    assert [point['ph'] for point in points] == ['s', 't', 'f']
    assert points[-1]['bp'] == 'e'


def test_an_arrow_ends_at_the_first_step_that_decodes_the_request(disaggregated, stamps):
  events = perfetto.trace_events(Report.from_events(disaggregated(stamps), workers=WORKERS))
  assert [(event['ph'], event['ts']) for event in events if event['ph'] in 'stf'] == [
    ('s', stamps.prefill_began * 1e6), ('t', stamps.wire_began * 1e6), ('f', stamps.decode_began * 1e6)
  ]  # fmt: skip


def test_a_request_that_ended_on_its_way_has_no_arrow(log):
  log.turn(0.0)
  log.arrive('r')
  prefill = log.step('p', chunks=[('r', 0, 4)])
  log.turn(1.0)
  log.done(prefill, 0.0, 1.0, {'r': 1})
  transfer = log.transfer('r')
  log.turn(2.0)
  log.done(transfer, 1.0, 2.0)
  log.finish('r', 'cancelled')
  events = perfetto.trace_events(Report.from_events(log.events, workers=WORKERS))
  assert len(_of(events, 'X')) == 2 and not [event for event in events if event['ph'] in 'stf']


def test_transfers_that_overlap_get_tracks_of_their_own(log):
  log.turn(0.0)
  for name in 'ab':
    log.arrive(name)
  orders = [log.transfer(name) for name in 'ab']
  log.turn(3.0)
  for order, began_s in zip(orders, (0.0, 1.0), strict=True):
    log.done(order, began_s, 2.0 + began_s)
  slices = _of(perfetto.trace_events(Report.from_events(log.events, workers=WORKERS)), 'X')
  assert len({(event['pid'], event['tid']) for event in slices}) == 2


def test_counters_follow_the_log_and_stand_only_where_they_change(few_requests):
  events = perfetto.trace_events(few_requests)
  processes = {event['pid']: event['args']['name'].partition(' ')[0] for event in _of(events, 'M') if event['tid'] == 0}
  seen = collections.defaultdict(list)
  for event in _of(events, 'C'):
    (value,) = event['args'].values()
    seen[event['name'], processes[event['pid']]].append(value)
  levels = collections.defaultdict(list)
  for now in few_requests.timeline.occupancy:
    levels['prompts waiting', 'requests'].append(now.waiting)
    for use in now.workers:
      levels['pages in use', use.worker].append(use.pages)
      levels['sequences decoding', use.worker].append(use.decoding)
  assert seen == {name: [value for value, _ in itertools.groupby(values)] for name, values in levels.items()}
  assert seen['pages in use', 'decode0'][-1] == 0 < max(seen['pages in use', 'decode0'])


def test_no_process_is_what_viewers_take_for_the_idle_task(few_requests):
  assert 0 not in {event['pid'] for event in perfetto.trace_events(few_requests)}


def test_the_file_is_json_that_a_viewer_takes(few_requests, tmp_path):
  path = perfetto.save_trace(few_requests, tmp_path / 'run')
  assert path == tmp_path / 'run' / 'trace.json'
  assert json.loads(path.read_text())['traceEvents'] == perfetto.trace_events(few_requests)
