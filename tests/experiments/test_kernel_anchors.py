"""Published kernels traced knowing what they would read: they compute what they did, and their loops can be counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from experiments import kernel_anchors


def inputs(case):
  """Small random arrays, and the lengths and tables that the case wants."""
  keys = iter(jax.random.split(jax.random.key(0), len(case.arguments)))
  return [
    case.integers[place]() if place in case.integers else jax.random.normal(next(keys), x.shape, jnp.float32)
    for place, x in enumerate(case.arguments)
  ]


def attention(q, k, v, scale):
  """`[..., t, D]` queries that are the newest of as many keys `[..., s, D]`."""
  scores = jnp.einsum('...td,...sd->...ts', q, k) * scale
  late = jnp.arange(k.shape[-2]) > jnp.arange(q.shape[-2])[:, None] + k.shape[-2] - q.shape[-2]
  return jnp.einsum('...ts,...sd->...td', jax.nn.softmax(jnp.where(late, -jnp.inf, scores), axis=-1), v)


def run(case, arguments):
  with pltpu.force_tpu_interpret_mode():
    return np.asarray(case.function(*arguments))


@pytest.mark.parametrize('block_q, block_kv', [(128, 128), (128, 256)])
def test_splash_attention_skips_only_what_is_above_the_diagonal(block_q, block_kv):
  case = kernel_anchors.splash_prefill(256, block_q, block_kv, kv_heads=1, static=True)
  q, k, v = inputs(case)
  np.testing.assert_allclose(
    run(case, (q, k, v)), attention(q, k[:, None], v[:, None], 1.0), rtol=2e-2, atol=2e-2
  )  # it scales nothing


@pytest.mark.parametrize('block_tokens', [32, 64])
def test_paged_attention_reads_every_token(block_tokens):
  case = kernel_anchors.paged_decode(2, 64, 16, block_tokens, kv_heads=2, static=True)
  q, k_pages, v_pages, lengths, tables = inputs(case)
  rounded = (pages.astype(jnp.bfloat16).astype(jnp.float32) for pages in (k_pages, v_pages))  # as the kernel does
  k, v = (pages[:, tables].reshape(2, 2, 64, 128).swapaxes(0, 1) for pages in rounded)  # [B, K, S, D]
  grouped = q.reshape(2, 2, 4, 1, 128)
  expected = attention(grouped, k[:, :, None], v[:, :, None], 1.0)
  actual = run(case, (q, k_pages, v_pages, lengths, tables))
  np.testing.assert_allclose(actual, expected.reshape(q.shape), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize('static', [False, True])
def test_ragged_paged_attention_has_loops_of_known_length(static):
  """Its arithmetic is not interpreted: the interpreter has no reshaped references."""
  case = kernel_anchors.ragged_decode(4, 64, 16, 32, queries=2, static=static)
  names = list(primitives(jax.make_jaxpr(case.function)(*case.arguments).jaxpr))
  assert names.count('dma_start') == 2 * 2 and names.count('dma_wait') == 2  # pages: first, next; the block's
  loops = names.count('while'), names.count('scan')
  assert loops == ((0, 2) if static else (2, 0))  # queries and blocks


def primitives(jaxpr):
  """The names of all operations, those inside of others too."""
  for equation in jaxpr.eqns:
    yield equation.primitive.name
    for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        yield from primitives(inner)


def test_the_modules_are_left_as_they_were():
  before = [vars(module).copy() for module in (kernel_anchors.paged, kernel_anchors.ragged, kernel_anchors.splash)]
  case = kernel_anchors.paged_decode(1, 32, 16, 32, kv_heads=1, static=True)
  jax.make_jaxpr(case.function)(*case.arguments)
  after = [vars(module) for module in (kernel_anchors.paged, kernel_anchors.ragged, kernel_anchors.splash)]
  assert before == after
