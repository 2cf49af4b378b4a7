"""A run that is broken off leaves its answers and a report, and goes on from there."""

import dataclasses
import json

import pytest

import pdjax
from pdjax.answers import read_answers
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
