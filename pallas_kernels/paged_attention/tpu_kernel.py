"""The grid step of paged decode attention on TPU: copies in, products, softmax, copies out."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.online_softmax import HIDDEN, LOG2_E, NOTHING
from pallas_kernels.paged_attention.tpu_problem import Problem
from pallas_kernels.tiles import LANES

BLOCK_BITS = 14  # of a list's item, for the block's number
_UNROLLED_COPIES = 16  # copies that are started in a straight line, at a quarter of what a loop over them costs


@dataclasses.dataclass
class Step:
  """A grid step as the kernel runs it: it starts the copies of its blocks, and attends to those of the step before."""

  problem: Problem
  # The kernel's references, by name:
  prefetched: Any  # lengths [B], items [cores · items] and maybe tables [B · blocks · pages], in scalar memory
  operands: Any  # q [B, C·R, D], pages [P, A, C, G, W], maybe scales [P, 2, K, G] and tables in HBM; sinks [C·R, 128]
  results: Any  # out [B, C·R, D] and maybe lse [B, C·R, 128] in HBM
  scratch: Any  # two slots of blocks' pages, queries, results; each row's own lanes, top, total and sum; semaphores
  core: Any  # which of the cores runs the step

  def run(self) -> None:
    step: Any = pl.program_id(1)
    steps: Any = pl.num_programs(1) - 1
    if self.problem.static_blocks is not None:
      steps = self.problem.static_steps
    if 'tables' in self.operands:
      pl.when((step == 0) & (steps > 0))(functools.partial(self._look_up, step))
      pl.when(step + 1 < steps)(functools.partial(self._look_up, step + 1))
    pl.when(step < steps)(functools.partial(self._start, step))
    pl.when(step == 0)(self._mark_lanes)
    pl.when(step > 0)(functools.partial(self._attend, step - 1))

    @pl.when(step == steps)
    def _():
      pl.when(steps >= 2)(functools.partial(self._results, steps - 2, wait=True))
      pl.when(steps >= 1)(functools.partial(self._results, steps - 1, wait=True))

  def _item(self, step, index):
    items = self.prefetched['items'].shape[0] // self.problem.cores
    return self.core * items + step * self.problem.config.blocks + index

  def _owner(self, item):
    """The sequence of an item's block; B where the list has ended."""
    return self.prefetched['items'][item] >> BLOCK_BITS

  def _block(self, step, index):
    """The number of an item's block in its sequence."""
    return self.prefetched['items'][self._item(step, index)] & ((1 << BLOCK_BITS) - 1)

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
    """The groups of pages of the block with tokens that are seen: the first, and the one after the last."""
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

      first, stop = self._copies(step, index)
      _for_each(first, stop, max(_UNROLLED_COPIES // self.problem.copy_pages, 1), start)

  def _sequence(self, step, index):
    return jnp.minimum(self._owner(self._item(step, index)), self.problem.batch - 1)

  def _row(self, step, index):
    """The row of the block's page numbers among those of all blocks of all sequences."""
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
    slot = step % 2
    parts = self._parts()
    scores = self._scores(step, slot, parts[0])
    for part, following in itertools.zip_longest(parts, parts[1:]):
      coming = self._scores(step, slot, following) if following else None
      self._weigh(step, slot, part, scores)
      scores = coming
    self._results(step, wait=False)

  def _parts(self) -> list[tuple[range, int]]:
    """The products of a grid step, each by its blocks and its share of their columns."""
    blocks, joined = self.problem.config.blocks, self.problem.joined
    firsts, shares = range(0, blocks, joined), range(self.problem.columns // self.problem.share)
    return [(range(first, first + joined), share) for first in firsts for share in shares]

  def _rows(self, share) -> slice:
    """The query rows of a sequence that belong to a share."""
    return slice(share * self.problem.share_rows, (share + 1) * self.problem.share_rows)

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

      if (
        self.problem.static_blocks == 1 and self.problem.batch % (self.problem.cores * self.problem.config.blocks) == 0
      ):
        copy()
      else:
        pl.when((sequence < self.problem.batch) & (self._owner(item + 1) != sequence))(copy)

  def _mark_lanes(self) -> None:
    """Write the factors of queries: the scale in the lanes of their own keys, 0 in all other lanes."""
    problem, own = self.problem, self.scratch['own']
    scale = problem.softmax_scale * (LOG2_E if problem.soft_cap is None else 1 / problem.soft_cap)
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, own.shape, axis) for axis in range(2))
    marks: Any = 0.0
    for first, lanes in self._own_lanes():
      of_rows = (row >= first) & (row < first + problem.group * problem.query_tokens)
      marks = jnp.where(of_rows & (lane >= lanes) & (lane < lanes + problem.head_dim), scale, marks)
    own[...] = jnp.broadcast_to(marks, own.shape)

  def _own_lanes(self):
    """First row and first lane of each key/value head in a product."""
    problem = self.problem
    for column, head in itertools.product(range(problem.joined * problem.share), range(problem.heads)):
      row = column * problem.column_rows + head * problem.group * problem.query_tokens
      yield row, column * problem.width + head * problem.head_dim

  def _columns(self, slot, index, share, which):
    """Keys (0) or values (-1) of the columns that share a product, side by side: `[block, share · W]`."""
    problem = self.problem
    which %= problem.page[0]
    columns = [
      self.scratch['page'][slot, index, :, which, column].reshape(problem.block_tokens, problem.width)
      for column in range(share * problem.share, (share + 1) * problem.share)
    ]
    return jnp.concatenate(columns, axis=1).astype(self.scratch['query'].dtype)

  def _scores(self, step, slot, part):
    """Scores `[rows, block]` of the queries that share a product."""
    problem, (indices, share) = self.problem, part
    queries = [self.scratch['query'][slot, index, self._rows(share)].astype(jnp.float32) for index in indices]
    column = jnp.concatenate([jnp.concatenate(queries, axis=0)] * (problem.width // problem.head_dim), axis=1)
    q = jnp.concatenate([column] * (problem.joined * problem.share), axis=1) * self.scratch['own'][...]
    q = q.astype(self.scratch['query'].dtype)
    blocks = [self._columns(slot, index, share, 0) for index in indices]
    if len(blocks) > 1:  # what one block holds of a token may be anything where another block has that token
      blocks = [self._seen(step, index, block) for index, block in zip(indices, blocks, strict=True)]
    keys = jnp.concatenate(blocks, axis=1)
    scores = jax.lax.dot_general(
      q, keys, (((1,), (1,)), ((), ())), precision=_precision(q.dtype), preferred_element_type=jnp.float32
    )
    return self._scale(scores, slot, part, 0, True)

  def _seen(self, step, index, tokens):
    """`[block, X]` with zeros for tokens of which no query sees anything: what is there may be anything."""
    token = jax.lax.broadcasted_iota(jnp.int32, (self.problem.block_tokens, 1), 0)
    first, stop = self._span(step, index)
    return jnp.where((token >= first) & (token < stop), tokens, 0)

  def _scale(self, rows, slot, part, which, visible):
    """`[rows, block]` times the scales of each row's head and each visible token, of keys (0) or values (1)."""
    if 'scale' not in self.scratch:
      return rows
    problem, (indices, share) = self.problem, part
    row = jax.lax.broadcasted_iota(jnp.int32, (rows.shape[0], 1), 0)
    scales: Any = 0.0
    numbers = range(share * problem.share * problem.heads, (share + 1) * problem.share * problem.heads)
    for (first, _), (index, number) in zip(self._own_lanes(), itertools.product(indices, numbers), strict=True):
      own = [
        self.scratch['scale'][slot, index, page, which, number : number + 1] for page in range(problem.block_pages)
      ]
      scales = jnp.where(row >= first, jnp.concatenate(own, axis=1), scales)
    return rows * jnp.where(visible, scales, 0)  # of hidden tokens they may be anything

  def _visible(self, step, indices):
    """A mask of the tokens that rows see of their blocks: `[1, block]` if all see the same, else `[rows, block]`."""
    problem = self.problem
    token = jax.lax.broadcasted_iota(jnp.int32, (1, problem.block_tokens), 1)
    row = jax.lax.broadcasted_iota(jnp.int32, (problem.joined * problem.share_rows, 1), 0)
    length: Any = None
    for place, index in enumerate(indices):
      left = self._length(step, index) - self._block(step, index) * problem.block_tokens
      length = left if length is None else jnp.where(row >= place * problem.share_rows, left, length)
    if problem.query_tokens > 1:  # a row's position lies so far behind the last
      length -= problem.query_tokens - 1 - (row % problem.column_rows) % problem.query_tokens
    visible = token < length
    if problem.sliding_window is not None:
      visible &= token >= length - problem.sliding_window
    return visible

  def _weigh(self, step, slot, part, scores) -> None:
    """Weigh the values of blocks by themselves, so that nothing waits for the blocks before, and add them to those."""
    problem, (indices, share) = self.problem, part
    if problem.soft_cap is not None:
      scores = jnp.tanh(scores) * (problem.soft_cap * LOG2_E)
    visible = self._visible(step, indices)
    scores = jnp.where(visible, scores, HIDDEN)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp2(scores - top)
    total = weights.sum(-1, keepdims=True)

    values = [self._seen(step, index, self._columns(slot, index, share, -1)) for index in indices]
    weights = self._scale(weights, slot, part, 1, visible).astype(self.scratch['query'].dtype)
    products = jax.lax.dot(
      weights, jnp.concatenate(values, axis=1), precision=_precision(weights.dtype), preferred_element_type=jnp.float32
    )
    out = self._own_sums(products)
    for place, index in enumerate(indices):
      rows = slice(place * problem.share_rows, (place + 1) * problem.share_rows)
      self._add(step, slot, index, share, top[rows], total[rows], out[rows])

  def _own_sums(self, products):
    """Of products with the values of all columns that share one, `[rows, columns · W]`, each row's own `[rows, D]`."""
    problem = self.problem
    row = jax.lax.broadcasted_iota(jnp.int32, (products.shape[0], 1), 0)
    columns: Any = 0.0
    for column in range(problem.joined * problem.share):
      own = products[:, column * problem.width : (column + 1) * problem.width]
      columns = jnp.where(row >= column * problem.column_rows, own, columns)
    first = problem.head_dim if problem.page[0] == 1 else 0  # values stand behind keys
    out = columns[:, first : first + problem.head_dim]
    for head in range(1, problem.heads):
      of_head = row % problem.column_rows >= head * problem.group * problem.query_tokens
      out = jnp.where(of_head, columns[:, head * problem.head_dim : (head + 1) * problem.head_dim], out)
    return out

  def _add(self, step, slot, index, share, top, total, out) -> None:
    """Add a block's part to what its sequence has so far, and give out the sum."""
    problem, state, rows = self.problem, self.scratch, self._rows(share)
    item = self._item(step, index)
    before = self._owner(jnp.maximum(item - 1, 0))
    fresh = (step * problem.config.blocks + index == 0) | (before != self._owner(item))
    old_top: Any = NOTHING
    old_total: Any = 0.0
    if 'sinks' in self.operands:
      old_top, old_total = self.operands['sinks'][rows, :1], 1.0
    old_top = jnp.where(fresh, old_top, state['top'][rows, :1])
    old_total = jnp.where(fresh, old_total, state['total'][rows, :1])
    new_top = jnp.maximum(old_top, top)
    kept, share_of_new = jnp.exp2(old_top - new_top), jnp.exp2(top - new_top)
    total = old_total * kept + total * share_of_new
    out = jnp.where(fresh, 0, state['sum'][rows]) * kept + out * share_of_new
    state['top'][rows] = jnp.broadcast_to(new_top, (problem.share_rows, LANES))
    state['total'][rows] = jnp.broadcast_to(total, (problem.share_rows, LANES))
    state['sum'][rows] = out
    state['out'][slot, index, rows] = (out / jnp.where(total > 0, total, 1)).astype(state['out'].dtype)
    if 'lse' in state:
      lse = jnp.where(total > 0, (new_top + jnp.log2(total)) / LOG2_E, -jnp.inf)
      state['lse'][slot, index, rows] = jnp.broadcast_to(lse, (problem.share_rows, LANES))


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
