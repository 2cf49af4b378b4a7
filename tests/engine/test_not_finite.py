"""A request whose numbers are not finite is served, logged and told like any other, and changes no other's answer."""

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest

import pdjax
from pdjax import launch
from pdjax.launch import OpenedModel
from pdjax.model.checkpoint import RandomCheckpoint
from pdjax.serving.messages import Turn
from pdjax.types import SLO, Request, SamplingParams
from pdjax.workload import Given
from tests.full_disk import FullDisk
from tests.tiny import TINY, byte_tokenizer, config, prompt

POISON = 90  # the token whose embedding is not finite


class Poisoned:
  """Random weights in which one token's embedding is a value that spreads over all logits."""

  def __init__(self, value: float):
    self._checkpoint, self._value = RandomCheckpoint(TINY), value

  def __getattr__(self, name):
    return getattr(self._checkpoint, name)

  def tensor(self, name: str) -> np.ndarray:
    tensor = np.array(self._checkpoint.tensor(name))
    if name == 'embed':
      tensor[POISON] = self._value
    return tensor


def opened(value: float) -> OpenedModel:
  return OpenedModel(TINY, Poisoned(value), byte_tokenizer())


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


def test_everyone_is_answered(served):
  result, _ = served
  assert [one.finish_reason for one in result.completions] == ['length'] * 9
  told = {one.request.id: [each.logprob for each in one.logprobs] for one in result.completions}
  for number in range(9):
    assert any(math.isnan(one) for one in told[f'r{number}']) == (number % 3 == 1)


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
  assert any('"NaN"' in line for line in lines)
  assert sum(event['event'] == 'Finished' for event in events) == 9
  for name in ('report.json', 'trace.json'):
    json.loads((folder / name).read_text(), parse_constant=pytest.fail)
  assert json.loads((folder / 'report.json').read_text())['slo'] == {'ttft_ms': None, 'tpot_ms': None, 'e2el_ms': None}


def test_a_session_with_a_work_directory_goes_on(tmp_path):
  deployment = launch.deploy(config(), opened(math.nan))
  with pdjax.Session(deployment, workdir=tmp_path) as session:
    streams = [session.submit(dataclasses.replace(one, slo=SLO(ttft_ms=math.inf))) for one in asked()]
    assert [stream.result(60).finish_reason for stream in streams] == ['length'] * 9
  assert (tmp_path / 'report.json').is_file()


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
  for event in whole.events[: kept.count('\n') + 1]:  # up to the first that is not in it
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
  assert (tmp_path / 'events.jsonl').read_text() == '{"event": "Turn", "now_s": 0.0}\n'
