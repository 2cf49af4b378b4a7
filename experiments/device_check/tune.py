"""Parameters of the attention kernels in plain XLA, timed at a few shapes: rows as tuning.json of a kernel has them."""

import dataclasses
import datetime
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.device_check import decode, prefill
from experiments.device_check.context import Context
from experiments.device_check.kernels import Pool, rotating, time_all
from experiments.device_check.sizes import Chunks
from experiments.device_check.timing import Case, draw
from pallas_kernels import PageLayout, arguments, devices
from pallas_kernels.paged_attention import xla as paged_xla
from pallas_kernels.prefill_attention import xla as prefill_xla
from pdjax.types.json_text import json_text

_IMPLEMENTATION = 'xla'
_DTYPES = ('bfloat16', 'float32')


@dataclasses.dataclass(frozen=True)
class _Choice:
  """Parameters for a problem."""

  kernel: str
  title: str
  problem: Mapping[str, int | str]
  config: Mapping[str, Any]


def run(context: Context) -> None:
  """Time every choice and write what each took to `tuned.json`, the fastest of a problem first."""
  sizes = context.sizes
  cases: list[Case] = []
  for dtype in _DTYPES:
    tokens = [sum(map(sum, chunks)) for chunks in sizes.tuned_prefills]
    tokens += [batch * length for batch, length in sizes.tuned_decodes]
    pool = Pool.draw(context, max(tokens), sizes.page_sizes[0], dtype)
    for chunks in sizes.tuned_prefills:
      cases += [_prefill(context, pool, chunks, blocks) for blocks in sizes.tuned_blocks]
    for batch, length in sizes.tuned_decodes:
      cases += [_decode(context, pool, batch, length, block) for block in sizes.tuned_block_tokens]
  device, date = devices.current(), datetime.date.today().isoformat()
  rows: dict[str, dict[str, Any]] = {}
  best: dict[str, tuple[float, Mapping[str, Any]]] = {}

  def add(case: Case, seconds: float, found: Mapping[str, float]) -> None:
    choice, microseconds = case.about, round(1e6 * seconds, 1)
    rows[case.name] = {
      'kernel': choice.kernel, 'implementation': _IMPLEMENTATION, 'device': device.name, 'problem': choice.problem,
      'config': choice.config, 'figures': {'microseconds': microseconds, 'date': date},
    }  # fmt: skip
    if choice.title not in best or microseconds < best[choice.title][0]:
      best[choice.title] = microseconds, choice.config
    lines = ',\n'.join(f'  {json_text(row)}' for row in rows.values())
    (context.folder / 'tuned.json').write_text(f'[\n{lines}\n]\n', encoding='utf-8')
    context.figures.add(case.name, microseconds, 'us')

  time_all(context, cases, add)
  for title, (microseconds, config) in best.items():
    context.figures.note(f'{title}: {dict(config)} is fastest, {microseconds:,.1f} us')


def _prefill(context: Context, pool: Pool, chunks: Chunks, blocks: tuple[int, int]) -> Case:
  query_heads, _, head_dim = context.sizes.heads
  new, lengths = [one for one, _ in chunks], [sum(chunk) for chunk in chunks]
  q = jax.ShapeDtypeStruct((sum(new), query_heads, head_dim), pool.pages.dtype)

  def make() -> Callable[[int], Any]:
    run = functools.partial(prefill_xla.prefill_attention, softmax_scale=head_dim**-0.5, blocks=blocks)
    queries = draw(q.shape, q.dtype, 0)
    offsets, stops = jnp.asarray(np.cumsum([0, *new]), jnp.int32), jnp.asarray(lengths, jnp.int32)
    return rotating(
      _precise(run), [(queries, pool.pages, table, offsets, stops) for table in pool.tables(context, lengths)]
    )

  title = f'prefill {prefill.title(chunks)}, {q.dtype.name}'
  facts = _facts(pool, q, lengths) | {'tokens': sum(new)}
  about = _Choice('prefill_attention', title, facts, {'blocks': blocks})
  return Case(f'{title}, blocks of {blocks[0]:,} × {blocks[1]:,}', make, about)


def _decode(context: Context, pool: Pool, batch: int, length: int, block_tokens: int) -> Case:
  query_heads, _, head_dim = context.sizes.heads
  q = jax.ShapeDtypeStruct((batch, query_heads, head_dim), pool.pages.dtype)
  lengths = [length] * batch

  def make() -> Callable[[int], Any]:
    run = functools.partial(paged_xla.paged_attention, softmax_scale=head_dim**-0.5, block_tokens=block_tokens)
    queries, stops = draw(q.shape, q.dtype, 0), jnp.asarray(lengths, jnp.int32)
    return rotating(_precise(run), [(queries, pool.pages, table, stops) for table in pool.tables(context, lengths)])

  title = f'{decode.title((batch, length))}, {q.dtype.name}'
  about = _Choice(
    'paged_attention', title, _facts(pool, q, lengths) | {'query_tokens': 1}, {'block_tokens': block_tokens}
  )
  return Case(f'{title}, blocks of {block_tokens:,}', make, about)


def _precise(run: Callable[..., Any]) -> Callable[..., Any]:
  """The kernel compiled as float32 is served; for bfloat16 the precision changes nothing."""

  def call(*arrays):
    with jax.default_matmul_precision('highest'):
      return run(*arrays)

  return jax.jit(call)


def _facts(pool: Pool, q: jax.ShapeDtypeStruct, lengths: list[int]) -> dict[str, int | str]:
  layout = PageLayout.of(pool.pages.shape, q.shape[-1])
  width = max(-(-length // pool.page_size) for length in lengths)
  return arguments.describe(layout, q, pool.pages, jax.ShapeDtypeStruct((len(lengths), width), jnp.int32))
