"""The benchmark of text as it streams: its inputs are what it says, and late tokens ask for no more."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments import text_cases
from experiments.text_cases import EARLY, LATE, Case
from pdjax.engine.detokenize import Detokenizer, TextStream
from tests.calls import calls_of

ROOT = pathlib.Path(__file__).parents[2]
CASES = text_cases.cases()


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_a_late_token_asks_for_no_more_than_an_early_one(case: Case):
  detokenizer = Detokenizer(case.tokenizer)
  TextStream(detokenizer).take(case.tokens[:1000])  # what is kept for each token is made once
  stream = TextStream(detokenizer, case.stop)
  early = calls_of(stream.take, [(token,) for token in case.tokens[:EARLY]])
  assert stream.take(case.tokens[EARLY:-EARLY])[1] is None  # the stop strings never come
  assert calls_of(stream.take, [(token,) for token in case.tokens[-EARLY:]]) <= 1.1 * early


def test_the_inputs_are_what_they_are_called():
  texts = {case.name: case.tokenizer.decode(case.tokens) for case in CASES}
  assert len(CASES) == len(texts) and all(len(case.tokens) == LATE for case in CASES)
  for kind in ('byte level', 'byte fallback'):
    assert set(texts[f'{kind}, a lone byte']) == {'\ufffd'}
    assert texts[f'{kind}, a run of bytes'].startswith(text_cases.MANY_BYTES * 600)
  assert texts['byte level, prose'].startswith(text_cases.PROSE * 2)
  assert 'café owner in 東京 😀 said:' in texts['byte fallback, prose']
  assert texts['words, one without end'] == '##s' + 's' * (LATE - 1)
  assert texts['words, punctuation'].startswith('a. b, c! d? e. a.')
  assert set(texts['changed late, what almost matches']) == {' '}


def test_it_prints_every_case_and_writes_rows(tmp_path):
  figures = tmp_path / 'text.json'
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.bench_text', '--repeats=1', '--bar=1000', f'--json={figures}'],
    cwd=ROOT, env=os.environ | {'COLUMNS': '120'}, capture_output=True, text=True, timeout=120,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  rows = {one['name']: one for one in json.loads(figures.read_text())}
  for case in CASES:
    early, late = (rows[f'{case.name}, a token at {at}'] for at in (EARLY, LATE))
    assert early['unit'] == late['unit'] == 'us' and early['value'] > 0 and late['value'] > 0
    assert rows[f'{case.name}, late over early']['unit'] == 'ratio'
    assert case.answer in done.stdout
  assert 'The highest ratio is' in done.stdout
