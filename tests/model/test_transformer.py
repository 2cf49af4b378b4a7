"""The transformer against Llama written once more in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdjax.model.checkpoint import RandomCheckpoint
from pdjax.model.checkpoint.base import tensor_shapes
from pdjax.model.layers import rms_norm, rotate, turn
from pdjax.model.transformer import bind
from pdjax.model.weights import load_weights
from pdjax.sharding import make_mesh
from pdjax.types import RopeScaling
from tests.model.numpy_llama import NumpyLlama
from tests.tiny import TINY, TINY_8_2, TINY_12_12, prompt

TIED = dataclasses.replace(TINY, name='tiny-tied', tied_embeddings=True, rope_theta=500.0, norm_eps=1e-2)
LINEAR = dataclasses.replace(TINY, name='tiny-linear', rope_scaling=RopeScaling('linear', 4.0))
LLAMA3 = dataclasses.replace(
  TINY, name='tiny-llama3', head_dim=16, rope_scaling=RopeScaling('llama3', 8.0, original_context_len=64)
)
WINDOWED = dataclasses.replace(TINY, name='tiny-window', sliding_window=5, windowed_layers=(1,))
BIASED = dataclasses.replace(TINY, name='tiny-bias', qkv_bias=True, qk_norm=True)
MODELS = [TINY, TIED, TINY_12_12, TINY_8_2, LINEAR, LLAMA3, WINDOWED, BIASED]


class Shaken(RandomCheckpoint):
  """Random weights whose norms are not all ones, so that their scales count."""

  def tensor(self, name: str) -> np.ndarray:
    tensor = super().tensor(name)
    return tensor if tensor.ndim > 1 else tensor * np.linspace(0.5, 1.5, tensor.size, dtype=np.float32)


def dense_attention(q, k, v, pages, window):
  """Causal attention within the prompt; nothing is cached."""
  group = q.shape[1] // k.shape[1]
  k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
  scores = jnp.einsum('thd,shd->hts', q, k) * q.shape[-1] ** -0.5
  visible = jnp.tri(q.shape[0], dtype=bool)
  if window is not None:
    visible &= ~jnp.tri(q.shape[0], k=-window, dtype=bool)
  return jnp.einsum('hts,shd->thd', jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)), v), pages


def run(checkpoint: RandomCheckpoint, tokens) -> np.ndarray:
  model = checkpoint.spec
  mesh = make_mesh(model, jax.devices()[:1])
  weights = load_weights(checkpoint, model, {'here': mesh}, jnp.dtype('float32'))['here']

  @jax.jit
  def logits(weights, tokens):
    transformer = bind(model, weights)
    nothing = (jnp.zeros(0),) * model.num_layers
    x, _ = transformer(tokens, jnp.arange(len(tokens)), nothing, dense_attention)
    return transformer.logits(x)

  with jax.default_matmul_precision('highest'):
    return np.asarray(logits(weights, np.array(tokens, np.int32)))


@pytest.mark.parametrize('model', MODELS, ids=lambda model: model.name)
def test_logits_are_those_of_llama(model):
  checkpoint = Shaken(model, seed=3)
  tokens = prompt(23, seed=5)
  actual = run(checkpoint, tokens)
  assert actual.dtype == np.float32 and actual.shape == (23, model.vocab_size)
  np.testing.assert_allclose(actual, NumpyLlama(checkpoint).logits(tokens), rtol=1e-4, atol=1e-4)


def test_tied_embeddings_have_no_second_matrix():
  assert 'unembed' not in {name: row.axes for name, row in TIED.weights.items()}
  assert {name: row.axes for name, row in TINY.weights.items()}['unembed'] == ('vocab', 'embed')


def test_every_weight_names_an_axis_for_each_of_its_dimensions():
  axes = {name: row.axes for name, row in BIASED.weights.items()}
  assert {name: len(names) for name, names in axes.items()} == {
    name: len(shape) for name, shape in tensor_shapes(BIASED).items()
  }


def test_rotation_turns_the_two_halves_of_a_head_as_complex_numbers():
  x = np.random.default_rng(0).standard_normal((5, 3, 8)).astype(np.float32)
  positions = np.array([0, 1, 7, 100, 8000])
  half = x[..., :4] + 1j * x[..., 4:]
  turned = half * np.exp(1j * positions[:, None] * 100.0 ** (-np.arange(4) / 4))[:, None]
  actual = np.asarray(rotate(x, turn(positions, dataclasses.replace(TINY, rope_theta=100.0))))
  np.testing.assert_allclose(actual[..., :4] + 1j * actual[..., 4:], turned, atol=2e-3)
  np.testing.assert_array_equal(actual[0], x[0])  # position 0 is not turned


def test_rotated_products_depend_on_the_distance_alone():
  rng = np.random.default_rng(1)
  q, k = (np.broadcast_to(rng.standard_normal((1, 1, 8)).astype(np.float32), (3, 1, 8)) for _ in range(2))
  later, earlier = (turn(np.array(positions), TINY) for positions in ([5, 9, 50], [2, 6, 47]))
  products = np.sum(rotate(q, later) * rotate(k, earlier), axis=-1)
  np.testing.assert_allclose(products, products[0, 0], rtol=1e-4)


def test_norms_and_rotations_keep_bfloat16():
  x = jnp.ones((2, 1, 8), jnp.bfloat16)
  assert rms_norm(x[:, 0], jnp.ones(8, jnp.bfloat16), 1e-5).dtype == jnp.bfloat16
  assert rotate(x, turn(jnp.arange(2), TINY)).dtype == jnp.bfloat16
