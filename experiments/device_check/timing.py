"""Times of calls on a device: back to back, with inputs that no cache holds, and compiled side by side."""

import concurrent.futures
import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from experiments.device_check.sizes import Sizes

_MOST_CALLS = 256
_LONG_S = 0.5  # of a group, of which three are enough
_MOST_KEPT_BYTES = 4 << 30  # of the results of a group, all of which are kept until it ends


def median_s(call: Callable[[int], Any], sizes: Sizes) -> float:
  """Seconds of one call, the median of groups of calls that are started back to back and waited for once.

  Starting a call is so hidden behind the one before, unless it takes longer than the call does.

  Args:
    call: Starts the call with the inputs of that number, which it counts modulo what it has, and returns its result.
    sizes: The number of groups, and their length.
  """
  result = jax.block_until_ready(call(0))
  kept_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(result))
  del result
  begin = time.perf_counter()
  jax.block_until_ready([call(1), call(2)])
  one_s = (time.perf_counter() - begin) / 2
  most = max(1, min(_MOST_CALLS, _MOST_KEPT_BYTES // max(kept_bytes, 1)))
  count = min(most, max(2, math.ceil(sizes.group_s / max(one_s, 1e-7))))
  seconds, number = [], 3
  for _ in range(sizes.groups if count * one_s < _LONG_S else min(sizes.groups, 3)):
    begin = time.perf_counter()
    jax.block_until_ready([call(number + index) for index in range(count)])
    seconds.append((time.perf_counter() - begin) / count)
    number += count
  return statistics.median(seconds)


@dataclasses.dataclass(frozen=True)
class Case:
  """Something to time.

  Attributes:
    name: The name of its figure.
    make: Draws its inputs and returns a function that starts it with those of a number.
    about: For whoever made the case.
    calls: Timed calls that one start makes.
    needed: Whether the part has failed if it cannot be timed.
  """

  name: str
  make: Callable[[], Callable[[int], Any]]
  about: Any = None
  calls: int = 1
  needed: bool = False


@dataclasses.dataclass(frozen=True)
class Prepared:
  """Cases that were prepared, by their names.

  Attributes:
    calls: The function that starts each.
    refused: The errors of those that cannot start.
    late: Cases that were given up, of which some may be compiling still.
    seconds: Seconds that it took.
  """

  calls: dict[str, Callable[[int], Any]]
  refused: dict[str, Exception]
  late: dict[str, concurrent.futures.Future[Any]]
  seconds: float

  @property
  def compiling(self) -> bool:
    """Whether one of those that were given up has not ended yet: it keeps the host busy, and may try out programs."""
    return any(not future.done() for future in self.late.values())


def prepare(cases: Sequence[Case], limit_s: float, grace_s: float = 10.0) -> Prepared:
  """Draw the inputs of all cases and run each once, which compiles it, side by side.

  Args:
    cases: Those that are begun first come first.
    limit_s: Seconds after which no other is begun.
    grace_s: Most seconds for which those that are begun by then are waited for.
  """

  def first(case: Case) -> Callable[[int], Any]:
    call = case.make()
    jax.block_until_ready(call(0))
    return call

  begin = time.perf_counter()
  pool = ThreadPoolExecutor(compilers())
  futures = {case.name: pool.submit(first, case) for case in cases}
  concurrent.futures.wait(futures.values(), limit_s)
  pool.shutdown(wait=False, cancel_futures=True)
  concurrent.futures.wait(futures.values(), grace_s)
  calls, refused, late = {}, {}, {}
  for name, future in futures.items():
    if future.cancelled() or not future.done():
      late[name] = future
    elif error := future.exception():
      if not isinstance(error, Exception):
        raise error
      refused[name] = error
    else:
      calls[name] = future.result()
  return Prepared(calls, refused, late, time.perf_counter() - begin)


def compilers() -> int:
  """Programs to compile at once."""
  return min(16, max(2, os.cpu_count() or 2))


def describe(error: BaseException, most: int = 300) -> str:
  """An exception in one line."""
  lines = str(error).splitlines() or ['']
  return f'{type(error).__name__}: {lines[0][:most]}'


def draw(shape: Iterable[int], dtype: Any, seed: int) -> jax.Array:
  """Normal numbers, drawn on the device."""
  return _draw(jax.random.key(seed), tuple(shape), jnp.dtype(dtype).name)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
  return jax.random.normal(key, shape, dtype)
