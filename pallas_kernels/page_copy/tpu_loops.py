"""Loops and conditions in a kernel, without a value that is carried along."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl


def loop(start, stop, step: Callable[[Any], None]) -> None:
  """Take a step for each number from `start` on, before `stop`."""

  def body(i, carry):
    step(i)
    return carry

  jax.lax.fori_loop(start, stop, body, 0)


def when(condition: Any, do: Callable[[], None]) -> None:
  """`pl.when`, and nothing where the answer is known now."""
  if condition is True:
    do()
  elif condition is not False:
    pl.when(condition)(do)
