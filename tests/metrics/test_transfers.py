"""The time that transfers took and the part of it that was hidden: by hand from a log, and as counters."""

import pytest

from pdjax.metrics.counters import counters, prometheus_text
from pdjax.metrics.timeline import read_timeline
from pdjax.metrics.transfers import TransferFigures
from pdjax.serving.events import Failed, Trip, WorkerLost
from tests.metrics.conftest import Log


@pytest.fixture
def timeline():
  """Two steps with a pause between them, three transfers that end well and one that does not."""
  log = Log()
  log.turn(0.0)
  log.arrive('a', prompt_len=8)
  log.arrive('b', prompt_len=8)
  steps = [log.step('p', chunks=[('a', 0, 8)]), log.step('p', chunks=[('b', 0, 8)])]
  log.turn(1.0)
  half_hidden, hidden, bare, lost = (log.transfer(name) for name in 'aabb')
  log.turn(8.0)
  log.done(steps[0], 0.0, 2.0, {'a': 1})
  log.done(steps[1], 3.0, 5.0, {'b': 1})
  log.done(half_hidden, 2.0, 3.75, wire_bytes=400, trip=Trip(2.5, 3.5, pieces=2))
  log.done(hidden, 3.5, 5.0, wire_bytes=600, trip=Trip(3.5, 4.5, pieces=1))
  log.done(bare, 5.0, 7.0, wire_bytes=1000, trip=Trip(5.0, 7.0, pieces=1))
  log.events.append(Failed(lost, 7.5, 'link down'))
  return read_timeline(log.events)


def test_parts_of_a_transfer_and_what_was_hidden_of_its_wire_time(timeline):
  figures = TransferFigures.of(timeline)
  assert (figures.count, figures.failed, figures.bytes, figures.pieces) == (3, 1, 2000, 4)
  means_ms = [part.mean_ms for part in (figures.queued, figures.posted, figures.wire, figures.admitting)]
  assert means_ms == pytest.approx([(1.0 + 2.5 + 4.0) / 3e-3, 0.5 / 3e-3, 4.0 / 3e-3, 0.75 / 3e-3])
  assert (figures.wire_s, figures.hidden_s, figures.overlap_share) == (4.0, 1.5, 0.375)


def test_parts_add_up_to_the_time_from_order_to_end(timeline):
  for span in timeline.spans:
    if span.kind == 'transfer':
      stamps = (span.submitted_s, span.began_s, span.trip.wire_began_s, span.trip.arrived_s, span.ended_s)
      assert list(stamps) == sorted(stamps)


def test_a_run_without_transfers_has_no_overlap():
  figures = TransferFigures.of(read_timeline([]))
  assert (figures.count, figures.overlap_share, figures.wire.mean_ms) == (0, None, None)


def test_counters_have_the_names_that_dashboards_of_vllm_and_sglang_read(timeline):
  found = counters(timeline)
  assert found['vllm:nixl_bytes_transferred_sum'] == 2000 and found['vllm:nixl_bytes_transferred_count'] == 3
  assert found['vllm:nixl_xfer_time_seconds_sum'] == 4.0 and found['vllm:nixl_num_descriptors_sum'] == 4
  assert found['vllm:nixl_num_failed_transfers_total'] == found['sglang:num_transfer_failed_reqs_total'] == 1
  assert found['sglang:kv_transfer_latency_ms_sum'] == 4000 and found['sglang:kv_transfer_latency_ms_count'] == 2
  assert found['pdjax:kv_transfer_hidden_seconds_total'] == 1.5
  lines = prometheus_text(timeline).splitlines()
  assert len(lines) == len(found) and 'vllm:nixl_post_time_seconds_sum 0.5' in lines


def test_transfers_of_a_request_that_overlap_count_once_and_those_of_a_lost_worker_as_failed():
  log = Log()
  log.turn(0.0)
  log.arrive('a', prompt_len=8)
  step = log.step('p', chunks=[('a', 0, 8)])
  one, other, _ = (log.transfer('a') for _ in range(3))
  log.turn(8.0)
  log.done(step, 0.0, 2.0, {'a': 1})
  log.done(one, 2.0, 4.0, wire_bytes=400, trip=Trip(2.0, 4.0, pieces=1))
  log.done(other, 2.0, 5.0, wire_bytes=600, trip=Trip(3.0, 5.0, pieces=1))
  log.events.append(WorkerLost('d', 6.0, 'gone'))
  found = counters(read_timeline(log.events))
  assert found['vllm:nixl_xfer_time_seconds_sum'] == 4.0 and found['sglang:kv_transfer_latency_ms_sum'] == 3000
  assert found['vllm:nixl_num_failed_transfers_total'] == found['sglang:num_transfer_failed_reqs_total'] == 1
