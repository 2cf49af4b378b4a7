"""Paged decode attention on TPU: the blocks of all sequences are one list, and a grid step attends to a few of them.

A grid step starts the copies of the next step's pages, waits for its own, and then runs straight on: the product of the
next queries and keys is issued before the softmax of these, so that the matrix units need not wait for the vector units.
Queries of several heads share one product as a block-diagonal matrix. That costs nothing: the matrix units are bound by
every key and value having to be pushed into them once, and not by the few rows that stream past.

The softmax is online (Milakov and Gimelshein 2018), in powers of two, its state in scratch from block to block.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LOG2_E = math.log2(math.e)
_NOTHING = -1e30  # the top of a row that has seen nothing; finite, so that differences stay free of NaN
_HIDDEN = 2 * _NOTHING  # so far below any top that its exponential is 0
_LANES = 128
_SUBLANES = 8
_BLOCK_BITS = 14  # of a list's item, for the block's number
_UNROLLED_COPIES = 16  # copies that are started in a straight line, at a quarter of what a loop over them costs
_PREFETCHED_PAGES = 65_536  # page numbers that may lie in scalar memory all the time; else blocks look theirs up


@dataclasses.dataclass(frozen=True)
class Config:
  """How the work is cut."""

  block_tokens: int = 2048  # cached tokens of one sequence that are attended to at once
  blocks: int = 1  # such blocks a grid step; several where heads are few
  share: int = 4  # page columns (heads, or what is packed into their lanes) whose queries share a product
  copy_tokens: int = 128  # tokens whose pages are copied together; what is read of a block is a multiple of these


@dataclasses.dataclass(frozen=True)
class _Problem:
  """The sizes of one call, after the queries are laid out in rows."""

  config: Config
  batch: int
  query_tokens: int
  query_heads: int
  head_dim: int
  page: tuple[int, ...]  # [A, C, G, W]
  table_pages: int  # N
  cores: int
  softmax_scale: float
  sliding_window: int | None
  soft_cap: float | None
  static_blocks: int | None  # blocks that every sequence fills, where known at trace time

  @property
  def columns(self) -> int:
    return self.page[1]

  @property
  def page_size(self) -> int:
    return self.page[2]

  @property
  def width(self) -> int:
    return self.page[3]

  @property
  def heads(self) -> int:
    """Key/value heads a column."""
    return self.page[0] * self.width // (2 * self.head_dim)

  @property
  def group(self) -> int:
    """Query heads a key/value head."""
    return self.query_heads // (self.columns * self.heads)

  @property
  def share(self) -> int:
    """Columns that share a product."""
    return next(n for n in range(min(self.config.share, self.columns), 0, -1) if self.columns % n == 0)

  @property
  def column_rows(self) -> int:
    """Query rows of one column, padded so that those which share a product fill whole sublanes."""
    return _round_up(self.heads * self.group * self.query_tokens, _SUBLANES // math.gcd(self.share, _SUBLANES))

  @property
  def rows(self) -> int:
    return self.columns * self.column_rows

  @property
  def share_rows(self) -> int:
    return self.share * self.column_rows

  @property
  def copy_pages(self) -> int:
    """Pages whose copies are started together."""
    return min(max(self.config.copy_tokens // self.page_size, 1), _round_up_power(self.table_pages))

  @property
  def block_pages(self) -> int:
    pages = min(self.config.block_tokens // self.page_size, self.table_pages)
    return _round_up(max(pages, 1), self.copy_pages)

  @property
  def block_tokens(self) -> int:
    return self.block_pages * self.page_size

  @property
  def table_blocks(self) -> int:
    """Blocks of the longest sequence."""
    return -(-self.table_pages // self.block_pages)

  @property
  def static_steps(self) -> int:
    """Grid steps of a core if every sequence fills `static_blocks` blocks."""
    return -(-(-(-self.batch // self.cores) * self.static_blocks) // self.config.blocks)

  @property
  def max_steps(self) -> int:
    """Grid steps of a core that has all the work."""
    return -(-self.batch * self.table_blocks // self.config.blocks)


def _round_up(value: int, multiple: int) -> int:
  return -(-value // multiple) * multiple


def _round_up_power(value: int) -> int:
  return 1 << (value - 1).bit_length()


def paged_attention(
  q: jax.Array,
  pages: jax.Array,
  tables: jax.Array,
  lengths: jax.Array,
  *,
  softmax_scale: float,
  sliding_window: int | None = None,
  soft_cap: float | None = None,
  sinks: jax.Array | None = None,
  scales: jax.Array | None = None,
  return_lse: bool = False,
  config: Config = Config(),
  cores: int = 1,
  vmem_limit_bytes: int | None = None,
  interpret: Any = False,
  static_blocks: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `pallas_kernels.paged_attention.paged_attention`.

  Args:
    q: `[B, H, D]` or `[B, Q, H, D]`.
    pages: `[P, A, C, G, W]`.
    tables: `[B, N]`.
    lengths: `[B]`.
    softmax_scale: Multiplies the scores.
    sliding_window: Tokens that a query sees, or None.
    soft_cap: Bounds the scores, or None.
    sinks: `[H]` or None.
    scales: `[P, 2, K, G]` of quantized pages, or None.
    return_lse: Whether to return the logarithm of each softmax's sum too.
    config: How to cut the work.
    cores: Cores of the device that share the grid.
    vmem_limit_bytes: What the kernel may use; what it is estimated to need if None.
    interpret: As for `pallas_call`.
    static_blocks: Promises that each sequence fills this many blocks to the last token. Trip counts are known at trace
      time then, which a static cost needs; the program is the same.
  """
  queries = q if q.ndim == 4 else q[:, None]
  problem = _Problem(
    config=config,
    batch=queries.shape[0],
    query_tokens=queries.shape[1],
    query_heads=queries.shape[2],
    head_dim=queries.shape[3],
    page=pages.shape[1:],
    table_pages=tables.shape[1],
    cores=cores,
    softmax_scale=softmax_scale,
    sliding_window=sliding_window,
    soft_cap=soft_cap,
    static_blocks=static_blocks,
  )
  work = _list_work(problem, lengths)
  results = _attend(problem, lengths, work, _rows(problem, queries, pages.dtype), pages, tables, scales, sinks, return_lse, interpret)
  position = lengths[:, None] - problem.query_tokens + jnp.arange(problem.query_tokens)  # [B, Q]
  seen = (position >= 0) & (lengths[:, None] > 0)
  out = _unrows(problem, results['out'])
  out = jnp.where(seen[..., None, None], out, 0).reshape(q.shape)
  if not return_lse:
    return out
  lse = _unrows(problem, results['lse'])[..., 0]
  return out, jnp.where(seen[..., None], lse, -jnp.inf).reshape(q.shape[:-1])


class _Work(NamedTuple):
  """The blocks of all sequences as one list a core, of which every grid step takes `blocks`."""

  items: jax.Array  # [cores · items] whose block (B where a list has ended), and which of its sequence in the low bits
  steps: int | jax.Array  # of the core that has most


def _list_work(problem: _Problem, lengths: jax.Array) -> _Work:
  """A sequence's blocks stand together, in order, in the list of one core: each is joined to those before it."""
  batch, blocks, tokens = problem.batch, problem.config.blocks, problem.block_tokens
  first = jnp.zeros_like(lengths)
  if problem.sliding_window is not None:
    first = jnp.maximum(lengths - problem.query_tokens + 1 - problem.sliding_window, 0) // tokens
  count = jnp.where(lengths > 0, -(-lengths // tokens) - first, 0)
  # Comparing with all sequences is cheaper here than cumulative sums, searches and gathers, each a kernel of its own.
  order = jnp.arange(batch)
  ends = jnp.sum(jnp.where(order <= order[:, None], count, 0), axis=1)
  stops = jnp.stack([jnp.zeros_like(ends[-1]), ends[-1]])
  if problem.cores > 1:  # cores take equal shares of the list, moved to where a sequence ends
    share = jnp.arange(problem.cores + 1) * ends[-1] // problem.cores
    stops = jnp.max(jnp.where(ends <= share[:, None], ends, 0), axis=1)  # [cores + 1]
  place = stops[:-1, None] + jnp.arange((problem.max_steps + 1) * blocks)  # [cores, items]
  sequence = jnp.sum(place[..., None] >= ends, axis=-1, dtype=jnp.int32)
  own = sequence[..., None] == order
  block = place + jnp.sum(jnp.where(own, first - ends + count, 0), axis=-1)
  sequence = jnp.where(place < stops[1:, None], sequence, batch)
  block = jnp.where(sequence < batch, block, 0)
  steps = -(-jnp.max(stops[1:] - stops[:-1]) // blocks)
  if problem.static_blocks is not None:
    steps = problem.static_steps
  return _Work(((sequence << _BLOCK_BITS) | block).reshape(-1), steps)


def _rows(problem: _Problem, q: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Queries `[B, Q, H, D]` as rows `[B, C·R, W]`, scaled, each with zeros in the lanes that are not its own head's."""
  batch, tokens, _, head_dim = q.shape
  scale = problem.softmax_scale * (_LOG2_E if problem.soft_cap is None else 1 / problem.soft_cap)
  q = (q.astype(jnp.float32) * scale).astype(dtype if jnp.issubdtype(dtype, jnp.floating) else q.dtype)
  q = q.reshape(batch, tokens, problem.columns, problem.heads, problem.group, head_dim).transpose(0, 2, 3, 4, 1, 5)
  lanes = [
    jnp.pad(q[:, :, e], ((0, 0),) * 4 + ((e * head_dim, problem.width - (e + 1) * head_dim),))
    for e in range(problem.heads)
  ]
  q = jnp.stack(lanes, 2).reshape(batch, problem.columns, -1, problem.width)
  q = jnp.pad(q, ((0, 0), (0, 0), (0, problem.column_rows - q.shape[2]), (0, 0)))
  return q.reshape(batch, problem.rows, problem.width)


def _unrows(problem: _Problem, rows: jax.Array) -> jax.Array:
  """Results `[B, C·R, W]` of the rows as `[B, Q, H, D]`, from the lanes of each row's own head."""
  batch, _, width = rows.shape
  head_dim = problem.head_dim
  real = problem.heads * problem.group * problem.query_tokens
  rows = rows.reshape(batch, problem.columns, problem.column_rows, width)[:, :, :real]
  rows = rows.reshape(batch, problem.columns, problem.heads, problem.group, problem.query_tokens, width)
  first = problem.width - head_dim if problem.page[0] == 1 else 0  # values stand behind keys
  heads = [rows[:, :, e, ..., first + e * head_dim : first + (e + 1) * head_dim] for e in range(problem.heads)]
  return jnp.stack(heads, 2).transpose(0, 4, 1, 2, 3, 5).reshape(batch, problem.query_tokens, -1, head_dim)


def _of_heads(problem: _Problem, values: jax.Array) -> jax.Array:
  """One value a query head `[H]` as `[C·R, 128]`, for every row and lane."""
  values = jnp.repeat(values.reshape(problem.columns, -1), problem.query_tokens, axis=1)
  values = jnp.pad(values, ((0, 0), (0, problem.column_rows - values.shape[1])))
  return jnp.broadcast_to(values.reshape(-1, 1), (problem.rows, _LANES))


def _attend(problem, lengths, work, q, pages, tables, scales, sinks, return_lse, interpret):
  """Results of the rows by name: 'out' `[B, C·R, W]` and maybe 'lse' `[B, C·R, 128]`; unwritten for empty sequences."""
  blocks, rows, width = problem.config.blocks, problem.rows, problem.width
  hbm = pl.BlockSpec(memory_space=pltpu.HBM)
  operands = {'q': q, 'pages': pages}
  in_specs = {'q': hbm, 'pages': hbm}
  scratch = {
    'page': pltpu.VMEM((2, blocks, problem.block_pages, *problem.page), pages.dtype),
    'query': pltpu.VMEM((2, blocks, rows, width), q.dtype),
    'top': pltpu.VMEM((rows, _LANES), jnp.float32),
    'total': pltpu.VMEM((rows, _LANES), jnp.float32),
    'sum': pltpu.VMEM((rows, width), jnp.float32),
    'arrived': pltpu.SemaphoreType.DMA((4, 2, blocks)),  # page numbers, queries, pages and scales, of each block
  }
  prefetched = {'lengths': lengths, 'items': work.items}
  padding = problem.table_blocks * problem.block_pages - tables.shape[1]
  if problem.copy_pages > 1:  # a group of pages may end behind those that the sequence holds: any will do there
    tables = jnp.clip(tables, 0, pages.shape[0] - 1)
  tables = jnp.pad(tables, ((0, 0), (0, padding)))
  if tables.size <= _PREFETCHED_PAGES:
    prefetched['tables'] = tables.reshape(-1)
  else:
    operands['tables'], in_specs['tables'] = tables.reshape(-1, 1, problem.block_pages), hbm
    scratch['tables'] = pltpu.SMEM((2, blocks, 1, problem.block_pages), jnp.int32)
  if scales is not None:
    operands['scales'], in_specs['scales'] = scales, hbm
    scratch['scale'] = pltpu.VMEM((2, blocks, problem.block_pages, *scales.shape[1:]), scales.dtype)
  if sinks is not None:
    operands['sinks'] = _of_heads(problem, sinks.astype(jnp.float32) * _LOG2_E)
    in_specs['sinks'] = pl.BlockSpec((rows, _LANES), lambda *_: (0, 0))
  shapes = {'out': jax.ShapeDtypeStruct((problem.batch, rows, width), q.dtype)}
  if return_lse:
    shapes['lse'] = jax.ShapeDtypeStruct((problem.batch, rows, _LANES), jnp.float32)
  for name, shape in shapes.items():
    scratch[name] = pltpu.VMEM((2, blocks, *shape.shape[1:]), shape.dtype)
  scratch['written'] = pltpu.SemaphoreType.DMA((len(shapes), 2, blocks))

  if not interpret:  # the static cost of v5e knows no copies out of vector memory, where XLA may put small arrays
    prefetched = {name: pltpu.with_memory_space_constraint(x, pltpu.HBM) for name, x in prefetched.items()}

  def kernel(*refs):
    prefetched_refs, (operands, results, scratch) = refs[:-3], refs[-3:]
    prefetched_refs = dict(zip(prefetched, prefetched_refs, strict=True))
    _Step(problem, prefetched_refs, operands, results, scratch, pl.program_id(0)).run()

  return pl.pallas_call(
    kernel,
    out_shape=shapes,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(prefetched),
      grid=(problem.cores, work.steps + 1),
      in_specs=[in_specs],
      out_specs=dict.fromkeys(shapes, hbm),
      scratch_shapes=[scratch],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'),
      vmem_limit_bytes=_vmem_bytes(problem, pages.dtype, q.dtype),
      disable_bounds_checks=True,
    ),
    interpret=interpret,
    name='paged_attention',
  )(*prefetched.values(), operands)


@dataclasses.dataclass
class _Step:
  """One grid step as the kernel runs it: starts the copies of its own blocks, and attends to those of the step before."""

  problem: _Problem
  prefetched: Any  # the kernel's references, by name
  operands: Any
  results: Any
  scratch: Any
  core: Any

  def run(self) -> None:
    step, steps = pl.program_id(1), pl.num_programs(1) - 1
    if self.problem.static_blocks is not None:
      steps = self.problem.static_steps
    if 'tables' in self.operands:
      pl.when(step == 0)(functools.partial(self._look_up, step))
      pl.when(step + 1 < steps)(functools.partial(self._look_up, step + 1))
    pl.when(step < steps)(functools.partial(self._start, step))
    pl.when(step > 0)(functools.partial(self._attend, step - 1))

    @pl.when(step == steps)
    def _():
      pl.when(steps >= 2)(functools.partial(self._results, steps - 2, wait=True))
      pl.when(steps >= 1)(functools.partial(self._results, steps - 1, wait=True))

  def _item(self, step, index):
    items = self.prefetched['items'].shape[0] // self.problem.cores
    return self.core * items + step * self.problem.config.blocks + index

  def _owner(self, item):
    """Whose block an item is; B where the list has ended."""
    return self.prefetched['items'][item] >> _BLOCK_BITS

  def _block(self, step, index):
    """Which block of its sequence an item is."""
    return self.prefetched['items'][self._item(step, index)] & ((1 << _BLOCK_BITS) - 1)

  def _length(self, step, index):
    """Cached tokens of the sequence whose block it is; none where the list has ended."""
    sequence = self._owner(self._item(step, index))
    length = self.prefetched['lengths'][jnp.minimum(sequence, self.problem.batch - 1)]
    return jnp.where(sequence < self.problem.batch, length, 0)

  def _span(self, step, index):
    """The first token of the block that any query sees, and the token after the last."""
    tokens = self.problem.block_tokens
    if self.problem.static_blocks is not None:
      return 0, tokens
    length, start = self._length(step, index), self._block(step, index) * tokens
    stop = jnp.clip(length - start, 0, tokens)
    if self.problem.sliding_window is None:
      return 0, stop
    return jnp.clip(length - self.problem.query_tokens + 1 - self.problem.sliding_window - start, 0, stop), stop

  def _copies(self, step, index):
    """Which groups of pages of the block hold tokens that are seen: the first, and the one after the last."""
    tokens = self.problem.copy_pages * self.problem.page_size
    first, stop = self._span(step, index)
    return first // tokens, (stop + tokens - 1) // tokens

  def _look_up(self, step) -> None:
    """Start the copies of the blocks' page numbers."""
    for index in range(self.problem.config.blocks):
      self._page_numbers(step, index).start()

  def _start(self, step) -> None:
    for index in range(self.problem.config.blocks):
      if 'tables' in self.operands:
        self._page_numbers(step, index).wait()
      self._queries(step, index).start()

      def start(group, index=index):
        for page in range(self.problem.copy_pages):
          place = group * self.problem.copy_pages + page
          number = self._page_number(step, index, place)
          for pool, buffer, arrived in self._pools(step, index):
            pltpu.make_async_copy(pool.at[number], buffer.at[place], arrived).start()

      _for_each(*self._copies(step, index), max(_UNROLLED_COPIES // self.problem.copy_pages, 1), start)

  def _sequence(self, step, index):
    return jnp.minimum(self._owner(self._item(step, index)), self.problem.batch - 1)

  def _row(self, step, index):
    """Where the block's page numbers stand among those of all blocks of all sequences."""
    return self._sequence(step, index) * self.problem.table_blocks + self._block(step, index)

  def _page_number(self, step, index, place):
    if 'tables' in self.prefetched:
      return self.prefetched['tables'][self._row(step, index) * self.problem.block_pages + place]
    return self.scratch['tables'][step % 2, index, 0, place]

  def _page_numbers(self, step, index):
    slot = step % 2
    source = self.operands['tables'].at[self._row(step, index)]
    return self._copy(source, self.scratch['tables'].at[slot, index], 0, slot, index)

  def _queries(self, step, index):
    slot = step % 2
    source = self.operands['q'].at[self._sequence(step, index)]
    return self._copy(source, self.scratch['query'].at[slot, index], 1, slot, index)

  def _copy(self, source, target, kind, slot, index):
    return pltpu.make_async_copy(source, target, self.scratch['arrived'].at[kind, slot, index])

  def _pools(self, step, index):
    slot = step % 2
    for place, (pool, buffer) in enumerate((('pages', 'page'), ('scales', 'scale')), 2):
      if pool in self.operands:
        arrived = self.scratch['arrived'].at[place, slot, index]
        yield self.operands[pool], self.scratch[buffer].at[slot, index], arrived

  def _wait(self, step) -> None:
    def wait(buffer, arrived):
      pltpu.make_async_copy(buffer, buffer, arrived).wait()  # for as many bytes as the buffer holds

    for index in range(self.problem.config.blocks):
      self._queries(step, index).wait()
      first, stop = self._copies(step, index)
      for _, buffer, arrived in self._pools(step, index):
        if self.problem.static_blocks is not None:
          wait(buffer, arrived)
          continue
        part = buffer.at[pl.ds(0, self.problem.copy_pages)]
        all_copied = stop - first == self.problem.block_pages // self.problem.copy_pages
        pl.when(all_copied)(functools.partial(wait, buffer, arrived))

        @pl.when(jnp.logical_not(all_copied))
        def _(first=first, stop=stop, part=part, arrived=arrived):
          jax.lax.fori_loop(first, stop, lambda *_: wait(part, arrived), None)

  def _attend(self, step) -> None:
    self._wait(step)
    pl.when(step >= 2)(functools.partial(self._results, step - 2, wait=True))  # whose room this step's take
    problem = self.problem
    slot = step % 2
    parts = [(index, share) for index in range(problem.config.blocks) for share in range(problem.columns // problem.share)]
    scores = self._scores(slot, *parts[0])
    for place, (index, share) in enumerate(parts):
      coming = self._scores(slot, *parts[place + 1]) if place + 1 < len(parts) else None
      self._join(step, slot, index, share, scores)
      scores = coming
    self._results(step, wait=False)

  def _results(self, step, wait: bool) -> None:
    """Start the copies of the results of sequences that end here, or wait for them."""
    slot = step % 2
    for index in range(self.problem.config.blocks):
      item = self._item(step, index)
      sequence = self._owner(item)

      def copy(index=index, sequence=sequence):
        for kind, name in enumerate(self.results):
          arrived = self.scratch['written'].at[kind, slot, index]
          copy = pltpu.make_async_copy(self.scratch[name].at[slot, index], self.results[name].at[sequence], arrived)
          copy.wait() if wait else copy.start()

      if self.problem.static_blocks == 1:
        copy()
      else:
        pl.when((sequence < self.problem.batch) & (self._owner(item + 1) != sequence))(copy)

  def _columns(self, slot, index, share, which):
    """Keys (0) or values (-1) of the columns that share a product, side by side: `[block, share · W]`."""
    problem = self.problem
    which %= problem.page[0]
    columns = [
      self.scratch['page'][slot, index, :, which, column].reshape(problem.block_tokens, problem.width)
      for column in range(share * problem.share, (share + 1) * problem.share)
    ]
    return jnp.concatenate(columns, axis=1).astype(self.scratch['query'].dtype)

  def _scores(self, slot, index, share):
    """Scores `[rows, block]` of the queries that share a product."""
    problem = self.problem
    rows = slice(share * problem.share_rows, (share + 1) * problem.share_rows)
    q = self.scratch['query'][slot, index, rows]
    own = [q.astype(jnp.float32) * self._owns(column).astype(jnp.float32) for column in range(problem.share)]
    q = jnp.concatenate(own, axis=1).astype(q.dtype)
    keys = self._columns(slot, index, share, 0)
    scores = jax.lax.dot_general(
      q, keys, (((1,), (1,)), ((), ())), precision=_precision(q.dtype), preferred_element_type=jnp.float32
    )
    return self._scale(scores, slot, index, share, 0)

  def _scale(self, rows, slot, index, share, which):
    """`[rows, block]` times the scales of each row's head and each token, of keys (0) or values (1)."""
    if 'scale' not in self.scratch:
      return rows
    problem = self.problem
    row = jax.lax.broadcasted_iota(jnp.int32, (problem.share_rows, 1), 0)
    scales: Any = 0.0
    for column, head in itertools.product(range(problem.share), range(problem.heads)):
      number = (share * problem.share + column) * problem.heads + head
      own = [self.scratch['scale'][slot, index, page, which, number : number + 1] for page in range(problem.block_pages)]
      first = column * problem.column_rows + head * problem.group * problem.query_tokens
      scales = jnp.where(row >= first, jnp.concatenate(own, axis=1), scales)
    return rows * scales

  def _owns(self, column):
    """Which rows of those that share a product belong to a column, `[rows, 1]`."""
    row = jax.lax.broadcasted_iota(jnp.int32, (self.problem.share_rows, 1), 0)
    first = column * self.problem.column_rows
    return (row >= first) & (row < first + self.problem.column_rows)

  def _visible(self, step, index):
    """Which tokens of the block the rows see: `[1, block]`, or `[rows, block]` for several query tokens."""
    problem = self.problem
    start = self._block(step, index) * problem.block_tokens
    length = self._length(step, index) - start
    token = jax.lax.broadcasted_iota(jnp.int32, (1, problem.block_tokens), 1)
    behind = 0  # how far a row's position lies behind the last
    if problem.query_tokens > 1:
      row = jax.lax.broadcasted_iota(jnp.int32, (problem.share_rows, 1), 0)
      behind = problem.query_tokens - 1 - (row % problem.column_rows) % problem.query_tokens
    visible = token < length - behind
    if problem.sliding_window is not None:
      visible &= token >= length - behind - problem.sliding_window
    return visible

  def _join(self, step, slot, index, share, scores) -> None:
    """Join a block's part to what its sequence has so far, and give out the sum."""
    problem, state = self.problem, self.scratch
    rows = slice(share * problem.share_rows, (share + 1) * problem.share_rows)
    item = self._item(step, index)
    if problem.soft_cap is not None:
      scores = jnp.tanh(scores) * (problem.soft_cap * _LOG2_E)
    scores = jnp.where(self._visible(step, index), scores, _HIDDEN)
    before = self._owner(jnp.maximum(item - 1, 0))
    fresh = (step * problem.config.blocks + index == 0) | (before != self._owner(item))
    old_top, old_total = (_NOTHING, 0.0)
    if 'sinks' in self.operands:
      old_top, old_total = self.operands['sinks'][rows, :1], 1.0
    old_top = jnp.where(fresh, old_top, state['top'][rows, :1])
    old_total = jnp.where(fresh, old_total, state['total'][rows, :1])
    top = jnp.maximum(old_top, scores.max(-1, keepdims=True))
    weights = jnp.exp2(scores - top)
    kept = jnp.exp2(old_top - top)
    total = old_total * kept + weights.sum(-1, keepdims=True)

    token = jax.lax.broadcasted_iota(jnp.int32, (problem.block_tokens, 1), 0)
    first, stop = self._span(step, index)
    values = jnp.where((token >= first) & (token < stop), self._columns(slot, index, share, -1), 0)
    weights = self._scale(weights, slot, index, share, 1)
    products = jax.lax.dot(
      weights.astype(values.dtype), values, precision=_precision(values.dtype), preferred_element_type=jnp.float32
    )
    added = sum(
      jnp.where(self._owns(column), products[:, column * problem.width : (column + 1) * problem.width], 0)
      for column in range(problem.share)
    )
    out = jnp.where(fresh, 0, state['sum'][rows]) * kept + added
    state['top'][rows] = jnp.broadcast_to(top, (problem.share_rows, _LANES))
    state['total'][rows] = jnp.broadcast_to(total, (problem.share_rows, _LANES))
    state['sum'][rows] = out
    state['out'][slot, index, rows] = (out / jnp.where(total > 0, total, 1)).astype(state['out'].dtype)
    if 'lse' in state:
      lse = jnp.where(total > 0, (top + jnp.log2(total)) / _LOG2_E, -jnp.inf)
      state['lse'][slot, index, rows] = jnp.broadcast_to(lse, (problem.share_rows, _LANES))


def _for_each(first, stop, unrolled: int, body) -> None:
  """Run `body(i)` for i from first to stop, `unrolled` of them in a straight line as long as there are so many."""

  def several(turn, _):
    for i in range(unrolled):
      body(first + turn * unrolled + i)

  turns = (stop - first) // unrolled
  jax.lax.fori_loop(0, turns, several, None)
  jax.lax.fori_loop(first + turns * unrolled, stop, lambda i, _: body(i), None)


def _precision(dtype):
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _vmem_bytes(problem: _Problem, page_dtype: jnp.dtype, q_dtype: jnp.dtype) -> int:
  """Vector memory that the kernel needs: what it keeps, and room for what the compiler keeps between products."""
  blocks, tokens, rows, width = problem.config.blocks, problem.block_tokens, problem.rows, problem.width
  pages = 2 * blocks * problem.block_pages * math.prod(problem.page) * page_dtype.itemsize
  scales = 2 * blocks * 2 * problem.columns * problem.heads * tokens * 4 if page_dtype.itemsize == 1 else 0
  queries_and_results = 4 * blocks * rows * width * q_dtype.itemsize + 2 * blocks * rows * _LANES * 4
  state = rows * (width + 2 * _LANES) * 4
  scores = 6 * max(problem.share_rows, _SUBLANES) * tokens * 4
  values = 2 * problem.share * width * tokens * q_dtype.itemsize
  return pages + scales + queries_and_results + state + scores + values + (1 << 20)
