"""Answers where float64 would take too long: at timed shapes beside plain XLA, and far up in a pool beside a small one.

A pool of more than 2^31 elements has places that a kernel which counts in 32 bits does not find.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.device_check.context import Context
from experiments.device_check.figures import CHECKED, FAR
from experiments.device_check.float64 import error
from experiments.device_check.kernels import AUTOMATIC, Pool, implementations, wanted
from experiments.device_check.prefill import title
from experiments.device_check.sizes import Chunks
from experiments.device_check.timing import describe, draw
from pallas_kernels import PageLayout, devices, paged_attention, prefill_attention
from pallas_kernels.dispatch import Refused
from pallas_kernels.paged_attention.api import IMPLEMENTATIONS as PAGED_ATTENTION
from pallas_kernels.prefill_attention.api import IMPLEMENTATIONS as PREFILL_ATTENTION

BOUND = 2e-2  # in bfloat16, of two ways whose sums are in float32
_FAR_CHUNK, _FAR_LENGTH = (40, 30), 70  # a chunk and the tokens before it, and tokens of a sequence that decodes
_ROOM = 2.5  # of the device's memory over the bytes of the far pool, below which it is left out

_Attend = Callable[..., Any]  # of queries, pages and tables


def run(context: Context) -> None:
  """Compare; what cannot be run is a failure."""
  sizes = context.sizes
  lengths = [sum(chunk) for chunk in sizes.compared_prefill]
  batch, length = sizes.compared_decode
  pool = Pool.draw(context, max(sum(lengths), batch * length), sizes.page_sizes[0])
  cases = {
    f'prefill {title(sizes.compared_prefill)}': (_prefill(context, sizes.compared_prefill), lengths),
    f'decode {batch} at {length:,}': (_decode(context, [length] * batch), [length] * batch),
  }
  for name, ((q, attend), stops) in cases.items():
    given = q, pool.pages, pool.tables(context, stops)[0]
    called = f'{name}, {AUTOMATIC} beside plain XLA, bfloat16'
    _compare(context, called, functools.partial(attend, None, *given), functools.partial(attend, 'xla', *given))
    del given
  del pool
  if context.platform == 'gpu' or context.toy:
    _far(context)


def _far(context: Context) -> None:
  """Read pages at the far end of a large pool, in every way, and the same pages of a small one."""
  sizes = context.sizes
  page_size, (_, kv_heads, head_dim) = sizes.page_sizes[0], sizes.heads
  shape = PageLayout.best(devices.current(), kv_heads, page_size, head_dim).page_shape
  elements = int(np.prod(shape))
  pages = -(-max(sum(_FAR_CHUNK), _FAR_LENGTH) // page_size)
  count = -(-sizes.far_elements // elements)
  room = (jax.devices()[0].memory_stats() or {}).get('bytes_limit')
  if room is not None and room < _ROOM * 2 * elements * count:
    context.figures.note(f'a pool of {count * elements:,} elements: not read, there are {room / 1e9:.0f} GB')
    return
  small = draw((pages, *shape), 'bfloat16', 3)
  far = jax.jit(lambda small: jnp.concatenate([jnp.full((count - pages, *shape), jnp.nan, small.dtype), small]))(small)
  near_table, far_table = (jnp.arange(first, first + pages, dtype=jnp.int32)[None] for first in (0, count - pages))
  for kernel, (q, attend), table in (
    ('prefill', _prefill(context, (_FAR_CHUNK,)), PREFILL_ATTENTION),
    ('decode', _decode(context, [_FAR_LENGTH]), PAGED_ATTENTION),
  ):
    sought = functools.partial(attend, 'xla', q, small, near_table)
    for way in (AUTOMATIC, *implementations(table, context.platform)):
      name = f'{kernel} {way}, bfloat16, {FAR} {count * elements:,} elements'
      found = functools.partial(attend, wanted(way), q, far, far_table)
      _compare(context, name, found, sought, may_refuse=way != AUTOMATIC)


def _compare(
  context: Context, name: str, call: Callable[[], Any], sought: Callable[[], Any], may_refuse: bool = False
) -> None:
  """Hand over how far one answer is from another."""
  try:
    missed = error(call(), np.asarray(sought()).astype(np.float64))
  except Exception as failure:  # to compile or to run it: the others go on
    if may_refuse and isinstance(failure, Refused):
      context.figures.note(f'{name}: refused, {str(failure)[:300]}')
    else:
      context.figures.fail(f'{name}: {describe(failure)}')
    return
  context.figures.add(name, missed, CHECKED, peer='allowed', peer_value=BOUND)
  if not missed <= BOUND:
    context.figures.fail(f'{name}: the relative error is {missed:.3g}, at most {BOUND:g} is allowed')


def _prefill(context: Context, chunks: Chunks) -> tuple[jax.Array, _Attend]:
  """Queries of packed chunks, and what attends with them."""
  query_heads, _, head_dim = context.sizes.heads
  new = [one for one, _ in chunks]
  offsets = jnp.asarray(np.cumsum([0, *new]), jnp.int32)
  lengths = jnp.asarray([sum(chunk) for chunk in chunks], jnp.int32)

  @functools.partial(jax.jit, static_argnums=0)
  def attend(implementation, q, pages, table):
    return prefill_attention(q, pages, table, offsets, lengths, implementation=implementation)

  return draw((sum(new), query_heads, head_dim), 'bfloat16', 1), attend


def _decode(context: Context, lengths: Sequence[int]) -> tuple[jax.Array, _Attend]:
  query_heads, _, head_dim = context.sizes.heads
  stops = jnp.asarray(lengths, jnp.int32)

  @functools.partial(jax.jit, static_argnums=0)
  def attend(implementation, q, pages, table):
    return paged_attention(q, pages, table, stops, implementation=implementation)

  return draw((len(lengths), query_heads, head_dim), 'bfloat16', 2), attend
