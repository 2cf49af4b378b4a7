"""The README is true: its Python blocks run one after another, on a tiny model with words."""

import dataclasses
import pathlib
import re

import pytest
import tokenizers

from pdjax import launch
from pdjax.model.checkpoint import RandomCheckpoint
from pdjax.model.tokenizer import Tokenizer
from pdjax.opened_model import OpenedModel
from tests.tiny import TINY

README = pathlib.Path(__file__).parents[1] / 'README.md'


class Wordy(RandomCheckpoint):
  """Random weights, and a tokenizer that knows a few words."""

  def tokenizer(self) -> Tokenizer:
    words = ['<unk>', '<end>', *(f'word{i}' for i in range(TINY.vocab_size - 2))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token='<unk>')
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return Tokenizer(backend)


@pytest.mark.slow
def test_the_python_of_the_readme_runs(monkeypatch, capsys):
  model = dataclasses.replace(TINY, context_len=256)
  checkpoint = Wordy(model)
  opened = OpenedModel(model, checkpoint, checkpoint.tokenizer())
  monkeypatch.setattr(launch, 'open_model', lambda config: opened)
  blocks = re.findall(r'```python\n(.*?)```', README.read_text(encoding='utf-8'), re.DOTALL)
  assert len(blocks) == 2
  assert 8 <= len(blocks[0].strip().splitlines()) <= 14
  # The tiny model's six heads are not cut by three; and fewer programs are compiled.
  smaller = {'tp=3': 'tp=2, max_sequences=2', 'prefill_pool(1': 'prefill_pool(1, max_step_tokens=32'}
  names: dict = {'__name__': 'readme'}
  for block in blocks:
    for ours, tiny in smaller.items():
      block = block.replace(ours, tiny)
    exec(compile(block, 'README.md', 'exec'), names)
  printed = capsys.readouterr().out
  assert printed.count('TTFT') >= 3
  assert names['result'].report.completed == 8
  assert names['result'].completions[0].text


@pytest.mark.parametrize('target', ['demo', 'test'])
def test_the_commands_of_the_first_screen_exist(target):
  first_screen = README.read_text(encoding='utf-8').splitlines()[:12]
  assert any(line.startswith(f'    make {target}') for line in first_screen)
  assert re.search(rf'^{target}:', (README.parent / 'Makefile').read_text(), re.MULTILINE)
