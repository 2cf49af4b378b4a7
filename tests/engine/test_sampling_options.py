"""Penalties, stop strings, log probabilities and samples, through the engine, against the plain loop."""

import dataclasses
import itertools

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from pdjax.engine.detokenize import Detokenizer
from pdjax.model.tokenizer import Tokenizer
from pdjax.policies import Colocated, Disaggregated
from pdjax.serving.events import Delivered, Done, Finished, Started, Withdrawn
from pdjax.serving.orders import StepOrder
from pdjax.types import Request, SamplingParams
from pdjax.workload.arrivals import Listed
from tests.engine.cluster import Cluster, live_pages
from tests.engine.conftest import build
from tests.engine.plain import answer
from tests.engine.test_replay import replay
from tests.tiny import TINY, byte_tokenizer, prompt

PENALTIES = ({'repetition_penalty': 1.5}, {'presence_penalty': 1.5, 'frequency_penalty': 0.6},
             {'repetition_penalty': 0.7, 'frequency_penalty': -0.5}, {})  # fmt: skip
DRAWS = ({}, {'temperature': 1.1}, {'temperature': 1.4, 'min_p': 0.2}, {'temperature': 1.2, 'top_k': 20, 'min_p': 0.1})


@pytest.fixture(scope='module')
def unequal() -> Cluster:
  """One prefill worker on two devices, one decode worker on one."""
  return build('1P1D', 2, 1)


@pytest.fixture(scope='module', params=['unequal', 'colocated'])
def cluster(request) -> Cluster:
  """Four sequences at once, or two on one worker that does both."""
  return request.getfixturevalue(request.param)


def requests(lengths=(1, 4, 17, 40), **options) -> list[Request]:
  """Every penalty with every way to draw, among requests that ask for nothing."""
  return [
    Request(f'{i}-{length}', prompt(length, seed=length), SamplingParams(12, seed=i, **penalty, **draw, **options))
    for i, (length, (penalty, draw)) in enumerate(
      zip(itertools.cycle(lengths), itertools.product(PENALTIES, DRAWS), strict=False)
    )
  ]


def assert_equal_to_plain(cluster: Cluster, asked, policy=None):
  served = cluster.serve(asked, policy)
  samples = [sample for request in asked for sample in request.samples()]
  assert [one.request for one in served.completions] == samples
  for one in served.completions:
    alone = answer(cluster.model, one.request)
    assert (one.token_ids, one.finish_reason, one.text) == (alone.tokens, alone.reason, alone.text), one.request.id
  return served


# ---------------------------------------------------------------------------- penalties


@pytest.mark.parametrize('steps', [1, 4])
def test_penalties_and_cuts_are_exact_in_one_batch(cluster, steps):
  """Prompts come in chunks of 16 tokens; a repetition penalty counts all of them at the first token."""
  asked = requests()
  policy = dataclasses.replace(cluster.config.policy, decode_steps=steps)
  assert_equal_to_plain(cluster, asked, policy)
  plain = [dataclasses.replace(one, sampling=SamplingParams(12, seed=one.sampling.seed)) for one in asked]
  assert sum(answer(TINY, a).tokens != answer(TINY, b).tokens for a, b in zip(asked, plain, strict=True)) > 8


def test_a_slot_forgets_the_penalties_of_its_last_sequence(cluster):
  heavy = requests()
  light = [Request(f'light{i}', prompt(9, seed=i), SamplingParams(8, presence_penalty=0.5)) for i in range(6)]
  assert_equal_to_plain(cluster, [*heavy[:8], *light])


# ---------------------------------------------------------------------------- stop strings


@pytest.mark.parametrize('steps', [1, 8])
def test_stop_strings_end_a_request_across_the_borders_of_tokens(cluster, steps):
  whole = Request('whole', prompt(9, seed=4), SamplingParams(20, ignore_eos=True))
  text = answer(TINY, whole).text
  stops = {'early': text[0], 'two': text[3:5], 'long': text[6:11], 'never': 'no such text', 'late': text[-2:]}
  asked = [whole] + [
    dataclasses.replace(whole, id=name, sampling=dataclasses.replace(whole.sampling, stop=(stop, 'zzzz')))
    for name, stop in stops.items()
  ]
  policy = dataclasses.replace(cluster.config.policy, decode_steps=steps)
  served = assert_equal_to_plain(cluster, asked, policy)
  two = served.by_id['two']
  assert two.finish_reason == 'stop' and two.text == text[: text.index(stops['two'])]
  assert len(two.token_ids) == len(two.text) + 2 < 20
  asked_for = delivered = 0
  for event in served.events:
    if isinstance(event, Started) and isinstance(event.order, StepOrder):
      order = event.order
      asked_for += sum(chunk.is_last for chunk in order.chunks)
    elif isinstance(event, Done) and event.decoded is not None:
      asked_for += event.decoded.tokens.size
    elif isinstance(event, Finished):
      delivered += len(event.tokens)
  assert served.report.wasted_tokens == asked_for - delivered >= (steps > 1)  # a slow host sees the end of one first


def test_text_is_sure_when_it_comes(one_and_one):
  tokenizer = byte_tokenizer()
  whole = Request('whole', prompt(9, seed=4), SamplingParams(20, ignore_eos=True))
  text = answer(TINY, whole).text
  held = dataclasses.replace(whole, id='held', sampling=dataclasses.replace(whole.sampling, stop=(text[2:6] + '\n',)))
  served = assert_equal_to_plain(one_and_one, [whole, held])
  for name in ('whole', 'held'):
    results = [
      one for event in served.events if isinstance(event, Delivered) for one in event.results if one.request == name
    ]
    sure, tokens = '', []
    for result in results:
      sure, tokens = sure + result.text, [*tokens, *result.tokens]
      assert tokenizer.decode(tokens).startswith(sure)
    assert sure == text
    assert ([result.text for result in results] == list(text)) == (name == 'whole')


def test_a_text_goes_on_from_its_prompt_on_every_worker(one_and_one, monkeypatch):
  """The decode worker, which is given the first token, knows the prompt as the prefill worker does."""
  backend = tokenizers.Tokenizer(models.WordLevel({f'▁{i}': i for i in range(TINY.vocab_size)}, unk_token='▁0'))
  backend.decoder = decoders.Metaspace()
  for worker in one_and_one.workers.values():
    monkeypatch.setattr(worker, '_detokenizer', Detokenizer(Tokenizer(backend)))
  asked = [Request('whole', prompt(9, seed=4), SamplingParams(6, ignore_eos=True)), Request('one', (7,))]
  served = one_and_one.serve(asked)
  for one in served.completions:
    assert len(one.token_ids) > 1 and one.text == ''.join(f' {token}' for token in one.token_ids)


# ---------------------------------------------------------------------------- log probabilities


def test_log_probabilities_are_the_models_own_whatever_else_is_asked_for(cluster):
  asked = requests(lengths=(4, 17), logprobs=5)[::3]
  asked += [dataclasses.replace(one, id=f'{one.id} {k}', sampling=dataclasses.replace(one.sampling, logprobs=k))
            for one in asked[:2] for k in (None, 0, 20)]  # fmt: skip
  served = assert_equal_to_plain(cluster, asked, dataclasses.replace(cluster.config.policy, decode_steps=4))
  for one in served.completions:
    most, expected = one.request.sampling.logprobs, answer(TINY, one.request).logprobs
    assert len(one.logprobs) == (0 if most is None else len(one.token_ids))
    for told, token, row in zip(one.logprobs, one.token_ids, expected, strict=False):
      assert abs(told.logprob - row[token]) < 1e-4
      assert [token for token, _ in told.top] == np.argsort(-row, kind='stable')[:most].tolist()
      np.testing.assert_allclose([value for _, value in told.top], np.sort(row)[::-1][:most], atol=1e-4)


# ---------------------------------------------------------------------------- samples


def sampled(n: int, lengths=(1, 3, 4, 8, 17, 40), **options) -> list[Request]:
  options = {'max_tokens': 7, 'temperature': 1.3} | options
  return [Request(f'r{i}', prompt(length, seed=i), SamplingParams(n=n, seed=i, **options))
          for i, length in enumerate(lengths)]  # fmt: skip


@pytest.mark.parametrize('name, n', [('unequal', 4), ('unequal', 3), ('colocated', 2), ('two_and_two', 3)])
def test_samples_are_those_of_as_many_requests(name, n, request):
  cluster = request.getfixturevalue(name)
  asked = [*sampled(n), *(dataclasses.replace(one, id=f'{one.id} alone') for one in sampled(1, lengths=(5, 9)))]
  served = assert_equal_to_plain(cluster, asked)
  assert len({one.token_ids for one in served.completions}) > 4 * n
  moved = {order.request: 0 for order, _ in served.transfers()}
  for order, _ in served.transfers():
    moved[order.request] += len(order.span.source_pages)
  if name != 'colocated':
    carried = {one.removesuffix('#1'): pages for one, pages in moved.items()}
    assert carried == {one.id: live_pages(one, cluster.config.page_size) for one in asked}
  assert served.report.account.ttft_closes_s < 1e-6 and served.report.account.handoff_closes_s < 1e-6
  assert replay(cluster, served, served.events) == served.events


def test_samples_with_everything_at_once(cluster):
  n = 2
  asked = [
    dataclasses.replace(one, sampling=dataclasses.replace(one.sampling, n=n, logprobs=2, stop=('e', 'st')))
    for one in requests()
  ]
  served = assert_equal_to_plain(cluster, asked, dataclasses.replace(cluster.config.policy, decode_steps=3))
  assert {one.finish_reason for one in served.completions} == {'stop', 'length'}
  assert all(len(one.logprobs) == len(one.token_ids) for one in served.completions)


def test_greedy_samples_are_equal_and_one_token_each_is_enough(cluster):
  served = assert_equal_to_plain(cluster, [*sampled(2, temperature=0), *[
    dataclasses.replace(one, id=f'{one.id} short') for one in sampled(2, max_tokens=1)
  ]])  # fmt: skip
  for one in served.completions:
    if one.request.sampling.temperature == 0:
      assert one.token_ids == served.by_id[one.request.id.removesuffix('#1')].token_ids
    else:
      assert len(one.token_ids) == 1


def test_the_first_may_stop_at_once_while_the_others_go_on(unequal, colocated):
  for cluster in (unequal, colocated):
    asked = []
    for one in sampled(2, lengths=(4, 9, 17)):
      first, second = (answer(TINY, sample).tokens for sample in one.samples())
      stop = first[0]
      assert stop not in second
      asked.append(dataclasses.replace(one, sampling=dataclasses.replace(one.sampling, stop_token_ids=(stop,))))
    served = assert_equal_to_plain(cluster, asked)
    assert [len(one.token_ids) for one in served.completions] == [1, 7] * 3


class WithdrawnAfter(Listed):
  """Requests, some of which are withdrawn as soon as one of them has ended."""

  def __init__(self, requests, after: str, names):
    super().__init__(requests)
    self._after, self._names = after, names

  @property
  def closed(self) -> bool:
    return super().closed and not self._names

  def due(self, now_s, finished=()):
    events = super().due(now_s, finished)
    if any(end.request == self._after for end in finished):
      events += [Withdrawn(name) for name in self._names]
      self._names = ()
    return events


@pytest.mark.parametrize('names, gone', [(('r0',), {'r0', 'r0#1'}), (('r0#1',), {'r0#1'})])
def test_withdrawing_a_request_or_a_sample(cluster, names, gone):
  short = Request('short', prompt(4), SamplingParams(2))
  (long,) = sampled(2, lengths=(9,), max_tokens=40, ignore_eos=True)
  served = cluster.serve([short, long], arrivals=WithdrawnAfter([short, long], 'short', names))
  assert {name for name, one in served.by_id.items() if one.finish_reason == 'cancelled'} == gone
  for name, one in served.by_id.items():
    tokens = answer(TINY, one.request).tokens
    assert one.token_ids == tokens[: len(one.token_ids)]
    assert name in gone or one.token_ids == tokens


def test_policies_know_nothing_of_samples(one_and_one, colocated):
  class ShortestFirst(Disaggregated):
    def waiting_key(self, request):
      return (request.prompt_len,)

  assert_equal_to_plain(one_and_one, sampled(2), ShortestFirst(max_prefill_tokens=9))
  assert_equal_to_plain(colocated, sampled(2), Colocated(token_budget=8, decode_steps=3))
