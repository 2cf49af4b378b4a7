"""Prompts that are computed here or there, as a decider says: every token is the plain loop's."""

import dataclasses
import functools

import pytest

from pdjax.policies import (
  AlwaysLocal,
  AlwaysRemote,
  Disaggregated,
  EarliestDeadline,
  LongestPrefix,
  ShortestFirst,
  SoonestFirstToken,
  StickyPrefix,
  UncachedThreshold,
)
from pdjax.serving.events import Started
from pdjax.serving.orders import StepOrder
from pdjax.types import Role
from tests.engine.cluster import Cluster
from tests.engine.conftest import SMALL_PIECES
from tests.engine.plain import generate
from tests.engine.test_places import CACHE
from tests.engine.test_prefix_cache import SYSTEM, ask
from tests.tiny import TINY_8_2, config, prompt


@functools.cache
def cluster() -> Cluster:
  """One device that prefills, and two that prefill and decode, with unlike pages."""
  run = config('1P1D', model=TINY_8_2)
  sizes = ({'page_size': 4}, {'page_size': 8, 'tp': 2, 'role': Role.BOTH})
  workers = tuple(dataclasses.replace(one, **fields) for one, fields in zip(run.workers, sizes, strict=True))
  policy = Disaggregated(max_prefill_tokens=16, moves_on=True)
  return Cluster(dataclasses.replace(run, workers=workers, policy=policy, prefix_cache=CACHE, transfer=SMALL_PIECES))


def where(events) -> dict[str, set[str]]:
  """The requests whose prompts each worker computed something of."""
  found: dict[str, set[str]] = {}
  for event in events:
    if isinstance(event, Started) and isinstance(event.order, StepOrder):
      found.setdefault(event.order.worker, set()).update(chunk.request.id for chunk in event.order.chunks)
  return {name: requests for name, requests in found.items() if requests}


@pytest.mark.parametrize(
  ('decider', 'order', 'workers'),
  [
    (AlwaysLocal(), ShortestFirst(), {'decode0'}),
    (AlwaysRemote(), EarliestDeadline(), {'prefill0'}),
    (UncachedThreshold(12), None, {'prefill0', 'decode0'}),
    (SoonestFirstToken(), ShortestFirst(), None),
  ],
  ids=lambda one: type(one).__name__,
)
def test_wherever_a_prompt_is_computed_its_tokens_are_the_same(decider, order, workers):
  policy = Disaggregated(
    max_prefill_tokens=16, place_prefill=StickyPrefix(), place_decode=LongestPrefix(), decider=decider, order_by=order,
    moves_on=True,
  )  # fmt: skip
  requests = [ask(f'r{one}', prompt(5 + 4 * one, seed=one), 7, seed=one) for one in range(6)]
  requests += [ask(f's{one}', (*SYSTEM, *prompt(3 + one, seed=one)), 6, temperature=0.8, seed=one) for one in range(4)]
  requests += [ask('n', SYSTEM[:11], 8, temperature=0.9, n=3), ask('one', SYSTEM[:5], 1)]
  served = cluster().serve(requests, policy)
  for request in requests:
    for sample in request.samples():
      assert served.tokens()[sample.id] == generate(cluster().model, sample)
  if workers is not None:
    assert where(served.events).keys() == workers
