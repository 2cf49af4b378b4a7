"""Calls are timed with inputs in turns, and a kernel that will not compile in time costs no other its figure."""

import concurrent.futures
import threading

import jax.numpy as jnp

from experiments.device_check import Sizes
from experiments.device_check.timing import Case, describe, median_s, prepare

TOY = Sizes.toy()


def test_inputs_are_taken_in_turns():
  numbers = []

  def call(number):
    numbers.append(number)
    return jnp.ones(3)

  assert median_s(call, TOY) > 0
  assert numbers == list(range(len(numbers))) and len(numbers) > TOY.groups


def test_what_fails_or_does_not_end_is_told_and_the_rest_is_there():
  end = threading.Event()

  def wait():
    end.wait()
    return lambda number: jnp.ones(1)

  def fail():
    raise NotImplementedError('no such kernel')

  cases = [Case('good', lambda: lambda number: jnp.ones(1)), Case('bad', fail), Case('slow', wait)]
  try:
    prepared = prepare(cases, limit_s=1.0, grace_s=0.1)
    assert prepared.compiling
  finally:
    end.set()
  assert list(prepared.calls) == ['good'] and list(prepared.late) == ['slow']
  assert describe(prepared.refused['bad']) == 'NotImplementedError: no such kernel'
  concurrent.futures.wait(prepared.late.values())
  assert not prepared.compiling


def test_what_is_being_compiled_when_time_is_up_is_waited_for():
  end = threading.Event()

  def wait():
    end.wait()
    return lambda number: jnp.ones(1)

  threading.Timer(0.5, end.set).start()
  prepared = prepare([Case('slow', wait)], limit_s=0.01, grace_s=60)
  assert list(prepared.calls) == ['slow'] and not prepared.late and not prepared.compiling
