"""The least time that a step could take: its matrix products by themselves, and its keys and values read once."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pdjax.model.layers import project
from pdjax.types import ModelSpec


def copy_bytes_per_s(threads: int, megabytes: int = 256) -> float:
  """Bytes per second that `threads` threads copy at once in this machine's memory."""
  source = np.ones(megabytes << 18, np.float32)
  target = np.empty_like(source)
  parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
  with ThreadPoolExecutor(threads) as pool:
    return source.nbytes / median_s(lambda: list(pool.map(lambda part: np.copyto(part[1], part[0]), parts)))


def products(model: ModelSpec, rows: int, unembedded: int, outputs_first: bool) -> Callable[[], Any]:
  """Every product of a step over `rows` tokens, of which so many are unembedded: each layer's matrices, one by one.

  Matrices lie `[outputs, inputs]` and are multiplied as the model does it, or `[inputs, outputs]` and as they lie. Each
  layer has inputs of its own: where products share one, XLA makes one product of them on a GPU, for which it joins
  their matrices on every call.
  """
  heads = model.head_dim * (model.query_heads + 2 * model.kv_heads)
  wide, embed = model.ffn_dim, model.embed_dim
  widths = (embed, model.query_heads * model.head_dim, embed, wide)
  outputs = (heads, embed, wide, wide, embed)
  rng = np.random.default_rng(0)

  @functools.cache
  def drawn(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)

  def random(*shape: int) -> jax.Array:
    return jnp.array(drawn(*shape))  # the same numbers for every layer, each in memory of its own

  def matrix(inner: int, outer: int) -> jax.Array:
    return random(outer, inner) if outputs_first else random(inner, outer)

  inputs = [[random(rows, width) for width in widths] for _ in range(model.num_layers)]
  layers = [
    [matrix(widths[place], outer) for place, outer in zip(_INPUT_OF, outputs, strict=True)]
    for _ in range(model.num_layers)
  ]
  arguments = inputs, layers, random(unembedded, embed), matrix(embed, model.vocab_size)
  call = jax.jit(functools.partial(multiply_all, project if outputs_first else jnp.matmul))
  with jax.default_matmul_precision('highest'):
    return functools.partial(call.lower(*arguments).compile(), *arguments)


_INPUT_OF = (0, 1, 2, 2, 3)  # which of a layer's inputs each of its matrices multiplies: gate and up have the same


def multiply_all(
  multiply: Callable[[jax.Array, jax.Array], jax.Array],
  inputs: Sequence[Sequence[jax.Array]],
  layers: Sequence[Sequence[jax.Array]],
  last: jax.Array,
  unembed: jax.Array,
) -> tuple[list[list[jax.Array]], jax.Array]:
  """Each layer's matrices by that layer's inputs, and the rows that are unembedded."""
  results = []
  for given, matrices in zip(inputs, layers, strict=True):
    results.append([multiply(given[place], one) for place, one in zip(_INPUT_OF, matrices, strict=True)])
  return results, multiply(last, unembed)


def products_s(model: ModelSpec, rows: int, unembedded: int, repeats: int) -> float:
  """Seconds of the products of a step, in the quicker of both ways."""
  with ThreadPoolExecutor(2) as pool:
    ways = list(pool.map(functools.partial(products, model, rows, unembedded), (False, True)))
  return min(median_s(lambda way=way: jax.block_until_ready(way()), repeats) for way in ways)  # type: ignore[misc]


def cached_s(model: ModelSpec, tokens: int, copy_speed: float) -> float:
  """Seconds in which so many cached tokens' keys and values in float32 are read at the speed of a copy."""
  return tokens * model.cached_token_bytes('float32') / copy_speed


def median_s(call: Callable[[], Any], repeats: int = 7) -> float:
  """Seconds of a call that waits for its end, the median of some after a first."""
  call()
  seconds = []
  for _ in range(repeats):
    begin = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - begin)
  return statistics.median(seconds)
