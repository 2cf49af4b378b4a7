"""Times read from logs written by hand."""

import dataclasses

import pytest

from pdjax.metrics.timeline import read_timeline
from pdjax.serving.events import Failed, WorkerLost
from pdjax.types.request import SLO


def test_every_time_of_a_disaggregated_request(disaggregated, stamps):
  timeline = read_timeline(disaggregated(stamps))
  (request,) = timeline.requests
  assert request.ttft_s == 0.8125
  assert request.queue_s == 0.25
  assert request.prefill_s == 0.5625
  assert request.token_times_s == (1.0625, 1.8125, 2.0625)
  assert request.itls_s == (0.75, 0.25)
  assert request.tpot_s == 0.5
  assert request.e2el_s == 1.8125
  assert request.handoff_s == 0.75
  assert (request.prefill_worker, request.decode_worker) == ('p', 'd')
  assert (request.num_transfers, request.wire_bytes) == (1, 4096)
  assert request.completed and request.finish_reason == 'length' and request.finished_s == 2.0625
  assert timeline.wasted_tokens == 2
  assert (timeline.start_s, timeline.end_s) == (0.25, 2.0625)


def test_handoff_parts_lie_between_their_own_stamps(disaggregated, stamps):
  (request,) = read_timeline(disaggregated(stamps)).requests
  parts = request.handoff
  assert (parts.wait_s, parts.wire_s, parts.admit_s, parts.step_s) == (0.0625, 0.125, 0.25, 0.3125)
  assert parts.total_s == request.handoff_s


STAGES = ('queue', 'prefill', 'wait', 'wire', 'admit', 'step')
ENDS = ('prefill_began', 'prefill_ended', 'wire_began', 'wire_ended', 'decode_began', 'decode_ended')


def _parts(request):
  handoff = request.handoff
  parts = (request.queue_s, request.prefill_s, handoff.wait_s, handoff.wire_s, handoff.admit_s, handoff.step_s)
  return dict(zip(STAGES, parts, strict=True))


@pytest.mark.parametrize('stage', STAGES)
def test_a_delay_in_one_stage_shows_in_that_part_alone(disaggregated, stamps, stage):
  delay_s = 0.375
  begins_to_differ = False
  late = {}
  for field in dataclasses.fields(stamps):
    begins_to_differ |= field.name == ENDS[STAGES.index(stage)]
    late[field.name] = getattr(stamps, field.name) + delay_s * begins_to_differ
  (before,) = read_timeline(disaggregated(stamps)).requests
  (after,) = read_timeline(disaggregated(type(stamps)(**late))).requests
  expected = _parts(before)
  expected[stage] += delay_s
  assert _parts(after) == expected


def test_pages_that_travelled_before_the_first_token_cost_nothing(disaggregated, stamps):
  hidden = dataclasses.replace(stamps, wire_began=0.75, wire_ended=1.0)
  (request,) = read_timeline(disaggregated(hidden)).requests
  parts = request.handoff
  assert (parts.wait_s, parts.wire_s, parts.admit_s, parts.step_s) == (0, 0, 0.4375, 0.3125)

  half_hidden = dataclasses.replace(stamps, wire_began=0.75, wire_ended=1.25)
  (request,) = read_timeline(disaggregated(half_hidden)).requests
  assert (request.handoff.wait_s, request.handoff.wire_s) == (0, 0.1875)


def test_of_several_transfers_the_one_that_ended_last_counts(log):
  log.turn(0.0)
  log.arrive('r', prompt_len=8)
  first = log.step('p', chunks=[('r', 0, 4)])
  log.turn(1.0)
  log.done(first, 0.0, 1.0)
  early = log.transfer('r', pages=(0,))
  second = log.step('p', chunks=[('r', 4, 4)])
  log.turn(2.0)
  log.done(second, 1.0, 2.0, {'r': 1})
  late = log.transfer('r', pages=(1,))
  log.turn(3.5)
  log.done(late, 2.25, 3.0, wire_bytes=10)  # the loop learns of it first
  log.done(early, 2.0, 2.5, wire_bytes=20)
  decode = log.step('d', decodes=['r'])
  log.turn(4.0)
  log.done(decode, 3.5, 4.0, {'r': 1})
  (request,) = read_timeline(log.events).requests
  assert request.prefill_began_s == 0.0
  assert (request.transfer_began_s, request.transfer_ended_s) == (2.25, 3.0)
  assert (request.num_transfers, request.wire_bytes) == (2, 30)
  parts = request.handoff
  assert (parts.wait_s, parts.wire_s, parts.admit_s, parts.step_s) == (0.25, 0.75, 0.5, 0.5)


def test_without_transfers_wait_and_wire_are_nothing(log):
  log.turn(0.0)
  log.arrive('r')
  step = log.step('w', chunks=[('r', 0, 4)])
  log.turn(1.0)
  log.done(step, 0.0, 1.0, {'r': 1})
  step = log.step('w', decodes=['r'])
  log.turn(2.0)
  log.done(step, 1.25, 2.0, {'r': 1})
  (request,) = read_timeline(log.events).requests
  parts = request.handoff
  assert (parts.wait_s, parts.wire_s, parts.admit_s, parts.step_s) == (0, 0, 0.25, 0.75)
  assert request.prefill_worker == request.decode_worker == 'w'


def test_tokens_of_one_step_arrive_together_as_one_piece(log):
  log.turn(0.0)
  log.arrive('r')
  step = log.step('w', chunks=[('r', 0, 4)])
  log.turn(1.0)
  log.done(step, 0.0, 1.0, {'r': 1})
  step = log.step('w', decodes=['r'])
  log.turn(2.0)
  log.done(step, 1.0, 2.0, {'r': 3})
  log.finish('r')
  (request,) = read_timeline(log.events).requests
  assert request.token_times_s == (1.0, 2.0, 2.0, 2.0)
  assert request.delta_times_s == (1.0, 2.0)
  assert request.itls_s == (1.0,)
  assert request.tpot_s == pytest.approx(1 / 3)


def test_one_token_has_no_second(log):
  log.turn(0.0)
  log.arrive('r')
  step = log.step('p', chunks=[('r', 0, 4)])
  log.turn(1.0)
  log.done(step, 0.0, 1.0, {'r': 1})
  log.finish('r', 'stop')
  (request,) = read_timeline(log.events).requests
  assert request.ttft_s == request.e2el_s == 1.0
  assert request.tpot_s is request.handoff_s is request.handoff is request.decode_worker is None
  assert request.itls_s == ()
  assert request.meets(SLO(ttft_ms=1000, tpot_ms=1)) and not request.meets(SLO(ttft_ms=999))


def test_a_rejected_request_has_an_end_and_no_times(log):
  log.turn(0.5)
  log.arrive('r', arrival_s=0.5)
  log.finish('r', 'rejected', 'prompt too long')
  (request,) = read_timeline(log.events).requests
  assert not request.completed and request.error == 'prompt too long' and request.finished_s == 0.5
  assert request.ttft_s is request.queue_s is request.prefill_s is request.e2el_s is request.handoff is None
  assert not request.meets(SLO())


def test_tokens_after_a_cancellation_are_wasted(log):
  log.turn(0.0)
  log.arrive('r')
  step = log.step('w', chunks=[('r', 0, 4)])
  log.turn(1.0)
  log.done(step, 0.0, 1.0, {'r': 1})
  step = log.step('w', decodes=['r'])
  log.finish('r', 'cancelled')
  log.turn(2.0)
  log.done(step, 1.0, 2.0, late={'r': 2}, wasted_tokens=1)
  timeline = read_timeline(log.events)
  assert timeline.requests[0].token_times_s == (1.0,)
  assert timeline.wasted_tokens == 3


def test_a_request_that_a_lost_worker_took_along_ends_with_the_error(log):
  log.turn(0.0)
  log.arrive('r')
  step = log.step('w', chunks=[('r', 0, 4)])
  log.turn(1.5)
  log.events += [Failed(step, 1.0, 'out of memory'), WorkerLost('w', 1.25, 'out of memory')]
  log.finish('r', 'error', 'out of memory')
  timeline = read_timeline(log.events)
  assert timeline.requests[0].error == 'out of memory'
  assert timeline.spans == () and timeline.host_lags_s == (0.5,)


def test_spans_say_what_each_order_did(disaggregated, stamps, log):
  prefill, transfer, decode, _ = read_timeline(disaggregated(stamps)).spans
  assert (prefill.kind, prefill.worker, prefill.prompt_tokens, prefill.output_tokens) == ('prefill', 'p', 4, 1)
  assert (transfer.kind, transfer.worker, transfer.target, transfer.wire_bytes) == ('transfer', 'p', 'd', 4096)
  assert (decode.kind, decode.began_s, decode.ended_s, decode.requests) == ('decode', 1.5, 1.75, ('r',))

  log.turn(0.0)
  log.arrive('a')
  log.arrive('b')
  order = log.step('w', chunks=[('a', 0, 2)], decodes=['b'])
  log.turn(1.0)
  log.done(order, 0.0, 1.0, {'b': 1})
  (span,) = read_timeline(log.events).spans
  assert (span.kind, span.requests, span.prompt_tokens, span.output_tokens) == ('fused', ('a', 'b'), 2, 1)


def test_an_empty_log_is_an_empty_timeline():
  timeline = read_timeline([])
  assert timeline.requests == timeline.spans == ()
  assert timeline.duration_s == 0
