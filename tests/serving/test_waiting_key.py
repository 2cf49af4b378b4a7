"""The order in which requests wait, where a policy names a key of it."""

import math
import random

import pytest

from pdjax.policies import Colocated, Disaggregated
from pdjax.serving import ClusterState, PolicyError, serve
from pdjax.serving.events import Started
from pdjax.serving.keyed_queue import KeyedQueue
from pdjax.serving.orders import StepOrder
from pdjax.serving.requests import RequestState
from pdjax.simulator import Simulator
from pdjax.types import Request, SamplingParams, colocated_pool
from pdjax.workload import Listed
from tests.serving.driver import ONE_OF_EACH, SIZES, TINY
from tests.test_simulator import HandCost


class ShortestWithAgeing(Disaggregated):
  """The shortest prompt first; a second of waiting counts for two tokens, so that nobody waits for ever."""

  seen: list[list[str]]

  def waiting_key(self, request):
    return (request.prompt_len + 2.0 * request.arrival_s,)

  def decide(self, view):
    keys = [self.waiting_key(entry.request) for entry in view.waiting.values()]
    assert keys == sorted(keys)
    self.seen.append(list(view.waiting))
    return super().decide(view)


def serve_all(policy, requests, workers=ONE_OF_EACH):
  state = ClusterState(TINY, workers, page_size=4)
  return list(serve(Listed(requests), policy, Simulator(TINY, workers, HandCost()), state))


def some_requests(count: int = 20, seed: int = 0) -> list[Request]:
  rng = random.Random(seed)
  return [
    Request(
      f'r{i}', tuple(range(2, 2 + rng.randint(1, 30))), SamplingParams(max_tokens=rng.randint(1, 9)),
      arrival_s=rng.choice((0.0, 0.0, 4.0 * i)),
    )
    for i in range(count)
  ]  # fmt: skip


@pytest.mark.parametrize('seed', range(4))
def test_requests_wait_in_the_order_of_the_key_at_every_decision(seed):
  policy = ShortestWithAgeing(max_prefill_tokens=16)
  object.__setattr__(policy, 'seen', [])
  requests = some_requests(seed=seed)
  events = serve_all(policy, requests)
  assert any(len(names) > 5 for names in policy.seen)
  begun = [
    chunk.request.id
    for event in events
    if isinstance(event, Started) and isinstance(event.order, StepOrder)
    for chunk in event.order.chunks
    if chunk.start == 0
  ]
  assert sorted(begun) == sorted(request.id for request in requests)
  arrived = [request.id for request in sorted(requests, key=lambda one: one.arrival_s)]
  assert begun != arrived


def test_of_equal_keys_the_first_comes_first_and_one_begun_again_has_its_old_place():
  queue = KeyedQueue(lambda entry: (entry.limit // 2,))
  entries = [RequestState(Request(f'r{i}', (2,)), limit, number=i) for i, limit in enumerate((4, 2, 5, 3, 4))]
  for entry in entries:
    queue[entry.request.id] = entry
  assert list(queue) == ['r1', 'r3', 'r0', 'r2', 'r4'] and len(queue) == 5
  del queue['r0']
  assert queue.pop('r1') is entries[1] and list(queue.values()) == [entries[3], entries[2], entries[4]]
  queue['r0'] = entries[0]
  queue['r0'] = entries[0]
  assert list(queue) == ['r3', 'r0', 'r2', 'r4'] and 'r1' not in queue
  with pytest.raises(KeyError):
    del queue['r1']


@pytest.mark.parametrize(
  ('key', 'message'),
  [
    (3, 'has waiting_key=3, expected a method'),
    (lambda request: request.prompt_len, "of request 'r0' with .*, expected a tuple of finite numbers"),
    (lambda request: (None,), r"of request 'r0' with \(None,\), expected a tuple of finite numbers"),
    (lambda request: (1, math.nan), r'with \(1, nan\), expected a tuple of finite numbers'),
    (lambda request: ('a',), 'expected a tuple of finite numbers'),
    (lambda request: (10**400,), 'expected a tuple of finite numbers'),
    (
      lambda request: 1 / 0,
      "waiting_key of request 'r0' raised ZeroDivisionError: .*; it takes a request",
    ),
    (lambda: (1,), "waiting_key of request 'r0' raised TypeError: .*; it takes a request and answers a tuple"),
  ],
)
def test_what_is_no_key_is_refused(key, message):
  class Careless(Colocated):
    waiting_key = key if not callable(key) else staticmethod(key)

  with pytest.raises(PolicyError, match=message):
    serve_all(Careless(), some_requests(1), colocated_pool(1, **SIZES))
