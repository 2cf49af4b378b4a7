"""Choosing tokens on the device: greedy, temperature, top-k, top-p, each sequence with random numbers of its own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pdjax.types.request import MAX_STOP_TOKENS, SamplingParams

LEAST_TEMPERATURE = 1e-5  # below it the likeliest token is taken; divided by less, logits overflow

_NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
  """How each of B sequences chooses its tokens and ends."""

  keys: jax.Array  # [B, 2] uint32, the request's seed as a Threefry key
  temperature: jax.Array  # [B] float32, 0 is greedy
  top_k: jax.Array  # [B] int32, 0 is all
  top_p: jax.Array  # [B] float32, 1 is all
  limits: jax.Array  # [B] int32, tokens to generate at most
  stops: jax.Array  # [B, M] int32, tokens that end the sequence, padded with -1

  @classmethod
  def stack(
    cls, params: Sequence[SamplingParams], limits: Sequence[int], eos_token_ids: Sequence[int], rows: int
  ) -> 'Sampling':
    """NumPy rows for these sequences, padded to `rows` of them."""
    new: dict[str, Any] = {
      'keys': np.zeros((rows, 2), np.uint32),
      'temperature': np.zeros(rows, np.float32),
      'top_k': np.zeros(rows, np.int32),
      'top_p': np.ones(rows, np.float32),
      'limits': np.zeros(rows, np.int32),
      'stops': np.full((rows, MAX_STOP_TOKENS), _NO_TOKEN, np.int32),
    }
    for row, (one, limit) in enumerate(zip(params, limits, strict=True)):
      new['keys'][row] = one.seed >> 32, one.seed & 0xFFFFFFFF
      new['temperature'][row], new['top_k'][row], new['top_p'][row] = one.temperature, one.top_k, one.top_p
      new['limits'][row] = limit
      stops = stop_tokens(one, eos_token_ids)
      new['stops'][row, : len(stops)] = stops
    return cls(**new)

  def ended(self, tokens: jax.Array, generated: jax.Array) -> jax.Array:
    """`[B]`, whether a sequence ends with these tokens `[B]`, the last of `generated` `[B]`."""
    return jnp.any(tokens[:, None] == self.stops, axis=1) | (generated >= self.limits)


def stop_tokens(params: SamplingParams, eos_token_ids: Sequence[int]) -> list[int]:
  """The tokens that end a request, each once."""
  return sorted({*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)})


def sample(logits: jax.Array, sampling: Sampling, generated: jax.Array) -> jax.Array:
  """Choose the next token of each sequence.

  The random numbers depend on the request's seed and on how many tokens it has, and on nothing else: the same request
  draws the same tokens in any batch, on any worker.

  Args:
    logits: `[B, V]` float32.
    sampling: How, for each sequence.
    generated: `[B]` int32 tokens that each sequence has generated.

  Returns:
    `[B]` int32 tokens.
  """
  greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

  sampled = sampling.temperature >= LEAST_TEMPERATURE

  def draw():
    scaled = logits / jnp.where(sampled, sampling.temperature, 1)[:, None]
    cut = jnp.any((sampling.top_k > 0) | (sampling.top_p < 1))
    scaled = jax.lax.cond(cut, lambda: keep_likely(scaled, sampling.top_k, sampling.top_p), lambda: scaled)
    noise = jax.vmap(lambda key, count: _gumbel(key, count, logits.shape[1]))(sampling.keys, generated)
    drawn = jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)
    return jnp.where(sampled, drawn, greedy)

  return jax.lax.cond(jnp.any(sampled), draw, lambda: greedy)


def keep_likely(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
  """Logits `[B, V]` with all but the `top_k` likeliest tokens, and of those the `top_p` nucleus, at minus infinity."""
  ordered = -jnp.sort(-logits, axis=-1)
  rank = jnp.arange(logits.shape[1])
  ordered = jnp.where((top_k[:, None] > 0) & (rank >= top_k[:, None]), -jnp.inf, ordered)
  probabilities = jax.nn.softmax(ordered, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of all likelier tokens
  # A top_p of 1 keeps all, although the sum may round to 1 before the last: the same whoever else is in the batch.
  kept = (before < top_p[:, None]) | (top_p[:, None] >= 1) | (rank == 0)
  ordered = jnp.where(kept, ordered, jnp.inf)
  lowest_kept = jnp.min(jnp.where(jnp.isneginf(ordered), jnp.inf, ordered), axis=-1, keepdims=True)
  return jnp.where(logits >= lowest_kept, logits, -jnp.inf)


def _gumbel(key: jax.Array, count: jax.Array, size: int) -> jax.Array:
  key = jax.random.wrap_key_data(key, impl='threefry2x32')
  return jax.random.gumbel(jax.random.fold_in(key, count), (size,), jnp.float32)
