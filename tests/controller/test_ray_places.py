"""On Ray a place that only holds pages is a process of its own, from which prompts are fetched."""

import dataclasses

import pytest

import pdjax
from pdjax.policies import Disaggregated
from pdjax.types import HostPlace, PrefixCache, RayCluster, Request, SamplingParams
from pdjax.workload import Given
from tests.tiny import config, prompt


@pytest.mark.slow
def test_a_process_that_only_holds_pages_gives_back_what_others_forgot():
  begin = prompt(20, seed=1)
  prompts = [(*begin, 3), *(prompt(40, seed=seed) for seed in (3, 4)), (*begin, 5)]
  requests = [
    Request(f'r{index}', tokens, SamplingParams(max_tokens=4), arrival_s=1.0 * index)
    for index, tokens in enumerate(prompts)
  ]
  run = config('1P1D', workload=Given(tuple(requests)))
  few = dataclasses.replace(run.workers[0], num_pages=12)  # which the prompts between take, every one
  run = dataclasses.replace(run, workers=(few, run.workers[1]))
  beside = dataclasses.replace(
    run,
    policy=Disaggregated(max_prefill_tokens=16, returns_to='host0'),
    prefix_cache=PrefixCache(block_tokens=4),
    places=(HostPlace('host0', 2**19),),
    processes=RayCluster(cpus=0.1),
    platform='cpu',
  )
  served, alone = pdjax.run(beside), pdjax.run(run)
  answers = {one.request.id: (one.token_ids, one.finish_reason) for one in alone.completions}
  assert {one.request.id: (one.token_ids, one.finish_reason) for one in served.completions} == answers
  assert {one.request.id: one.cached_tokens for one in served.completions} == {'r0': 0, 'r1': 0, 'r2': 0, 'r3': 20}
  assert ('host0', 'prefill0', 20) in {(one.source, one.target, one.tokens) for one in served.report.copies}
