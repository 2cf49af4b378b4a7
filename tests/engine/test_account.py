"""Accounts of time: a delay in one stage of a real run shows in the part of the account that is its own."""

import functools
import itertools
import time

import pytest

from pdjax.engine.engine import Engine
from pdjax.engine.runner import Runner
from pdjax.engine.worker import Worker
from pdjax.kv.transfer import Parcel
from pdjax.types import Request, SamplingParams
from tests.tiny import prompt

DELAY_S = 0.5
PARTS = ('queue', 'prefill', 'wait', 'wire', 'admit', 'step')


def delayed(function, when=lambda *args: True):
  """The function, late on the first call it is to be late on."""
  calls = itertools.count()

  @functools.wraps(function)
  def late(*args, **kwargs):
    if when(*args) and next(calls) == 0:
      time.sleep(DELAY_S)
    return function(*args, **kwargs)

  return late


def delay_dispatch_of_the_prompt(engine: Engine, monkeypatch) -> None:
  monkeypatch.setattr(Runner, 'run', delayed(Runner.run, lambda runner, order, after: order.chunks))


def delay_collecting_the_prompt(engine: Engine, monkeypatch) -> None:
  monkeypatch.setattr(Worker, 'collect', delayed(Worker.collect, lambda worker, order, pending: order.chunks))


def delay_the_gather(engine: Engine, monkeypatch) -> None:
  monkeypatch.setattr(Parcel, 'wait_gathered', delayed(Parcel.wait_gathered))


def delay_the_pieces(engine: Engine, monkeypatch) -> None:
  monkeypatch.setattr(Parcel, 'wait', delayed(Parcel.wait))


def hold_the_decode_worker(engine: Engine, monkeypatch) -> None:
  monkeypatch.setattr(Runner, '_await_written', delayed(Runner._await_written))


def delay_collecting_the_decode_step(engine: Engine, monkeypatch) -> None:
  monkeypatch.setattr(Worker, 'collect', delayed(Worker.collect, lambda worker, order, pending: order.decodes))


@pytest.mark.parametrize(
  'part, delay',
  [
    ('queue', delay_dispatch_of_the_prompt),
    ('prefill', delay_collecting_the_prompt),
    ('wait', delay_the_gather),
    ('wire', delay_the_pieces),
    ('admit', hold_the_decode_worker),
    ('step', delay_collecting_the_decode_step),
  ],
)
def test_a_delay_shows_in_its_own_part_alone(one_and_one, monkeypatch, part, delay):
  request = Request('one', prompt(9), SamplingParams(max_tokens=4, ignore_eos=True))
  served = one_and_one.serve([request], prepare=lambda engine: delay(engine, monkeypatch))
  account = served.report.account
  parts_s = {name: getattr(account, f'{name}_ms') / 1e3 for name in PARTS}
  assert parts_s.pop(part) > 0.9 * DELAY_S, account
  assert all(value < 0.5 * DELAY_S for value in parts_s.values()), account
  assert len(served.completions[0].token_ids) == 4


def test_the_parts_add_up_to_the_whole(two_and_two):
  requests = [Request(f'r{i}', prompt(3 + 5 * i, seed=i), SamplingParams(max_tokens=5)) for i in range(9)]
  report = two_and_two.serve(requests).report
  assert report.account.ttft_closes_s < 1e-9 and report.account.handoff_closes_s < 1e-9
  for request in report.timeline.requests:
    assert request.ttft_s == pytest.approx(request.queue_s + request.prefill_s)
    assert request.handoff_s == pytest.approx(request.handoff.total_s)


def test_nothing_is_moved_nor_waited_for_where_both_phases_share_a_worker(colocated):
  request = Request('one', prompt(9), SamplingParams(max_tokens=4, ignore_eos=True))
  report = colocated.serve([request]).report
  assert report.account.wait_ms == report.account.wire_ms == 0
  assert report.account.admit_ms + report.account.step_ms == pytest.approx(report.handoff.mean_ms)
