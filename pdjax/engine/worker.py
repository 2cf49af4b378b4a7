"""Worker: one mesh, one copy of the weights, a pool of pages a cache kind, one set of slots, and its programs."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from pdjax.engine.detokenize import Detokenizer
from pdjax.engine.packing import Packing
from pdjax.engine.place import Place
from pdjax.engine.programs import (
  Admit,
  Copy,
  Decode,
  Fused,
  Grow,
  Prefill,
  Program,
  Remember,
  layer_groups,
  programs_of,
  run_groups,
)
from pdjax.engine.sequences import Followed, log_probabilities
from pdjax.engine.slots import Slots
from pdjax.engine.steps import NO_TOKEN, Steps
from pdjax.model.sampling import Chosen, past
from pdjax.model.tokenizer import Tokenizer
from pdjax.model.transformer import Weights
from pdjax.serving.batch import NOBODY, Batch
from pdjax.serving.events import Decoded, Ended, Result
from pdjax.serving.orders import Admission, PageCopies, StepOrder
from pdjax.sharding import replicated
from pdjax.types.cache import KV
from pdjax.types.model import ModelSpec
from pdjax.types.request import Request
from pdjax.types.transfer import TransferSpec
from pdjax.types.worker import Role, WorkerSpec, bucket_for

_MOST_COMPILERS = 8  # programs of a worker compiled side by side: each takes memory, and there may be more workers


class Collected(NamedTuple):
  """The outcome of a step: the first tokens of prompts, those of its batch, and how many were computed in vain."""

  results: tuple[Result, ...]
  decoded: Decoded | None
  wasted: int


@dataclasses.dataclass(frozen=True)
class Pending:
  """A dispatched step's tokens, on their way: `[C]` of chunks, `[steps, B]` of decodes; and who was followed then.

  Chunks of requests that were left out then may be of pages in which something is missing.
  """

  first: Chosen | None
  tokens: Chosen | None
  followed: Followed
  left_out: tuple[str, ...] = ()


class Worker(Place):
  """A place that also runs steps, in the order of dispatch.

  Attributes:
    weights: The model's weights, as `pools` and `slots` are: on its mesh.
    slots: Its decoding sequences on the devices, replaced by every program that updates them.
    packing: Puts orders into rows for the devices.
    programs: Its programs by name; `compile` compiles and runs what it finds there.
    followed: The sequences that have not ended, as the host follows them.
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
    super().__init__(spec, model, mesh)
    self.weights = weights
    self.packing = Packing(spec, model, jax.tree.leaves(weights)[0].dtype)
    self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
    bounds = () if transfer is None else transfer.all_step_groups(spec, model.num_layers)
    self._groups = layer_groups(model, bounds)
    self.programs = programs_of(spec, self._groups)
    self._compiled: dict[str, jax.stages.Compiled] = {}
    self._expected = -1  # the id of the last order; steps that follow in one that stands have its own
    self._packed: tuple[Batch, np.ndarray] = (NOBODY, np.zeros(0, np.int32))
    self.reset()

  def reset(self) -> None:
    """Start over with empty pages and slots, as a new incarnation."""
    super().reset()
    self.slots: Slots = jax.device_put(self.packing.empty_slots(), replicated(self.mesh))
    self.forget_all()

  @property
  def broken(self) -> bool:
    """Whether a failed step has consumed the pages it was given."""
    return super().broken or any(leaf.is_deleted() for leaf in jax.tree.leaves(self.slots))

  # -------------------------------------------------------------------------- compiling

  def compile(self, precision: str) -> dict[str, float]:
    """Compile every program of the worker's roles for every bucket, and run each once for one token in page 0.

    A program's first run is slow, on CPU by a fifth of a second: XLA prepares its products then.

    Args:
      precision: Of matrix products, as `jax.default_matmul_precision` takes it.

    Returns:
      Seconds of compiling by program; programs compile side by side, so the sum exceeds the time it took.
    """

    def timed(program: Program) -> float:
      begin = time.perf_counter()
      with jax.default_matmul_precision(precision):
        self._compiled[program.name] = self.lower(program).compile()
      return time.perf_counter() - begin

    with ThreadPoolExecutor(max(2, min(_MOST_COMPILERS, (os.cpu_count() or 2) // 2))) as pool:
      seconds = dict(zip(self.programs, pool.map(timed, self.programs.values()), strict=True))
    for program in self.programs.values():
      program.rehearse(self.run, self.packing)
    jax.block_until_ready(([pool.pages for pool in self.pools.values()], self.slots))
    return seconds

  def lower(self, program: Program) -> jax.stages.Lowered:
    """A program for this worker's devices and sizes, ready to be compiled."""
    function = program.function(Steps(self.model, self.mesh, self.spec.max_fused_steps))
    whole = replicated(self.mesh)
    state = [part.of(self) for part in program.takes]
    arguments = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), program.one_token(self.packing)
    )
    return jax.jit(function, donate_argnums=program.donates).lower(*state, *arguments)

  def program(self, name: str) -> jax.stages.Compiled:
    """The compiled program of a name, such as `prefillx64`; see `Program.name`."""
    return self._compiled[name]

  def run(self, program: Program, *arguments: Any) -> tuple[Any, ...]:
    """Hand a program to the devices; its outputs beside the worker's new state."""
    out = self.program(program.name)(*[part.of(self) for part in program.takes], *arguments)
    if not isinstance(out, tuple):
      out = (out,)
    assert len(out) >= len(program.gives_back), f'{program.name} gives back {len(out)} parts'
    for part, new in zip(program.gives_back, out, strict=False):
      part.put(self, new)
    return out[len(program.gives_back) :]

  # -------------------------------------------------------------------------- running

  def dispatch(self, order: StepOrder, after: Callable[[tuple[int, int]], None] = lambda group: None) -> Pending:
    """Hand a step to the devices and return at once; `after` is called with each of its groups of layers, if any.

    The order alone says what is to be run, whatever role the worker has by then. A worker compiled for groups of layers
    runs chunks by themselves in these, also where the order does not ask for it.

    Raises:
      ValueError: if the order asks for groups of layers that nothing was compiled for.
    """
    groups = tuple(group.bounds for group in self._groups)
    if not set(order.layer_groups).issubset(groups):
      raise ValueError(
        f'step {order.id} is to run in the groups of layers {order.layer_groups}, but worker {self.spec.name!r} is '
        f'compiled for {groups or "whole steps"}; give the state the TransferSpec of the workers.'
      )
    if order.id != self._expected:
      self.followed.expect(order)
      self._expected = order.id
    if admitted := [(join.slot, join.admission) for join in order.joins if join.admission is not None]:
      self._admit(admitted)
    for arguments in self.packing.grown([(one.slot, one.pages) for one in order.growth]):
      self.run(Grow(), *arguments)
    for row, chunk in enumerate(order.chunks):
      self._copy(chunk.copies)
      if chunk.is_last:
        self.followed.follow(chunk.request, (), chunk.limit)
        self._remember(chunk.request, (), self.packing.num_slots + row)
        if chunk.slot is not None:
          self._remember(chunk.request, (), chunk.slot)
    first = tokens = None
    if not order.chunks:
      size = bucket_for(len(order.batch), self.spec.batch_buckets)
      (tokens,) = self.run(Decode(size), self._ids(order.batch, size), np.int32(order.steps))
    else:
      size = bucket_for(sum(chunk.length for chunk in order.chunks), self.spec.token_buckets)
      chunks = self.packing.chunks(order.chunks, size)
      if Role.BOTH in self.spec.roles and (order.decodes or Role.PREFILL not in self.spec.roles):
        batch = self.spec.max_sequences
        first, tokens = self.run(Fused(size, batch), chunks, self._ids(order.batch, batch))
      elif self._groups:
        first = run_groups(self.run, self._groups, chunks, after)
      else:
        (first,) = self.run(Prefill(size), chunks)
    return Pending(first, tokens, self.followed, self.followed.left_out)

  def _ids(self, batch: Batch, size: int) -> np.ndarray:
    """The slots of a batch, `[size]`; packed once for all steps of it."""
    known, ids = self._packed
    if known is not batch or len(ids) != size:
      ids = self.packing.ids(batch.slots, size)
      self._packed = batch, ids
    return ids

  def collect(self, order: StepOrder, pending: Pending) -> Collected:
    """Wait for a step; each request's tokens, and how many were computed in vain."""
    results: list[Result | None] = []
    computed = 0
    decoded = None
    if pending.first is not None:
      first, finite = jax.device_get((pending.first.tokens, pending.first.finite))
      for row, (chunk, token) in enumerate(zip(order.chunks, first.tolist(), strict=False)):
        error = None if finite[row] else self._not_finite
        if chunk.is_last:
          computed += 1
          told = functools.partial(log_probabilities, pending.first, row)
          results.append(pending.followed.result(chunk.request.id, [token], told, error, leaves=chunk.slot is None))
        elif error is not None and chunk.request.id not in pending.left_out:  # before anyone goes on from its pages
          results.append(Result(chunk.request.id, (), 'error', error=error))
    if pending.tokens is not None:
      decoded = self._decoded(order, pending.tokens, pending.followed) if order.decodes else None
      computed += order.steps * len(order.batch)
    delivered = tuple(result for result in results if result is not None)
    brought = sum(len(result.tokens) for result in delivered) + (0 if decoded is None else decoded.num_tokens())
    return Collected(delivered, decoded, computed - brought)

  def _decoded(self, order: StepOrder, chosen: Chosen, followed: Followed) -> Decoded:
    tokens, finite = jax.device_get((chosen.tokens, chosen.finite))
    size = len(order.batch)
    tokens, finite = tokens[: order.steps, :size], finite[: order.steps, :size]
    counts, texts, ended, logprobs = np.zeros(size, np.int64), [''] * size, [], {}
    for row, (request, column) in enumerate(zip(order.batch.requests, tokens.T.tolist(), strict=True)):
      got = [token for token in column if token != NO_TOKEN]
      if not got:
        continue
      told = functools.partial(log_probabilities, chosen, np.s_[: len(got), row])
      error = None if finite[len(got) - 1, row] else self._not_finite  # where it is not, the sequence ended
      result = followed.result(request, got, told, error)
      if result is None:
        continue
      counts[row], texts[row] = len(result.tokens), result.text
      if result.logprobs:
        logprobs[row] = result.logprobs
      if result.finish_reason is not None:
        ended.append(Ended(row, result.finish_reason, result.error))
    return Decoded(tokens, counts, tuple(ended), tuple(texts) if self._detokenizer is not None else (), logprobs)

  @property
  def _not_finite(self) -> str:
    return (
      f'worker {self.spec.name!r} computed logits that are not finite (NaN or infinite), so there is no token to '
      f'choose; look for NaN in the weights, or for numbers that {self.packing.dtype} does not hold (then set another '
      'dtype).'
    )

  def forget_all(self) -> None:
    """Let go of all requests, so that steps under way bring nothing to others of the same id.

    Sequences may be left alive in slots: they write nothing, for only slots that an order names are run, and no order
    names one before it was filled anew.
    """
    self.followed = Followed(self.model.eos_token_ids, self._detokenizer)  # steps under way go on with the last
    self._expected = -1

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

  def clear_slots(self, order: StepOrder) -> None:
    """Leave nothing alive in the slots that a step was to use or fill."""
    slots = list(order.batch.slots)
    slots += [chunk.slot for chunk in order.chunks if chunk.slot is not None]
    if slots:
      self.run(Admit(), *self.packing.slots(slots, self.packing.empty_rows()))

  def _admit(self, admitted: Sequence[tuple[int, Admission]]) -> None:
    """Fill slots with sequences that arrive, and follow them."""
    for slot, admission in admitted:
      self._copy(admission.copies)
      self.followed.follow(admission.request, admission.tokens, admission.limit)
      self._remember(admission.request, admission.tokens, slot)
    rows = self.packing.admitted([admission for _, admission in admitted])
    self.run(Admit(), *self.packing.slots([slot for slot, _ in admitted], rows))

  def _copy(self, copies: PageCopies) -> None:
    """Copy pages over others."""
    assert copies.keys() <= {KV}, 'no other kind is copied here'
    for pair in copies.get(KV, ()):
      self.run(Copy(), *map(np.int32, pair))

  def _remember(self, request: Request, tokens: Sequence[int], row: int) -> None:
    """Note a sequence's past in a row of the history, if its penalties ask for it."""
    if request.sampling.penalises:
      self.run(Remember(), np.int32(row), past(request.prompt, tokens, self.model.vocab_size))
