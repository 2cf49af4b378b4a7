"""A plain loop: one prompt, one dense cache, one token after another. Every other way of serving must equal it."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pdjax.model.transformer import Weights, bind
from pdjax.types.model import ModelSpec


class PlainLoop:
  """Greedy generation without pages, batches or meshes.

  The prompt goes in by pieces of a fixed size, so that two programs serve every length.
  """

  def __init__(
    self,
    model: ModelSpec,
    weights: Weights,
    max_tokens: int,
    piece: int = 64,
    decode_weights: Weights | None = None,
    cache_dtype: jnp.dtype | None = None,
  ):
    """Serve a model on one device.

    Args:
      model: The model.
      weights: Its weights; with `decode_weights`, for prompts alone.
      max_tokens: Most tokens of a prompt and its answer together.
      piece: Tokens of a piece.
      decode_weights: Those for all tokens behind the first, if they are others.
      cache_dtype: Of the cache; None is that of `weights`.
    """
    self._model = model
    self._weights = weights
    self._decode_weights = weights if decode_weights is None else decode_weights
    self._dtype = cache_dtype or jax.tree.leaves(weights)[0].dtype
    self._piece = piece
    self._cache_len = -(-max_tokens // piece) * piece
    self._run = jax.jit(functools.partial(_run, model), donate_argnums=1)

  def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The tokens that follow a prompt, up to an end-of-sequence token or `max_tokens`."""
    shape = (self._cache_len, self._model.kv_heads, self._model.head_dim)
    caches = [(jnp.zeros(shape, self._dtype), jnp.zeros(shape, self._dtype)) for _ in range(self._model.num_layers)]
    with jax.default_matmul_precision('highest'):
      for start in range(0, len(prompt), self._piece):
        tokens = np.zeros(self._piece, np.int32)
        real = prompt[start : start + self._piece]
        tokens[: len(real)] = real
        token, caches = self._run(self._weights, caches, tokens, start, len(real) - 1)
      out = [int(token)]
      while len(out) < max_tokens and out[-1] not in self._model.eos_token_ids:
        position = len(prompt) + len(out) - 1
        token, caches = self._run(self._decode_weights, caches, np.array(out[-1:], np.int32), position, 0)
        out.append(int(token))
    return out


def _run(model: ModelSpec, weights: Weights, caches, tokens: jax.Array, start: jax.Array, last: jax.Array):
  """Run tokens at positions `start` and up; the likeliest token after row `last`, and the caches."""
  transformer = bind(model, weights)
  positions = start + jnp.arange(tokens.shape[0])

  def attend(q, k, v, cache, window):
    keys, values = (
      jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, 0)
      for old, new in zip(cache, (k, v), strict=True)
    )
    queries = q.reshape(q.shape[0], model.kv_heads, -1, model.head_dim)
    scores = jnp.einsum('tkrd,skd->tkrs', queries, keys) * model.head_dim**-0.5
    position = jnp.arange(keys.shape[0])
    visible = position <= positions[:, None]
    if window is not None:
      visible &= position > positions[:, None] - window
    weights = jax.nn.softmax(scores, axis=-1, where=visible[:, None, None])
    out = jnp.einsum('tkrs,skd->tkrd', weights, values)
    return out.reshape(q.shape).astype(q.dtype), (keys, values)

  x, caches = transformer(tokens, positions, caches, attend)
  return jnp.argmax(transformer.logits(x[last][None])[0]), list(caches)
