"""The choice of a kernel is noted with every reason against another, and each reason but once."""

import logging

import pytest

from experiments.device_check.choices import note_choices
from experiments.device_check.figures import Figures, read_lines
from pallas_kernels import devices, dispatch

LOGGER = logging.getLogger('pallas_kernels')


@pytest.fixture
def figures(tmp_path):
  level, made = LOGGER.level, Figures(str(tmp_path / 'lines.jsonl'))
  handler = note_choices(made)
  yield made
  LOGGER.removeHandler(handler)
  LOGGER.setLevel(level)


def test_each_reason_is_noted_once(figures, tmp_path):
  def choose(context: int, refusal: str | None) -> None:
    tuned = dispatch.Tuned(print, dict, lambda device, facts: {}, lambda config, device, facts: refusal, ('cpu',))
    table = {'fast': tuned, 'xla': dispatch.Plain(print)}
    facts = {'context': context, 'batch': hash(tmp_path) % 997}
    dispatch.choose('of_this_test', table, None, facts, devices.current())

  for context, refusal in ((1, 'too long'), (2, 'too long'), (3, 'it was tried in vain'), (4, None), (5, None)):
    choose(context, refusal)
  told = [note.split(', ')[0] for note in read_lines(tmp_path / 'lines.jsonl')['notes']]
  assert told == ['of_this_test takes xla', 'of_this_test takes xla', 'of_this_test takes fast']
