"""Pages that are taken as sequences grow change no token on devices, however few there are."""

import dataclasses
import random

import pytest

from pdjax.policies import Colocated, Disaggregated
from pdjax.serving.events import Preempted, Started
from pdjax.serving.orders import StepOrder
from pdjax.types import Request, SamplingParams
from tests.engine.cluster import Cluster
from tests.engine.conftest import build
from tests.engine.plain import generate
from tests.tiny import TINY, TINY_12_12, prompt

SAMPLED = (
  {}, {'temperature': 0.8}, {'temperature': 1.2, 'top_p': 0.7}, {'temperature': 0.9, 'repetition_penalty': 1.3},
)  # fmt: skip


def some_requests(seed: int) -> list[Request]:
  """Two dozen at once, of all lengths, sampled in all ways; a few stop early."""
  rng = random.Random(seed)
  return [
    Request(
      f'r{index}', prompt(rng.randint(1, 24), seed=index),
      SamplingParams(max_tokens=rng.randint(2, 36), seed=index, ignore_eos=bool(index % 3), **SAMPLED[index % 4]),
    )
    for index in range(24)
  ]  # fmt: skip


def growing(cluster: Cluster, ahead: int) -> Cluster:
  """The cluster, whose sequences take so many pages ahead."""
  return cluster.changed(pages_ahead=ahead, max_preemptions=4)


def assert_exact(cluster: Cluster, requests: list[Request], policy=None) -> list[Preempted]:
  """Every token is that of a plain loop; the preemptions."""
  served = cluster.serve(requests, policy)
  assert served.tokens() == {request.id: generate(cluster.model, request) for request in requests}
  orders = [event.order for event in served.events if isinstance(event, Started)]
  grown = [one for order in orders if isinstance(order, StepOrder) for one in order.growth]
  assert len(grown) > 10
  return [event for event in served.events if isinstance(event, Preempted)]


@pytest.mark.parametrize('ahead', [0, 1])
def test_tokens_are_those_of_a_plain_loop_with_a_third_of_the_pages(ahead):
  sizes = {'num_pages': 16, 'max_sequences': 6}  # one of 59 tokens needs 15
  cluster = build('1P1D', page_size=4, **sizes)
  assert assert_exact(growing(cluster, ahead), some_requests(ahead)), 'nobody was preempted'
  policy = dataclasses.replace(cluster.config.policy, decode_steps=5)
  assert isinstance(policy, Disaggregated)
  assert_exact(growing(cluster, ahead), some_requests(ahead + 2), policy)


def test_colocated_tokens_are_those_of_a_plain_loop_with_a_third_of_the_pages():
  cluster = build('1C', page_size=4, num_pages=20, max_sequences=6)
  assert assert_exact(growing(cluster, 1), some_requests(5), Colocated(token_budget=24))
  assert_exact(growing(cluster, 0), some_requests(6), Colocated(token_budget=24, decode_steps=4))


def test_pages_grow_between_meshes_and_page_sizes_that_are_unlike():
  differing = [{'page_size': 4, 'num_pages': 40}, {'page_size': 2, 'num_pages': 36}]
  cluster = build('1P1D', 2, 3, TINY_12_12, max_sequences=6, differing=differing)
  assert assert_exact(growing(cluster, 1), some_requests(7))


def test_a_worker_forgets_who_was_preempted_there_and_decodes_elsewhere(two_and_two):
  cluster = growing(two_and_two, 0)
  cluster.specs = tuple(dataclasses.replace(spec, num_pages=18) for spec in cluster.specs)
  assert assert_exact(cluster, some_requests(8)), 'nobody was preempted'  # and `serve` looks at what workers remember


def test_samples_of_one_prompt_grow_each_by_itself():
  requests = [
    Request(f'r{index}', prompt(7 + index, seed=index), SamplingParams(max_tokens=20, n=3, seed=index, temperature=1.0))
    for index in range(4)
  ]
  whole = build('1P1D', page_size=4, num_pages=64, max_sequences=6)
  assert growing(whole, 1).serve(requests).tokens() == whole.serve(requests).tokens()
  assert {TINY.name} == {whole.model.name}
