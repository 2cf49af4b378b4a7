"""How long a device takes for a call: back to back, with inputs that no cache holds, and compiled side by side."""

import concurrent.futures
import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    sizes: How many groups, and how long.
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
  """Something to time: `make` draws its inputs and answers with what starts it on a number of them.

  `about` is for whoever made the case.
  """

  name: str
  make: Callable[[], Callable[[int], Any]]
  about: Any = None


def prepare(cases: Sequence[Case], limit_s: float) -> tuple[dict[str, Callable[[int], Any]], dict[str, str], float]:
  """Draw the inputs of all cases and run each once, which compiles it, side by side.

  Args:
    cases: Those that are begun first come first.
    limit_s: Seconds after which those that are not compiled are given up.

  Returns:
    What starts each, why others cannot be, both by name, and the seconds it took.
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
  calls, refused = {}, {}
  for name, future in futures.items():
    if future.cancelled() or not future.done():
      refused[name] = f'not compiled within {limit_s:.0f} s'
    elif error := future.exception():  # a kernel that this device or version refuses is one figure less
      refused[name] = describe(error)
    else:
      calls[name] = future.result()
  return calls, refused, time.perf_counter() - begin


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


# ---------------------------------------------------------------------------- ceilings

COPY, PRODUCT = 'copy, read and written', 'product in bfloat16'  # names of their rows


@dataclasses.dataclass(frozen=True)
class Ceilings:
  """What the device reached at best: bytes per second read and written by a copy, FLOP/s of a product in bfloat16."""

  copy_bytes_per_s: float
  flops_per_s: float

  @classmethod
  def of_rows(cls, values: Mapping[str, float]) -> 'Ceilings':
    """From the figures of rows by name.

    Raises:
      KeyError: if they are not there.
    """
    return cls(values[COPY] * 1e9, values[PRODUCT] * 1e12)


def measure_ceilings(sizes: Sizes) -> Ceilings:
  """Copy one large array by the runtime and by a program, whichever is faster, and multiply two large matrices."""
  count = sizes.copy_bytes // 2
  array = draw((count,), 'bfloat16', 0)
  copies = [jax.jit(jnp.copy), jax.jit(jnp.negative)]  # the second reads and writes as much, in a program of its own
  copy_s = min(median_s(lambda _, copy=copy: copy(array), sizes) for copy in copies)  # type: ignore[misc]
  array.delete()
  a, b = (draw((sizes.product_size,) * 2, 'bfloat16', seed) for seed in (1, 2))
  multiply = jax.jit(jnp.matmul)
  product_s = median_s(lambda _: multiply(a, b), sizes)
  return Ceilings(2 * 2 * count / copy_s, 2 * sizes.product_size**3 / product_s)
