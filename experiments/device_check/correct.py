"""Answers of every kernel beside float64: fresh random inputs, NaN in all that is not to be read or not written."""

import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.device_check import large
from experiments.device_check.context import Context
from experiments.device_check.figures import CHECKED
from experiments.device_check.float64 import Sequences, attend, dtype_of, error
from experiments.device_check.kernels import AUTOMATIC, implementations, wanted
from experiments.device_check.sizes import Chunks
from experiments.device_check.timing import compilers, describe
from pallas_kernels import (
  append_tokens,
  gather_pages,
  paged_attention,
  prefill_attention,
  quantized_matmul,
  scatter_pages,
)
from pallas_kernels.dispatch import Refused
from pallas_kernels.page_copy.api import IMPLEMENTATIONS as PAGE_COPY
from pallas_kernels.paged_attention.api import IMPLEMENTATIONS as PAGED_ATTENTION
from pallas_kernels.prefill_attention.api import IMPLEMENTATIONS as PREFILL_ATTENTION
from pallas_kernels.quantized_matmul import quantize
from pallas_kernels.quantized_matmul.api import IMPLEMENTATIONS as QUANTIZED_MATMUL
from pallas_kernels.quantized_matmul.storage import dequantize
from pallas_kernels.token_append.api import IMPLEMENTATIONS as TOKEN_APPEND

BOUNDS = {'float32': 1e-5, 'float16': 2e-3, 'bfloat16': 2e-2}  # ‖error‖ / ‖answer‖ by the dtype of queries
CHUNKS = ((37, 0), (1, 64), (0, 0), (300, 100), (80, 17))  # (new, cached before), of odd lengths; one has no tokens
ALONE: dict[str, Chunks] = {  # with nothing beside them, as they are where a step has one prompt
  'one chunk': ((293, 0),),
  'one chunk behind a prefix': ((131, 700),),
  'long': ((70, 2200), (20, 0)),  # in tables of more tokens than any implementation takes in one turn
}
_TRACERS = 4  # threads that trace, of which Python lets one run at a time, beside those that compile
PADDING = 5  # rows behind the chunks
LENGTHS = (1, 100, 0, 257, 33)  # cached tokens of decoding sequences; 0 is a row not in use
LONG_LENGTHS = (2300, 64)
QUERIES = 3  # newest tokens of each, where they are several
_OPTIONS: dict[str, dict[str, Any]] = {
  'plain': {},
  'window': {'sliding_window': 50},
  'soft cap': {'soft_cap': 3.0},
  'sinks': {'sinks': True},
  'all, lse': {'sliding_window': 50, 'soft_cap': 3.0, 'sinks': True, 'return_lse': True},
  'lse': {'return_lse': True},
  'int8 pages': {'int8': True},
}


@dataclasses.dataclass(frozen=True)
class Check:
  """One call: what it is given, and what it must answer.

  `expected` are pairs of an answer and the largest relative error that it may have; 0 is for bits that are kept. Only
  one that `may_refuse`, because its implementation is asked for by name, passes if there is no answer.
  """

  name: str
  call: Callable[..., Any]
  inputs: tuple[Any, ...]
  expected: tuple[tuple[np.ndarray, float], ...]
  precision: str = 'default'  # of matrix products, as `jax.default_matmul_precision` takes it
  may_refuse: bool = False


def run(context: Context) -> None:
  """Compile side by side and compare one after another, as soon as each is there; then what is large.

  Inputs are other ones each time, unless the context has a seed that was told before.
  """
  figures, begin = context.figures, time.perf_counter()
  seed = time.time_ns() if context.seed is None else context.seed
  figures.note(f'inputs are those of --seed={seed}')
  todo = checks(context, np.random.default_rng(seed))
  print(f'{len(todo)} calls drawn in {time.perf_counter() - begin:.1f} s', flush=True)
  check_all(context, todo)
  figures.compiled(time.perf_counter() - begin)
  large.run(context)


def check_all(context: Context, todo: Sequence[Check]) -> None:
  """Compile calls side by side and compare their answers one after another, as soon as each is there."""
  figures, begin = context.figures, time.perf_counter()
  distrusted: set[str] = set()
  with ThreadPoolExecutor(_TRACERS) as tracers, ThreadPoolExecutor(compilers()) as pool:
    programs = _Programs(pool)
    for check, future in zip(todo, [tracers.submit(programs.compile, check) for check in todo], strict=True):
      try:
        result = _run_poisoned(future.result().result(), check.inputs)
      except Refused as refusal:
        if not check.may_refuse:
          figures.fail(f'{check.name}: {describe(refusal)}')
          continue
        reason = str(refusal)[:300]
        figures.note(f'{check.name}: refused, {reason}')
        if _TRIED in reason and reason not in distrusted:  # said once, of all the calls that come to it
          distrusted.add(reason)
          figures.fail(f'{check.name}: {reason}')
      except Exception as failure:  # to compile or to run it: the others go on
        figures.fail(f'{check.name}: {describe(failure)}')
      else:
        _compare(context, check, result)
  print(f'{len(todo)} calls, {programs.count} programs, in {time.perf_counter() - begin:.1f} s', flush=True)


_TRIED = 'was tried'  # in the reason of a refusal, if the implementation was run and found to be wrong


class _Programs:
  """Compiled programs by what they say, so that two ways of asking for one are compiled once."""

  def __init__(self, pool: ThreadPoolExecutor):
    self._pool = pool
    self._lock = threading.Lock()
    self._by_text: dict[str, Future[Any]] = {}

  @property
  def count(self) -> int:
    """The number of programs."""
    return len(self._by_text)

  def compile(self, check: Check) -> 'Future[Any]':
    """Trace a call; its program, which is being compiled if it is new.

    Raises:
      Refused: if the implementation that is asked for says that it is not for this problem.
    """
    with jax.default_matmul_precision(check.precision):
      lowered = jax.jit(check.call).lower(*check.inputs)
    text = lowered.as_text()
    with self._lock:
      if text not in self._by_text:
        self._by_text[text] = self._pool.submit(lowered.compile)
      return self._by_text[text]


def _run_poisoned(call: Any, inputs: tuple[Any, ...]) -> list[Any]:
  """Run a program just after the memory that its results will lie in was filled with NaN and given back."""
  given = jax.block_until_ready(jax.device_put(inputs))
  shapes = [one for one in jax.tree.leaves(call.out_info) if jnp.issubdtype(one.dtype, jnp.floating)]
  poison = jax.block_until_ready([jax.device_put(np.full(one.shape, np.nan, one.dtype)) for one in shapes])
  for array in poison:  # when all are there: else the second would lie where the first did
    array.delete()
  return jax.device_get(call(*given))


def _compare(context: Context, check: Check, result: Any) -> None:
  leaves = jax.tree.leaves(result)
  assert len(leaves) == len(check.expected), check.name
  worst, worst_bound = 0.0, check.expected[0][1]
  for actual, (expected, bound) in zip(leaves, check.expected, strict=True):
    found = error(actual, expected) if bound else (0.0 if _same_bits(actual, expected) else float('inf'))
    if not found <= bound:
      context.figures.fail(f'{check.name}: the relative error is {found:.3g}, at most {bound:g} is allowed')
      worst, worst_bound = found, bound
    elif worst <= worst_bound and found >= worst:
      worst, worst_bound = found, bound
  context.figures.add(
    check.name, worst, CHECKED, peer='allowed' if worst_bound else None, peer_value=worst_bound or None
  )


def _same_bits(actual: Any, expected: np.ndarray) -> bool:
  actual = np.asarray(actual)
  return actual.dtype == expected.dtype and actual.shape == expected.shape and actual.tobytes() == expected.tobytes()


# ---------------------------------------------------------------------------- what is checked


def checks(context: Context, rng: np.random.Generator) -> list[Check]:
  """Every kernel in every way, by worth; what implementations have in common is drawn once."""
  sizes, found = context.sizes, []
  for index, heads in enumerate(sizes.checked_heads):
    for place, page_size in enumerate(sizes.checked_page_sizes):
      for dtype in sizes.checked_dtypes:
        first = not index and not place
        if not first and dtype == 'float16':
          continue
        names = sizes.checked_options if first and dtype != 'float16' else ('plain', 'all, lse')
        found += _attention(context, rng, heads, page_size, dtype, names, alone=first and dtype in sizes.checked_alone)
  found += _copies(context, rng)
  found += _products(context, rng)
  return found


def _ways(table: Any, platform: str) -> list[str]:
  """The automatic choice, and each that may be asked for."""
  return [AUTOMATIC, *implementations(table, platform)]


def _attention(
  context: Context,
  rng: np.random.Generator,
  heads: tuple[int, int, int],
  page_size: int,
  dtype: str,
  options: Sequence[str],
  alone: bool,
) -> list[Check]:
  query_heads, kv_heads, head_dim = heads
  bound, kind = BOUNDS[dtype], dtype_of(dtype)
  sinks = rng.standard_normal(query_heads).astype(np.float32)
  lse_bound = max(bound / 10, 1e-5)  # of scores alone, and these in float32

  def given(name: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Options of a kernel, those of the answer, and what pages hold."""
    chosen = dict(_OPTIONS[name])
    stored = 'int8' if chosen.pop('int8', False) else dtype
    exact = {key: value for key, value in chosen.items() if key != 'return_lse'}
    if chosen.pop('sinks', False):
      exact['sinks'] = sinks
    return chosen, exact, stored

  calls: dict[str, list[tuple[str, Any, tuple[Any, ...], Any]]] = {'prefill': [], 'decode': []}

  def add(phase: str, title: str, name: str, lengths: Sequence[int], rows: Sequence[slice | int], q: np.ndarray, *more):
    """Draw sequences, and what the last tokens of each, which are these rows of q, have to answer."""
    chosen, exact, stored = given(name)
    sequences = Sequences.random(rng, lengths, kv_heads, head_dim, page_size, stored)
    answers = [np.zeros(q.shape), np.full(q.shape[:-1], -np.inf)]
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
      if length:
        new = q[row].reshape(-1, query_heads, head_dim)
        position = np.arange(length - len(new), length)
        out, lse = attend(new, sequences.keys[index], sequences.values[index], position, **exact)
        answers[0][row], answers[1][row] = out.reshape(q[row].shape), lse.reshape(q[row].shape[:-1])
    arrays = (q, sequences.pages, sequences.tables, *more, np.array(lengths, np.int32))
    named = {'sinks': exact['sinks']} if 'sinks' in exact else {}
    if sequences.scales is not None:
      named['scales'] = sequences.scales
    expected = _expected(answers, 'return_lse' in chosen, bound, lse_bound)
    calls[phase].append((title, chosen, (arrays, named), expected))

  def add_prefill(title: str, name: str, chunks: Chunks) -> None:
    offsets = np.cumsum([0, *(new for new, _ in chunks)]).astype(np.int32)
    q = rng.standard_normal((offsets[-1] + PADDING, query_heads, head_dim)).astype(kind)
    rows = [slice(start, stop) for start, stop in itertools.pairwise(offsets)]
    add('prefill', title, name, [sum(chunk) for chunk in chunks], rows, q, offsets)

  def add_decode(title: str, name: str, lengths: Sequence[int], queries: int = 1) -> None:
    shape = (len(lengths), query_heads, head_dim) if queries == 1 else (len(lengths), queries, query_heads, head_dim)
    add('decode', title, name, lengths, range(len(lengths)), rng.standard_normal(shape).astype(kind))

  for name in options:
    add_prefill(name, name, CHUNKS)
    add_decode(name, name, LENGTHS)
    if name in ('plain', 'all, lse'):
      add_decode(f'{name}, {QUERIES} queries', name, LENGTHS, QUERIES)
  if alone:
    for title, chunks in ALONE.items():
      add_prefill(f'lse, {title}', 'lse', chunks)
    add_decode('lse, long', 'lse', LONG_LENGTHS)

  found = []
  shape = f'{dtype}, {query_heads}/{kv_heads} of {head_dim}, page {page_size}'
  kernels: dict[str, tuple[Any, Any]] = {
    'prefill': (prefill_attention, PREFILL_ATTENTION),
    'decode': (paged_attention, PAGED_ATTENTION),
  }
  for phase, (kernel, table) in kernels.items():
    for way in _ways(table, context.platform):
      precision = 'highest' if dtype == 'float32' else 'default'
      found += [
        Check(
          f'{phase} {way}, {shape}, {name}', _called(kernel, way, chosen), inputs, expected, precision,
          may_refuse=way != AUTOMATIC,
        )
        for name, chosen, inputs, expected in calls[phase]
      ]  # fmt: skip
  return found


def _called(kernel: Callable[..., Any], way: str, options: dict[str, Any]) -> Callable[..., Any]:
  """A kernel with options; its arrays are given, those by name too."""

  def call(arrays, named):
    return kernel(*arrays, **named, **options, implementation=wanted(way))

  return call


def _expected(answers, with_lse: bool, bound: float, lse_bound: float) -> tuple[tuple[np.ndarray, float], ...]:
  out, lse = answers
  return ((out, bound), (lse, lse_bound)) if with_lse else ((out, bound),)


def _copies(context: Context, rng: np.random.Generator) -> list[Check]:
  """Tokens appended, pages gathered and scattered: bits are kept, and so is what is not written."""
  kv_heads, head_dim, page_size, pages = 8, 128, 16, 24
  found = []
  tables = {**PAGE_COPY, 'append_tokens': TOKEN_APPEND}
  for function, way in [(name, way) for name, table in tables.items() for way in _ways(table, context.platform)]:
    named = way != AUTOMATIC
    for dtype in context.sizes.checked_dtypes:
      kind = dtype_of(dtype)
      pool = rng.standard_normal((pages, 2, kv_heads, page_size, head_dim)).astype(kind)
      pool[3:5] = np.nan
      ids = np.append(rng.permutation(pages)[:9], pages + 2).astype(np.int32)
      name = f'{function} {way}, {dtype}'
      if function == 'gather_pages':
        found.append(
          Check(
            name,
            functools.partial(gather_pages, implementation=wanted(way)),
            (pool, ids[:-1]),
            ((pool[ids[:-1]], 0),),
            may_refuse=named,
          )
        )
      elif function == 'scatter_pages':
        values = rng.standard_normal((len(ids), *pool.shape[1:])).astype(kind)
        after = pool.copy()
        after[ids[:-1]] = values[:-1]  # the last number is out of the pool: it drops its page
        found.append(
          Check(
            name,
            functools.partial(scatter_pages, implementation=wanted(way)),
            (pool, ids, values),
            ((after, 0),),
            may_refuse=named,
          )
        )
      else:
        places = rng.permutation(pages * page_size)[:41]
        page, offset = (places // page_size).astype(np.int32), (places % page_size).astype(np.int32)
        page[7] = pages
        k, v = rng.standard_normal((2, len(places), kv_heads, head_dim)).astype(kind)
        after, kept = pool.copy(), page < pages
        after[page[kept], 0, :, offset[kept]], after[page[kept], 1, :, offset[kept]] = k[kept], v[kept]
        found.append(
          Check(
            name,
            functools.partial(append_tokens, implementation=wanted(way)),
            (pool, k, v, page, offset),
            ((after, 0),),
            may_refuse=named,
          )
        )
    if function == 'append_tokens':
      found.append(_quantized_append(rng, way))
  return found


def _quantized_append(rng: np.random.Generator, way: str) -> Check:
  """Tokens appended to int8 pages; what they stand for differs by half a step of their scale."""
  kv_heads, head_dim, page_size, pages, tokens = 8, 128, 16, 6, 41
  places = rng.permutation(pages * page_size)[:tokens]
  page, offset = (places // page_size).astype(np.int32), (places % page_size).astype(np.int32)
  k, v = rng.standard_normal((2, tokens, kv_heads, head_dim)).astype(np.float32)

  def call(k, v, page, offset):
    pool = jnp.zeros((pages, 2, kv_heads, page_size, head_dim), jnp.int8)
    scales = jnp.zeros(pool.shape[:-1], jnp.float32)
    pool, scales = append_tokens(pool, k, v, page, offset, scales=scales, implementation=wanted(way))
    return pool.astype(jnp.float32) * scales[..., None]

  after = np.zeros((pages, 2, kv_heads, page_size, head_dim))
  after[page, 0, :, offset], after[page, 1, :, offset] = k, v
  return Check(
    f'append_tokens {way}, int8 with scales', call, (k, v, page, offset), ((after, 1e-2),), may_refuse=way != AUTOMATIC
  )


def _products(context: Context, rng: np.random.Generator) -> list[Check]:
  """Products with weights in eight and four bits, and with activations in eight."""
  rows, inner, outer = 33, 256, 384
  found = []
  kinds = {'int8': (8, None), 'int4': (4, None), 'int4 in groups of 64': (4, 64), 'w8a8': (8, None)}
  stored = {}
  for name, (bits, group) in kinds.items():
    with jax.default_device(jax.devices()[0]):
      weights = quantize(jnp.asarray(rng.standard_normal((inner, outer), np.float32)), bits, group)
    stored[name] = weights, np.asarray(dequantize(weights, inner)).astype(np.float64)
  for way in _ways(QUANTIZED_MATMUL, context.platform):
    for dtype in context.sizes.checked_dtypes:
      precision = 'highest' if dtype == 'float32' else 'default'
      for name, (weights, exact) in stored.items():
        x = rng.standard_normal((rows, inner)).astype(dtype_of(dtype))
        call = functools.partial(quantized_matmul, quantize_activations=name == 'w8a8', implementation=wanted(way))
        bound = BOUNDS[dtype] if name != 'w8a8' else 2e-2  # activations are rounded to eight bits
        values, scales = map(np.asarray, (weights.values, weights.scales))
        expected = x.astype(np.float64) @ exact
        found.append(
          Check(
            f'quantized_matmul {way}, {dtype}, {name}',
            call,
            (x, values, scales),
            ((expected, bound),),
            precision,
            may_refuse=way != AUTOMATIC,
          )
        )
  return found
