"""Each model family gives the logits of transformers, from the configuration and weights that transformers read."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import append_tokens, prefill_attention
from pdjax.model.checkpoint import Checkpoint, SafetensorsCheckpoint
from pdjax.model.transformer import bind
from pdjax.model.weights import load_weights
from pdjax.sharding import make_mesh, replicated
from pdjax.types import ModelSpec, RopeScaling
from tests.model.numpy_llama import NumpyLlama

FOLDER = pathlib.Path(__file__).parents[2] / 'data' / 'families'
PAGE_SIZE = 8

BASE = ModelSpec(
  name='', num_layers=2, embed_dim=24, query_heads=4, kv_heads=2, head_dim=6, ffn_dim=32, vocab_size=64,
  context_len=128, eos_token_ids=(2,),
)  # fmt: skip
LLAMA3 = RopeScaling('llama3', 8.0, 1.0, 4.0, 64)

# What each family's config.json says, beyond BASE.
SPECS = {
  'llama2': {'kv_heads': 4},
  'llama2-linear': {'rope_theta': 5000.0, 'rope_scaling': RopeScaling('linear', 4.0)},
  'llama3': {'head_dim': 16, 'rope_scaling': LLAMA3, 'eos_token_ids': (2, 5)},
  'smollm2': {'query_heads': 3, 'kv_heads': 1, 'head_dim': 8, 'rope_theta': 1e5, 'tied_embeddings': True},
  'mistral': {'sliding_window': 8},
  'qwen2': {
    'num_layers': 3, 'rope_theta': 1e6, 'norm_eps': 1e-6, 'sliding_window': 8, 'windowed_layers': (1, 2),
    'qkv_bias': True,
  },
  'qwen3': {
    'num_layers': 3, 'head_dim': 16, 'rope_theta': 1e6, 'norm_eps': 1e-6, 'sliding_window': 8,
    'windowed_layers': (0, 2), 'qk_norm': True, 'tied_embeddings': True,
  },
}  # fmt: skip

# A field that its prompt must be long enough to feel.
FELT = {
  'llama2-linear': {'rope_scaling': None},
  'llama3': {'rope_scaling': RopeScaling('llama3', 8.0, 1.0, 2.0, 64)},  # nothing but the blended band differs
  'mistral': {'sliding_window': None},
  'qwen2': {'windowed_layers': (0, 1, 2)},
  'qwen3': {'windowed_layers': None},
}


def golden(family: str) -> tuple[np.ndarray, np.ndarray]:
  """A prompt `[T]` and the logits `[T, V]` of transformers."""
  with np.load(FOLDER / family / 'logits.npz', allow_pickle=False) as file:
    return file['prompt'], file['logits']


def paged_logits(checkpoint: Checkpoint, prompt: np.ndarray) -> np.ndarray:
  """Logits `[T, V]` of a prompt that goes into pages in two chunks."""
  model = checkpoint.spec
  mesh = make_mesh(model, jax.devices()[:1])
  weights = load_weights(checkpoint, model, {'here': mesh}, jnp.dtype('float32'))['here']
  num_pages = len(prompt) // PAGE_SIZE
  table = np.arange(num_pages, dtype=np.int32)[::-1]

  @jax.jit
  def chunk(weights, pages, tokens, start):
    transformer = bind(model, weights)
    positions = start + jnp.arange(len(tokens))

    def attend(q, k, v, layer, window):
      layer = append_tokens(layer, k, v, jnp.asarray(table)[positions // PAGE_SIZE], positions % PAGE_SIZE)
      offsets = jnp.array([0, len(tokens)], jnp.int32)
      lengths = jnp.reshape(start + len(tokens), 1)
      return prefill_attention(q, layer, table[None], offsets, lengths, sliding_window=window), layer

    x, pages = transformer(tokens, positions, pages, attend)
    return transformer.logits(x), pages

  empty = np.zeros((num_pages, 2, model.kv_heads, PAGE_SIZE, model.head_dim), np.float32)
  pages = jax.device_put(
    (empty,) * model.num_layers, replicated(mesh)
  )  # as they come back: one program for both chunks
  out = []
  with jax.default_matmul_precision('highest'):
    for start, tokens in zip((0, len(prompt) // 2), np.split(prompt, 2), strict=True):
      logits, pages = chunk(weights, pages, tokens, np.int32(start))
      out.append(np.asarray(logits))
  return np.concatenate(out)


def test_every_family_has_its_checkpoint():
  assert {path.name for path in FOLDER.iterdir()} == SPECS.keys()


@pytest.mark.parametrize('family', SPECS)
def test_a_config_becomes_the_spec(family):
  checkpoint = SafetensorsCheckpoint(FOLDER / family)
  assert checkpoint.spec == dataclasses.replace(BASE, name=family, **SPECS[family])
  assert checkpoint.dtype == np.float16


@pytest.mark.parametrize('family', SPECS)
def test_logits_are_those_of_transformers(family):
  prompt, expected = golden(family)
  actual = paged_logits(SafetensorsCheckpoint(FOLDER / family), prompt)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


@dataclasses.dataclass(frozen=True)
class _Respecified:
  """A checkpoint read as if it were another model of the same shapes."""

  checkpoint: Checkpoint
  spec: ModelSpec

  def tensor(self, name: str) -> np.ndarray:
    return np.asarray(self.checkpoint.tensor(name), np.float32)


@pytest.mark.parametrize('family', SPECS)
def test_the_prompt_is_long_enough_to_tell_the_family(family):
  checkpoint = SafetensorsCheckpoint(FOLDER / family)
  prompt, expected = golden(family)
  logits = functools.partial(_numpy_logits, checkpoint, prompt)
  np.testing.assert_allclose(logits(), expected, rtol=0, atol=1e-4)
  if family in FELT:
    assert np.abs(logits(**FELT[family]) - expected).max() > 0.1


def _numpy_logits(checkpoint: Checkpoint, prompt: np.ndarray, **changes) -> np.ndarray:
  return NumpyLlama(_Respecified(checkpoint, dataclasses.replace(checkpoint.spec, **changes))).logits(prompt)
