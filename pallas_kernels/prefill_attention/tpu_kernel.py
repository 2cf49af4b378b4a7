"""One grid step of the TPU kernel: a block of rows over the blocks of pages that it sees."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.online_softmax import HIDDEN, LOG2_E, NOTHING
from pallas_kernels.prefill_attention.tpu_problem import Problem
from pallas_kernels.tiles import SUBLANES

_ELSEWHERE = 1e30  # the top of another sequence's row: so high that this sequence's powers are 0
_OVERFLOW = 2.0**64  # a sum from which on sums of values might have overflowed
_BY_ROWS = (((1,), (1,)), ((), ()))  # a product of two matrices, both over their last axis


def _cdiv(a, b):
  return (a + b - 1) // b if isinstance(a, int) else jax.lax.div(a + (b - 1), jnp.int32(b))


def _floordiv(a, b):
  """The quotient of two numbers that are not negative."""
  return a // b if isinstance(a, int) else jax.lax.div(a, jnp.int32(b))


def _rem(a, b):
  """The remainder of two numbers that are not negative."""
  return a % b if isinstance(a, int) else jax.lax.rem(a, jnp.int32(b))


def _max(a, b):
  return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def _min(a, b):
  return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


@dataclasses.dataclass(frozen=True)
class Walk:
  """The cached blocks that one sequence's rows in one block of rows see, in the order of visits.

  Rows `low` to `high` are the sequence's; row t stands at position `before + t`. Blocks `interior` to
  `interior_end` are seen whole by all of them, `first` to `interior` and `interior_end` to `end` in part.
  """

  low: jax.Array
  high: jax.Array
  before: jax.Array
  first: jax.Array
  interior: jax.Array
  interior_end: jax.Array
  end: jax.Array

  @classmethod
  def of(cls, problem: Problem, first_row, start, stop, length):
    """The walk of the sequence with rows `start` to `stop` in the block of rows from `first_row` on."""
    low, high = _max(start, first_row), _min(stop, first_row + problem.config.block_rows)
    before = length - stop
    some = high > low
    first_position, last_position = _max(before + low, 0), _max(before + high - 1, 0)
    end = jnp.where(some, _floordiv(last_position, problem.block_tokens) + 1, 0)
    interior_end = jnp.where(some, _floordiv(first_position, problem.block_tokens), 0)
    first, interior = jnp.int32(0), jnp.int32(0)
    if problem.sliding_window is not None:
      first = _floordiv(_max(first_position - problem.sliding_window + 1, 0), problem.block_tokens)
      interior = _cdiv(_max(last_position - problem.sliding_window + 1, 0), problem.block_tokens)
      first = _min(first, end)
      interior = _min(_max(interior, first), end)
      interior_end = _max(interior_end, interior)
    return cls(low, high, before, first, interior, interior_end, end)

  @property
  def edges(self):
    return self.end - self.first - (self.interior_end - self.interior)

  @property
  def steps(self):
    return self.end - self.first

  def block(self, step):
    """The block that is visited at this step: those of the edges, then the interior."""
    upper = self.end - self.interior_end
    return jnp.where(
      step < upper,
      self.interior_end + step,
      jnp.where(step < self.edges, self.first + step - upper, self.interior + step - self.edges),
    )


class Kernel:
  """One grid step: its references, and what is done with them."""

  def __init__(self, problem: Problem, chunks: Sequence[tuple[int, int, int]] | None, block, refs, scratch):
    """`chunks` are each sequence's first row, the row past its last, and its length, if known at trace time."""
    self.problem, self.chunks = problem, chunks
    self.offsets, self.lengths, self.sinks = refs['offsets'], refs['lengths'], refs.get('sinks')
    self.q, self.tables, self.pages, self.scales = refs['q'], refs['tables'], refs['pages'], refs.get('scales')
    self.prefetched = len(self.tables.shape) == 1  # else a row of the table lies in `ids`
    self.out, self.lse = refs['out'], refs.get('lse')
    self.queries, self.top, self.total, self.sums, self.ids, self.arrived, self.ids_arrived, self.copied = scratch[:8]
    self.copied_scales: Any = None
    self.restored: Any = None
    if problem.quantized:
      self.copied_scales, self.restored = scratch[8:]
    self.first_row = block * problem.config.block_rows

  # The copies.

  def copy_table(self, sequence):
    """The copy of a sequence's page numbers into scalar memory, where those of all are not there already."""
    return pltpu.make_async_copy(self.tables.at[sequence], self.ids, self.ids_arrived)

  def start_table(self, sequence):
    if not self.prefetched:
      self.copy_table(sequence).start()

  def await_table(self, sequence):
    if not self.prefetched:
      self.copy_table(sequence).wait()

  def page(self, sequence, slot):
    """The page that a sequence has in a slot of its table, of which the copy has ended."""
    if not self.prefetched:
      return self.ids[0, slot]
    return self.tables[sequence * (self.tables.shape[0] // self.lengths.shape[0]) + slot]

  def fetch_block(self, sequence, slot, block, length):
    """Start the copies of a block's pages; past the last one, which may be anything, that one comes again."""
    last = _floordiv(length - 1, self.problem.page_size)
    for i in range(self.problem.block_pages):
      page = self.page(sequence, _min(block * self.problem.block_pages + i, last))
      pltpu.make_async_copy(self.pages.at[page], self.copied.at[slot, i], self.arrived.at[slot]).start()
      if self.problem.quantized:
        scales = self.copied_scales.at[slot, i]
        pltpu.make_async_copy(self.scales.at[page], scales, self.arrived.at[slot]).start()

  def await_block(self, slot):
    """Wait for a block once for all its pages; restore what is quantized."""
    pltpu.make_async_copy(self.copied.at[slot], self.copied.at[slot], self.arrived.at[slot]).wait()
    if self.problem.quantized:
      scales = self.copied_scales.at[slot]
      pltpu.make_async_copy(scales, scales, self.arrived.at[slot]).wait()
      _loop(0, self.problem.block_pages, lambda i: self.restore(slot, i))

  def restore(self, slot, page):
    """Multiply one page's keys and values by their scales."""
    problem = self.problem
    columns = [self.copied_scales[slot, page, kind].T for kind in range(2)]  # of keys and of values, [G, K] each
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, problem.width), 1)
    for part in range(problem.parts):
      for head in range(problem.heads):
        scale = jnp.zeros((problem.page_size, problem.width), jnp.float32)
        for segment in range(problem.width // problem.head_dim):
          kind, kv_head = problem.held_in(part, head, segment)
          column = columns[kind][:, kv_head : kv_head + 1]
          scale = jnp.where(lane >= segment * problem.head_dim, column, scale)
        stored = self.copied[slot, page, part, head].astype(jnp.float32)
        self.restored[page, part, head] = (stored * scale).astype(self.restored.dtype)

  # What a tile reads.

  def keys(self, slot, head, tile):
    return self._tokens(slot, head, 0, tile, 1)

  def values(self, slot, head, tile, count):
    """[W, count tiles of tokens], float32."""
    return self._tokens(slot, head, self.problem.parts - 1, tile, count).astype(jnp.float32)

  def _tokens(self, slot, head, part, tile, count):
    problem = self.problem
    pages = problem.tile_tokens // problem.page_size
    block = self.restored if problem.quantized else self.copied.at[slot]
    tokens = block[pl.ds(tile * pages, count * pages), part, head]
    return tokens.reshape(count * problem.tile_tokens, problem.width)

  # The softmax.

  def scores(self, slot, head, tiles, u, g):
    """[tokens, rows] of each tile of tokens."""
    q = self.queries[head, u, g]
    out = [
      jax.lax.dot_general(
        self.keys(slot, head, t), q, _BY_ROWS, preferred_element_type=jnp.float32, precision=self.precision
      )
      for t in tiles
    ]
    if self.problem.soft_cap is not None:
      out = [jnp.tanh(s) * (self.problem.soft_cap * LOG2_E) for s in out]
    return out

  @property
  def precision(self):
    return jax.lax.Precision.HIGHEST if self.queries.dtype == jnp.float32 else None

  def add(self, scores, values, head, u, g, own, running):
    """Add tiles of scores `[S, rows]` and their values `[W, S]` to the sums of the rows that are `own` `[1, rows]`."""
    at = self.place(head, u, g)
    top, total, sums = self.top[at], self.total[at], self.sums[at]
    if running:
      old = top
      top = functools.reduce(jnp.maximum, [_by_sublane(s).max(0) for s in scores], old)
      top = jnp.broadcast_to(top.max(0, keepdims=True), old.shape)
      top = jnp.where(own, top, old)
      self.top[at] = top
      shrink = jnp.exp2(old - top)
      total, sums = total * shrink, jnp.where(old[:1] == NOTHING, 0, sums * shrink[:1])  # untouched memory before
    reference = jnp.where(own, top[:1], _ELSEWHERE)
    weights = [jnp.exp2(s - reference) for s in scores]
    self.total[at] = functools.reduce(jnp.add, [_by_sublane(w).sum(0) for w in weights], total)
    columns = jnp.concatenate(weights, axis=0).astype(values.dtype)
    self.sums[at] = sums + jnp.dot(values, columns, preferred_element_type=jnp.float32, precision=self.precision)

  def own(self, walk, u):
    """[1, tile_rows] whether a row is the sequence's."""
    rows = self.row_numbers(u)
    return (rows >= walk.low) & (rows < walk.high)

  def row_numbers(self, u):
    """[1, tile_rows] packed rows."""
    rows = self.problem.config.tile_rows
    return self.first_row + u * rows + jax.lax.broadcasted_iota(jnp.int32, (1, rows), 1)

  def interior(self, walk, slot):
    """A block that all the sequence's rows see."""
    problem, config = self.problem, self.problem.config
    tiles = range(problem.tiles)

    def some_heads(i):
      heads = [i * problem.heads_at_once + h for h in range(problem.heads_at_once)]
      values = [self.values(slot, head, 0, len(tiles)).T.astype(self.queries.dtype) for head in heads]
      own = [self.own(walk, u) for u in range(problem.row_tiles)]
      items = [(h, u, g) for h in range(len(heads)) for u in range(problem.row_tiles) for g in range(problem.group)]
      products = [functools.partial(self.scores, slot, heads[h], tiles, u, g) for h, u, g in items]
      for (h, u, g), scores in zip(items, _ahead(products, config.ahead), strict=True):
        self.add(scores, values[h], heads[h], u, g, own[u], running=not config.fixed_reference)

    _loop(0, problem.heads // problem.heads_at_once, some_heads)

  def edges(self, walk, slot, block, length, exact):
    """A block that some row does not see whole: tile by tile, those that are seen at all.

    What is done again for `exact` sums is rare: short code, a query head at a time.
    """
    problem, config = self.problem, self.problem.config
    first_u = _floordiv(walk.low - self.first_row, config.tile_rows)
    end_u = _cdiv(walk.high - self.first_row, config.tile_rows)
    at_once = 1 if exact else problem.edge_heads_at_once
    steps = problem.query_heads if exact else problem.heads // at_once

    def some_heads(i, tile, u):
      token = block * problem.block_tokens + tile * problem.tile_tokens
      token += jax.lax.broadcasted_iota(jnp.int32, (problem.tile_tokens, 1), 0)
      own = self.own(walk, u)
      position = jnp.where(own, self.row_numbers(u) + walk.before, -1)
      visible = token <= position
      if problem.sliding_window is not None:
        visible &= token > position - problem.sliding_window
      heads = [_floordiv(i, problem.group)] if exact else [i * at_once + h for h in range(at_once)]
      groups = [_rem(i, problem.group)] if exact else range(problem.group)
      values = [
        jnp.where(token < length, self.values(slot, head, tile, 1), 0).T.astype(self.queries.dtype) for head in heads
      ]
      items = [(h, g) for h in range(len(heads)) for g in groups]
      products = [functools.partial(self.scores, slot, heads[h], [tile], u, g) for h, g in items]
      for (h, g), (scores,) in zip(items, _ahead(products, config.ahead), strict=True):
        self.add([jnp.where(visible, scores, HIDDEN)], values[h], heads[h], u, g, own, running=True)

    def some_rows(tile):
      """The tiles of rows that see any of a tile of tokens."""
      token = block * problem.block_tokens + tile * problem.tile_tokens
      seen_from = _max(_floordiv(_max(token - walk.before - self.first_row, 0), config.tile_rows), first_u)
      seen_until = end_u
      if problem.sliding_window is not None:
        past = token + problem.tile_tokens - 1 + problem.sliding_window - walk.before - self.first_row
        seen_until = _min(end_u, _cdiv(_max(past, 0), config.tile_rows))
      _loop(seen_from, _max(seen_until, seen_from), lambda u: _loop(0, steps, lambda i: some_heads(i, tile, u)))

    _loop(0, problem.tiles, some_rows)

  # The walk.

  def attend(self, sequence, fetched=False, exact=False):
    """One sequence's rows in this block of rows, over all that they see.

    Its table and its first block may have been fetched before. `exact` is a running maximum everywhere.
    """
    start, stop, length = self.chunk(sequence)
    walk = Walk.of(self.problem, self.first_row, start, stop, length)

    if fetched is not True:

      @pl.when((walk.steps > 0) & jnp.logical_not(fetched))
      def _():
        self.start_table(sequence)
        self.await_table(sequence)
        self.fetch_block(sequence, 0, walk.block(0), length)

    def step(i, work):
      slot = jax.lax.rem(i, 2)

      @pl.when(i + 1 < walk.steps)
      def _():
        self.fetch_block(sequence, 1 - slot, walk.block(i + 1), length)

      self.await_block(slot)
      work(walk.block(i), slot)

    def edge(i):
      step(i, lambda block, slot: self.edges(walk, slot, block, length, exact))

    def interior(i):
      step(i, lambda block, slot: self.interior(walk, slot))

    edges = walk.steps if exact else walk.edges
    _loop(0, edges, edge)
    if not exact:
      _loop(edges, walk.steps, interior)

  def run(self):
    """Zero the state and take the queries while the first sequence's first block comes, then attend, then write."""
    sequences = self.lengths.shape[0]
    if self.chunks is None:
      first = self.count(sequences, lambda b: self.offsets[b + 1] <= self.first_row)
      end = self.count(sequences, lambda b: self.offsets[b] < self.first_row + self.problem.config.block_rows)
      end_row = self.offsets[sequences]
    else:
      first, end, end_row = 0, sequences, self.chunks[-1][1]

    def when_any(start):
      start() if self.chunks is not None else pl.when(first < end)(start)

    when_any(lambda: self.start_table(first))
    self.start()

    @when_any
    def _():
      self.await_table(first)
      start, stop, length = self.chunk(first)
      self.fetch_block(first, 0, Walk.of(self.problem, self.first_row, start, stop, length).block(0), length)

    self.take_queries()
    _loop(first, end, lambda sequence: self.attend(sequence, fetched=sequence == first))
    if self.problem.config.fixed_reference:

      @pl.when(self.overflowed(end_row))
      def _():
        self.start()
        _loop(first, end, lambda sequence: self.attend(sequence, exact=True))

    self.give_out(end_row)

  def chunk(self, sequence):
    """Its first row, the row past its last, and its cached tokens."""
    if self.chunks is not None:
      return self.chunks[sequence]
    return self.offsets[sequence], self.offsets[sequence + 1], self.lengths[sequence]

  def count(self, number, holds):
    return jax.lax.fori_loop(0, number, lambda i, n: n + holds(i).astype(jnp.int32), jnp.int32(0))

  # Rows in, rows out.

  def each(self, body, joined=False):
    """`body(first, heads, u)` for every piece of code: some packed heads from the first on, of the u-th tile.

    They are all that there are, tile by tile, or else a loop's; then `joined` has all tiles in each round of it.
    """
    problem = self.problem
    heads, tiles = problem.outer_heads, problem.row_tiles
    pieces = problem.heads // heads

    def all_tiles(i):
      for u in range(tiles):
        body(i * heads, heads, u)

    if pieces == 1 or joined:
      _loop(0, pieces, all_tiles)
    else:  # one loop: on two around the transposes of results the simulation gives up
      _loop(0, tiles * pieces, lambda i: body(_floordiv(i, tiles) * heads, heads, _rem(i, tiles)))

  def start(self):
    """Nothing is seen yet; a sink is a logit without a value."""
    problem = self.problem

    def start_heads(first, heads, u):
      at = pl.ds(first, heads), u
      lanes = (heads, *self.top.shape[2:])
      if self.sinks is None:
        self.top[at] = jnp.full(lanes, NOTHING, jnp.float32)
        self.total[at] = jnp.zeros(lanes, jnp.float32)
        return
      self.sums[at] = jnp.zeros((heads, *self.sums.shape[2:]), jnp.float32)
      once = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, problem.config.tile_rows), 0) == 0
      for head in range(heads * problem.group):
        c, g = divmod(head, problem.group)
        at = self.place(first + c, u, g)
        self.top[at] = jnp.full(once.shape, self.sinks[first * problem.group + head] * LOG2_E, jnp.float32)
        self.total[at] = once.astype(jnp.float32)

    self.each(start_heads)

  def place(self, head, u, g):
    """The indices in the scratch of a tile's rows, of the g-th query head of a packed head."""
    return head, u, slice(None), self.tile(g)

  def tile(self, i):
    """The i-th rows of a tile, which begin a vector."""
    rows = self.problem.config.tile_rows
    return pl.ds(i * rows if isinstance(i, int) else pl.multiple_of(i * rows, rows), rows)

  def take_queries(self):
    """Queries of the block, scaled, each in the lanes of its own key/value head."""
    problem = self.problem
    scale = problem.softmax_scale * LOG2_E if problem.soft_cap is None else problem.softmax_scale / problem.soft_cap

    def take(first, heads, u):
      for head in range(0, heads * problem.group, problem.heads_a_word):
        for offset, q in enumerate(self.read_heads(first, head, u)):
          c, g = divmod(head + offset, problem.group)
          self.queries[first + c, u, g] = (q * scale).astype(self.queries.dtype)

    self.each(take)

  def give_out(self, end):
    """Divide by the sums and write the rows; `end` is the first row of padding."""
    problem = self.problem

    def give(first, heads, u):
      for head in range(0, heads * problem.group, problem.heads_a_word):
        outs = [self.normalized(first, head + offset, u, end) for offset in range(problem.heads_a_word)]
        self.write_heads(first, head, u, outs, end)

    self.each(give, joined=problem.config.join_results)

  def normalized(self, first, head, u, end):
    """[W, rows] of a query head's tile, garbage in rows of padding; the logs of its sums are written on the way.

    Query heads count from those of the packed head `first`, here and below.
    """
    c, g = divmod(head, self.problem.group)
    at = self.place(first + c, u, g)
    real = self.row_numbers(u) < end
    total = jnp.where(real, self.total[at].sum(0, keepdims=True), 1)
    if self.lse is not None:
      lse = (self.top[at][:1] + jnp.log2(total)) * (1 / LOG2_E)
      self.lse[pl.ds(first * self.problem.group + head, 1), self.tile(u)] = jnp.where(real, lse, -jnp.inf)
    return self.sums[at] * (1 / total)

  def read_heads(self, first, head, u):
    """[rows, W] float32 of one query head's tile, or of two that share their 32-bit words."""
    if not self.problem.rows_in_place:
      return [self.q[first * self.problem.group + head, self.tile(u)].astype(jnp.float32)]
    words = self.words(self.q, first, u)[self.word_rows(head)]
    return [pltpu.bitcast(words << 16, jnp.float32), pltpu.bitcast(words & jnp.uint32(0xFFFF0000), jnp.float32)]

  def write_heads(self, first, head, u, outs, end):
    """The reverse, of `[W, rows]` each; rows of padding become zeros."""
    real = self.row_numbers(u) < end
    if not self.problem.rows_in_place:
      at = first * self.problem.group + head, self.tile(u)
      self.out[at] = jnp.where(real, outs[0], 0).T.astype(self.out.dtype)
      return
    low, high = (pltpu.bitcast(out.astype(jnp.bfloat16).astype(jnp.float32), jnp.uint32) for out in outs)
    self.words(self.out, first, u)[self.word_rows(head)] = jnp.where(real, (low >> 16) | high, jnp.uint32(0)).T

  def words(self, rows, first, u):
    """Rows `[T, H, D]` of 16 bits as words `[T H / 2, D]`, from some of a tile's on.

    Two heads one above the other share a word; SUBLANES of them lie together, so `first` has to begin such heads.
    """
    problem, half = self.problem, self.problem.query_heads // 2
    words = rows.bitcast(jnp.uint32).reshape(problem.config.block_rows * half, problem.width)
    start = u * problem.config.tile_rows * half + _floordiv(first * problem.group, 2)
    count = problem.config.tile_rows * half - (problem.heads - problem.outer_heads) * problem.group // 2
    return words.at[pl.ds(start if isinstance(start, int) else pl.multiple_of(start, SUBLANES // 2), count)]

  def word_rows(self, head):
    return pl.ds(head // 2, self.problem.config.tile_rows, stride=self.problem.query_heads // 2)

  def overflowed(self, end):
    """Whether a row's sum is beyond what can be trusted."""
    problem = self.problem
    worst = jnp.float32(0)
    for u in range(problem.row_tiles):
      real = self.row_numbers(u) < end
      beyond = jnp.zeros((SUBLANES, problem.config.tile_rows), jnp.float32)
      for head, g in itertools.product(range(problem.heads), range(problem.group)):
        beyond = jnp.maximum(beyond, jnp.where(self.total[self.place(head, u, g)] < _OVERFLOW, 0.0, 1.0))
      worst = jnp.maximum(worst, jnp.max(jnp.where(real, beyond, 0.0)))
    return worst > 0


def _by_sublane(x):
  return x.reshape(-1, SUBLANES, x.shape[-1])


def _loop(first, end, body):
  """`body(i)` for each i, which leaves its results in references."""

  def step(i, nothing):
    body(i)
    return nothing

  if isinstance(first, int) and isinstance(end, int) and end - first == 1:
    body(first)
  else:
    jax.lax.fori_loop(first, end, step, 0)


def _ahead(products, number):
  """The products' results one by one, so many of the next ones asked for before each is handed out."""
  pending = [product() for product in products[:number]]
  for at in range(len(products)):
    if at + number < len(products):
      pending.append(products[at + number]())
    yield pending.pop(0)
