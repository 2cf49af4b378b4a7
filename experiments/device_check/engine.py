"""Steps of a Llama with random weights in bfloat16, run by the engine's workers: a long prompt, decode steps by batch.

Workers are those of `pdjax.engine.build`, compiled side by side and for few sizes, and orders go to an `Engine` as the
loop gives them. Sequences that decode are admitted into pages of random keys and values: to compute their prompts would
take longer than all that is measured.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.device_check.bounds import nominal, unknown
from experiments.device_check.context import Context
from experiments.device_check.drawn import DrawnCheckpoint
from experiments.device_check.result import MFU
from experiments.device_check.timing import draw
from experiments.few_buckets import FewBuckets
from pdjax.engine.engine import Engine
from pdjax.engine.worker import Worker
from pdjax.model.weights import load_weights
from pdjax.serving.batch import NOBODY
from pdjax.serving.events import Done, Event
from pdjax.serving.orders import Admission, ChunkOrder, Join, StepOrder
from pdjax.sharding import make_mesh
from pdjax.types import ModelSpec, Request, SamplingParams, WorkerSpec
from pdjax.types.cache import KV, KVDtypeName
from pdjax.types.worker import Role

PAGE_SIZE = 16
_DTYPE: KVDtypeName = 'bfloat16'
_BYTES = 2
_UNCOUNTED = 2  # steps at the beginning of a row of them
_MAX_CHUNKS = WorkerSpec('any').max_chunks  # by default
_SPARE = 0.9  # of the device's memory, which weights and pages may fill


def run(context: Context) -> None:
  """All figures with few layers, which compile quickly; a prompt also in steps with room for more, as by default."""
  sizes = context.sizes
  measure(context, sizes.few_layers, sizes.prompt_len, sizes.decode_batches, (1, _MAX_CHUNKS))


def run_whole(context: Context) -> None:
  """The whole model: a prompt, and decode steps of the smallest batch and the largest but one."""
  sizes = context.sizes
  measure(context, sizes.model.num_layers, sizes.prompt_len, _first_batches(sizes.decode_batches))


def run_batches(context: Context) -> None:
  """The whole model: decode steps of the other batches, by themselves because each takes long to compile."""
  sizes = context.sizes
  others = [batch for batch in sizes.decode_batches if batch not in _first_batches(sizes.decode_batches)]
  if not others:
    context.figures.pass_over('there are no other batches')
    return
  measure(context, sizes.model.num_layers, None, others)


def _first_batches(batches: Sequence[int]) -> tuple[int, ...]:
  return (batches[0], batches[-2]) if len(batches) > 2 else (batches[0],)


def measure(
  context: Context, layers: int, prompt_len: int | None, batches: Sequence[int], max_chunks: Sequence[int] = (1,)
) -> None:
  """Build the workers that it takes, and measure their steps.

  Args:
    context: Takes the figures.
    layers: Of the model.
    prompt_len: Tokens of prompts, or None to measure none.
    batches: Sequences of decode steps.
    max_chunks: Most chunks of a prefill step, for each of which prompts are measured, one a step.
  """
  figures, sizes = context.figures, context.sizes
  _ = context.ceilings  # before the weights take the memory
  begin = time.perf_counter()
  longest = sizes.decode_context + 2 * sizes.decode_steps + 2
  context_len = max(prompt_len or 0, longest)
  model = dataclasses.replace(sizes.model, num_layers=layers, context_len=context_len)
  prompt_tokens = 2 * len(max_chunks) * (prompt_len or 0)
  batches = _that_fit(context, model, prompt_tokens, batches, longest)
  device = jax.devices()[0]
  mesh = make_mesh(model, [device])
  weights = load_weights(DrawnCheckpoint(model), model, {0: mesh}, jnp.dtype(_DTYPE))[0]
  jax.block_until_ready(weights)
  print(f'weights drawn in {time.perf_counter() - begin:.1f} s', flush=True)

  common: dict[str, Any] = {'page_size': PAGE_SIZE, 'kv_dtype': _DTYPE, 'max_fused_steps': 1}
  specs = []
  if prompt_len is not None:
    room: dict[str, Any] = {'num_pages': 2 * -(-prompt_len // PAGE_SIZE), 'max_step_tokens': prompt_len}
    for index, most in enumerate(max_chunks):
      specs.append(FewBuckets(f'prefill{index}', Role.PREFILL, **room, max_chunks=most, max_sequences=1, **common))
  if batches:
    pages, most = max(batches) * -(-longest // PAGE_SIZE), max(batches)
    specs.append(
      FewBuckets(
        'decode0',
        Role.DECODE,
        num_pages=pages,
        max_sequences=most,
        max_chunks=1,
        batches=tuple(sorted(batches)),
        **common,
      )
    )
  workers = [Worker(spec, model, mesh, weights) for spec in specs]
  begin = time.perf_counter()
  with ThreadPoolExecutor(len(workers)) as pool:
    programs = list(pool.map(lambda worker: worker.compile('default'), workers))
  compile_s = time.perf_counter() - begin
  figures.compiled(compile_s)
  seconds = ', '.join(
    f'{spec.name} {name} {took:.1f} s'
    for spec, each in zip(specs, programs, strict=True)
    for name, took in each.items()
  )
  print(f'compiled in {compile_s:.1f} s: {seconds}', flush=True)
  if prompt_len is not None and nominal(device) is None:
    figures.note(f'no MFU of a data sheet: {unknown(device)}')
  figures.note(f'pages of {PAGE_SIZE} tokens, tables for {context_len:,}; compiling took {seconds}')

  engine = Engine(workers, {})
  try:
    for worker in workers:
      _fill(worker)
    for spec in specs:
      if spec.role is Role.PREFILL:
        _prefill(context, engine, model, spec)
    for batch in batches:
      _decode(context, engine, model, batch)
  finally:
    engine.close()


def _that_fit(
  context: Context, model: ModelSpec, prompt_tokens: int, batches: Sequence[int], longest: int
) -> list[int]:
  """The batches whose pages fit beside weights and the pages of so many tokens of prompts."""
  room = (jax.devices()[0].memory_stats() or {}).get('bytes_limit', math.inf) * _SPARE
  room -= model.weight_bytes(_BYTES) + prompt_tokens * model.cached_token_bytes(_DTYPE)
  fitting = []
  for batch in batches:
    needed = batch * longest * model.cached_token_bytes(_DTYPE)
    if needed <= room:
      fitting.append(batch)
    else:
      context.figures.note(f'decode {batch}: not measured, its pages take {needed / 1e9:.0f} GB of {room / 1e9:.0f}')
  return fitting


def _fill(worker: Worker) -> None:
  """Put random keys and values into all pages of a worker."""
  layers = []
  for index, old in enumerate(worker.pages.layers):
    shape, dtype, sharding = old.shape, old.dtype, old.sharding
    old.delete()  # there may be no room for both
    layers.append(jax.device_put(draw(shape, dtype, index), sharding))
  worker.pages = dataclasses.replace(worker.pages, layers=tuple(layers))
  jax.block_until_ready(worker.pages)


# ---------------------------------------------------------------------------- steps

_numbers = itertools.count()


def _ends_s(engine: Engine, orders: Sequence[StepOrder], each: bool = False) -> list[float]:
  """The ends of these steps, in seconds; all are dispatched at once, or `each` when the one before has ended."""
  engine.start_clock()
  ends: list[float] = []
  if not each:
    for order in orders:
      engine.submit([order])
  for count, order in enumerate(orders, 1):
    if each:
      engine.submit([order])
    while len(ends) < count:
      ends += list(_ended(engine.wait(math.inf)[1]))
  return ends


def _ended(events: Sequence[Event]) -> Iterator[float]:
  for event in events:
    if not isinstance(event, Done):
      raise RuntimeError(f'a step failed: {event}')
    yield event.ended_s


def _per_step_s(ends_s: Sequence[float]) -> float:
  """Seconds from one end to the next, the first ones left out."""
  first = min(_UNCOUNTED, len(ends_s) - 2)
  return (ends_s[-1] - ends_s[first]) / (len(ends_s) - 1 - first)


def _tokens(model: ModelSpec, count: int, seed: int) -> tuple[int, ...]:
  return tuple(np.random.default_rng(seed).integers(2, model.vocab_size, count).tolist())


def _prefill(context: Context, engine: Engine, model: ModelSpec, spec: WorkerSpec) -> None:
  prompt_len = spec.max_step_tokens
  pages = -(-prompt_len // PAGE_SIZE)
  sampling = SamplingParams(max_tokens=2, ignore_eos=True)
  orders = []
  for index in range(context.sizes.prefill_steps + _UNCOUNTED):
    number = next(_numbers)
    request = Request(f'p{number}', _tokens(model, prompt_len, number), sampling)
    own = {KV: tuple(range(index % 2 * pages, (index % 2 + 1) * pages))}
    orders.append(StepOrder(number, spec.name, chunks=(ChunkOrder(request, 0, prompt_len, own, sampling.max_tokens),)))
  step_s = _per_step_s(_ends_s(engine, orders))
  flops = model.token_flops() * prompt_len + model.attention_flops(prompt_len, 0) + model.unembed_flops()
  said = nominal(jax.devices()[0])
  more: dict[str, Any] = {} if said is None else {MFU: flops / step_s / said[1]}
  room = '' if spec.max_chunks == 1 else f', in a pass for {spec.max_chunks}'
  context.figures.add(
    f'prefill of {prompt_len:,} tokens, {model.num_layers} layers{room}', prompt_len / step_s, 'tokens/s',
    floor_share=flops / step_s / context.ceilings.flops_per_s, milliseconds=1e3 * step_s,
    tflops_per_s=flops / step_s / 1e12, **more,
  )  # fmt: skip


def _decode(context: Context, engine: Engine, model: ModelSpec, batch: int) -> None:
  sizes = context.sizes
  worker = engine.workers['decode0']
  each = worker.pages.num_pages // worker.spec.max_sequences
  order = np.random.default_rng(0).permutation(worker.pages.num_pages)
  prompt, steps = _tokens(model, sizes.decode_context, batch), 2 * sizes.decode_steps
  sampling = SamplingParams(max_tokens=steps + 2, ignore_eos=True)
  requests = [Request(f'd{next(_numbers)}', prompt, sampling) for _ in range(batch)]
  orders, joins = [], []
  for slot, request in enumerate(requests):
    own = {KV: tuple(order[slot * each : (slot + 1) * each].tolist())}
    admission = Admission(request, own, (prompt[slot % len(prompt)],), sampling.max_tokens)
    joins.append(Join(request.id, slot, sizes.decode_context, sampling.max_tokens - 1, admission=admission))
  everyone = NOBODY.changed((), joins)
  for step in range(steps):  # half of them after the clock began anew, which nobody outlives but in the slots
    begins = step in (0, sizes.decode_steps)
    joining = tuple(dataclasses.replace(one, admission=None if step else one.admission) for one in joins if begins)
    orders.append(StepOrder(next(_numbers), 'decode0', joins=joining, decodes=True, batch=everyone))
  step_s = _per_step_s(_ends_s(engine, orders[: sizes.decode_steps]))
  waited_s = _per_step_s(_ends_s(engine, orders[sizes.decode_steps :], each=True))
  for name, seconds, done in (('', step_s, 1), (', each begun when the last has ended', waited_s, 3)):
    cached = batch * (sizes.decode_context + done * sizes.decode_steps // 2)
    moved = multiplied_bytes(model) + cached * model.cached_token_bytes(_DTYPE)
    context.figures.add(
      f'decode step of {batch} at {sizes.decode_context:,}, {model.num_layers} layers{name}', 1e3 * seconds, 'ms',
      floor_share=moved / context.ceilings.copy_bytes_per_s / seconds,
      bound_share=moved / context.ceilings.bytes_per_s / seconds, tokens_per_s=batch / seconds, bytes_moved=moved,
    )  # fmt: skip


def multiplied_bytes(model: ModelSpec) -> int:
  """Bytes of the weights that every decode step multiplies by: all but the embedding of tokens."""
  return _BYTES * (model.num_layers * model.layer_params + model.embed_dim * model.vocab_size)
