"""Parameters of attention kernels timed at a few shapes: plain XLA's blocks, cuDNN's tiles; rows as tuning.json has."""

import dataclasses
import datetime
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.device_check import decode, prefill
from experiments.device_check.context import Context
from experiments.device_check.kernels import Pool, chained, time_all
from experiments.device_check.sizes import Chunks
from experiments.device_check.timing import Case, draw
from pallas_kernels import PageLayout, arguments, devices, tuning
from pallas_kernels.paged_attention import xla as paged_xla
from pallas_kernels.prefill_attention import cudnn as prefill_cudnn
from pallas_kernels.prefill_attention import xla as prefill_xla
from pdjax.types.json_text import json_text

_DTYPES = ('bfloat16', 'float32')
_XLA, _CUDNN = 'xla', 'cudnn'


@dataclasses.dataclass(frozen=True)
class Choice:
  """Parameters for a problem, of one implementation of a kernel."""

  kernel: str
  title: str
  problem: Mapping[str, int | str]
  config: Mapping[str, Any]
  implementation: str = _XLA


def run(context: Context) -> None:
  """Time every choice and write what each took to `tuned_<kernel>.json`, the fastest of a problem first."""
  cases = _cases(context)
  device, date = devices.current().name, datetime.date.today().isoformat()
  measured: list[tuple[Choice, float]] = []

  def add(case: Case, seconds: float, found: Mapping[str, float]) -> None:
    measured.append((case.about, round(1e6 * seconds, 1)))
    context.figures.add(case.name, measured[-1][1], 'us')
    for kernel, rows in rows_of(measured, device, date).items():
      lines = ',\n'.join(f'  {json_text(dataclasses.asdict(row))}' for row in rows)
      (context.folder / f'tuned_{kernel}.json').write_text(f'[\n{lines}\n]\n', encoding='utf-8')

  time_all(context, cases, add)
  best: dict[tuple[str, str], tuple[float, Choice]] = {}
  for choice, microseconds in measured:
    key = choice.title, choice.implementation
    best[key] = min(best.get(key, (microseconds, choice)), (microseconds, choice), key=lambda pair: pair[0])
  for (title, implementation), (microseconds, choice) in best.items():
    context.figures.note(f'{title}, {implementation}: {dict(choice.config)} is fastest, {microseconds:,.1f} us')


def rows_of(measured: Iterable[tuple[Choice, float]], device: str, date: str) -> dict[str, list[tuning.Row]]:
  """Rows of each kernel's table from choices and their microseconds: by problem, and of one problem the fastest first.

  Of equally near rows the first counts (`pallas_kernels.tuning.nearest`).
  """
  problems: dict[tuple[str, str, str], list[tuple[float, Choice]]] = {}
  for choice, microseconds in measured:
    problems.setdefault((choice.kernel, choice.title, choice.implementation), []).append((microseconds, choice))
  rows: dict[str, list[tuning.Row]] = {}
  for (kernel, _, implementation), choices in problems.items():
    for microseconds, choice in sorted(choices, key=lambda pair: pair[0]):
      figures = {'microseconds': microseconds, 'date': date}
      rows.setdefault(kernel, []).append(tuning.Row(device, choice.problem, choice.config, figures, implementation))
  return rows


# ---------------------------------------------------------------------------- what is timed


def _cases(context: Context) -> list[Case]:
  sizes, cases = context.sizes, []
  shapes = [*sizes.tuned_prefills, *sizes.tuned_packed]
  most = max([sum(map(sum, chunks)) for chunks in shapes] + [batch * length for batch, length in sizes.tuned_decodes])
  for dtype in _DTYPES:
    pool = Pool.draw(context, most, sizes.page_sizes[0], dtype)
    for chunks in sizes.tuned_prefills:
      table_tokens = _table_tokens(pool, [sum(chunk) for chunk in chunks])
      configs = _blocks(sizes.tuned_blocks, table_tokens, prefill_xla.BY_PLATFORM.get(context.platform, {}))
      cases += [_prefill(context, pool, chunks, config) for config in configs]
    for chunks in sizes.tuned_packed:
      cases += _packed(context, pool, chunks)
    for batch, length in sizes.tuned_decodes:
      table_tokens = _table_tokens(pool, [length])
      configs = _block_tokens(sizes.tuned_block_tokens, table_tokens, paged_xla.BY_PLATFORM.get(context.platform, {}))
      cases += [_decode(context, pool, batch, length, config) for config in configs]
  return cases


def _table_tokens(pool: Pool, lengths: Sequence[int]) -> int:
  return max(-(-length // pool.page_size) for length in lengths) * pool.page_size


def _blocks(wanted: Sequence[tuple[int, int]], table_tokens: int, platform: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Parameters of prefill attention: blocks, and up to which table all of it is one block, as the platform has it.

  Where a table is short enough for that, blocks of it are timed too, and what no block divides is timed once.
  """
  whole = int(platform.get('whole', 0))
  if table_tokens > whole:
    return [{'blocks': list(blocks), 'whole': whole} for blocks in wanted]
  divided = [{'blocks': list(blocks), 'whole': 0} for blocks in wanted if blocks[1] < table_tokens]
  cached = platform.get('blocks', wanted[0])[1]
  return [*divided, *({'blocks': [rows, cached], 'whole': whole} for rows in dict.fromkeys(one for one, _ in wanted))]


def _block_tokens(wanted: Sequence[int], table_tokens: int, platform: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The same of decode attention."""
  whole = int(platform.get('whole', 0))
  if table_tokens > whole:
    return [{'block_tokens': tokens, 'whole': whole} for tokens in wanted]
  divided = [{'block_tokens': tokens, 'whole': 0} for tokens in wanted if tokens < table_tokens]
  return [*divided, {'block_tokens': platform.get('block_tokens', wanted[0]), 'whole': whole}]


def _prefill(
  context: Context, pool: Pool, chunks: Chunks, config: dict[str, Any], implementation: str = _XLA, **more: Any
) -> Case:
  query_heads, _, head_dim = context.sizes.heads
  new, lengths = [one for one, _ in chunks], [sum(chunk) for chunk in chunks]
  q = jax.ShapeDtypeStruct((sum(new), query_heads, head_dim), pool.pages.dtype)
  kernel: Callable[..., Any] = (
    functools.partial(prefill_xla.prefill_attention, **config)
    if implementation == _XLA
    else functools.partial(prefill_cudnn.prefill_attention, config=prefill_cudnn.Config(**config), **more)
  )

  def attend(queries, table, pages, offsets, stops):
    with jax.default_matmul_precision('highest'):  # as float32 is served; for bfloat16 it changes nothing
      return kernel(queries, pages, table, offsets, stops, softmax_scale=head_dim**-0.5)

  count = prefill.calls(context, chunks)

  def make() -> Callable[[int], Any]:
    offsets, stops = jnp.asarray(np.cumsum([0, *new]), jnp.int32), jnp.asarray(lengths, jnp.int32)
    shared = pool.pages, offsets, stops
    return chained(attend, [draw(q.shape, q.dtype, 0)], pool.tables(context, lengths), shared, count)

  title = f'prefill {prefill.title(chunks)}, {q.dtype.name}'
  facts = _facts(pool, q, lengths) | {'tokens': sum(new)}
  about = Choice('prefill_attention', title, facts, config, implementation)
  return Case(f'{title}, {implementation}, {_said(config)}', make, about, count)


def _packed(context: Context, pool: Pool, chunks: Chunks) -> list[Case]:
  """Tiles of cuDNN, where chunks are packed: of one chunk alone all rows are one tile."""
  query_heads, _, head_dim = context.sizes.heads
  new, lengths = [one for one, _ in chunks], [sum(chunk) for chunk in chunks]
  q = jax.ShapeDtypeStruct((sum(new), query_heads, head_dim), pool.pages.dtype)
  device, facts = devices.current(), _facts(pool, q, lengths) | {'tokens': sum(new)}
  config = prefill_cudnn.rule(device, facts)
  if (refusal := prefill_cudnn.refusal(config, device, facts)) is not None:
    context.figures.note(f"prefill {prefill.title(chunks)}, {q.dtype.name}: cuDNN's tiles are not timed, {refusal}")
    return []
  configs = [dataclasses.replace(config, tile_rows=rows) for rows in context.sizes.tuned_tile_rows]
  return [_prefill(context, pool, chunks, dataclasses.asdict(one), _CUDNN, device=device) for one in configs]


def _decode(context: Context, pool: Pool, batch: int, length: int, config: dict[str, Any]) -> Case:
  query_heads, _, head_dim = context.sizes.heads
  q = jax.ShapeDtypeStruct((batch, query_heads, head_dim), pool.pages.dtype)
  lengths = [length] * batch

  def attend(queries, table, pages, stops):
    with jax.default_matmul_precision('highest'):
      return paged_xla.paged_attention(queries, pages, table, stops, softmax_scale=head_dim**-0.5, **config)

  count = decode.calls(context, (batch, length))

  def make() -> Callable[[int], Any]:
    shared = pool.pages, jnp.asarray(lengths, jnp.int32)
    return chained(attend, [draw(q.shape, q.dtype, 0)], pool.tables(context, lengths), shared, count)

  title = f'{decode.title((batch, length))}, {q.dtype.name}'
  about = Choice('paged_attention', title, _facts(pool, q, lengths) | {'query_tokens': 1}, config)
  return Case(f'{title}, {_XLA}, {_said(config)}', make, about, count)


def _said(config: Mapping[str, Any]) -> str:
  return ', '.join(f'{name}={value}' for name, value in config.items())


def _facts(pool: Pool, q: jax.ShapeDtypeStruct, lengths: list[int]) -> dict[str, int | str]:
  layout = PageLayout.of(pool.pages.shape, q.shape[-1])
  width = max(-(-length // pool.page_size) for length in lengths)
  return arguments.describe(layout, q, pool.pages, jax.ShapeDtypeStruct((len(lengths), width), jnp.int32))
