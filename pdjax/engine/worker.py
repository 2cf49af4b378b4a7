"""Worker: one mesh, one copy of the weights, one pool of pages, one set of slots, and the passes compiled for them."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pdjax.engine.slots import Slots
from pdjax.engine.steps import NO_TOKEN, Chunks, Passes
from pdjax.kv.pages import KVPages
from pdjax.model.sampling import Sampling, stop_tokens
from pdjax.model.transformer import Weights
from pdjax.serving.messages import Admission, ChunkOrder, FinishReason, Result, StepOrder
from pdjax.sharding import replicated
from pdjax.types.cluster import WorkerSpec, bucket_for
from pdjax.types.model import ModelSpec
from pdjax.types.request import Request

LimitOf = Callable[[Request], int]


@dataclasses.dataclass(slots=True)
class _Progress:
  """What tells that a sequence has ended, on the host: the device decides by the same rule."""

  left: int
  stops: frozenset[int]

  def take(self, tokens: Sequence[int]) -> FinishReason | None:
    """Count tokens; why the sequence ends with the last of them, or None."""
    self.left -= len(tokens)
    if tokens[-1] in self.stops:
      return 'stop'
    return 'length' if self.left <= 0 else None


@dataclasses.dataclass(frozen=True)
class Pending:
  """The tokens of a dispatched pass, still on their way: `[C]` of its chunks, `[steps, B]` of its decodes."""

  first: jax.Array | None
  tokens: jax.Array | None

  def arrays(self) -> list[jax.Array]:
    return [array for array in (self.first, self.tokens) if array is not None]


class Worker:
  """Runs passes on one mesh, in the order of dispatch."""

  def __init__(
    self,
    spec: WorkerSpec,
    model: ModelSpec,
    mesh: Mesh,
    weights: Weights,
    page_size: int,
    dtype: jnp.dtype,
    limit_of: LimitOf,
  ):
    """Make an empty worker; `spec.num_pages` must be a count, `limit_of` says how many tokens a request generates."""
    assert isinstance(spec.num_pages, int)
    self.spec = spec
    self.model = model
    self.mesh = mesh
    self.weights = weights
    self.page_size = page_size
    self.dtype = dtype
    self.incarnation = 0
    self._limit_of = limit_of
    self._table_width = -(-model.context_len // page_size)
    self._num_slots = spec.max_sequences if spec.role.decodes else 1
    self._programs: dict[tuple, Any] = {}
    self._progress: dict[str, _Progress] = {}
    self.page_shapes = KVPages.shapes(model, spec.num_pages, page_size, dtype, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.page_shapes)
    zeros = functools.partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.page_shapes)
    self._make_pages = jax.jit(zeros, out_shardings=shardings)
    self.reset()

  def reset(self) -> None:
    """Start over with empty pages and slots, as a new incarnation."""
    self.incarnation += 1
    for layer in self.pages.layers if self.incarnation > 1 else ():
      layer.delete()  # there may be no room for two pools
    self.pages: KVPages = self._make_pages()
    self.slots: Slots = jax.device_put(Slots.empty(self._num_slots, self._table_width), replicated(self.mesh))
    self._progress.clear()

  @property
  def broken(self) -> bool:
    """Whether a failed pass has consumed the pages it was given."""
    return any(leaf.is_deleted() for leaf in jax.tree.leaves((self.pages, self.slots)))

  # -------------------------------------------------------------------------- compiling

  def compile(self, precision: str) -> dict[str, float]:
    """Compile every bucket of every pass of the worker's role.

    Args:
      precision: Of matrix products, as `jax.default_matmul_precision` takes it.

    Returns:
      Seconds by program; programs compile side by side, so the sum exceeds the time it took.
    """
    role = self.spec.role
    keys: list[tuple] = [('admit',)] if role.decodes else []
    if role.prefills:
      kind, *batch = ('fused', self.spec.max_sequences) if role.decodes else ('prefill',)
      keys += [(kind, tokens, *batch) for tokens in self.spec.token_buckets]
    if role.decodes:
      keys += [('decode', batch) for batch in self.spec.batch_buckets]

    def timed(key: tuple) -> float:
      begin = time.perf_counter()
      with jax.default_matmul_precision(precision):
        self._programs[key] = self._lower(key).compile()
      return time.perf_counter() - begin

    with ThreadPoolExecutor(2) as pool:
      return {'x'.join(map(str, key)): seconds for key, seconds in zip(keys, pool.map(timed, keys), strict=True)}

  def _lower(self, key: tuple) -> jax.stages.Lowered:
    passes = Passes(self.model, self.mesh, self.spec.max_fused_steps)
    state = (self.weights, self.pages, self.slots)
    match key:
      case ('prefill', tokens):
        return jax.jit(passes.prefill, donate_argnums=(1, 2)).lower(
          *state, self._abstract(self._pack_chunks((), tokens))
        )
      case ('decode', batch):
        steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(self.mesh))
        return jax.jit(passes.decode, donate_argnums=(1, 2)).lower(
          *state, self._abstract(self._pack_ids((), batch)), steps
        )
      case ('fused', tokens, batch):
        chunks, ids = self._pack_chunks((), tokens), self._pack_ids((), batch)
        return jax.jit(passes.fused, donate_argnums=(1, 2)).lower(*state, self._abstract(chunks), self._abstract(ids))
      case ('admit',):
        rows = self._abstract(Slots.empty(self._num_slots, self._table_width))
        ids = self._abstract(self._pack_ids((), self._num_slots))
        return jax.jit(Slots.put, donate_argnums=0).lower(self.slots, ids, rows)
    raise AssertionError(key)

  def _abstract(self, tree: Any) -> Any:
    sharding = replicated(self.mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

  def program(self, *key: Any) -> jax.stages.Compiled:
    """A compiled pass: `'prefill', tokens`, `'decode', batch` or `'fused', tokens, batch`."""
    return self._programs[key]

  # -------------------------------------------------------------------------- running

  def dispatch(self, order: StepOrder) -> Pending:
    """Hand a pass to the devices and return at once."""
    admitted = [(decode.slot, decode.admission) for decode in order.decodes if decode.admission is not None]
    if admitted:
      self._admit(admitted)
    for chunk in order.chunks:
      if chunk.is_last:
        self._track(chunk.request, 0)
    ids = [decode.slot for decode in order.decodes]
    state = (self.weights, self.pages, self.slots)
    first = tokens = None
    if not order.chunks:
      batch = bucket_for(len(ids), self.spec.batch_buckets)
      program = self.program('decode', batch)
      self.pages, self.slots, tokens = program(*state, self._pack_ids(ids, batch), np.int32(order.steps))
    else:
      size = bucket_for(sum(chunk.length for chunk in order.chunks), self.spec.token_buckets)
      chunks = self._pack_chunks(order.chunks, size)
      if self.spec.role.decodes:
        program = self.program('fused', size, self.spec.max_sequences)
        batch_ids = self._pack_ids(ids, self.spec.max_sequences)
        self.pages, self.slots, first, tokens = program(*state, chunks, batch_ids)
      else:
        self.pages, self.slots, first = self.program('prefill', size)(*state, chunks)
    return Pending(first, tokens)

  def collect(self, order: StepOrder, pending: Pending) -> tuple[tuple[Result, ...], int]:
    """Wait for a pass; each request's tokens, and how many were computed in vain."""
    results: list[Result | None] = []
    wasted = 0
    if pending.first is not None:
      first = np.asarray(pending.first).tolist()
      for chunk, token in zip(order.chunks, first, strict=False):
        if chunk.is_last:
          results.append(self._result(chunk.request.id, [token], leaves=chunk.slot is None))
    if pending.tokens is not None:
      columns = np.asarray(pending.tokens)[: order.steps].T.tolist()
      for decode, column in zip(order.decodes, columns, strict=False):
        tokens = [token for token in column if token != NO_TOKEN]
        wasted += len(column) - len(tokens)
        if tokens:
          results.append(self._result(decode.request, tokens))
    return tuple(result for result in results if result is not None), wasted

  def forget(self, request: str) -> None:
    """Let go of a request that was ended from outside; what passes under way still bring it is not reported."""
    self._progress.pop(request, None)

  def _result(self, request: str, tokens: list[int], *, leaves: bool = False) -> Result | None:
    """The outcome for one request, or None if it was ended meanwhile; `leaves` says that it decodes elsewhere."""
    progress = self._progress.get(request)
    if progress is None:
      return None
    reason = progress.take(tokens)
    if leaves or reason is not None:
      self.forget(request)
    return Result(request, tuple(tokens), reason)

  def _track(self, request: Request, generated: int) -> None:
    stops = stop_tokens(request.sampling, self.model.eos_token_ids)
    self._progress[request.id] = _Progress(self._limit_of(request) - generated, frozenset(stops))

  def _admit(self, admitted: Sequence[tuple[int, Admission]]) -> None:
    rows = Slots.empty(self._num_slots, self._table_width)
    admissions = [admission for _, admission in admitted]
    for row, admission in enumerate(admissions):
      generated = len(admission.tokens)
      rows.tokens[row] = admission.tokens[-1]
      rows.lengths[row] = admission.request.prompt_len + generated - 1
      rows.generated[row] = generated
      rows.alive[row] = True
      rows.tables[row, : len(admission.pages)] = admission.pages
      self._track(admission.request, generated)
    rows = dataclasses.replace(rows, sampling=self._sampling([one.request for one in admissions], self._num_slots))
    self._put_slots([slot for slot, _ in admitted], rows)

  def clear_slots(self, order: StepOrder) -> None:
    """Leave nothing alive in the slots that a pass was to use or fill."""
    slots = [decode.slot for decode in order.decodes]
    slots += [chunk.slot for chunk in order.chunks if chunk.slot is not None]
    if slots:
      self._put_slots(slots, Slots.empty(self._num_slots, self._table_width))

  def _put_slots(self, slots: Sequence[int], rows: Slots) -> None:
    """Replace these slots by the first of so many rows."""
    self.slots = self.program('admit')(self.slots, self._pack_ids(slots, self._num_slots), rows)

  def _sampling(self, requests: Sequence[Request], rows: int) -> Sampling:
    limits = [self._limit_of(request) for request in requests]
    return Sampling.stack([request.sampling for request in requests], limits, self.model.eos_token_ids, rows)

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
      new['tokens'][end : end + chunk.length] = chunk.request.prompt[chunk.start : stop]
      end += chunk.length
      new['offsets'][row + 1 :] = end
      new['lengths'][row] = stop
      new['tables'][row, : len(chunk.pages)] = chunk.pages
      if chunk.slot is not None:
        new['slots'][row] = chunk.slot
    return Chunks(**new, sampling=self._sampling([chunk.request for chunk in chunks], most))
