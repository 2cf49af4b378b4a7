"""Whole runs by the public functions: sources that answer what is served, and times that were measured or not."""

import dataclasses

import pytest

import pdjax
from pdjax.serving.events import Arrived, Finished
from tests.tiny import TINY, config

SMALL = {'max_sequences': 2}


def test_a_closed_loop_on_the_engine_never_has_more_in_flight_than_it_may():
  workload = pdjax.ClosedLoopWorkload(
    max_concurrency=3, num_requests=9, prompt=pdjax.Uniform(3, 20), output=pdjax.Uniform(1, 5)
  )
  result = pdjax.run(config(workload=workload, **SMALL))
  assert result.report.completed == 9
  in_flight, most = 0, 0
  for event in result.events:
    in_flight += isinstance(event, Arrived) - isinstance(event, Finished)
    most = max(most, in_flight)
  assert most == 3


def test_every_turn_of_a_chat_continues_what_was_answered():
  workload = pdjax.MultiTurn(
    num_chats=2, turns=pdjax.Fixed(3), prompt=pdjax.Fixed(5), user=pdjax.Fixed(3), output=pdjax.Fixed(4)
  )
  result = pdjax.run(config(workload=workload, **SMALL))
  assert result.report.completed == 6
  by_id = {one.request.id: one for one in result.completions}
  for chat in (0, 1):
    for turn in (1, 2):
      before, now = by_id[f'chat-{chat}-turn-{turn - 1}'], by_id[f'chat-{chat}-turn-{turn}']
      so_far = (*before.request.prompt, *before.token_ids)
      assert tuple(now.request.prompt[: len(so_far)]) == so_far
      assert now.request.arrival_s >= before.token_times_s[-1]


def test_the_engine_ends_requests_at_the_lengths_that_the_workload_knows():
  output = pdjax.Uniform(1, 9)
  workload = pdjax.Poisson(requests_per_s=200, num_requests=8, prompt=pdjax.Fixed(6), output=output, seed=3)
  run = config(workload=workload, **SMALL)
  lengths = [len(one.token_ids) for one in pdjax.run(run).completions]
  assert lengths == [len(one.token_ids) for one in pdjax.simulate(run).completions]
  assert len(set(lengths)) > 2


def test_an_engine_without_weights_or_work_is_refused_before_anything_is_built():
  with pytest.raises(ValueError, match='the engine needs weights'):
    pdjax.run(dataclasses.replace(config(), checkpoint=None))
  with pytest.raises(ValueError, match='has no workload'):
    pdjax.run(dataclasses.replace(config(), workload=None))
  with pytest.raises(ValueError, match='one that prefills and one that decodes'):
    pdjax.ServingConfig(workers=pdjax.prefill_pool(1), model=TINY)


def test_a_simulation_that_measured_this_machine_first_says_so():
  run = config()
  assert not pdjax.simulate(run).report.calibrated
  report = pdjax.simulate(run, calibrate=True).report
  assert report.calibrated
  assert not any('Uncalibrated' in note for note in report.notes)
  assert report.completed == len(run.workload.requests)
