"""A kernel that answers wrongly, or leaves some of its answer unwritten, fails the check; so does one that should run.

Only what is asked for by name may refuse, and only by saying that it cannot run.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.device_check import Sizes, correct, large
from experiments.device_check.context import Context
from experiments.device_check.correct import Check, check_all
from experiments.device_check.figures import Figures, read_lines
from pallas_kernels.dispatch import Refused

X = np.arange(6.0, dtype=np.float32).reshape(2, 3)


def context(folder: pathlib.Path) -> Context:
  return Context('cpu', Sizes.toy(), Figures(str(folder / 'lines.jsonl')), folder, toy=True)


def refuse(error: Exception):
  def call(x):
    raise error

  return call


@pytest.mark.parametrize(
  ('call', 'failure'),
  [
    (lambda x: 2 * x, None),
    (lambda x: 2.1 * x, 'relative error is 0.05'),
    (lambda x: jnp.where(x > 4, jnp.nan, 2 * x), 'relative error is nan'),
    (lambda x: x @ x, 'TypeError'),
    (refuse(Refused('a kernel cannot run on this')), 'cannot run on'),
    (refuse(ValueError('not for this problem')), 'not for this problem'),
  ],
)
def test_only_right_answers_pass_where_a_kernel_is_taken_by_itself(call, failure, tmp_path):
  check_all(context(tmp_path), [Check('twice', call, (X,), ((2.0 * X.astype(np.float64), 1e-5),))])
  found = read_lines(tmp_path / 'lines.jsonl')
  if failure is None:
    assert found['failures'] == [] and found['rows']
  else:
    (told,) = found['failures']
    assert told.startswith('twice: ') and failure in told


@pytest.mark.parametrize(
  ('said', 'failures'),
  [
    (Refused('a kernel cannot run on this as asked for. It is for others.'), 0),
    (Refused('a kernel cannot run on this as asked for. It was tried, and its result differs.'), 1),
    (ValueError('q has no such shape'), 2),
    (ValueError('a library cannot run on this either'), 2),
  ],
)
def test_what_is_asked_for_by_name_may_say_that_it_cannot_run_but_not_that_it_was_tried_in_vain(
  said, failures, tmp_path
):
  todo = [Check(name, refuse(said), (X,), ((X, 1e-5),), may_refuse=True) for name in ('a', 'b')]
  check_all(context(tmp_path), todo)
  found = read_lines(tmp_path / 'lines.jsonl')
  assert len(found['failures']) == failures
  assert sum('refused' in note for note in found['notes']) == (0 if failures == 2 else 2)


def test_automatic_choices_must_answer_and_others_may_refuse(tmp_path):
  todo = correct.checks(context(tmp_path), np.random.default_rng(0))
  assert {check.may_refuse for check in todo} == {True, False}
  assert all(check.may_refuse == (' automatic, ' not in check.name) for check in todo)


def test_what_is_measured_is_checked_in_its_kind(tmp_path):
  """One chunk alone, whole and behind a prefix; a packed chunk of several blocks; contexts of several turns."""
  names = [check.name for check in correct.checks(context(tmp_path), np.random.default_rng(0))]
  for words in ('lse, one chunk', 'lse, one chunk behind a prefix', 'lse, long'):
    assert any(name.startswith('prefill automatic') and name.endswith(words) for name in names)
  assert any(name.startswith('decode automatic') and name.endswith('lse, long') for name in names)
  assert max(new for new, _ in correct.CHUNKS) > 256 and len(correct.CHUNKS) > 1
  assert max(map(sum, correct.ALONE['long'])) > 2048 and max(correct.LONG_LENGTHS) > 2048
  assert [len(chunks) for chunks in correct.ALONE.values()][:2] == [1, 1]


def test_all_results_are_poisoned_at_once(monkeypatch):
  """A buffer given back before the next is made would be made again in the same place."""
  alive, most = [], []
  put = jax.device_put

  def watched(value, *arguments, **options):
    array = put(value, *arguments, **options)
    if isinstance(value, np.ndarray) and np.isnan(value).all():
      alive.append(array)
      most.append(sum(not one.is_deleted() for one in alive))
    return array

  call = jax.jit(lambda x: (x, 2 * x, 3 * x)).lower(X).compile()
  monkeypatch.setattr(jax, 'device_put', watched)
  correct._run_poisoned(call, (X,))
  assert most == [1, 2, 3] and all(array.is_deleted() for array in alive)


def test_the_seed_is_told_and_the_same_seed_is_the_same_inputs(tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(correct, 'checks', lambda context, rng: seen.append(rng.standard_normal()) or [])
  monkeypatch.setattr(large, 'run', lambda context: None)
  correct.run(context(tmp_path))
  (note,) = read_lines(tmp_path / 'lines.jsonl')['notes']
  correct.run(dataclasses.replace(context(tmp_path), seed=int(note.rpartition('=')[2])))
  correct.run(context(tmp_path))
  assert seen[0] == seen[1] != seen[2]


def test_calls_that_are_one_program_are_compiled_once(tmp_path, capsys):
  check_all(context(tmp_path), [Check(name, lambda x: x + 1, (X,), ((X + 1.0, 1e-6),)) for name in ('a', 'b')])
  assert '2 calls, 1 programs' in capsys.readouterr().out


def test_bits_that_are_to_be_kept_are_compared_as_bits(tmp_path):
  kept = np.array([1.0, np.nan], np.float32)
  todo = [Check('kept', lambda x: x + 0, (kept,), ((kept, 0),)), Check('lost', lambda x: x + 1, (kept,), ((kept, 0),))]
  check_all(context(tmp_path), todo)
  assert [failure.split(':')[0] for failure in read_lines(tmp_path / 'lines.jsonl')['failures']] == ['lost']
