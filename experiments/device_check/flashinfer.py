"""FlashInfer's decode attention of one sequence over contiguous keys, called through jax-tvm-ffi, checked, then timed.

As FlashInfer's tutorial for JAX does it: its kernel is built by its own compiler driver, registered under a name, and
called with room for partial results as one of its outputs. Its batched kernels plan on the host before each call, which
is not the same work, so they are left out.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.device_check.context import Context
from experiments.device_check.decode import add, read_bytes, title
from experiments.device_check.figures import CHECKED
from experiments.device_check.float64 import attend, error
from experiments.device_check.kernels import rotating, sets, time_all
from experiments.device_check.timing import Case, draw

NAME = 'FlashInfer on contiguous keys'
_TARGET = 'flashinfer.single_decode'
_ROOM_BYTES = 32 << 20  # for partial results
_BOUND = 2e-2


def run(context: Context) -> None:
  """Build and register the kernel, compare one answer with float64, then time it at every context."""
  _register(context.sizes.heads[2])
  inputs = _inputs(context, 257, 0)
  q, k, v = (np.asarray(array).astype(np.float64) for array in inputs)
  expected, _ = attend(q[None], k, v, np.array([256]))
  missed = error(jax.jit(_call)(*inputs), expected[0])
  context.figures.add(f'{title((1, 257))}, {NAME}', missed, CHECKED, peer='allowed', peer_value=_BOUND)
  if not missed <= _BOUND:
    context.figures.fail(f'{NAME}: the relative error is {missed:.3g}, so it is not timed')
    return
  cases = []
  for length in context.sizes.contexts:
    cases.append(Case(f'{title((1, length))}, {NAME}', functools.partial(_make, context, length), (1, length)))
  time_all(context, cases, functools.partial(add, context))


def _register(head_dim: int) -> None:
  """Build the kernel for bfloat16 and make it known to JAX; packages that are rarely there are imported here."""
  torch, bridge, jit = map(importlib.import_module, ('torch', 'jax_tvm_ffi', 'flashinfer.jit'))
  dtype = torch.bfloat16
  module = jit.gen_single_decode_module(dtype, dtype, dtype, head_dim, head_dim, 0, False, False).build_and_load()

  def decode(out, room, q, k, v, softmax_scale):
    # No logarithms of sums; keys as [S, K, D]; no window, slopes or cap; rotary embeddings are applied elsewhere.
    module.run(q, k, v, room, out, None, 0, -1, None, 0.0, softmax_scale, 1.0, 1e-4)

  bridge.register_ffi_target(
    _TARGET, decode, arg_spec=['rets', 'args', 'attrs.softmax_scale'], platform='gpu', pass_owned_tensor=True
  )


def _call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Attention of one token's queries `[H, D]` over keys and values `[S, K, D]`."""
  results = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((_ROOM_BYTES,), jnp.uint8)
  return jax.ffi.ffi_call(_TARGET, results)(q, k, v, softmax_scale=float(q.shape[-1] ** -0.5))[0]


def _inputs(context: Context, length: int, seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  query_heads, kv_heads, head_dim = context.sizes.heads
  q = draw((query_heads, head_dim), 'bfloat16', 3 * seed)
  k, v = (draw((length, kv_heads, head_dim), 'bfloat16', 3 * seed + part) for part in (1, 2))
  return q, k, v


def _make(context: Context, length: int) -> Callable[[int], Any]:
  count = sets(context, read_bytes((1, length), context.sizes.heads))
  return rotating(jax.jit(_call), [_inputs(context, length, seed) for seed in range(count)])
