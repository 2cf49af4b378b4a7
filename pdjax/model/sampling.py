"""Choosing tokens on the device, each sequence by its own rules and with random numbers of its own.

Logits go through the penalties, then temperature, top-k, top-p and min-p. What no sequence of a batch asks for is
skipped for the batch; what a sequence gets never depends on who else is in it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pdjax.types.request import MAX_LOGPROBS, MAX_STOP_TOKENS, SamplingParams

LEAST_TEMPERATURE = 1e-5  # below it the likeliest token is taken; divided by less, logits overflow

_NO_TOKEN = -1
_IN_PROMPT, _ONCE = 1, 2  # what a token's entry in a history is made of
_MOST = np.iinfo(np.uint16).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
  """How each of B sequences chooses its tokens and ends."""

  keys: jax.Array  # [B, 2] uint32, the request's seed as a Threefry key
  temperature: jax.Array  # [B] float32, 0 is greedy
  top_k: jax.Array  # [B] int32, 0 is all
  top_p: jax.Array  # [B] float32, 1 is all
  min_p: jax.Array  # [B] float32, 0 is all
  penalised: jax.Array  # [B] bool, whether any of the next three changes anything
  repetition: jax.Array  # [B] float32
  presence: jax.Array  # [B] float32
  frequency: jax.Array  # [B] float32
  tells: jax.Array  # [B] bool, whether log probabilities are asked for
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
      'min_p': np.zeros(rows, np.float32),
      'penalised': np.zeros(rows, bool),
      'repetition': np.ones(rows, np.float32),
      'presence': np.zeros(rows, np.float32),
      'frequency': np.zeros(rows, np.float32),
      'tells': np.zeros(rows, bool),
      'limits': np.zeros(rows, np.int32),
      'stops': np.full((rows, MAX_STOP_TOKENS), _NO_TOKEN, np.int32),
    }
    for row, (one, limit) in enumerate(zip(params, limits, strict=True)):
      new['keys'][row] = one.seed >> 32, one.seed & 0xFFFFFFFF
      for name in ('temperature', 'top_k', 'top_p', 'min_p'):
        new[name][row] = getattr(one, name)
      for name in ('repetition', 'presence', 'frequency'):
        new[name][row] = getattr(one, f'{name}_penalty')
      new['penalised'][row], new['tells'][row] = one.penalises, one.logprobs is not None
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
  """The next token of each of B sequences and, where it is asked for, how likely it and the K likeliest were."""

  tokens: jax.Array  # [B] int32
  logprobs: jax.Array  # [B] float32
  top_tokens: jax.Array  # [B, K] int32, likeliest first; of equals the smaller id
  top_logprobs: jax.Array  # [B, K] float32

  @classmethod
  def of(cls, tokens: jax.Array, vocab_size: int) -> 'Chosen':
    """Tokens of any shape, of which nothing more is told."""
    zeros = jnp.zeros(tokens.shape, jnp.float32)
    top = jnp.zeros((*tokens.shape, min(MAX_LOGPROBS, vocab_size)), jnp.float32)
    return cls(tokens, zeros, top.astype(jnp.int32), top)


def sample(
  logits: jax.Array, sampling: Sampling, generated: jax.Array, history: Callable[[], jax.Array] | None = None
) -> Chosen:
  """Choose the next token of each sequence.

  The random numbers depend on the request's seed and on how many tokens it has, and on nothing else: the same request
  draws the same tokens in any batch, on any worker. Log probabilities are those of `logits`, before anything is done
  to them.

  Args:
    logits: `[B, V]` float32.
    sampling: How, for each sequence.
    generated: `[B]` int32 tokens that each sequence has generated.
    history: Reads `[B, V]` of `past` for penalties; it is not read where no sequence is penalised. None where none
      ever is.

  Returns:
    The tokens.
  """
  vocab_size = logits.shape[1]
  sampled = sampling.temperature >= LEAST_TEMPERATURE

  def likeliest(logits):
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)

  def draw(logits, greedy):
    scaled = logits / jnp.where(sampled, sampling.temperature, 1)[:, None]
    ranked = sampled & ((sampling.top_k > 0) | (sampling.top_p < 1))
    cut = ranked | (sampled & (sampling.min_p > 0))

    def cut_off():
      kept = jax.lax.cond(jnp.any(ranked), lambda: keep_likely(scaled, sampling.top_k, sampling.top_p), lambda: scaled)
      return keep_near_best(kept, sampling.min_p)

    kept = jax.lax.cond(jnp.any(cut), cut_off, lambda: scaled)
    noise = jax.vmap(lambda key, count: _gumbel(key, count, vocab_size))(sampling.keys, generated)
    return jnp.where(sampled, likeliest(kept + noise), greedy)

  def choose(wanted):
    greedy = likeliest(wanted)
    tokens = jax.lax.cond(jnp.any(sampled), lambda: draw(wanted, greedy), lambda: greedy)
    return jax.lax.cond(jnp.any(sampling.tells), lambda: tell(logits, tokens), lambda: Chosen.of(tokens, vocab_size))

  # Branches of whole ways to choose, rather than of the logits to choose by: these would be copied at each branch.
  ways = [lambda: Chosen.of(likeliest(logits), vocab_size), lambda: choose(logits)]
  way = jnp.any(sampled | sampling.tells).astype(jnp.int32)
  if history is not None:
    ways.append(lambda: choose(penalise(logits, history(), sampling)))
    way = jnp.where(jnp.any(sampling.penalised), 2, way)
  return jax.lax.switch(way, ways)


def tell(logits: jax.Array, tokens: jax.Array) -> Chosen:
  """The tokens `[B]` with their log probabilities and the likeliest ones', by logits `[B, V]`."""
  total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  best, best_tokens = jax.lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[1]))
  own = jnp.take_along_axis(logits, tokens[:, None], axis=1) - total
  return Chosen(tokens, own[:, 0], best_tokens.astype(jnp.int32), best - total)


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


def keep_near_best(logits: jax.Array, min_p: jax.Array) -> jax.Array:
  """Logits `[B, V]` with tokens less probable than `min_p` `[B]` times the likeliest at minus infinity."""
  least = jnp.max(logits, axis=-1) + jnp.log(min_p)  # minus infinity for 0, which keeps all
  return jnp.where(logits >= least[:, None], logits, -jnp.inf)


# ---------------------------------------------------------------------------- what was there before


def past(prompt: Sequence[int], tokens: Sequence[int], vocab_size: int) -> np.ndarray:
  """`[V]` uint16: for each token whether it is in the prompt, in the lowest bit, and above it how often generated."""
  times = np.bincount(np.asarray(tokens, np.int64), minlength=vocab_size)
  row = np.minimum(times * _ONCE, _MOST - _IN_PROMPT).astype(np.uint16)
  row[np.asarray(prompt, np.int64)] |= _IN_PROMPT
  return row


def count(history: jax.Array, rows: jax.Array, tokens: jax.Array) -> jax.Array:
  """Note tokens `[B]` in the rows `[B]` of a history `[R, V]`; a row past the last notes nothing."""
  entries = history.at[rows, tokens].get(mode='fill', fill_value=0)
  entries = jnp.where(entries < _MOST - _ONCE, entries + _ONCE, entries)
  return history.at[rows, tokens].set(entries.astype(history.dtype), mode='drop')


def penalise(logits: jax.Array, history: jax.Array, sampling: Sampling) -> jax.Array:
  """Logits `[B, V]` after the penalties for the tokens in a history `[B, V]`; repetition first."""
  times = (history // _ONCE).astype(jnp.float32)
  repetition = jnp.where(sampling.penalised, sampling.repetition, 1)[:, None]
  again = jnp.where(logits > 0, logits / repetition, logits * repetition)
  logits = jnp.where(history > 0, again, logits)
  return logits - sampling.frequency[:, None] * times - sampling.presence[:, None] * (times > 0)


def _gumbel(key: jax.Array, count: jax.Array, size: int) -> jax.Array:
  key = jax.random.wrap_key_data(key, impl='threefry2x32')
  return jax.random.gumbel(jax.random.fold_in(key, count), (size,), jnp.float32)
