"""A kernel that answers wrongly, or leaves some of its answer unwritten, fails the check; one that refuses does not."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.device_check import Sizes, correct
from experiments.device_check.context import Context
from experiments.device_check.correct import Check
from experiments.device_check.figures import Figures, read_lines

X = np.arange(6.0, dtype=np.float32).reshape(2, 3)


def refuse(x):
  raise ValueError('not for this problem')


@pytest.mark.parametrize(
  ('call', 'failure'),
  [
    (lambda x: 2 * x, None),
    (lambda x: 2.1 * x, 'relative error is 0.05'),
    (lambda x: jnp.where(x > 4, jnp.nan, 2 * x), 'relative error is nan'),
    (lambda x: x @ x, 'TypeError'),
    (refuse, None),
  ],
)
def test_only_right_answers_pass(call, failure, tmp_path, monkeypatch):
  check = Check('twice', call, (X,), ((2.0 * X.astype(np.float64), 1e-5),))
  monkeypatch.setattr(correct, 'checks', lambda context, rng: [check])
  file = tmp_path / 'lines.jsonl'
  correct.run(Context('cpu', Sizes.toy(), Figures(str(file)), pathlib.Path(tmp_path)))
  found = read_lines(file)
  if failure is None:
    assert found['failures'] == [] and (found['rows'] or 'refused' in found['notes'][0])
  else:
    (told,) = found['failures']
    assert told.startswith('twice: ') and failure in told


def test_calls_that_are_one_program_are_compiled_once(tmp_path, monkeypatch, capsys):
  todo = [Check(name, lambda x: x + 1, (X,), ((X + 1.0, 1e-6),)) for name in ('a', 'b')]
  monkeypatch.setattr(correct, 'checks', lambda context, rng: todo)
  correct.run(Context('cpu', Sizes.toy(), Figures(str(tmp_path / 'lines.jsonl')), pathlib.Path(tmp_path)))
  assert '2 calls, 1 programs' in capsys.readouterr().out


def test_bits_that_are_to_be_kept_are_compared_as_bits(tmp_path, monkeypatch):
  kept = np.array([1.0, np.nan], np.float32)
  todo = [Check('kept', lambda x: x + 0, (kept,), ((kept, 0),)), Check('lost', lambda x: x + 1, (kept,), ((kept, 0),))]
  monkeypatch.setattr(correct, 'checks', lambda context, rng: todo)
  figures = Figures(str(tmp_path / 'lines.jsonl'))
  correct.run(Context('cpu', Sizes.toy(), figures, pathlib.Path(tmp_path)))
  assert [failure.split(':')[0] for failure in figures.failures] == ['lost']
