"""The programs of a worker's steps: prefill, decode and both fused, as pure functions of pages and slots."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import append_tokens, paged_attention, prefill_attention
from pallas_kernels.online_softmax import owners
from pdjax.engine.slots import Sequences, Slots
from pdjax.kv.pages import LAYER_SPEC, KVPages
from pdjax.model.layers import Attend
from pdjax.model.sampling import Chosen, Sampling, sample
from pdjax.model.transformer import Transformer, Weights, bind, bind_blocks, run_blocks
from pdjax.sharding import MESH_AXES, ShardingRules, replicated
from pdjax.types.model import ModelSpec

NO_TOKEN = -1  # in outputs: the sequence had ended before


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunks:
  """Prompt chunks of C sequences, packed one after another into T tokens."""

  tokens: jax.Array  # [T] int32
  offsets: jax.Array  # [C + 1] int32, the rows of each chunk
  lengths: jax.Array  # [C] int32, cached tokens of each sequence with its chunk
  tables: jax.Array  # [C, N] int32, its pages
  slots: jax.Array  # [C] int32, its slot if it goes on decoding here, else past the last
  sampling: Sampling


@dataclasses.dataclass(frozen=True)
class Steps:
  """The programs of one worker's steps, to be compiled. Pages and slots are donated and come back updated."""

  model: ModelSpec
  mesh: Mesh
  max_fused_steps: int

  def prefill(self, weights: Weights, pages: KVPages, slots: Slots, chunks: Chunks) -> tuple[KVPages, Slots, Chosen]:
    """Run prompt chunks; also returns each sequence's next token `[C]`, which counts if the chunk is its last."""
    x, pages = self._run(weights, pages, chunks.tokens, _chunk_rows(chunks, pages), chunks, None)
    return pages, *self.finish(weights, slots, x, chunks)

  def begin(self, weights: Weights, chunks: Chunks) -> jax.Array:
    """The first of the programs that a prefill step in groups of layers consists of: `[T, E]`."""
    x = bind(self.model, weights).embedded(chunks.tokens)
    return jax.lax.with_sharding_constraint(x, replicated(self.mesh))

  def layers(
    self, first: int, weights: Sequence[Weights], pages: KVPages, x: jax.Array, chunks: Chunks
  ) -> tuple[KVPages, jax.Array]:
    """The layers from `first` on, one item of weights for each, and only their pages; also `[T, E]`."""
    blocks, rows = bind_blocks(self.model, weights, first), _chunk_rows(chunks, pages)
    x, pages = self._run_blocks(functools.partial(run_blocks, blocks, x), pages, rows, chunks, None)
    return pages, jax.lax.with_sharding_constraint(x, replicated(self.mesh))

  def finish(self, weights: Weights, slots: Slots, x: jax.Array, chunks: Chunks) -> tuple[Slots, Chosen]:
    """The last of them: each sequence's next token `[C]`."""
    first = self._first_tokens(bind(self.model, weights), x, chunks, slots)
    return _admit_chunks(slots, chunks, first), first

  def decode(
    self, weights: Weights, pages: KVPages, slots: Slots, ids: jax.Array, steps: jax.Array
  ) -> tuple[KVPages, Slots, Chosen]:
    """Run `steps` decode steps of the slots `ids` `[B]`; also returns `[max_fused_steps, B]` tokens."""
    model = bind(self.model, weights)

    def one_step(step, carry):
      pages, slots, rows, out = carry
      x, pages = self._run(weights, pages, rows.tokens, _decode_rows(rows, pages), None, rows)
      chosen, slots, rows = self._next_tokens(model, x, slots, ids, rows)
      return pages, slots, rows, jax.tree.map(lambda all, new: all.at[step].set(new), out, chosen)

    tokens = jnp.full((self.max_fused_steps, ids.shape[0]), NO_TOKEN, jnp.int32)
    out = Chosen.of(tokens, self.model.vocab_size)
    pages, slots, rows, out = jax.lax.fori_loop(0, steps, one_step, (pages, slots, slots.take(ids), out))
    return pages, slots.put(ids, rows), out

  def fused(
    self, weights: Weights, pages: KVPages, slots: Slots, chunks: Chunks, ids: jax.Array
  ) -> tuple[KVPages, Slots, Chosen, Chosen]:
    """Run prompt chunks and one decode step together; also returns `[C]` and `[1, B]` tokens."""
    model = bind(self.model, weights)
    sequences = slots.take(ids)
    chunk_rows, decode_rows = _chunk_rows(chunks, pages), _decode_rows(sequences, pages)
    rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), chunk_rows, decode_rows)
    packed = jnp.concatenate([chunks.tokens, sequences.tokens])
    x, pages = self._run(weights, pages, packed, rows, chunks, sequences)
    first = self._first_tokens(model, x, chunks, slots)
    chosen, slots, sequences = self._next_tokens(model, x[chunks.tokens.shape[0] :], slots, ids, sequences)
    slots = _admit_chunks(slots.put(ids, sequences), chunks, first)
    return pages, slots, first, jax.tree.map(lambda one: one[None], chosen)

  def _first_tokens(self, model: Transformer, x: jax.Array, chunks: Chunks, slots: Slots) -> Chosen:
    logits = self._logits(model, x[jnp.maximum(chunks.offsets[1:] - 1, 0)])
    return sample(logits, chunks.sampling, jnp.zeros_like(chunks.lengths), lambda: slots.history[slots.size :])

  def _next_tokens(
    self, model: Transformer, x: jax.Array, slots: Slots, ids: jax.Array, rows: Sequences
  ) -> tuple[Chosen, Slots, Sequences]:
    chosen = sample(self._logits(model, x), rows.sampling, rows.generated, lambda: slots.history[ids])
    slots = slots.count(ids, rows, chosen.tokens)
    tokens = jnp.where(rows.alive, chosen.tokens, NO_TOKEN)
    return dataclasses.replace(chosen, tokens=tokens), slots, rows.advance(chosen)

  def _logits(self, model: Transformer, x: jax.Array) -> jax.Array:
    vocab = ShardingRules.for_model(self.model, self.mesh.size).vocab
    # Said of the product too, or the whole matrix would be gathered to make whole logits everywhere.
    logits = jax.lax.with_sharding_constraint(model.logits(x), NamedSharding(self.mesh, PartitionSpec(None, vocab)))
    return jax.lax.with_sharding_constraint(logits, replicated(self.mesh))

  def _run(
    self,
    weights: Weights,
    pages: KVPages,
    tokens: jax.Array,
    rows: 'Rows',
    chunks: Chunks | None,
    slots: Sequences | None,
  ) -> tuple[jax.Array, KVPages]:
    """Every block over packed tokens: chunks first, then one token of each slot."""
    run = functools.partial(bind(self.model, weights), tokens)
    return self._run_blocks(run, pages, rows, chunks, slots)

  def _run_blocks(
    self,
    run: Callable[[jax.Array, Sequence[Any], Attend], tuple[jax.Array, tuple[Any, ...]]],
    pages: KVPages,
    rows: 'Rows',
    chunks: Chunks | None,
    slots: Sequences | None,
  ) -> tuple[jax.Array, KVPages]:
    """The blocks that `run` takes positions, pages and what attends through."""
    split = 0 if chunks is None else chunks.tokens.shape[0]

    def attend(window, q, k, v, layer, rows, chunks, slots):
      pool, scales = layer
      layer = pool, scales = _append(pool, scales, k, v, rows)
      options = {'scales': scales, 'sliding_window': window}
      parts = []
      if chunks is not None:
        parts.append(prefill_attention(q[:split], pool, chunks.tables, chunks.offsets, chunks.lengths, **options))
      if slots is not None:
        lengths = jnp.where(slots.alive, slots.lengths + 1, 0)
        parts.append(paged_attention(q[split:], pool, slots.tables, lengths, **options))
      return jnp.concatenate(parts), layer

    heads, kv_heads, whole = PartitionSpec(None, MESH_AXES), PartitionSpec(None, 'kv'), PartitionSpec()

    def attend_everywhere(q, k, v, layer, window):
      local = jax.shard_map(
        functools.partial(attend, window),
        mesh=self.mesh,
        in_specs=(heads, kv_heads, kv_heads, LAYER_SPEC, whole, whole, whole),
        out_specs=(heads, LAYER_SPEC),
        check_vma=False,
      )
      return local(q, k, v, layer, rows, chunks, slots)

    pools = list(zip(pages.layers, pages.scales or itertools.repeat(None), strict=False))
    x, appended = run(rows.position, pools, attend_everywhere)
    layers, scales = zip(*appended, strict=True)
    return x, dataclasses.replace(pages, layers=layers, scales=scales if pages.scales else ())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """The position of each of T packed tokens in its sequence and in the pool. Padding has a page past the pool."""

  position: jax.Array  # [T] int32
  page: jax.Array  # [T] int32
  offset: jax.Array  # [T] int32


def _append(pool: jax.Array, scales: jax.Array | None, k: jax.Array, v: jax.Array, rows: Rows) -> Any:
  """One layer's pool with new tokens in it, and its scales."""
  out = append_tokens(pool, k, v, rows.page, rows.offset, scales=scales)
  return (out, None) if scales is None else out


def _chunk_rows(chunks: Chunks, pages: KVPages) -> Rows:
  row = jnp.arange(chunks.tokens.shape[0])
  sequence = owners(chunks.offsets[1:-1], row)  # of padding, the last
  live = row < chunks.offsets[-1]
  position = jnp.where(live, chunks.lengths[sequence] - chunks.offsets[sequence + 1] + row, 0)
  page = chunks.tables[sequence, position // pages.page_size]
  return Rows(position, jnp.where(live, page, pages.num_pages), position % pages.page_size)


def _decode_rows(slots: Sequences, pages: KVPages) -> Rows:
  page = jnp.take_along_axis(slots.tables, (slots.lengths // pages.page_size)[:, None], axis=1, mode='clip')[:, 0]
  return Rows(slots.lengths, jnp.where(slots.alive, page, pages.num_pages), slots.lengths % pages.page_size)


def _admit_chunks(slots: Slots, chunks: Chunks, first: Chosen) -> Slots:
  """Put sequences whose prompt is computed, and that stay, into their slots."""
  one = jnp.ones_like(first.tokens)
  alive = first.finite & ~chunks.sampling.ended(first.tokens, one)
  rows = Sequences(first.tokens, chunks.lengths, one, alive, chunks.tables, chunks.sampling)
  return slots.put(chunks.slots, rows).count(chunks.slots, rows, first.tokens)
