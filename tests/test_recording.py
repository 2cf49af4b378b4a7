"""A run that is broken off leaves its answers and a report, and goes on from there."""

import dataclasses
import json

import pytest

import pdjax
from pdjax.answers import Answers, read_answers
from pdjax.completions import complete
from pdjax.serving.events import Finished
from tests.tiny import config

SMALL = {'max_sequences': 2}


def test_a_run_is_broken_off_and_goes_on_from_python(tmp_path):
  output = pdjax.Uniform(1, 9)
  sampling = pdjax.SamplingParams(temperature=1.0)
  workload = pdjax.Poisson(
    requests_per_s=200, num_requests=8, prompt=pdjax.Fixed(6), output=output, sampling=sampling, seed=3
  )
  run = config(workload=workload, **SMALL)
  whole = {one.request.id: one.token_ids for one in pdjax.run(run).completions}
  ended = []

  def watch(event):
    if isinstance(event, Finished):
      ended.append(event.request)
      if len(ended) == 3:
        raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    pdjax.run(run, workdir=tmp_path / 'out', watch=watch)
  assert [row['id'] for row in read_answers(tmp_path / 'out' / 'answers.jsonl')] == ended
  report = json.loads((tmp_path / 'out' / 'report.json').read_text())
  assert report['completed'] == 3 and 'The run was broken off before its end (KeyboardInterrupt' in report['notes'][0]
  result = pdjax.run(run, workdir=tmp_path / 'out', resume=True)
  assert {one.request.id: one.token_ids for one in result.completions} == whole
  assert result.report.num_prompts == 5 and '3 answers were there before' in ' '.join(result.report.notes)
  assert (tmp_path / 'out' / 'before-1' / 'report.json').is_file()
  with pytest.raises(ValueError, match=r'config\.seed was 0 and is 1'):
    pdjax.run(dataclasses.replace(run, seed=1), workdir=tmp_path / 'out', resume=True)
  with pytest.raises(ValueError, match='resume goes with the folder of a run'):
    pdjax.run(run, resume=True)


@pytest.mark.parametrize('keep', [True, False])
@pytest.mark.parametrize('log', ['full', 'summary', 'off'])
def test_a_run_that_is_broken_off_leaves_answers_and_the_log_that_was_asked_for(tmp_path, keep, log):
  workload = pdjax.Poisson(requests_per_s=200, num_requests=8, prompt=pdjax.Fixed(6), output=pdjax.Uniform(1, 9))
  out, seen = tmp_path / 'out', []

  def watch(event):
    seen.append(event)
    if sum(isinstance(one, Finished) for one in seen) == 3:
      raise KeyboardInterrupt

  answers = Answers(has_text=False, path=tmp_path / 'answers.jsonl')
  with pytest.raises(KeyboardInterrupt):
    pdjax.simulate(
      config(workload=workload, **SMALL), workdir=out, watch=watch, answers=answers, log=log, keep_events=keep
    )
  ended = [event.request for event in seen if isinstance(event, Finished)]
  assert [row['id'] for row in read_answers(tmp_path / 'answers.jsonl')] == ended
  assert (out / 'events.jsonl').exists() == (log == 'full')
  assert (out / 'report.json').exists() == (out / 'report.html').exists() == (log != 'off')
  if log != 'off':
    report = json.loads((out / 'report.json').read_text())
    assert report['completed'] == 3 and 'The run was broken off' in report['notes'][0]
    assert report['finish_reasons']['unfinished'] > 0 and any(report['ttfts'])


@pytest.mark.parametrize('keep', [True, False])
def test_an_interruption_between_the_log_and_the_answers_loses_no_answer(tmp_path, monkeypatch, keep):
  workload = pdjax.Poisson(requests_per_s=200, num_requests=8, prompt=pdjax.Fixed(6), output=pdjax.Uniform(1, 9))
  ends, note = [], Answers.note

  def interrupted(answers, event):
    if isinstance(event, Finished):
      ends.append(event.request)
      if len(ends) == 3:
        monkeypatch.setattr(Answers, 'note', note)
        raise KeyboardInterrupt
    note(answers, event)

  monkeypatch.setattr(Answers, 'note', interrupted)
  answers = Answers(has_text=False)
  with pytest.raises(KeyboardInterrupt):
    pdjax.simulate(config(workload=workload, **SMALL), workdir=tmp_path, answers=answers, keep_events=keep)
  assert [one.request.id for one in answers.completions] == sorted(ends) and len(ends) == 3
  assert all(one.served and len(one.token_times_s) == len(one.token_ids) for one in answers.completions)


def test_completions_of_a_run_are_those_of_its_events_and_take_few_bytes():
  workload = pdjax.Poisson(requests_per_s=100, num_requests=60, prompt=pdjax.Fixed(6), output=pdjax.Uniform(1, 30))
  result = pdjax.simulate(config(workload=workload))
  assert result.completions == complete(result.events, has_text=False) and len(result.completions) == 60
  assert result.completions[-1] == list(result.completions)[-1] and result.completions[:2] == result.completions[0:2]
  assert set(map(len, (one.token_ids for one in result.completions))) != {1}
