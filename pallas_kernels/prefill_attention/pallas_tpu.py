"""Packed prefill attention on TPU: a block of rows at a time, over blocks of pages copied while the last ones are used.

The grid walks blocks of packed rows, whosever they are. For each sequence with rows in the block, its cached blocks
come in one after another: first the *edges*, in which some row does not see some token, with masks and a running
maximum; then the *interior*, which all the sequence's rows see whole. An interior block refers its exponentials to
the maximum of the edges, which hold each row's own key, so it needs neither masks nor maxima. Should a key in the
interior stand out so far that a row's sum overflows, the rows are done again with a running maximum everywhere.

Scores lie transposed, tokens down the sublanes and rows along the lanes: the product with the values then runs at
full width on 256 x 256 matrix units although a head is 128 wide, and sums need no shuffle of lanes. The products of
the next tiles stand before the softmax of this one, in straight-line code, so that the compiler can overlap them.

Scores are in units of log2(e), folded into the queries, so that a plain power of two takes the place of the exponential.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_NOTHING = -1e30  # the top of a row that has seen nothing; finite, so that differences stay free of NaN
_HIDDEN = 2 * _NOTHING  # so far below any top that its power is 0
_ELSEWHERE = 1e30  # the top of another sequence's row: so high that this sequence's powers are 0
_OVERFLOW = 2.0**64  # a sum from which on sums of values might have overflowed
_SUBLANES, _LANES = 8, 128
_SPILLS = 8 << 20  # bytes of VMEM for what the compiler puts aside
_VMEM_BYTES = {
  'TPU v4': 16 << 20,
  'TPU v5 lite': 128 << 20,
  'TPU v5': 64 << 20,
  'TPU v6 lite': 128 << 20,
  'TPU7x': 64 << 20,
}
_FLOAT8 = (jnp.float8_e4m3fn, jnp.float8_e5m2)
_FLOAT8_DEVICES = ('TPU7x',)
_BY_ROWS = (((1,), (1,)), ((), ()))  # a product of two matrices, both over their last axis


@dataclasses.dataclass(frozen=True)
class Config:
  """How the work is cut.

  Attributes:
    block_rows: Packed rows a grid step.
    tile_rows: Rows of one head a tile of scores; divides block_rows.
    block_tokens: Cached tokens copied at a time, about: whole tiles.
    tile_tokens: Cached tokens a matrix product, about: whole pages.
    ahead: Tiles whose scores are asked for before the softmax of the present one.
    heads_at_once: Key/value heads in one straight-line piece of code, in the interior.
    edge_heads_at_once: The same for the edges.
    fixed_reference: Whether the interior refers to the edges' maximum; else every block has a running maximum.
  """

  block_rows: int = 512
  tile_rows: int = 256
  block_tokens: int = 512
  tile_tokens: int = 256
  ahead: int = 2
  heads_at_once: int = 1
  edge_heads_at_once: int = 1
  fixed_reference: bool = True


@dataclasses.dataclass(frozen=True)
class _Plan:
  """The shapes of one call, all of them static.

  Packed pages hold C heads of W lanes, keys and values in A parts; a packed head answers `group` query heads.
  """

  config: Config
  rows: int  # T, whole blocks
  query_heads: int  # H
  head_dim: int  # D
  parts: int  # A
  heads: int  # C
  page_size: int  # G
  width: int  # W
  q_lane: tuple[int, ...]  # for each query head, the lane of its packed head in which its keys begin
  out_lane: tuple[int, ...]  # and its values
  softmax_scale: float
  sliding_window: int | None
  soft_cap: float | None
  quantized: bool
  rows_in_place: bool  # whether the kernel takes [T, H, D] as it is, else [H, T, W]

  def held_in(self, part, head, segment):
    """What a packed head holds in its segment-th D lanes: 0 for keys or 1 for values, and of which head."""
    return (segment, head) if self.parts == 1 else (part, head * (self.width // self.head_dim) + segment)

  @property
  def heads_a_word(self) -> int:
    return 2 if self.rows_in_place else 1

  @property
  def group(self) -> int:
    return self.query_heads // self.heads

  @property
  def tile_tokens(self) -> int:
    return self.page_size * max(self.config.tile_tokens // self.page_size, 1)

  @property
  def block_tokens(self) -> int:
    return self.tile_tokens * max(self.config.block_tokens // self.tile_tokens, 1)

  @property
  def block_pages(self) -> int:
    return self.block_tokens // self.page_size

  @property
  def row_tiles(self) -> int:
    return self.config.block_rows // self.config.tile_rows


def _cdiv(a, b):
  return (a + b - 1) // b if isinstance(a, int) else jax.lax.div(a + (b - 1), jnp.int32(b))


def _floordiv(a, b):
  """Of what is not negative."""
  return a // b if isinstance(a, int) else jax.lax.div(a, jnp.int32(b))


def _max(a, b):
  return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def _min(a, b):
  return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


@dataclasses.dataclass(frozen=True)
class _Walk:
  """Which cached blocks one sequence's rows in one block of rows see, and in what order they are visited.

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
  def of(cls, plan: _Plan, first_row, start, stop, length):
    """The walk of the sequence with rows `start` to `stop` in the block of rows from `first_row` on."""
    low, high = _max(start, first_row), _min(stop, first_row + plan.config.block_rows)
    before = length - stop
    some = high > low
    first_position, last_position = _max(before + low, 0), _max(before + high - 1, 0)
    end = jnp.where(some, _floordiv(last_position, plan.block_tokens) + 1, 0)
    interior_end = jnp.where(some, _floordiv(first_position, plan.block_tokens), 0)
    first, interior = jnp.int32(0), jnp.int32(0)
    if plan.sliding_window is not None:
      first = _floordiv(_max(first_position - plan.sliding_window + 1, 0), plan.block_tokens)
      interior = _cdiv(_max(last_position - plan.sliding_window + 1, 0), plan.block_tokens)
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


class _Kernel:
  """One grid step: its references, and what is done with them."""

  def __init__(self, plan, static, offsets, lengths, sinks, tables, q, pages, scales, out, lse, scratch):
    self.plan, self.offsets, self.lengths, self.sinks, self.tables = plan, offsets, lengths, sinks, tables
    self.static = static  # chunks known while tracing
    self.q, self.pages, self.scales, self.out, self.lse = q, pages, scales, out, lse
    self.queries, self.top, self.total, self.sums, self.copied, self.ids, self.arrived, self.ids_arrived = scratch[:8]
    self.copied_scales, self.restored = scratch[8:] if plan.quantized else (None, None)
    self.first_row = pl.program_id(0) * plan.config.block_rows

  # The copies.

  def copy_table(self, sequence):
    return pltpu.make_async_copy(self.tables.at[sequence], self.ids, self.ids_arrived)

  def fetch_block(self, slot, block, length):
    """Start the copies of a block's pages; past the last one, which may be anything, that one comes again."""
    last = _floordiv(length - 1, self.plan.page_size)
    for i in range(self.plan.block_pages):
      page = self.ids[0, _min(block * self.plan.block_pages + i, last)]
      pltpu.make_async_copy(self.pages.at[page], self.copied.at[slot, i], self.arrived.at[slot]).start()
      if self.plan.quantized:
        scales = self.copied_scales.at[slot, i]
        pltpu.make_async_copy(self.scales.at[page], scales, self.arrived.at[slot]).start()

  def await_block(self, slot):
    """Wait for a block once for all its pages; restore what is quantized."""
    pltpu.make_async_copy(self.copied.at[slot], self.copied.at[slot], self.arrived.at[slot]).wait()
    if self.plan.quantized:
      scales = self.copied_scales.at[slot]
      pltpu.make_async_copy(scales, scales, self.arrived.at[slot]).wait()
      _loop(0, self.plan.block_pages, lambda i: self.restore(slot, i))

  def restore(self, slot, page):
    """Multiply one page's keys and values by their scales."""
    plan = self.plan
    columns = [self.copied_scales[slot, page, kind].T for kind in range(2)]  # of keys and of values, [G, K] each
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, plan.width), 1)
    for part in range(plan.parts):
      for head in range(plan.heads):
        scale = jnp.zeros((plan.page_size, plan.width), jnp.float32)
        for segment in range(plan.width // plan.head_dim):
          kind, kv_head = plan.held_in(part, head, segment)
          column = columns[kind][:, kv_head : kv_head + 1]
          scale = jnp.where(lane >= segment * plan.head_dim, column, scale)
        stored = self.copied[slot, page, part, head].astype(jnp.float32)
        self.restored[page, part, head] = (stored * scale).astype(self.restored.dtype)

  # What a tile reads.

  def keys(self, slot, head, tile):
    return self._tokens(slot, head, 0, tile, 1)

  def values(self, slot, head, tile, count):
    """[W, count tiles of tokens], float32."""
    return self._tokens(slot, head, self.plan.parts - 1, tile, count).astype(jnp.float32)

  def _tokens(self, slot, head, part, tile, count):
    plan = self.plan
    pages = plan.tile_tokens // plan.page_size
    block = self.restored if plan.quantized else self.copied.at[slot]
    tokens = block[pl.ds(tile * pages, count * pages), part, head]
    return tokens.reshape(count * plan.tile_tokens, plan.width)

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
    if self.plan.soft_cap is not None:
      out = [jnp.tanh(s) * (self.plan.soft_cap * math.log2(math.e)) for s in out]
    return out

  @property
  def precision(self):
    return jax.lax.Precision.HIGHEST if self.queries.dtype == jnp.float32 else None

  def add(self, scores, values, head, u, g, own, running):
    """Add tiles of scores `[S, rows]` and their values `[W, S]` to the sums of the rows that are `own` `[1, rows]`."""
    at = (head, u, slice(None), pl.ds(g * self.plan.config.tile_rows, self.plan.config.tile_rows))
    top, total, sums = self.top[at], self.total[at], self.sums[at]
    if running:
      old = top
      top = functools.reduce(jnp.maximum, [_by_sublane(s).max(0) for s in scores], old)
      top = jnp.broadcast_to(top.max(0, keepdims=True), old.shape)
      top = jnp.where(own, top, old)
      self.top[at] = top
      shrink = jnp.exp2(old - top)
      total, sums = total * shrink, jnp.where(old[:1] == _NOTHING, 0, sums * shrink[:1])  # untouched memory before
    reference = jnp.where(own, top[:1], _ELSEWHERE)
    weights = [jnp.exp2(s - reference) for s in scores]
    self.total[at] = functools.reduce(jnp.add, [_by_sublane(w).sum(0) for w in weights], total)
    weights = jnp.concatenate(weights, axis=0).astype(values.dtype)
    self.sums[at] = sums + jnp.dot(values, weights, preferred_element_type=jnp.float32, precision=self.precision)

  def own(self, walk, u):
    """[1, tile_rows] whether a row is the sequence's."""
    rows = self.row_numbers(u)
    return (rows >= walk.low) & (rows < walk.high)

  def row_numbers(self, u):
    """[1, tile_rows] packed rows."""
    rows = self.plan.config.tile_rows
    return self.first_row + u * rows + jax.lax.broadcasted_iota(jnp.int32, (1, rows), 1)

  def interior(self, walk, slot):
    """A block that all the sequence's rows see."""
    plan, config = self.plan, self.plan.config
    tiles = range(plan.block_tokens // plan.tile_tokens)

    def some_heads(i):
      heads = [i * config.heads_at_once + h for h in range(config.heads_at_once)]
      values = [self.values(slot, head, 0, len(tiles)).T.astype(self.queries.dtype) for head in heads]
      own = [self.own(walk, u) for u in range(plan.row_tiles)]
      items = [(h, u, g) for h in range(len(heads)) for u in range(plan.row_tiles) for g in range(plan.group)]
      products = [functools.partial(self.scores, slot, heads[h], tiles, u, g) for h, u, g in items]
      for (h, u, g), scores in zip(items, _ahead(products, config.ahead), strict=True):
        self.add(scores, values[h], heads[h], u, g, own[u], running=not config.fixed_reference)

    _loop(0, plan.heads // config.heads_at_once, some_heads)

  def edges(self, walk, slot, block, length):
    """A block that some row does not see whole: tile by tile, those that are seen at all."""
    plan, config = self.plan, self.plan.config
    first_u = _floordiv(walk.low - self.first_row, config.tile_rows)
    end_u = _cdiv(walk.high - self.first_row, config.tile_rows)

    def some_heads(i, tile, u):
      token = block * plan.block_tokens + tile * plan.tile_tokens
      token += jax.lax.broadcasted_iota(jnp.int32, (plan.tile_tokens, 1), 0)
      own = self.own(walk, u)
      position = jnp.where(own, self.row_numbers(u) + walk.before, -1)
      visible = token <= position
      if plan.sliding_window is not None:
        visible &= token > position - plan.sliding_window
      heads = [i * config.edge_heads_at_once + h for h in range(config.edge_heads_at_once)]
      values = [
        jnp.where(token < length, self.values(slot, head, tile, 1), 0).T.astype(self.queries.dtype) for head in heads
      ]
      items = [(h, g) for h in range(len(heads)) for g in range(plan.group)]
      products = [functools.partial(self.scores, slot, heads[h], [tile], u, g) for h, g in items]
      for (h, g), (scores,) in zip(items, _ahead(products, config.ahead), strict=True):
        self.add([jnp.where(visible, scores, _HIDDEN)], values[h], heads[h], u, g, own, running=True)

    def some_rows(tile):
      """Of a tile of tokens: the tiles of rows that see any of it."""
      token = block * plan.block_tokens + tile * plan.tile_tokens
      seen_from = _max(_floordiv(_max(token - walk.before - self.first_row, 0), config.tile_rows), first_u)
      seen_until = end_u
      if plan.sliding_window is not None:
        past = token + plan.tile_tokens - 1 + plan.sliding_window - walk.before - self.first_row
        seen_until = _min(end_u, _cdiv(_max(past, 0), config.tile_rows))
      head_steps = plan.heads // config.edge_heads_at_once
      _loop(seen_from, _max(seen_until, seen_from), lambda u: _loop(0, head_steps, lambda i: some_heads(i, tile, u)))

    _loop(0, plan.block_tokens // plan.tile_tokens, some_rows)

  # The walk.

  def attend(self, sequence, fetched=False, exact=False):
    """One sequence's rows in this block of rows, over all that they see.

    Its table and its first block may have been fetched before. `exact` is a running maximum everywhere.
    """
    start, stop, length = self.chunk(sequence)
    walk = _Walk.of(self.plan, self.first_row, start, stop, length)

    if fetched is not True:

      @pl.when((walk.steps > 0) & jnp.logical_not(fetched))
      def _():
        self.copy_table(sequence).start()
        self.copy_table(sequence).wait()
        self.fetch_block(0, walk.block(0), length)

    def step(i, work):
      slot = jax.lax.rem(i, 2)

      @pl.when(i + 1 < walk.steps)
      def _():
        self.fetch_block(1 - slot, walk.block(i + 1), length)

      self.await_block(slot)
      work(walk.block(i), slot)

    def edge(i):
      step(i, lambda block, slot: self.edges(walk, slot, block, length))

    def interior(i):
      step(i, lambda block, slot: self.interior(walk, slot))

    edges = walk.steps if exact else walk.edges
    _loop(0, edges, edge)
    if not exact:
      _loop(edges, walk.steps, interior)

  def run(self):
    """Zero the state and take the queries while the first sequence's first block comes, then attend, then write."""
    sequences = self.lengths.shape[0]
    if self.static is None:
      first = self.count(sequences, lambda b: self.offsets[b + 1] <= self.first_row)
      end = self.count(sequences, lambda b: self.offsets[b] < self.first_row + self.plan.config.block_rows)
      end_row = self.offsets[sequences]
    else:
      first, end, end_row = 0, sequences, self.static[-1][1]

    def when_any(start):
      start() if self.static is not None else pl.when(first < end)(start)

    when_any(lambda: self.copy_table(first).start())
    self.start()

    @when_any
    def _():
      self.copy_table(first).wait()
      start, stop, length = self.chunk(first)
      self.fetch_block(0, _Walk.of(self.plan, self.first_row, start, stop, length).block(0), length)

    self.take_queries()
    _loop(first, end, lambda sequence: self.attend(sequence, fetched=sequence == first))
    if self.plan.config.fixed_reference:

      @pl.when(self.overflowed(end_row))
      def _():
        self.start()
        _loop(first, end, lambda sequence: self.attend(sequence, exact=True))

    self.give_out(end_row)

  def chunk(self, sequence):
    """Its first row, the row past its last, and its cached tokens."""
    if self.static is not None:
      return self.static[sequence]
    return self.offsets[sequence], self.offsets[sequence + 1], self.lengths[sequence]

  def count(self, number, holds):
    return jax.lax.fori_loop(0, number, lambda i, n: n + holds(i).astype(jnp.int32), jnp.int32(0))

  # Rows in, rows out.

  def start(self):
    """Nothing is seen yet; a sink is a logit without a value."""
    if self.sinks is None:
      self.top[...] = jnp.full_like(self.top, _NOTHING)
      self.total[...] = jnp.zeros_like(self.total)
      return
    plan = self.plan
    self.sums[...] = jnp.zeros_like(self.sums)
    once = jax.lax.broadcasted_iota(jnp.int32, (_SUBLANES, plan.config.tile_rows), 0) == 0
    for head in range(plan.query_heads):
      for u in range(plan.row_tiles):
        at = self.place(head, u)
        self.top[at] = jnp.full(once.shape, self.sinks[head] * math.log2(math.e), jnp.float32)
        self.total[at] = once.astype(jnp.float32)

  def place(self, head, u):
    """Where a query head's rows of a tile lie in the scratch."""
    c, g = divmod(head, self.plan.group)
    return c, u, slice(None), slice(g * self.plan.config.tile_rows, (g + 1) * self.plan.config.tile_rows)

  def take_queries(self):
    """Queries of the block, scaled, each in the lanes of its own key/value head."""
    plan = self.plan
    scale = plan.softmax_scale * math.log2(math.e) if plan.soft_cap is None else plan.softmax_scale / plan.soft_cap
    for u in range(plan.row_tiles):
      for head in range(0, plan.query_heads, plan.heads_a_word):
        for offset, q in enumerate(self.read_heads(head, u)):
          c, g = divmod(head + offset, plan.group)
          self.queries[c, u, g] = (q * scale).astype(self.queries.dtype)

  def give_out(self, end):
    """Divide by the sums and write the rows; `end` is the first row of padding."""
    plan, rows = self.plan, self.plan.config.tile_rows
    for u in range(plan.row_tiles):
      for head in range(0, plan.query_heads, plan.heads_a_word):
        outs = [self.normalized(head + offset, u, end) for offset in range(plan.heads_a_word)]
        self.write_heads(head, u, outs)

  def normalized(self, head, u, end):
    """[W, rows] of a query head's tile; its log of sums is written on the way."""
    at, rows = self.place(head, u), self.plan.config.tile_rows
    total = self.total[at].sum(0, keepdims=True)
    real = (self.row_numbers(u) < end) & (total > 0)
    total = jnp.where(real, total, 1)
    if self.lse is not None:
      lse = (self.top[at][:1] + jnp.log2(total)) * math.log(2)
      self.lse[head : head + 1, pl.ds(u * rows, rows)] = jnp.where(real, lse, -jnp.inf)
    return jnp.where(real, self.sums[at] * (1 / total), 0)

  def read_heads(self, head, u):
    """[rows, W] float32 of one query head's tile, or of two that share their 32-bit words."""
    rows = self.plan.config.tile_rows
    if not self.plan.rows_in_place:
      return [self.q[head, pl.ds(u * rows, rows)].astype(jnp.float32)]
    words = self.words(self.q)[self.word_rows(head, u)]
    return [pltpu.bitcast(words << 16, jnp.float32), pltpu.bitcast(words & jnp.uint32(0xFFFF0000), jnp.float32)]

  def write_heads(self, head, u, outs):
    rows = self.plan.config.tile_rows
    if not self.plan.rows_in_place:
      self.out[head, pl.ds(u * rows, rows)] = outs[0].T.astype(self.out.dtype)
      return
    low, high = (pltpu.bitcast(out.astype(jnp.bfloat16).astype(jnp.float32), jnp.uint32) for out in outs)
    self.words(self.out)[self.word_rows(head, u)] = ((low >> 16) | high).T

  def words(self, rows):
    """Rows `[T, H, D]` of 16 bits as words `[T H / 2, D]`: two heads one above the other share a word."""
    return rows.reshape(self.plan.config.block_rows * self.plan.query_heads, self.plan.width).bitcast(jnp.uint32)

  def word_rows(self, head, u):
    stride = self.plan.query_heads // 2
    return pl.ds(u * self.plan.config.tile_rows * stride + head // 2, self.plan.config.tile_rows, stride=stride)

  def overflowed(self, end):
    """Whether a row's sum is beyond what can be trusted."""
    plan = self.plan
    worst = jnp.zeros((_SUBLANES, plan.config.tile_rows), jnp.float32)
    for u in range(plan.row_tiles):
      real = self.row_numbers(u) < end
      for head in range(plan.query_heads):
        total = self.total[self.place(head, u)]
        worst = jnp.maximum(worst, jnp.where(real, jnp.where(total < _OVERFLOW, 0.0, 1.0), 0.0))
    return jnp.max(worst) > 0


def _by_sublane(x):
  return x.reshape(-1, _SUBLANES, x.shape[-1])


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


def prefill_attention(
  q, pages, tables, offsets, lengths, *, softmax_scale, sliding_window=None, soft_cap=None, sinks=None, scales=None,
  return_lse=False, config: Config, interpret=False, static_lengths=None,
):
  """See `pallas_kernels.prefill_attention.prefill_attention`."""
  plan = _plan(q, pages, config, softmax_scale, sliding_window, soft_cap)
  tokens = q.shape[0]
  queries = jnp.pad(q, ((0, plan.rows - tokens), (0, 0), (0, 0)))
  if not plan.rows_in_place:
    queries = jnp.swapaxes(_pad_lanes(queries, plan.q_lane, plan.width), 0, 1)
  tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % _LANES)))[:, None]
  static = None
  if static_lengths is not None:
    ends = [sum(static_lengths[: i + 1]) for i in range(len(static_lengths))]
    static = [(end - length, end, length) for end, length in zip(ends, static_lengths, strict=True)]

  def kernel(offsets, lengths, *refs):
    refs = list(refs)
    sinks_ref = refs.pop(0) if sinks is not None else None
    tables, q, pages = refs[:3]
    refs = refs[3:]
    scales_ref = refs.pop(0) if scales is not None else None
    out = refs.pop(0)
    lse = refs.pop(0) if return_lse else None
    _Kernel(plan, static, offsets, lengths, sinks_ref, tables, q, pages, scales_ref, out, lse, refs).run()

  scalars = [offsets.astype(jnp.int32), lengths.astype(jnp.int32)]
  if sinks is not None:
    scalars.append(sinks.astype(jnp.float32))
  if plan.rows_in_place:
    rows_spec = pl.BlockSpec((config.block_rows, plan.query_heads, plan.width), lambda i, *_: (i, 0, 0))
  else:
    rows_spec = pl.BlockSpec((plan.query_heads, config.block_rows, plan.width), lambda i, *_: (0, i, 0))
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  out_specs, out_shape = [rows_spec], [jax.ShapeDtypeStruct(queries.shape, q.dtype)]
  if return_lse:
    out_specs.append(pl.BlockSpec((plan.query_heads, config.block_rows), lambda i, *_: (0, i)))
    out_shape.append(jax.ShapeDtypeStruct((plan.query_heads, plan.rows), jnp.float32))
  out = pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(plan.rows // config.block_rows,),
      in_specs=[anywhere, rows_spec, anywhere] + ([] if scales is None else [anywhere]),
      out_specs=out_specs,
      scratch_shapes=[
        *(pltpu.VMEM(shape, dtype) for shape, dtype in _state_shapes(plan, q.dtype)),
        pltpu.VMEM((2, plan.block_pages, *pages.shape[1:]), pages.dtype),
        pltpu.SMEM(tables.shape[1:], jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA,
        *(pltpu.VMEM(shape, dtype) for shape, dtype in _restored_shapes(plan, q.dtype)),
      ],
    ),
    out_shape=out_shape,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',), vmem_limit_bytes=vmem_bytes(q, pages, config)
    ),
    interpret=interpret,
  )(*scalars, tables, queries, pages, *([] if scales is None else [scales]))
  rows = out[0] if plan.rows_in_place else jnp.swapaxes(_take_lanes(out[0], plan.out_lane, plan.head_dim), 0, 1)
  rows = rows[:tokens]
  return (rows, jnp.swapaxes(out[1], 0, 1)[:tokens]) if return_lse else rows


def _state_shapes(plan, dtype):
  """Of the queries, and of each row's top, total and sums of values."""
  lanes = plan.group * plan.config.tile_rows
  numbers = (plan.heads, plan.row_tiles, _SUBLANES, lanes)
  return [
    ((plan.heads, plan.row_tiles, plan.group, plan.config.tile_rows, plan.width), dtype),
    (numbers, jnp.float32),
    (numbers, jnp.float32),
    ((plan.heads, plan.row_tiles, plan.width, lanes), jnp.float32),
  ]


def _restored_shapes(plan, dtype):
  """Of the scales of two blocks, and of one block whose scales are multiplied in."""
  if not plan.quantized:
    return []
  kv_heads = plan.parts * plan.heads * plan.width // (2 * plan.head_dim)
  return [
    ((2, plan.block_pages, 2, kv_heads, plan.page_size), jnp.float32),
    ((plan.block_pages, plan.parts, plan.heads, plan.page_size, plan.width), dtype),
  ]


def _padded_bytes(shape, dtype):
  """Bytes of an array in VMEM, where its last two axes fill whole registers."""
  size = jnp.dtype(dtype).itemsize
  *leading, sublanes, lanes = shape
  sublanes += -sublanes % (_SUBLANES * 4 // size)
  return math.prod(leading) * sublanes * (lanes + -lanes % _LANES) * size


def vmem_bytes(q: jax.Array, pages: jax.Array, config: Config) -> int:
  """VMEM that the kernel asks for: its rows twice, coming and going, its state, two blocks of pages, and for spills."""
  plan = _plan(q, pages, config, 1.0, None, None)
  rows = (config.block_rows, plan.query_heads, plan.width)
  if not plan.rows_in_place:
    rows = (plan.query_heads, config.block_rows, plan.width)
  log_sums = 2 * _padded_bytes((plan.query_heads, config.block_rows), jnp.float32)
  blocks = _padded_bytes((2, plan.block_pages, *pages.shape[1:]), pages.dtype)
  scratch = [*_state_shapes(plan, q.dtype), *_restored_shapes(plan, q.dtype)]
  return 4 * _padded_bytes(rows, q.dtype) + log_sums + blocks + sum(_padded_bytes(*each) for each in scratch) + _SPILLS


def refusal(q: jax.Array, pages: jax.Array, *, config: Config, device_kind: str | None = None) -> str | None:
  """Why the kernel cannot run for these arguments on this kind of device (None: interpreted), or None if it can."""
  plan = _plan(q, pages, config, 1.0, None, None)
  tiles = plan.block_tokens // plan.tile_tokens
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    return f'queries are {q.dtype}, expected bfloat16 or float32.'
  if not plan.quantized and pages.dtype != q.dtype:
    return f'pages are {pages.dtype} and queries {q.dtype}; expected the same, or pages of 8 bits.'
  if config.block_rows % config.tile_rows:
    return f'block_rows {config.block_rows} is not a multiple of tile_rows {config.tile_rows}.'
  if plan.heads % config.heads_at_once or plan.heads % config.edge_heads_at_once:
    return (
      f'heads_at_once {config.heads_at_once} and edge_heads_at_once {config.edge_heads_at_once} '
      f'do not both divide the {plan.heads} heads of a page.'
    )
  if device_kind is None:
    return None
  if plan.width % _LANES:
    return f'pages are {plan.width} wide, expected a multiple of {_LANES} lanes; pack heads of {plan.head_dim}.'
  if config.tile_rows % _LANES:
    return f'tile_rows {config.tile_rows} is not a multiple of {_LANES} lanes.'
  if plan.page_size % 16 or plan.tile_tokens * tiles % _LANES:
    return f'pages of {plan.page_size} tokens do not fill tiles of 16 sublanes and blocks of {_LANES} lanes.'
  if pages.dtype in _FLOAT8 and device_kind not in _FLOAT8_DEVICES:
    return f'pages are {pages.dtype}, which {device_kind} computes with slowly; use int8 pages.'
  need, have = vmem_bytes(q, pages, config), _VMEM_BYTES.get(device_kind, min(_VMEM_BYTES.values()))
  if need > have:
    return f'the blocks need {need} bytes of VMEM and {device_kind} has {have}; lower block_rows or block_tokens.'
  return None


def rule(device_kind: str, q: jax.Array, pages: jax.Array) -> Config:
  """The blocks to take where no measurement is near: the largest of a few that fit."""
  heads = pages.shape[2]
  tile_rows = 128 if q.shape[0] <= 128 else 256
  sizes = [size for size in (512, 256, 128) if size >= tile_rows and size < q.shape[0] + tile_rows] or [tile_rows]
  for rows in sizes:
    for tokens in (512, 256):
      tiles_a_head = rows // tile_rows * (q.shape[1] // heads)
      at_once = math.gcd(heads, max(1, 16 // tiles_a_head))
      edges = math.gcd(heads, max(1, 32 // (q.shape[1] // heads)))
      config = Config(rows, tile_rows, tokens, 256, heads_at_once=at_once, edge_heads_at_once=edges)
      if refusal(q, pages, config=config, device_kind=device_kind) is None:
        return config
  return Config(tile_rows, tile_rows, 256, 256)


def _plan(q, pages, config, softmax_scale, sliding_window, soft_cap):
  tokens, query_heads, head_dim = q.shape
  _, parts, heads, page_size, width = pages.shape
  kv_heads = parts * heads * width // (2 * head_dim)
  group = query_heads // kv_heads
  packed = kv_heads // heads  # kv heads a packed head
  q_lane = tuple((h // group) % packed * head_dim for h in range(query_heads))
  out_lane = tuple(head_dim for _ in q_lane) if parts == 1 else q_lane
  rows = config.block_rows * -(-tokens // config.block_rows)
  in_place = q.dtype == jnp.bfloat16 and head_dim == width == _LANES and query_heads % 16 == 0
  return _Plan(config, rows, query_heads, head_dim, parts, heads, page_size, width, q_lane, out_lane,
               float(softmax_scale), sliding_window, soft_cap, pages.dtype.itemsize == 1, in_place)


def _pad_lanes(q, lanes, width):
  """[T, H, D] to [T, H, W], each head at its lane."""
  head_dim = q.shape[2]
  if head_dim == width:
    return q
  return jnp.stack([jnp.pad(q[:, h], ((0, 0), (lane, width - head_dim - lane))) for h, lane in enumerate(lanes)], axis=1)


def _take_lanes(out, lanes, head_dim):
  """[H, T, W] to [H, T, D]."""
  if out.shape[2] == head_dim:
    return out
  return jnp.stack([out[h, :, lane : lane + head_dim] for h, lane in enumerate(lanes)])
