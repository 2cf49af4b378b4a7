"""Attention over pages beside attention over contiguous keys: what is timed, on which inputs, and the work it is."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.device_check.context import Context
from experiments.device_check.timing import Case, compilers, describe, draw, median_s, prepare
from pallas_kernels import PageLayout, devices

AUTOMATIC = 'automatic'
WHILE_COMPILING = 'other programs were being compiled'  # notes of figures
LAUNCH_BOUND = 'launch-bound'
_STARTS = 2  # times that of starting a small program, below which a program may be waiting for the next start
POOL_ELEMENTS = 1 << 30  # at most, of a pool that is drawn at random; `large` looks at one that is larger
CUDNN, DENSE = 'cuDNN on contiguous keys', 'XLA on contiguous keys'
_UNITS = {'GB/s': 1e9, 'TFLOP/s': 1e12}


def implementations(table: Mapping[str, Any], platform: str) -> list[str]:
  """The names in a kernel's table of what is made for a platform, and plain XLA; not its definition."""
  mine = [name for name, one in table.items() if platform in getattr(one, 'platforms', ())]
  return [*mine, 'xla']


def wanted(name: str) -> str | None:
  """The `implementation` to give a kernel for a name in a row."""
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
    count = min(max(-(-tokens // page_size), rotated), POOL_ELEMENTS // elements) + 1
    pages = draw((count, *layout.page_shape), dtype, page_size)
    return cls(pages, page_size, np.random.default_rng(page_size).permutation(count).astype(np.int32))

  def holds(self, lengths: Sequence[int]) -> bool:
    """Whether there are pages enough for sequences of these lengths, none of them named twice."""
    return sum(-(-length // self.page_size) for length in lengths) <= len(self.order)

  def tables(self, context: Context, lengths: Sequence[int], width: int | None = None) -> list[jax.Array]:
    """Page tables of sequences that the pool holds, each of other pages than the ones before.

    They are as many as no cache holds, or as the pool has pages for.
    """
    assert self.holds(lengths), (lengths, len(self.order))
    counts = [-(-length // self.page_size) for length in lengths]
    width = max(counts) if width is None else -(-width // self.page_size)
    page_bytes = self.pages.nbytes // len(self.order)
    most = min(sets(context, sum(counts) * page_bytes), max(1, len(self.order) // sum(counts)))
    tables = []
    for start in range(0, most * sum(counts), sum(counts)):
      table, place = np.zeros((len(lengths), width), np.int32), start
      for row, count in enumerate(counts):
        table[row, :count] = self.order[place : place + count]
        place += count
      tables.append(jnp.asarray(table))
    return tables


def rotating(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> Callable[[int], Any]:
  """A function that calls with each of the inputs in turn."""
  return lambda number: call(*inputs[number % len(inputs)])


def chained(
  attend: Callable[..., Any], queries: Sequence[Any], keys: Sequence[Any], shared: tuple[Any, ...], calls: int
) -> Callable[[int], Any]:
  """A function that makes `calls` calls in one program, each with other keys: a start may take longer than a call.

  Args:
    attend: Of queries, one set of keys and what is shared; its answer must be as queries are, for it is what the next
      call of the same program is given, so that none can be left out or joined with another.
    queries: Queries of the first call of a program, in turns.
    keys: Keys and values of the calls in turns, or tables that name their pages.
    shared: Further arguments, the same for all calls.
    calls: Calls of a program.
  """

  def attend_in_turn(q, keys, shared):
    return functools.reduce(lambda q, own: attend(q, own, *shared), keys, q)

  count = -(-len(keys) // calls)
  groups = [tuple(keys[place % len(keys)] for place in range(i * calls, (i + 1) * calls)) for i in range(count)]
  run = jax.jit(attend_in_turn)
  return lambda number: run(queries[number % len(queries)], groups[number % count], shared)


def calls_of(context: Context, least_s: float) -> int:
  """The number of calls in one program, of `least_s` each or more, so that its start does not count."""
  return min(context.sizes.chained_calls, max(1, math.ceil(_STARTS * context.ceilings.start_s / least_s)))


def sets(context: Context, each_bytes: int) -> int:
  """The number of sets of inputs, one a call, of `each_bytes` each, that together no cache holds."""
  return max(2, -(-context.sizes.rotated_bytes // max(each_bytes, 1)))


def dense(implementation: str) -> Callable[..., Any]:
  """JAX's attention over contiguous keys."""
  return functools.partial(jax.nn.dot_product_attention, implementation=implementation)


def time_all(context: Context, cases: Sequence[Case], add: Callable[[Case, float, Mapping[str, float]], None]) -> None:
  """Compile all cases side by side, then time them one by one; `add` is given a case, its seconds and all so far.

  A case that is needed and cannot be timed is a failure of the part. Of others, those given up leave it incomplete.
  """
  figures, start_s = context.figures, context.ceilings.start_s
  prepared = prepare(cases, context.sizes.compile_s)
  figures.compiled(prepared.seconds)
  print(f'{len(prepared.calls)} programs compiled in {prepared.seconds:.1f} s, {compilers()} at once', flush=True)

  def missing(case: Case, reason: str, tell: Callable[[str], None]) -> None:
    (figures.fail if case.needed else tell)(f'{case.name}: not measured, {reason}')

  found: dict[str, float] = {}
  for case in cases:
    if case.name in prepared.late:
      missing(case, f'not compiled within {prepared.seconds:.0f} s', figures.give_up)
      continue
    if case.name in prepared.refused:  # what this device or version refuses is one figure less
      missing(case, describe(prepared.refused[case.name]), figures.note)
      continue
    compiling = prepared.compiling
    try:
      seconds = median_s(prepared.calls.pop(case.name), context.sizes)
    except Exception as error:  # such as no more memory: the next may still run
      missing(case, describe(error), figures.give_up)
      continue
    remarks = [
      WHILE_COMPILING if compiling else None,
      LAUNCH_BOUND if seconds < _STARTS * start_s else None,
      f'{case.calls} calls a program' if case.calls > 1 else None,
    ]
    found[case.name] = seconds / case.calls
    figures.remark = '; '.join(filter(None, remarks)) or None
    try:
      add(case, found[case.name], found)
    finally:
      figures.remark = None


def add_rate(
  context: Context,
  case: Case,
  seconds: float,
  found: Mapping[str, float],
  shape: str,
  work: int,
  unit: str,
  **ceilings: float,
) -> None:
  """Hand over how fast a case does its work, beside cuDNN where that was timed at the same shape before.

  Args:
    context: Of the part.
    case: The case that was timed.
    seconds: Of a call.
    found: Seconds of all cases so far, by name.
    shape: The shape in words, with which the names of its cases begin.
    work: Bytes or FLOPs of a call.
    unit: The unit of the rate, such as GB/s.
    **ceilings: Rates in bytes or FLOPs per second, by the share of `Figures.add` that is of them.
  """
  beside = f'{shape}, {CUDNN}'
  peer_s = found.get(beside) if case.name != beside else None
  context.figures.add(
    case.name, work / seconds / _UNITS[unit], unit,
    peer=None if peer_s is None else CUDNN, peer_value=None if peer_s is None else work / peer_s / _UNITS[unit],
    **{share: work / seconds / most for share, most in ceilings.items()}, microseconds=round(1e6 * seconds, 2),
  )  # fmt: skip


def say_what_is_missing(context: Context) -> None:
  """Say that a peer cannot be measured here."""
  if context.platform != 'gpu':
    context.figures.note(f'{CUDNN}: not measured, this is no GPU')
