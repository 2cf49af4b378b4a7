"""Chained calls are all made, on inputs of their own; what cannot be timed is told, and fails where it must."""

import pathlib
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.device_check import Sizes, kernels
from experiments.device_check.bounds import COPY, PRODUCT, READ, START, Ceilings
from experiments.device_check.context import Context
from experiments.device_check.figures import Figures, read_lines
from experiments.device_check.kernels import (
  CUDNN,
  LAUNCH_BOUND,
  WHILE_COMPILING,
  Pool,
  add_rate,
  calls_of,
  chained,
  time_all,
)
from experiments.device_check.timing import Case

CEILINGS = Ceilings.of_rows({COPY: 2.0, READ: 4.0, PRODUCT: 3.0, START: 10.0})


@pytest.fixture
def context(tmp_path) -> Context:
  made = Context('cpu', Sizes.toy(), Figures(str(tmp_path / 'lines.jsonl')), pathlib.Path(tmp_path))
  made.__dict__['ceilings'] = CEILINGS
  return made


def found(context: Context) -> dict:
  return read_lines(context.folder / 'lines.jsonl')


def test_chained_calls_take_keys_in_turns_and_each_depends_on_the_one_before():
  call = chained(lambda q, own, add: q * own + add, [jnp.float32(1)], list(map(jnp.float32, (2, 3, 5))), (1,), 2)
  assert [float(call(number)) for number in range(3)] == [(1 * 2 + 1) * 3 + 1, (1 * 5 + 1) * 2 + 1, (1 * 2 + 1) * 3 + 1]


def test_short_calls_share_a_program_up_to_a_few(context):
  assert calls_of(context, 1.0) == 1 and calls_of(context, 20e-6) == 1
  assert calls_of(context, 19e-6) == 2 and calls_of(context, 1e-9) == context.sizes.chained_calls


def test_a_pool_names_no_page_twice_in_a_table_and_says_what_it_does_not_hold(context):
  pool = Pool(jnp.zeros((9, 2, 2, 16, 16)), 16, np.arange(9))
  assert pool.holds([72, 64]) and not pool.holds([72, 81])
  for table in pool.tables(context, [72, 64]):
    assert len(set(np.asarray(table).ravel().tolist())) == 9
  assert len(pool.tables(context, [144])) == 1


@pytest.mark.parametrize('needed', [True, False])
def test_what_is_needed_and_not_measured_is_a_failure(context, needed, monkeypatch):
  end = threading.Event()
  prepare = kernels.prepare
  monkeypatch.setattr(kernels, 'prepare', lambda cases, limit_s: prepare(cases, 0.5, grace_s=0.1))

  def late():
    end.wait()
    return lambda number: jnp.ones(1)

  def refused():
    raise ValueError('no such kernel')

  def broken():
    called = []

    def call(number):
      called.append(number)
      if len(called) > 1:
        raise RuntimeError('no more memory')
      return jnp.ones(1)

    return call

  cases = [Case(name, make, needed=needed) for name, make in (('r', refused), ('b', broken), ('l', late))]
  cases.append(Case('good', lambda: lambda number: jnp.ones(1), calls=2))
  try:
    time_all(context, cases, lambda case, seconds, found: context.figures.add(case.name, seconds, 's'))
  finally:
    end.set()
  told = found(context)
  (row,) = told['rows']
  assert row['name'] == 'good' and WHILE_COMPILING in row['note'] and '2 calls a program' in row['note']
  if needed:
    assert [text[0] for text in told['failures']] == ['r', 'b', 'l'] and not told['given_up']
  else:
    assert not told['failures'] and [text[0] for text in told['given_up']] == ['b', 'l']
    assert told['notes'] == ['r: not measured, ValueError: no such kernel']


def test_programs_that_are_shorter_than_two_starts_are_marked(context, monkeypatch):
  monkeypatch.setattr(kernels, 'median_s', lambda call, sizes: call(0))
  cases = [Case(name, lambda value=value: lambda number: value) for name, value in (('short', 19e-6), ('long', 20e-6))]
  time_all(context, cases, lambda case, seconds, found: context.figures.add(case.name, seconds, 's'))
  assert [row.get('note') for row in found(context)['rows']] == [LAUNCH_BOUND, None]


def test_a_rate_stands_beside_that_of_cudnn_at_its_shape_and_cudnn_beside_nothing(context):
  seconds = {f'a shape, {CUDNN}': 4e-9, 'another shape': 1.0}
  for name, took in (('a shape, page 16, xla', 8e-9), (f'a shape, {CUDNN}', 4e-9)):
    add_rate(context, Case(name, lambda: print, None), took, seconds, 'a shape', 8, 'GB/s', floor_share=2e9)
  ours, peer = found(context)['rows']
  assert (ours['peer'], peer['peer'], peer['peer_value']) == (CUDNN, None, None)
  assert [ours['value'], ours['peer_value'], ours['floor_share']] == pytest.approx([1.0, 2.0, 0.5])
  assert [peer['value'], peer['floor_share']] == pytest.approx([2.0, 1.0])
