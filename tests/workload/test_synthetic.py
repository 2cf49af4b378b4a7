"""Made-up workloads have the statistics they name, keep true lengths from policies, and repeat by seed."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from pdjax.types.request import SLO, SamplingParams
from pdjax.workload.lengths import Fixed, Lognormal, Uniform
from pdjax.workload.synthetic import Bursty, ClosedLoopWorkload, Constant, MultiTurn, Poisson
from pdjax.workload.workload import WorkloadContext
from tests.workload import sources

CONTEXT = WorkloadContext(vocab_size=1000, context_len=8192)
SHORT = {'prompt': Uniform(3, 9), 'output': Uniform(1, 6)}

WORKLOADS = [
  Poisson(num_requests=20),
  Bursty(num_requests=20),
  Constant(num_requests=20),
  ClosedLoopWorkload(num_requests=20, max_concurrency=3),
  MultiTurn(num_chats=5, turns=Fixed(4), max_concurrency=2),
]
BY_NAME = pytest.mark.parametrize('workload', WORKLOADS, ids=lambda workload: type(workload).__name__)


def all_requests(workload, context=CONTEXT):
  return sources.all_requests(workload, context)


def gaps_s(workload):
  requests, _ = all_requests(workload)
  return np.diff([request.arrival_s for request in requests])


@pytest.mark.parametrize('workload', [Poisson, Bursty, Constant])
def test_the_mean_rate_is_the_one_asked_for(workload):
  gaps = gaps_s(workload(requests_per_s=4.0, num_requests=20_000, **SHORT))
  assert gaps.mean() == pytest.approx(0.25, rel=0.03)


@pytest.mark.parametrize('burstiness', [0.25, 1.0, 4.0])
def test_the_gaps_vary_as_burstiness_says(burstiness):
  gaps = gaps_s(Bursty(requests_per_s=4.0, burstiness=burstiness, num_requests=20_000, **SHORT))
  assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_poisson_gaps_are_exponential_and_constant_gaps_equal():
  gaps = gaps_s(Poisson(requests_per_s=2.0, num_requests=20_000, **SHORT))
  assert gaps.std() / gaps.mean() == pytest.approx(1.0, rel=0.05)
  assert np.mean(gaps > 0.5) == pytest.approx(math.exp(-1), rel=0.05)
  np.testing.assert_allclose(gaps_s(Constant(requests_per_s=2.0, num_requests=50)), 0.5)


def test_an_infinite_rate_brings_all_at_once():
  requests, _ = all_requests(Poisson(requests_per_s=math.inf, num_requests=10))
  assert {request.arrival_s for request in requests} == {0.0}


def test_another_rate_meets_the_same_requests():
  slow, _ = all_requests(Poisson(requests_per_s=1.0, num_requests=10))
  fast, _ = all_requests(Poisson(requests_per_s=8.0, num_requests=10))
  np.testing.assert_allclose([r.arrival_s for r in slow], [8 * r.arrival_s for r in fast])
  assert [r.prompt for r in slow] == [r.prompt for r in fast]


@BY_NAME
def test_the_same_seed_gives_the_same_requests_and_another_seed_others(workload):
  def summary(workload):
    requests, arrivals = all_requests(workload)
    return [(r, tuple(r.prompt), arrivals.output_len(r.id)) for r in requests]

  assert summary(workload) == summary(workload)
  assert summary(workload) != summary(dataclasses.replace(workload, seed=1))


@BY_NAME
def test_as_many_requests_come_as_it_says(workload):
  requests, _ = all_requests(workload)
  assert len(requests) == workload.num_requests == 20
  assert len({request.id for request in requests}) == 20


@BY_NAME
def test_a_request_does_not_tell_its_true_output_length(workload):
  requests, arrivals = all_requests(workload)
  lengths = {arrivals.output_len(request.id) for request in requests}
  assert len(lengths) > 5
  assert {request.sampling.max_tokens for request in requests} == {workload.output.upper}
  assert all(request.sampling.ignore_eos for request in requests)
  assert all(1 <= length <= workload.output.upper for length in lengths)


def test_every_request_has_a_seed_of_its_own():
  requests, _ = all_requests(Poisson(num_requests=200))
  assert len({request.sampling.seed for request in requests}) == 200


def test_prompt_and_output_lengths_follow_their_distributions():
  workload = Poisson(num_requests=5000, prompt=Lognormal(100, 0.5), output=Uniform(10, 20))
  requests, arrivals = all_requests(workload)
  assert np.median([request.prompt_len for request in requests]) == pytest.approx(100, rel=0.04)
  assert np.mean([arrivals.output_len(request.id) for request in requests]) == pytest.approx(15, rel=0.03)


def test_sampling_and_limits_reach_every_request():
  workload = Poisson(num_requests=3, sampling=SamplingParams(temperature=0.7, top_k=5), slo=SLO(ttft_ms=100))
  requests, _ = all_requests(workload)
  assert {(r.sampling.temperature, r.sampling.top_k, r.slo) for r in requests} == {(0.7, 5, SLO(ttft_ms=100))}


def test_text_prompts_are_encoded_in_turn_and_the_model_decides_where_answers_end():
  context = WorkloadContext(1000, 8192, encode_chat=lambda text: [1, *map(ord, text)])
  sampling = SamplingParams(max_tokens=9, stop_token_ids=(3,))
  requests, arrivals = all_requests(Poisson(num_requests=3, prompts=('a', 'bc'), sampling=sampling), context)
  assert [request.prompt for request in requests] == [(1, 97), (1, 98, 99), (1, 97)]
  assert {(r.sampling.max_tokens, r.sampling.ignore_eos, r.sampling.stop_token_ids) for r in requests} == {
    (9, False, (3,))
  }
  assert [arrivals.output_len(request.id) for request in requests] == [None] * 3


def test_text_prompts_without_a_tokenizer_are_refused():
  with pytest.raises(ValueError, match=r"text prompt 'Hello' but the run has no tokenizer"):
    Poisson(prompts=('Hello',)).arrivals(CONTEXT)


def test_a_closed_loop_keeps_its_concurrency():
  arrivals = ClosedLoopWorkload(num_requests=10, max_concurrency=4).arrivals(CONTEXT)
  assert len(arrivals.due(0.0, [])) == 4
  assert arrivals.next_s() == math.inf


def test_chat_turns_extend_the_turn_before():
  requests, arrivals = all_requests(MultiTurn(num_chats=3, turns=Fixed(3)))
  by_chat = {}
  for request in requests:
    by_chat.setdefault(request.session, []).append(request)
  assert len(by_chat) == 3
  for turns in by_chat.values():
    for earlier, later in itertools.pairwise(turns):
      answer = (5,) * arrivals.output_len(earlier.id)
      assert tuple(later.prompt[: earlier.prompt_len + len(answer)]) == (*earlier.prompt, *answer)
      assert later.prompt_len > earlier.prompt_len + len(answer)


def test_chats_stop_before_the_context_is_full():
  workload = MultiTurn(
    num_chats=4, turns=Fixed(50), prompt=Fixed(20), user=Fixed(10), output=Fixed(10), max_context=100
  )
  requests, _ = all_requests(workload)
  assert 4 < len(requests) < workload.num_requests
  assert max(r.prompt_len + r.sampling.max_tokens for r in requests) <= 100


def test_chats_can_start_by_a_poisson_process():
  workload = MultiTurn(num_chats=4000, turns=Fixed(1), chats_per_s=5.0, max_concurrency=None, **SHORT)
  assert gaps_s(workload).mean() == pytest.approx(0.2, rel=0.04)


def test_the_report_finds_rate_burstiness_and_concurrency():
  def figures(workload):
    return workload.request_rate, workload.burstiness, workload.max_concurrency

  assert figures(Poisson(requests_per_s=3.0)) == (3.0, 1.0, None)
  assert figures(Bursty(requests_per_s=3.0, burstiness=0.25)) == (3.0, 0.25, None)
  assert figures(Constant(requests_per_s=3.0)) == (3.0, None, None)
  assert figures(ClosedLoopWorkload(max_concurrency=5)) == (math.inf, None, 5)
  assert figures(MultiTurn(max_concurrency=5)) == (math.inf, None, 5)
  assert figures(MultiTurn(chats_per_s=2.0, max_concurrency=None)) == (None, None, None)


@pytest.mark.parametrize(
  ('workload', 'fields'),
  [
    (Poisson, {'requests_per_s': 0.0}),
    (Poisson, {'requests_per_s': -1.0}),
    (Poisson, {'requests_per_s': math.nan}),
    (Poisson, {'num_requests': 0}),
    (Poisson, {'seed': -1}),
    (Poisson, {'prompts': ()}),
    (Bursty, {'burstiness': 0.0}),
    (Bursty, {'burstiness': math.inf}),
    (Constant, {'requests_per_s': 0}),
    (ClosedLoopWorkload, {'max_concurrency': 0}),
    (ClosedLoopWorkload, {'think_s': -0.5}),
    (MultiTurn, {'num_chats': 0}),
    (MultiTurn, {'chats_per_s': 0.0}),
    (MultiTurn, {'max_concurrency': 0}),
  ],
)
def test_impossible_fields_are_refused_by_name(workload, fields):
  with pytest.raises(ValueError, match=next(iter(fields))):
    workload(**fields)


@BY_NAME
def test_lengths_beyond_the_context_are_refused_before_anything_runs(workload):
  with pytest.raises(ValueError, match='at most 100 together'):
    workload.arrivals(WorkloadContext(vocab_size=10, context_len=100))


def test_stop_tokens_among_random_tokens_are_refused():
  with pytest.raises(ValueError, match='stop_token_ids'):
    Poisson(sampling=SamplingParams(stop_token_ids=(3,))).arrivals(CONTEXT)


def test_all_chats_begin_with_the_shared_tokens_and_go_on_with_their_own():
  workload = MultiTurn(num_chats=3, turns=Fixed(1), shared=20, prompt=Fixed(5), output=Fixed(4))
  requests, _ = all_requests(workload)
  begins = {tuple(request.prompt[:20]) for request in requests}
  assert len(begins) == 1 and {request.prompt_len for request in requests} == {25}
  assert len({tuple(request.prompt[20:]) for request in requests}) == 3
  others, _ = all_requests(dataclasses.replace(workload, seed=1))
  assert tuple(others[0].prompt[:20]) not in begins
  plain, _ = all_requests(dataclasses.replace(workload, shared=0))
  assert [tuple(request.prompt) for request in plain] == [tuple(request.prompt[20:]) for request in requests]
  with pytest.raises(ValueError, match='first turns of up to'):
    all_requests(dataclasses.replace(workload, shared=10**6))
