"""Worker: one mesh, one copy of the weights, one pool of pages, one set of slots, and the programs of its steps."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pdjax.engine.detokenize import Detokenizer
from pdjax.engine.sequences import Followed, log_probabilities
from pdjax.engine.slots import Sequences, Slots
from pdjax.engine.steps import NO_TOKEN, Chunks, Steps
from pdjax.kv.pages import KVPages, copy
from pdjax.model.sampling import Chosen, Sampling, past
from pdjax.model.tokenizer import Tokenizer
from pdjax.model.transformer import Weights
from pdjax.serving.events import Result
from pdjax.serving.orders import Admission, ChunkOrder, StepOrder
from pdjax.sharding import replicated
from pdjax.types.cluster import TransferSpec, WorkerSpec, bucket_for
from pdjax.types.model import ModelSpec
from pdjax.types.request import Request

_MOST_COMPILERS = 8  # programs of a worker compiled side by side: each takes memory, and there may be more workers


@dataclasses.dataclass(frozen=True)
class Pending:
  """A dispatched step's tokens, on their way: `[C]` of chunks, `[steps, B]` of decodes; and who was followed then."""

  first: Chosen | None
  tokens: Chosen | None
  followed: Followed


class Worker:
  """Runs steps on one mesh, in the order of dispatch.

  Attributes:
    weights: The model's weights, as `pages` and `slots` are: on its mesh.
    pages: Its pool, replaced by every program that updates it.
    slots: Its decoding sequences on the devices, replaced alike.
    followed: The sequences that have not ended, as the host follows them.
    incarnation: The number of its incarnation, from 1.
  """

  def __init__(
    self,
    spec: WorkerSpec,
    model: ModelSpec,
    mesh: Mesh,
    weights: Weights,
    tokenizer: Tokenizer | None = None,
    transfer: TransferSpec | None = None,
  ):
    """Make an empty worker.

    Args:
      spec: Its description; `num_pages` must be a count, `page_size` and `kv_dtype` filled in.
      model: The model it serves.
      mesh: Its devices.
      weights: The model's weights on that mesh.
      tokenizer: Turns tokens into text; without one there is no text, and stop strings are never found.
      transfer: The way of pages, which decides the groups of layers that its steps run in; None for whole steps.
    """
    assert isinstance(spec.num_pages, int) and spec.page_size and spec.kv_dtype
    self.spec = spec
    self.model = model
    self.mesh = mesh
    self.weights = weights
    self.incarnation = 0
    self._dtype = jax.tree.leaves(weights)[0].dtype
    self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
    self._table_width = -(-model.context_len // spec.page_size)
    self._num_slots = spec.max_sequences if spec.role.decodes else 1
    self._group_starts = self._programs_of_groups(
      () if transfer is None else transfer.step_groups(spec.role, model.num_layers)
    )
    self._programs: dict[tuple, Any] = {}
    self.page_shapes = KVPages.shapes(
      model, spec.num_pages, spec.page_size, jnp.dtype(spec.kv_dtype), mesh, spec.page_layout
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.page_shapes)
    zeros = functools.partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.page_shapes)
    self._make_pages = jax.jit(zeros, out_shardings=shardings)
    self.reset()

  def reset(self) -> None:
    """Start over with empty pages and slots, as a new incarnation."""
    self.incarnation += 1
    for leaf in jax.tree.leaves(self.pages) if self.incarnation > 1 else ():
      leaf.delete()  # there may be no room for two pools
    self.pages: KVPages = self._make_pages()
    history: Any = np.zeros((self._num_slots + self.spec.max_chunks, self.model.vocab_size), np.uint16)
    self.slots: Slots = jax.device_put(Slots(self._empty_rows(), history), replicated(self.mesh))
    self.forget_all()

  @property
  def broken(self) -> bool:
    """Whether a failed step has consumed the pages it was given."""
    return any(leaf.is_deleted() for leaf in jax.tree.leaves((self.pages, self.slots)))

  # -------------------------------------------------------------------------- compiling

  def compile(self, precision: str) -> dict[str, float]:
    """Compile every program of the worker's role for every bucket, and run each once for one token in page 0.

    A program's first run is slow, on CPU by a fifth of a second: XLA prepares its products then.

    Args:
      precision: Of matrix products, as `jax.default_matmul_precision` takes it.

    Returns:
      Seconds of compiling by program; programs compile side by side, so the sum exceeds the time it took.
    """
    role = self.spec.role
    keys: list[tuple] = [('remember',), *([('admit',), ('copy',)] if role.decodes else [])]
    for tokens in self.spec.token_buckets if role.prefills else ():
      keys += self._prompt_programs(tokens)
    if role.decodes:
      keys += [('decode', batch) for batch in self.spec.batch_buckets]

    def timed(key: tuple) -> float:
      begin = time.perf_counter()
      with jax.default_matmul_precision(precision):
        self._programs[key] = self._lower(key).compile()
      return time.perf_counter() - begin

    with ThreadPoolExecutor(max(2, min(_MOST_COMPILERS, (os.cpu_count() or 2) // 2))) as pool:
      seconds = {'x'.join(map(str, key)): took for key, took in zip(keys, pool.map(timed, keys), strict=True)}
    for key in keys:
      if key[0] in ('decode', 'fused'):
        self._run(('admit',), *self._one_token('admit'))
      if key[0] == 'begin':
        self._run_groups(self._one_token('prefill', key[1])[0], lambda group: None)
      elif key[0] not in ('layers', 'finish'):
        self._run(key, *self._one_token(*key))
    jax.block_until_ready((self.pages, self.slots))
    return seconds

  def _lower(self, key: tuple) -> jax.stages.Lowered:
    steps = Steps(self.model, self.mesh, self.spec.max_fused_steps)
    call: Callable
    state: tuple = (self.weights, self.pages, self.slots)
    donated: tuple[int, ...] = (1, 2)
    match key:
      case ('copy',):
        call, state, donated = copy, (self.pages,), (0,)
      case ('admit' | 'remember' as name,):
        call, state, donated = Slots.put if name == 'admit' else Slots.remember, (self.slots,), (0,)
      case ('begin', _):
        call, state, donated = steps.begin, (self.weights,), ()
      case ('layers', _, start, count):
        call = functools.partial(steps.layers, start)
        state, donated = (self._layer_weights(start, start + count), self.pages.part(start, start + count)), (1, 2)
      case ('finish', _):
        call, state, donated = steps.finish, (self.weights, self.slots), (1,)
      case (name, *_):
        call = getattr(steps, name)
    sharding = replicated(self.mesh)
    arguments = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), self._one_token(*key)
    )
    return jax.jit(call, donate_argnums=donated).lower(*state, *arguments)

  def _one_token(self, *key: Any) -> tuple[Any, ...]:
    """A program's arguments beside the worker's state: for one token, in slot 0, that its sequence ends with."""
    match key:
      case ('prefill', tokens):
        chunks = self._pack_chunks((), tokens)
        chunks.offsets[1:], chunks.lengths[:1] = 1, 1
        return (chunks,)
      case ('begin', tokens):
        return self._one_token('prefill', tokens)
      case ('layers' | 'finish', tokens, *_):
        x = jax.ShapeDtypeStruct((tokens, self.model.embed_dim), jax.tree.leaves(self.weights)[0].dtype)
        return x, *self._one_token('prefill', tokens)
      case ('decode', batch):
        return self._pack_ids((0,), batch), np.int32(1)
      case ('fused', tokens, batch):
        return *self._one_token('prefill', tokens), self._pack_ids((0,), batch)
      case ('admit',):
        rows = self._empty_rows()
        rows.alive[0] = True
        return self._pack_ids((0,), self._num_slots), rows
      case ('remember',):
        return np.int32(0), np.zeros(self.model.vocab_size, np.uint16)
      case ('copy',):
        return np.int32(0), np.int32(0)
    raise AssertionError(key)

  def program(self, *key: Any) -> jax.stages.Compiled:
    """The compiled program of a step: `'prefill', tokens`, `'decode', batch` or `'fused', tokens, batch`.

    Or of a part of one: `'begin', tokens`, `'layers', tokens, first, count` or `'finish', tokens`.
    """
    return self._programs[key]

  def _run(self, key: tuple, *arguments: Any) -> list[Any]:
    """Hand a program to the devices; its outputs beside the worker's new state."""
    program = self.program(*key)
    match key[0]:
      case 'copy':
        self.pages = program(self.pages, *arguments)
        return []
      case 'admit' | 'remember':
        self.slots = program(self.slots, *arguments)
        return []
    self.pages, self.slots, *out = program(self.weights, self.pages, self.slots, *arguments)
    return out

  def _prompt_programs(self, tokens: int) -> list[tuple]:
    """The programs that run prompt chunks of so many tokens.

    Where some chunks travel layer by layer, all steps run in groups of layers: equal groups are one program, so that
    much less is compiled than with the whole step as another, and on the devices a few more programs cost little.
    """
    if self.spec.role.decodes:
      return [('fused', tokens, self.spec.max_sequences)]
    if not self._group_starts:
      return [('prefill', tokens)]
    parts = sorted({(start, stop - first) for (first, stop), start in self._group_starts.items()})
    return [('begin', tokens), *(('layers', tokens, *part) for part in parts), ('finish', tokens)]

  def _programs_of_groups(self, groups: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """For each group of layers, the first layer of the first group as long with equal windows: they share a program."""
    starts: dict[tuple, int] = {}
    windows = [tuple(map(self.model.window, range(*group))) for group in groups]
    return {group: starts.setdefault(window, group[0]) for group, window in zip(groups, windows, strict=True)}

  def _layer_weights(self, first: int, stop: int) -> list[Weights]:
    return [self.weights['layers'][layer] for layer in range(first, stop)]

  def _run_groups(self, chunks: Chunks, after: Callable[[tuple[int, int]], None]) -> Chosen:
    """Hand a prefill step to the devices group of layers by group; `after` is called behind each."""
    size = chunks.tokens.shape[0]
    x = self.program('begin', size)(self.weights, chunks)
    for (first, stop), start in self._group_starts.items():
      program = self.program('layers', size, start, stop - first)
      part, x = program(self._layer_weights(first, stop), self.pages.part(first, stop), x, chunks)
      self.pages = self.pages.with_part(first, part)
      after((first, stop))
    self.slots, chosen = self.program('finish', size)(self.weights, self.slots, x, chunks)
    return chosen

  # -------------------------------------------------------------------------- running

  def dispatch(self, order: StepOrder, after: Callable[[tuple[int, int]], None] = lambda group: None) -> Pending:
    """Hand a step to the devices and return at once; `after` is called with each of its groups of layers, if any.

    A worker compiled for groups of layers runs in these, also where the order does not ask for it.

    Raises:
      ValueError: if the order asks for groups of layers that nothing was compiled for.
    """
    if not self._group_starts.keys() >= set(order.layer_groups):
      raise ValueError(
        f'step {order.id} is to run in the groups of layers {order.layer_groups}, but worker {self.spec.name!r} is '
        f'compiled for {tuple(self._group_starts) or "whole steps"}; give the state the TransferSpec of the workers.'
      )
    self.followed.expect(order)
    if admitted := [(decode.slot, decode.admission) for decode in order.decodes if decode.admission is not None]:
      self._admit(admitted)
    for row, chunk in enumerate(order.chunks):
      if chunk.is_last:
        self.followed.follow(chunk.request, (), chunk.limit)
        self._remember(chunk.request, (), self._num_slots + row)
        if chunk.slot is not None:
          self._remember(chunk.request, (), chunk.slot)
    ids = [decode.slot for decode in order.decodes]
    first = tokens = None
    if not order.chunks:
      batch = bucket_for(len(ids), self.spec.batch_buckets)
      (tokens,) = self._run(('decode', batch), self._pack_ids(ids, batch), np.int32(order.steps))
    else:
      size = bucket_for(sum(chunk.length for chunk in order.chunks), self.spec.token_buckets)
      chunks = self._pack_chunks(order.chunks, size)
      if self.spec.role.decodes:
        batch = self.spec.max_sequences
        first, tokens = self._run(('fused', size, batch), chunks, self._pack_ids(ids, batch))
      elif self._group_starts:
        first = self._run_groups(chunks, after)
      else:
        (first,) = self._run(('prefill', size), chunks)
    return Pending(first, tokens, self.followed)

  def collect(self, order: StepOrder, pending: Pending) -> tuple[tuple[Result, ...], int]:
    """Wait for a step; each request's tokens, and how many were computed in vain."""
    results: list[Result | None] = []
    computed = 0
    if pending.first is not None:
      first, finite = jax.device_get((pending.first.tokens, pending.first.finite))
      for row, (chunk, token) in enumerate(zip(order.chunks, first.tolist(), strict=False)):
        if chunk.is_last:
          computed += 1
          told = functools.partial(log_probabilities, pending.first, row)
          error = None if finite[row] else self._not_finite
          results.append(pending.followed.result(chunk.request.id, [token], told, error, leaves=chunk.slot is None))
    if pending.tokens is not None:
      chosen, finite = jax.device_get((pending.tokens.tokens, pending.tokens.finite))
      for row, (decode, column) in enumerate(zip(order.decodes, chosen[: order.steps].T.tolist(), strict=False)):
        computed += len(column)
        tokens = [token for token in column if token != NO_TOKEN]
        if tokens:
          told = functools.partial(log_probabilities, pending.tokens, np.s_[: len(tokens), row])
          error = None if finite[len(tokens) - 1, row] else self._not_finite  # where it is not, the sequence ended
          results.append(pending.followed.result(decode.request, tokens, told, error))
    delivered = tuple(result for result in results if result is not None)
    return delivered, computed - sum(len(result.tokens) for result in delivered)

  @property
  def _not_finite(self) -> str:
    return (
      f'worker {self.spec.name!r} computed logits that are not finite (NaN or infinite), so there is no token to '
      f'choose; look for NaN in the weights, or for numbers that {self._dtype} does not hold (then set another dtype).'
    )

  def forget_all(self) -> None:
    """Let go of all requests, so that steps under way bring nothing to others of the same id.

    Sequences may be left alive in slots: they write nothing, for only slots that an order names are run, and no order
    names one before it was filled anew.
    """
    self.followed = Followed(self.model.eos_token_ids, self._detokenizer)  # steps under way go on with the last

  def forget(self, request: str) -> None:
    """Let go of a request that was ended from outside; what steps under way still bring it is not reported."""
    self.followed.forget(request)

  def leave_out(self, order: StepOrder) -> Callable[[], None]:
    """Go on without a step that could not be handed to the devices.

    Later steps may have been decided before anyone knew. So nothing stays alive in the slots that the step was to use
    or fill, and what is computed of its requests counts for nothing until they begin again, or until no more steps can
    come that were decided in ignorance.

    Returns:
      Lets go of its requests; to be called once the steps before it were collected.

    Raises:
      Exception: if the slots cannot be cleared; then the worker is `broken`.
    """
    let_go = self.followed.leave_out(order.requests)
    try:
      self.clear_slots(order)
    except Exception:
      for leaf in jax.tree.leaves(self.slots):
        leaf.delete()  # a sequence alive in one of them would write into pages that are others' by then
      raise
    return let_go

  def _remember(self, request: Request, tokens: Sequence[int], row: int) -> None:
    """Note a sequence's past in a row of the history, if its penalties ask for it."""
    if request.sampling.penalises:
      row_of = past(request.prompt, tokens, self.model.vocab_size)
      self._run(('remember',), np.int32(row), row_of)

  def _admit(self, admitted: Sequence[tuple[int, Admission]]) -> None:
    rows = self._empty_rows()
    for row, (slot, admission) in enumerate(admitted):
      request, tokens = admission.request, admission.tokens
      if admission.copy is not None:
        self._run(('copy',), *map(np.int32, admission.copy))
      rows.tokens[row] = tokens[-1] if tokens else request.prompt[-1]
      rows.lengths[row] = request.prompt_len + len(tokens) - 1
      rows.generated[row] = len(tokens)
      rows.alive[row] = True
      rows.tables[row, : len(admission.pages)] = admission.pages
      self.followed.follow(request, tokens, admission.limit)
      self._remember(request, tokens, slot)
    rows = dataclasses.replace(rows, sampling=self._sampling([one for _, one in admitted], self._num_slots))
    self._put_slots([slot for slot, _ in admitted], rows)

  def clear_slots(self, order: StepOrder) -> None:
    """Leave nothing alive in the slots that a step was to use or fill."""
    slots = [decode.slot for decode in order.decodes]
    slots += [chunk.slot for chunk in order.chunks if chunk.slot is not None]
    if slots:
      self._put_slots(slots, self._empty_rows())

  def _empty_rows(self) -> Sequences:
    return Sequences.empty(self._num_slots, self._table_width)

  def _put_slots(self, slots: Sequence[int], rows: Sequences) -> None:
    """Replace these slots by the first of so many rows."""
    self._run(('admit',), self._pack_ids(slots, self._num_slots), rows)

  def _sampling(self, orders: Sequence[ChunkOrder | Admission], rows: int) -> Sampling:
    stops = [order.request.stop_tokens(self.model.eos_token_ids) for order in orders]
    return Sampling.stack([order.request.sampling for order in orders], [order.limit for order in orders], stops, rows)

  def _pack_ids(self, slots: Sequence[int], size: int) -> np.ndarray:
    ids = np.full(size, self._num_slots, np.int32)
    ids[: len(slots)] = slots
    return ids

  def _pack_chunks(self, chunks: Sequence[ChunkOrder], size: int) -> Chunks:
    most = self.spec.max_chunks
    new: dict[str, Any] = {
      'tokens': np.zeros(size, np.int32),
      'offsets': np.zeros(most + 1, np.int32),
      'lengths': np.zeros(most, np.int32),
      'tables': np.zeros((most, self._table_width), np.int32),
      'slots': np.full(most, self._num_slots, np.int32),
    }
    end = 0
    for row, chunk in enumerate(chunks):
      stop = chunk.start + chunk.length
      new['tokens'][end : end + chunk.length] = chunk.token_ids
      end += chunk.length
      new['offsets'][row + 1 :] = end
      new['lengths'][row] = stop
      new['tables'][row, : len(chunk.pages)] = chunk.pages
      if chunk.slot is not None:
        new['slots'][row] = chunk.slot
    return Chunks(**new, sampling=self._sampling(chunks, most))
