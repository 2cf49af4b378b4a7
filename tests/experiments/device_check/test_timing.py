"""Calls are timed with inputs in turns, and a kernel that will not compile in time costs no other its figure."""

import dataclasses
import threading

import jax
import jax.numpy as jnp

from experiments.device_check import Sizes
from experiments.device_check.timing import COPY, PRODUCT, Case, Ceilings, measure_ceilings, median_s, prepare

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
    calls, refused, _ = prepare(cases, limit_s=1.0)
  finally:
    end.set()
  assert list(calls) == ['good']
  assert refused['bad'] == 'NotImplementedError: no such kernel' and 'not compiled within 1 s' in refused['slow']


def test_ceilings_are_those_of_the_rows_or_measured():
  found = Ceilings.of_rows({COPY: 2.0, PRODUCT: 3.0})
  assert (found.copy_bytes_per_s, found.flops_per_s) == (2e9, 3e12)
  measured = measure_ceilings(dataclasses.replace(TOY, copy_bytes=1 << 12))
  assert measured.copy_bytes_per_s > 0 and measured.flops_per_s > 0
  assert jax.devices()
