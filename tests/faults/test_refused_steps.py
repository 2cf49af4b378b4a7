"""A step that cannot be handed to its devices: nothing computed over the hole that it leaves is ever delivered."""

import dataclasses
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable

import pytest

from pdjax.engine.programs import Begin, Decode, Fused, Prefill
from pdjax.engine.worker import Worker
from pdjax.policies import Colocated, Disaggregated
from pdjax.serving.events import Delivered, Failed, Finished, WorkerLost
from pdjax.serving.orders import StepOrder
from pdjax.types import FaultSpec, Request, SamplingParams
from pdjax.types.faults import ALL_FAIL
from tests.controller.thread_peers import Processes
from tests.engine.cluster import Cluster, Served
from tests.engine.conftest import shared, shared_colocated
from tests.engine.plain import answer, generate
from tests.faults.oracles import assert_right
from tests.faults.test_random_faults import Leaving
from tests.tiny import TINY, byte_tokenizer, config, prompt

VICTIM = 'victim'
POLICIES = {'1P1D': Disaggregated(max_prefill_tokens=16), '1C': Colocated(token_budget=16)}


def cluster(split: str) -> Cluster:
  if split == '1C':
    return shared_colocated().only('both0')
  return shared('2P2D').only('prefill0', 'decode0')


def requests(length: int = 40) -> list[Request]:
  """A victim of as many chunks as 16 tokens go into its length, and two others that share steps with it."""
  sampling = SamplingParams(max_tokens=8, temperature=0.7, seed=5, repetition_penalty=1.2, ignore_eos=True)
  others = [Request(f'other{i}', prompt(5 + 2 * i, i), dataclasses.replace(sampling, seed=i)) for i in range(2)]
  return [Request(VICTIM, prompt(length, 9), sampling), *others]


def has_chunk(which: Callable) -> Callable[[StepOrder], bool]:
  return lambda order: any(chunk.request.id == VICTIM and which(chunk) for chunk in order.chunks)


def has_decode(which: Callable) -> Callable[[StepOrder], bool]:
  seen = itertools.count()
  return lambda order: VICTIM in order.batch.requests and which(next(seen))


STEPS = {
  'the first chunk': lambda: has_chunk(lambda chunk: chunk.start == 0),
  'a chunk in the middle': lambda: has_chunk(lambda chunk: chunk.start > 0 and not chunk.is_last),
  'the last chunk': lambda: has_chunk(lambda chunk: chunk.is_last),
  'the first decode step': lambda: has_decode(lambda number: number == 0),
  'a later decode step': lambda: has_decode(lambda number: number == 3),
}


class Refusing:
  """Lets a worker's dispatch of some steps fail before or after it has done all but hand them over."""

  def __init__(self, when: Callable[[StepOrder], bool], times: int = 1, late: bool = False):
    self.refused: list[StepOrder] = []
    self._when, self._times, self._late = when, times, late

  def patch(self, monkeypatch) -> None:
    dispatch, run = Worker.dispatch, Worker.run
    refusing = []

    def dispatches(worker, order, *after):
      if len(self.refused) < self._times and self._when(order):
        self.refused.append(order)
        if not self._late:
          raise RuntimeError('no more streams')
        refusing.append(order)
      try:
        return dispatch(worker, order, *after)
      finally:
        refusing.clear()

    def runs(worker, program, *arguments):
      if refusing and isinstance(program, Begin | Prefill | Decode | Fused):
        raise RuntimeError('no more streams')
      return run(worker, program, *arguments)

    monkeypatch.setattr(Worker, 'dispatch', dispatches)
    monkeypatch.setattr(Worker, 'run', runs)


def wait_for_what_follows(engine, refusing: Refusing, monkeypatch) -> None:
  """Let the loop learn of a refused step together with what steps behind it have brought."""
  collect = engine._mailbox.collect
  left = [2]

  def collects(until_s):
    if refusing.refused and left[0]:
      left[0] -= 1
      time.sleep(0.1)
    return collect(until_s)

  monkeypatch.setattr(engine._mailbox, 'collect', collects)


@pytest.mark.parametrize('split', POLICIES)
@pytest.mark.parametrize(
  ('length', 'which'),  # of two chunks, both are handed over before anyone knows of the first
  [(40, which) for which in STEPS] + [(30, which) for which in STEPS if 'middle' not in which],
)
@pytest.mark.parametrize('late', [False, True], ids=['at once', 'late'])
@pytest.mark.parametrize('faults', [FaultSpec(), ALL_FAIL], ids=['recompute', 'fail'])
def test_its_requests_begin_again_or_end_with_the_error_and_nothing_wrong_is_told(
  split, length, which, late, faults, monkeypatch
):
  ours = cluster(split).changed(faults=faults)
  refusing = Refusing(STEPS[which](), late=late)
  refusing.patch(monkeypatch)
  served = ours.serve(
    requests(length), POLICIES[split], prepare=lambda engine: wait_for_what_follows(engine, refusing, monkeypatch)
  )
  (order,) = refusing.refused
  (failed,) = [event for event in served.events if isinstance(event, Failed)]
  assert failed.order == order.id and failed.error == 'RuntimeError: no more streams'
  assert not any(isinstance(event, WorkerLost) for event in served.events)
  inside = set(order.requests)
  for request in served.requests:
    one, alone = served.by_id[request.id], answer(TINY, request)
    if faults is ALL_FAIL and request.id in inside:
      assert (one.finish_reason, one.error) == ('error', failed.error)
      assert one.token_ids == alone.tokens[: len(one.token_ids)]
      assert one.text == byte_tokenizer().decode(one.token_ids)
    else:
      assert (one.token_ids, one.finish_reason, one.text) == (alone.tokens, alone.reason, alone.text)
  if faults is ALL_FAIL:
    assert brought_after(served, failed, inside) == []


def brought_after(served: Served, failed: Failed, names: set[str]) -> list[tuple[str, tuple[int, ...]]]:
  """The tokens that steps brought requests after a failure was told."""
  after = served.events[served.events.index(failed) :]
  return [
    (result.request, result.tokens)
    for event in after
    if isinstance(event, Delivered)
    for result in event.results
    if result.request in names
  ]


@pytest.mark.parametrize('split', POLICIES)
def test_a_request_whose_steps_are_refused_for_ever_ends_and_the_others_are_exact(split, monkeypatch):
  refusing = Refusing(STEPS['the first chunk'](), times=100)
  refusing.patch(monkeypatch)
  served = cluster(split).serve(requests(), POLICIES[split])
  assert 1 <= len(refusing.refused) <= 3 * len(served.requests)
  ends = {name: one.finish_reason for name, one in served.by_id.items()}
  assert ends[VICTIM] == 'error' and served.by_id[VICTIM].token_ids == ()
  for request in served.requests:
    if ends[request.id] != 'error':
      assert served.tokens()[request.id] == generate(TINY, request)


@pytest.mark.parametrize('split', POLICIES)
def test_slots_that_cannot_be_cleared_lose_their_worker_before_anyone_writes_through_them(split, monkeypatch):
  ours = cluster(split)
  refusing = Refusing(STEPS['a later decode step']())
  refusing.patch(monkeypatch)
  monkeypatch.setattr(Worker, 'clear_slots', lambda worker, order: 1 / 0)
  served = ours.serve(requests(), POLICIES[split])
  (lost,) = [event for event in served.events if isinstance(event, WorkerLost)]
  assert lost.worker == refusing.refused[0].worker and lost.error.startswith('ZeroDivisionError')
  assert served.tokens() == {request.id: generate(TINY, request) for request in served.requests}


@pytest.mark.parametrize('split', POLICIES)
def test_any_step_may_be_refused_and_every_answer_is_exact(split, monkeypatch):
  rng = random.Random(7)
  ours = cluster(split).changed(faults=FaultSpec(max_attempts=100))
  for late in (False, True):
    Refusing(lambda order: rng.random() < 0.08, times=10**6, late=late).patch(monkeypatch)
  asked = []
  for number in range(60):
    options = {'n': rng.choice((1, 1, 2)), 'repetition_penalty': rng.choice((1.0, 1.3))}
    sampling = SamplingParams(max_tokens=rng.choice((1, 4, 10)), ignore_eos=True, **options)
    asked.append(Request(f'r{number}', prompt(rng.choice((1, 9, 17, 40)), number % 5), sampling, 0.01 * number))
  arrivals = Leaving(asked, rng, within_s=0.5)
  served = ours.serve((), POLICIES[split], arrivals=arrivals)
  ends = Counter(assert_right(served.events, arrivals.requests.values(), served.state, plain).values())
  assert set(ends) <= {'length', 'cancelled'} and ends['length'] > 0.7 * ends.total()
  assert sum(isinstance(event, Failed) for event in served.events) > 20


def plain(request: Request) -> tuple[int, ...]:
  longest = dataclasses.replace(request.sampling, max_tokens=10, n=1, seed=0)
  alone = dataclasses.replace(request, id='alone', arrival_s=0.0, sample_of=None, sampling=longest)
  return generate(TINY, alone)[0][: request.sampling.max_tokens]


def test_a_step_refused_in_another_process_is_begun_again_too(monkeypatch):
  processes = Processes.of(config('1P1D'))
  try:
    for which in ('the first chunk', 'a later decode step'):
      refusing = Refusing(STEPS[which]())
      with monkeypatch.context() as patched:
        refusing.patch(patched)
        served = processes.serve(requests())
      assert len(refusing.refused) == 1 and any(isinstance(event, Failed) for event in served.events)
      assert served.tokens() == {request.id: generate(TINY, request) for request in served.requests}
      ended = [event for event in served.events if isinstance(event, Finished)]
      assert len(ended) == len(served.requests)
  finally:
    processes.built.backend.close()
