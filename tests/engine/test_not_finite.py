"""A request whose logits are not finite ends with an error that says so, and changes no other's answer."""

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest

import pdjax
from pdjax import launch
from pdjax.deployment import deploy
from pdjax.metrics.event_log import read_events
from pdjax.model.checkpoint import RandomCheckpoint
from pdjax.opened_model import OpenedModel
from pdjax.policies import Colocated, Disaggregated
from pdjax.serving.events import Delivered, Turn
from pdjax.types import SLO, Request, SamplingParams
from pdjax.workload import Given
from tests.engine.plain import generate
from tests.full_disk import FullDisk
from tests.tiny import TINY, byte_tokenizer, config, prompt

POISON = 90  # the token whose embedding is not finite


class Poisoned:
  """Random weights in which a row of a matrix, by default a token's embedding, is a value that spreads over logits."""

  def __init__(self, value: float, row: int = POISON, name: str = 'embed'):
    self._checkpoint, self._value, self._row, self._name = RandomCheckpoint(TINY), value, row, name

  def __getattr__(self, name):
    return getattr(self._checkpoint, name)

  def tensor(self, name: str) -> np.ndarray:
    tensor = np.array(self._checkpoint.tensor(name))
    if name == self._name:
      tensor[self._row] = self._value
    return tensor


def opened(value: float, *where) -> OpenedModel:
  return OpenedModel(TINY, Poisoned(value, *where), byte_tokenizer())


def asked() -> list[Request]:
  """Healthy requests before, beside and after poisoned ones, which leave their pages behind."""
  sampling = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=2, seed=1)
  requests = []
  for number in range(9):
    tokens = tuple(token for token in prompt(5 + number, seed=number) if token != POISON)
    if number % 3 == 1:
      tokens = (*tokens[:3], POISON, *tokens[3:])
    penalty = {'repetition_penalty': 1.1} if number > 6 else {'temperature': float(number % 2)}
    requests.append(Request(f'r{number}', tokens, dataclasses.replace(sampling, **penalty), 0.02 * number))
  return requests


@pytest.fixture(scope='module', params=['nan', 'inf'])
def served(request, tmp_path_factory) -> tuple[pdjax.RunResult, pathlib.Path]:
  folder = tmp_path_factory.mktemp('out')
  small = dataclasses.replace(config(num_pages=16, workload=Given(asked())), slo=SLO(ttft_ms=math.inf))
  return launch.run(small, workdir=folder, opened=opened(float(request.param))), folder


def test_who_it_concerns_is_told_why_and_gets_nothing(served):
  result, _ = served
  for number, one in enumerate(result.completions):
    if number % 3 == 1:
      assert (one.finish_reason, one.token_ids, one.text, one.logprobs) == ('error', (), '', ())
      assert "worker 'prefill0' computed logits that are not finite (NaN or infinite)" in one.error
    else:
      assert (one.finish_reason, one.error, len(one.token_ids)) == ('length', None, 6)
      assert all(math.isfinite(each.logprob) for each in one.logprobs)
  assert any('not finite' in note for note in result.report.notes)


def test_the_others_get_what_they_get_without_it(served):
  result, _ = served
  healthy = [one for number, one in enumerate(asked()) if number % 3 != 1]
  alone = launch.run(config(workload=Given(healthy)), opened=opened(0.0))
  got, expected = ({one.request.id: (one.token_ids, one.text) for one in run.completions} for run in (result, alone))
  assert {name: got[name] for name in expected} == expected


def test_every_file_is_strict_json(served):
  _, folder = served
  lines = (folder / 'events.jsonl').read_text().splitlines()
  events = [json.loads(line, parse_constant=pytest.fail) for line in lines]
  assert not any('"NaN"' in line for line in lines)
  assert sum(event['event'] == 'Finished' for event in events) == 9
  for name in ('report.json', 'trace.json'):
    json.loads((folder / name).read_text(), parse_constant=pytest.fail)
  assert json.loads((folder / 'report.json').read_text())['slo'] == {'ttft_ms': None, 'tpot_ms': None, 'e2el_ms': None}


def test_a_session_with_a_work_directory_goes_on(tmp_path):
  deployment = deploy(config(), opened(math.nan))
  with pdjax.Session(deployment, workdir=tmp_path) as session:
    streams = [session.submit(dataclasses.replace(one, slo=SLO(ttft_ms=math.inf))) for one in asked()]
    reasons = [stream.result(60).finish_reason for stream in streams]
    assert reasons == ['error' if number % 3 == 1 else 'length' for number in range(9)]
    with pytest.raises(pdjax.RequestError, match="'error': worker 'prefill0' computed logits that are not finite"):
      list(streams[1])
  assert (tmp_path / 'report.json').is_file()


# ---------------------------------------------------------------------------- later in the answer


def answering(value: int, sampling: SamplingParams) -> tuple[Request, tuple[int, ...]]:
  """A request, and the tokens that it gets if the embedding of the token at that place of its answer is not finite."""
  for seed in range(100):
    request = Request('one', prompt(9, seed), sampling)
    tokens, _ = generate(TINY, request)
    if tokens[value] not in (*request.prompt, *tokens[:value]):
      return request, tokens[: value + 1]
  raise AssertionError('no such prompt')


@pytest.mark.parametrize(
  ('split', 'policy'),
  [
    ('1P1D', Disaggregated(max_prefill_tokens=16, decode_steps=4)),
    ('1P1D', Disaggregated(max_prefill_tokens=16)),
    ('1C', Colocated(token_budget=16)),
  ],
  ids=['four tokens a step', 'one token a step', 'beside chunks'],
)
@pytest.mark.parametrize('place', [0, 1, 2])  # of the last token that there is
def test_the_tokens_before_it_are_delivered_and_none_after(split, policy, place):
  sampling = SamplingParams(max_tokens=8, temperature=0.7, seed=3, repetition_penalty=1.1, ignore_eos=True, logprobs=1)
  request, expected = answering(place, sampling)
  others = [one for one in asked() if expected[-1] not in one.prompt]
  others = [dataclasses.replace(one, arrival_s=0.0) for one in others if expected[-1] not in generate(TINY, one)[0]]
  run = dataclasses.replace(config(split), policy=policy, workload=Given([request, *others]))
  result = launch.run(run, opened=opened(math.nan, expected[-1]))
  (one,) = [one for one in result.completions if one.request.id == 'one']
  assert (one.token_ids, one.finish_reason) == (expected, 'error')
  assert 'not finite' in one.error and one.text == byte_tokenizer().decode(expected)
  assert len(one.logprobs) == len(one.token_ids)
  told = [each.tokens for event in result.events if isinstance(event, Delivered) for each in event.results
          if each.request == 'one']  # fmt: skip
  assert sum(told, ()) == expected
  healthy = {each.request.id: each.token_ids for each in result.completions if each is not one}
  assert healthy == {each.id: generate(TINY, each)[0] for each in others} and len(healthy) > 2


@pytest.mark.parametrize('end', [{'stop_token_ids': 'last'}, {'max_tokens': 2}], ids=['a stop token', 'the last token'])
def test_who_has_all_its_tokens_by_then_has_no_error(end):
  request, expected = answering(1, SamplingParams(max_tokens=8, ignore_eos=True))
  end = {name: (expected[-1],) if value == 'last' else value for name, value in end.items()}
  request = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, **end))
  run = dataclasses.replace(config(workload=Given([request])), policy=Disaggregated(decode_steps=4))
  (one,) = launch.run(run, opened=opened(math.nan, expected[-1])).completions
  assert (one.token_ids, one.finish_reason, one.error) == (*generate(TINY, request), None)


@pytest.mark.parametrize('split', ['1P1D', '1C'])
def test_weights_that_are_nan_serve_nobody_and_the_report_says_why(split):
  requests = [Request(f'r{i}', prompt(5 + i, i), SamplingParams(max_tokens=4, n=1 + i)) for i in range(3)]
  result = launch.run(config(split, workload=Given(requests)), opened=opened(math.nan, 3, 'layers.1.down'))
  assert len(result.completions) == 6
  assert all(one.finish_reason == 'error' and 'not finite' in one.error for one in result.completions)
  assert (result.report.completed, result.report.failed) == (0, 6)
  assert any('No request completed' in note for note in result.report.notes)


@pytest.mark.parametrize('share', [0.0, 0.3, 1.0])
def test_a_log_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch, share):
  whole = launch.simulate(config(), workdir=tmp_path / 'whole')
  text = (tmp_path / 'whole' / 'events.jsonl').read_text()
  with monkeypatch.context() as patched:
    FullDisk(patched, 'events.jsonl', int(share * len(text)))
    result = launch.simulate(config(), workdir=tmp_path / 'full')
  assert result.events == whole.events
  notes = [note for note in result.report.notes if 'ends early' in note]
  kept = (tmp_path / 'full' / 'events.jsonl').read_text()
  assert text.startswith(kept) and kept[-1:] in ('', '\n') and len(kept) >= int(share * len(text)) - 4096
  if share == 1.0:
    assert notes == [] and kept == text
    return
  now_s = 0.0
  for event in whole.events[: kept.count('\n')]:  # behind the format's line, up to the first that lacks
    now_s = event.now_s if isinstance(event, Turn) else now_s
  (note,) = notes
  assert f'nothing from {now_s:.3f} s on' in note and 'No space left on device' in note
  assert str(tmp_path / 'full' / 'events.jsonl') in note
  assert list(json.loads((tmp_path / 'full' / 'report.json').read_text())['notes']).count(note) == 1


def test_an_event_of_nobodys_kind_ends_no_log(tmp_path):
  class Unreadable:
    def __str__(self):
      raise RuntimeError('nothing to tell')

  with pdjax.metrics.EventLog(tmp_path / 'events.jsonl') as log:
    for event in (Turn(0.0), Turn(Unreadable()), Turn(1.0)):
      log.append(event)
  assert len(log) == 3 and 'nothing to tell' in log.notes[0]
  assert list(read_events(tmp_path / 'events.jsonl')) == [{'event': 'Turn', 'now_s': 0.0}]
