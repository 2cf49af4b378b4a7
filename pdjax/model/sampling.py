"""Choosing tokens on the device, each sequence by its own rules and with random numbers of its own.

Logits go through the penalties, then temperature, top-k, top-p and min-p. A part that no sequence of a batch asks for
is skipped for the batch; the tokens of a sequence never depend on the others in it.
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
  """The rules by which each of B sequences chooses its tokens and ends."""

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
    cls, params: Sequence[SamplingParams], limits: Sequence[int], stops: Sequence[Sequence[int]], rows: int
  ) -> 'Sampling':
    """NumPy rows for sequences that end after so many tokens or with one of their stop tokens, padded to `rows`.

    A seed that nobody drew counts as 0.
    """
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
    for row, (one, limit, ends) in enumerate(zip(params, limits, stops, strict=True)):
      seed = one.seed or 0
      new['keys'][row] = seed >> 32, seed & 0xFFFFFFFF
      for name in ('temperature', 'top_k', 'top_p', 'min_p'):
        new[name][row] = getattr(one, name)
      for name in ('repetition', 'presence', 'frequency'):
        new[name][row] = getattr(one, f'{name}_penalty')
      new['penalised'][row], new['tells'][row] = one.penalises, one.logprobs is not None
      new['limits'][row] = limit
      new['stops'][row, : len(ends)] = ends
    return cls(**new)

  def ended(self, tokens: jax.Array, generated: jax.Array) -> jax.Array:
    """`[B]`, whether a sequence ends with these tokens `[B]`, the last of `generated` `[B]`."""
    return jnp.any(tokens[:, None] == self.stops, axis=1) | (generated >= self.limits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
  """The next token of each of B sequences and, where it is asked for, how likely it and the K likeliest were."""

  tokens: jax.Array  # [B] int32
  finite: jax.Array  # [B] bool, whether there was one to choose: no logit NaN, and the highest of them finite
  logprobs: jax.Array  # [B] float32
  top_tokens: jax.Array  # [B, K] int32, likeliest first; of equals the smaller id
  top_logprobs: jax.Array  # [B, K] float32

  @classmethod
  def of(cls, tokens: jax.Array, vocab_size: int) -> 'Chosen':
    """Tokens of any shape, of which nothing more is told."""
    zeros = jnp.zeros(tokens.shape, jnp.float32)
    top = jnp.zeros((*tokens.shape, min(MAX_LOGPROBS, vocab_size)), jnp.float32)
    return cls(tokens, jnp.ones(tokens.shape, bool), zeros, top.astype(jnp.int32), top)


def sample(
  logits: jax.Array, sampling: Sampling, generated: jax.Array, history: Callable[[], jax.Array] | None = None
) -> Chosen:
  """Choose the next token of each sequence.

  The random numbers depend on the request's seed and on how many tokens it has, and on nothing else: the same request
  draws the same tokens in any batch, on any worker. Log probabilities are those of `logits`, before anything is done
  to them.

  Args:
    logits: `[B, V]` float32.
    sampling: The rules of each sequence.
    generated: `[B]` int32 tokens that each sequence has generated.
    history: Reads `[B, V]` of `past` for penalties; it is not read where no sequence is penalised. None where none
      ever is.

  Returns:
    The tokens.
  """
  vocab_size = logits.shape[1]
  sampled = sampling.temperature >= LEAST_TEMPERATURE

  def draw(logits, greedy):
    scaled = logits / jnp.where(sampled, sampling.temperature, 1)[:, None]
    ranked = sampled & ((sampling.top_k > 0) | (sampling.top_p < 1))
    cut = ranked | (sampled & (sampling.min_p > 0))

    def cut_off():
      kept = jax.lax.cond(jnp.any(ranked), lambda: keep_likely(scaled, sampling.top_k, sampling.top_p), lambda: scaled)
      return keep_near_best(kept, sampling.min_p)

    kept = jax.lax.cond(jnp.any(cut), cut_off, lambda: scaled)
    noise = jax.vmap(lambda key, count: _gumbel(key, count, vocab_size))(sampling.keys, generated)
    return jnp.where(sampled, likeliest(kept + noise)[0], greedy)

  def take_likeliest():
    tokens, highest = likeliest(logits)
    return dataclasses.replace(Chosen.of(tokens, vocab_size), finite=jnp.isfinite(highest))

  def choose(wanted):
    greedy, highest = likeliest(wanted)
    tokens = jax.lax.cond(jnp.any(sampled), lambda: draw(wanted, greedy), lambda: greedy)
    told = jax.lax.cond(jnp.any(sampling.tells), lambda: tell(logits, tokens), lambda: Chosen.of(tokens, vocab_size))
    return dataclasses.replace(told, finite=jnp.isfinite(highest))

  # Branches of whole ways to choose, rather than of the logits to choose by: these would be copied at each branch.
  ways = [take_likeliest, lambda: choose(logits)]
  way = jnp.any(sampled | sampling.tells).astype(jnp.int32)
  if history is not None:
    ways.append(lambda: choose(penalise(logits, history(), sampling)))
    way = jnp.where(jnp.any(sampling.penalised), 2, way)
  chosen = jax.lax.switch(way, ways)
  return dataclasses.replace(chosen, finite=chosen.finite & ~have_nan(logits))


def have_nan(logits: jax.Array) -> jax.Array:
  """`[B]`, whether rows of logits `[B, V]` have a NaN, or both infinities: no other sum of them is NaN."""
  return jnp.isnan(jnp.sum(logits, axis=1))


def likeliest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The first of the highest of each row of `[B, V]`, as argmax, and how high it is; on a CPU in a tenth of its time.

  Of a row with NaN it is any: which of NaN and a number XLA's maximum on a CPU takes depends on where they stand.
  """
  blocks = _blocks(logits, -jnp.inf)
  highest = jnp.max(blocks, axis=-1)
  block = jnp.argmax(highest, axis=-1)
  within = jnp.argmax(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], axis=-1)
  # Of the maxima that were found: their maximum XLA would look for among all logits once more.
  highest = jnp.take_along_axis(highest, block[:, None], axis=1)[:, 0]
  return (block * blocks.shape[-1] + within).astype(jnp.int32), highest


def _blocks(rows: jax.Array, padding: float) -> jax.Array:
  """Rows `[B, V]` as `[B, V/128, 128]`: XLA on a CPU goes through a long row one by one, and through blocks abreast."""
  return jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % 128)), constant_values=padding).reshape(rows.shape[0], -1, 128)


def _sum(rows: jax.Array) -> jax.Array:
  """The sum of each row of `[B, V]` as `[B, 1]`."""
  return jnp.sum(jnp.sum(_blocks(rows, 0), axis=1), axis=-1, keepdims=True)


def tell(logits: jax.Array, tokens: jax.Array) -> Chosen:
  """The tokens `[B]` with their log probabilities and the likeliest ones', by logits `[B, V]`."""
  total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  _, best_tokens = jax.lax.top_k(_comparable(logits), min(MAX_LOGPROBS, logits.shape[1]))
  own, best = (jnp.take_along_axis(logits, which, axis=1) - total for which in (tokens[:, None], best_tokens))
  told = Chosen.of(tokens, logits.shape[1])
  return dataclasses.replace(told, logprobs=own[:, 0], top_tokens=best_tokens.astype(jnp.int32), top_logprobs=best)


def _comparable(logits: jax.Array) -> jax.Array:
  """The logits with one zero and one NaN: ordered by their bits, as top_k does, they are in the order of argmax."""
  return jnp.where(logits == 0, 0.0, jnp.where(jnp.isnan(logits), jnp.nan, logits))


def keep_likely(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
  """Logits `[B, V]` with all but the `top_k` likeliest tokens, and of those the `top_p` nucleus, at minus infinity.

  Tokens as likely as the last that is kept are kept too. The least kept logit is found by bisection over the 32 bits of
  a float, which takes a CPU a twentieth of the time of a sort.
  """
  ranks = _ranks(logits)
  all_ranks = jnp.full((logits.shape[0], 1), _LOWEST_RANK)

  def least_of_top_k():
    found = _highest_rank(lambda rank: _sum((ranks >= rank).astype(jnp.int32)) >= top_k[:, None], all_ranks)
    return jnp.where(top_k[:, None] > 0, found, all_ranks)

  least = jax.lax.cond(jnp.any(top_k > 0), least_of_top_k, lambda: all_ranks)
  weights = jnp.where(ranks >= least, jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), 0)

  def least_of_nucleus():
    wanted = top_p[:, None] * _sum(weights)
    found = _highest_rank(lambda rank: _sum(jnp.where(ranks >= rank, weights, 0)) >= wanted, all_ranks)
    # A top_p of 1 keeps all, although the sum may round to less: the same whoever else is in the batch.
    return jnp.where(top_p[:, None] < 1, jnp.maximum(found, least), least)

  least = jax.lax.cond(jnp.any(top_p < 1), least_of_nucleus, lambda: least)
  least = jnp.minimum(least, jnp.max(ranks, axis=-1, keepdims=True))  # the best stays, however small top_p is
  return jnp.where(ranks >= least, logits, -jnp.inf)


_LOWEST_RANK = np.int32(np.iinfo(np.int32).min)


def _ranks(logits: jax.Array) -> jax.Array:
  """Integers in the order of the floats: what is negative has its other bits turned."""
  bits = jax.lax.bitcast_convert_type(_comparable(logits), jnp.int32)
  return jnp.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def _highest_rank(reaches: Callable[[jax.Array], jax.Array], lowest: jax.Array) -> jax.Array:
  """The highest rank `[B, 1]` that reaches what is wanted; the `lowest` there is if none does.

  `reaches` is true up to some rank and false from there on.
  """
  found = jnp.where(reaches(jnp.zeros_like(lowest)), 0, lowest)

  def next_bit(index, found):
    higher = found + (jnp.int32(1) << (30 - index))
    return jnp.where(reaches(higher), higher, found)

  return jax.lax.fori_loop(0, 31, next_bit, found)


def keep_near_best(logits: jax.Array, min_p: jax.Array) -> jax.Array:
  """Logits `[B, V]` with tokens less probable than `min_p` `[B]` times the likeliest at minus infinity."""
  least = jnp.max(logits, axis=-1) + jnp.log(min_p)  # minus infinity for 0, which keeps all
  return jnp.where(logits < least[:, None], -jnp.inf, logits)  # an infinite best makes NaN, and nothing is less


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
