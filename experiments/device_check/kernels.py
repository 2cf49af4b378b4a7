"""Attention over pages beside attention over contiguous keys: what is timed, on which inputs, and the work it is."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.device_check.context import Context
from experiments.device_check.timing import Case, compilers, draw, median_s, prepare
from pallas_kernels import PageLayout, devices

AUTOMATIC = 'automatic'
_MOST_ELEMENTS = 1 << 30  # of a pool: kernels may count them in 32 bits
CUDNN, DENSE = 'cuDNN on contiguous keys', 'XLA on contiguous keys'


def implementations(table: Mapping[str, Any], platform: str) -> list[str]:
  """The names in a kernel's table of what is made for a platform, and plain XLA; not its definition."""
  mine = [name for name, one in table.items() if platform in getattr(one, 'platforms', ())]
  return [*mine, 'xla']


def wanted(name: str) -> str | None:
  """What to ask a kernel for by a name in a row."""
  return None if name == AUTOMATIC else name


@dataclasses.dataclass(frozen=True)
class Pool:
  """Pages of random keys and values, and what may name them."""

  pages: jax.Array
  page_size: int
  order: np.ndarray  # all page numbers, shuffled

  @classmethod
  def draw(cls, context: Context, tokens: int, page_size: int, dtype: str = 'bfloat16') -> 'Pool':
    """Room for so many tokens or the bytes that timed calls take in turns, if these are more; up to a gigaelement."""
    _, kv_heads, head_dim = context.sizes.heads
    layout = PageLayout.best(devices.current(), kv_heads, page_size, head_dim)
    elements = 2 * kv_heads * page_size * head_dim
    rotated = -(-context.sizes.rotated_bytes // (elements * jnp.dtype(dtype).itemsize))
    count = min(max(-(-tokens // page_size), rotated), _MOST_ELEMENTS // elements) + 1
    pages = draw((count, *layout.page_shape), dtype, page_size)
    return cls(pages, page_size, np.random.default_rng(page_size).permutation(count).astype(np.int32))

  def tables(self, context: Context, lengths: Sequence[int], width: int | None = None) -> list[jax.Array]:
    """Page tables of sequences of these lengths, each of other pages than the ones before, as many as no cache holds.

    Where the pool has fewer pages than they name in all, some are named twice.
    """
    counts = [-(-length // self.page_size) for length in lengths]
    width = max(counts) if width is None else -(-width // self.page_size)
    page_bytes = self.pages.nbytes // len(self.order)
    most = min(sets(context, sum(counts) * page_bytes), max(1, len(self.order) // sum(counts)))
    tables = []
    for start in range(0, most * sum(counts), sum(counts)):
      table, place = np.zeros((len(lengths), width), np.int32), start
      for row, count in enumerate(counts):
        table[row, :count] = np.take(self.order, range(place, place + count), mode='wrap')
        place += count
      tables.append(jnp.asarray(table))
    return tables


def rotating(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> Callable[[int], Any]:
  """What calls with each of the inputs in turn."""
  return lambda number: call(*inputs[number % len(inputs)])


def sets(context: Context, each_bytes: int) -> int:
  """How many sets of inputs of so many bytes no cache holds, of which a call takes one."""
  return max(2, -(-context.sizes.rotated_bytes // max(each_bytes, 1)))


def dense(implementation: str) -> Callable[..., Any]:
  """JAX's attention over contiguous keys."""
  return functools.partial(jax.nn.dot_product_attention, implementation=implementation)


def time_all(context: Context, cases: Sequence[Case], add: Callable[[Case, float, Mapping[str, float]], None]) -> None:
  """Compile all cases side by side, then time them one by one; `add` is given a case, its seconds and all so far."""
  figures = context.figures
  calls, refused, compile_s = prepare(cases, context.sizes.compile_s)
  figures.compiled(compile_s)
  print(f'{len(calls)} programs compiled in {compile_s:.1f} s, {compilers()} at once', flush=True)
  for name, reason in refused.items():
    figures.note(f'{name}: not measured, {reason}')
  found: dict[str, float] = {}
  for case in cases:
    if case.name not in calls:
      continue
    try:
      found[case.name] = median_s(calls.pop(case.name), context.sizes)
    except Exception as error:  # such as no more memory: the next may still run
      figures.note(f'{case.name}: not measured, {type(error).__name__}: {str(error)[:200]}')
      continue
    add(case, found[case.name], found)


def say_what_is_missing(context: Context) -> None:
  """Say that a peer cannot be measured here."""
  if context.platform != 'gpu':
    context.figures.note(f'{CUDNN}: not measured, this is no GPU')
