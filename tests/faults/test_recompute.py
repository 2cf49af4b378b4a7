"""A request that begins again on devices goes on as if nothing had been: tokens, text, samples, and where it ends."""

import dataclasses

import pytest

from experiments.faults.engine_faults import FaultyEngine
from pdjax.serving.events import Done, Started, WorkerLost
from pdjax.serving.orders import StepOrder
from pdjax.types import Request, SamplingParams
from tests.engine.cluster import Cluster
from tests.engine.conftest import shared_colocated
from tests.engine.plain import answer
from tests.engine.test_replay import replay
from tests.faults.injection import Injector, Seen
from tests.faults.oracles import assert_right
from tests.faults.test_matrix_engine import cluster as disaggregated
from tests.tiny import TINY, prompt

GREEDY = SamplingParams(max_tokens=9, ignore_eos=True)
ASKED = {
  'greedy': GREEDY,
  'sampled': dataclasses.replace(GREEDY, temperature=1.0, top_p=0.9, seed=11),
  'penalties': dataclasses.replace(
    GREEDY, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3, temperature=0.7, seed=4
  ),
  'logprobs': dataclasses.replace(GREEDY, logprobs=2),
  'two samples': dataclasses.replace(GREEDY, n=2, temperature=1.0, seed=5),
  "to the context's end": dataclasses.replace(GREEDY, max_tokens=200),
}


@pytest.fixture(params=[disaggregated, shared_colocated], ids=['2P2D', '2C'])
def cluster(request) -> Cluster:
  return request.param()


def at_token(count: int):
  """The moment at which the victim has so many tokens."""
  return lambda seen, what: isinstance(what, Done) and seen.tokens >= count


def in_chunk(seen: Seen, what) -> bool:
  return isinstance(what, StepOrder) and any(chunk.request.id == seen.victim for chunk in what.chunks)


def serve_losing(cluster: Cluster, requests: list[Request], moment, side: str = 'decode', again: int = 0):
  """Serve while the worker on that side of the first request dies at the moment, and once more after so many tokens."""

  def wrap(engine) -> Injector:
    injector = Injector(FaultyEngine(engine), requests[0].id)
    injector.moment = moment

    def act(injector: Injector) -> None:
      injector.lose(getattr(injector.seen, side) or injector.seen.prefill, down_s=0.02)
      if again:
        injector.moment, injector.acted = at_token(again), 0
        injector.act = lambda injector: injector.lose(injector.seen.decode, down_s=0.0)

    injector.act = act
    return injector

  return cluster.serve(requests, wrap=wrap)


def check(served, requests: list[Request], lost: int = 1) -> None:
  samples = [one for request in requests for one in request.samples()]
  ends = assert_right(served.events, samples, served.state, lambda one: answer(TINY, one).tokens)
  assert set(ends.values()) <= {'length', 'stop'}
  assert sum(isinstance(event, WorkerLost) for event in served.events) == lost
  for one in samples:
    assert served.by_id[one.id].text == answer(TINY, one).text
    assert served.by_id[one.id].finish_reason == answer(TINY, one).reason


@pytest.mark.parametrize('asked', ASKED)
def test_tokens_and_text_are_those_of_an_undisturbed_run(cluster, asked):
  requests = [Request('a', prompt(21, 2), ASKED[asked]), Request('b', prompt(9, 3), GREEDY)]
  if asked == "to the context's end":
    requests = [Request('a', prompt(55, 2), ASKED[asked]), requests[1]]
  served = serve_losing(cluster, requests, at_token(4))
  check(served, requests)
  for one in requests[0].samples():
    told = served.by_id[one.id].logprobs
    assert len(told) == (len(served.by_id[one.id].token_ids) if asked == 'logprobs' else 0)
    for token, logprob, expected in zip(served.by_id[one.id].token_ids, told, answer(TINY, one).logprobs, strict=False):
      assert abs(logprob.logprob - expected[token]) < 1e-4
  assert replay(cluster, served, served.events) == served.events


@pytest.mark.parametrize('moment', [in_chunk, at_token(1), at_token(7)], ids=['in its chunk', 'first token', 'late'])
def test_it_does_not_matter_when(cluster, moment):
  requests = [Request('a', prompt(30, 2), ASKED['sampled']), Request('b', prompt(9, 3), GREEDY)]
  served = serve_losing(cluster, requests, moment, side='prefill' if moment is in_chunk else 'decode')
  check(served, requests)


def test_it_may_begin_again_more_than_once(cluster):
  requests = [Request('a', prompt(30, 2), ASKED['penalties'])]
  check(serve_losing(cluster, requests, at_token(3), again=6), requests, lost=2)


@pytest.mark.parametrize('after', [2, 4, 6])
def test_a_stop_string_that_spans_the_loss_is_found(cluster, after):
  whole = Request('a', prompt(21, 2), dataclasses.replace(GREEDY, max_tokens=12))
  text = answer(TINY, whole).text
  stop = text[after - 1 : after + 4]
  stopped = dataclasses.replace(whole, sampling=dataclasses.replace(whole.sampling, stop=(stop,)))
  served = serve_losing(cluster, [stopped], at_token(after))
  check(served, [stopped])


def test_nothing_is_computed_that_is_still_there():
  """The decode worker dies while the prompt is on its way: it is sent to another, as it is."""
  requests = [Request('a', prompt(30, 2), GREEDY)]
  served = serve_losing(disaggregated(), requests, in_chunk)
  check(served, requests)
  chunks = [chunk for event in served.events if isinstance(event, Started)
            for chunk in getattr(event.order, 'chunks', ())]  # fmt: skip
  assert sum(chunk.length for chunk in chunks) == 30
