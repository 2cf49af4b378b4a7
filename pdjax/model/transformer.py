"""The transformer: tokens and pages in, logits and pages out. Outside this folder its weights are a plain pytree."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pdjax.model.layers import Attend, Block, add_weights, project, rms_norm, turn
from pdjax.types.model import ModelSpec

Weights = dict[str, Any]
"""Nested by name: `weights['layers'][3]['q']` is what checkpoints call `layers.3.q`, as `[outputs, inputs]`."""


class Transformer(nnx.Module):
  """A decoder-only model of the Llama family (Touvron et al. 2023) over packed tokens."""

  embed: nnx.Param
  final_norm: nnx.Param
  unembed: nnx.Param

  def __init__(self, model: ModelSpec, dtype: jnp.dtype):
    """Lay out the weights of `ModelSpec.weights`.

    Raises:
      ValueError: if the model has a part that is not computed; see `ModelSpec.only_simulated`.
    """
    model.check_computed()
    add_weights(self, model.outer_weights(), dtype)
    self.layers = nnx.List([Block(model, layer, dtype) for layer in range(model.num_layers)])
    self.model = model

  def __call__(
    self, tokens: jax.Array, positions: jax.Array, pages: Sequence[Any], attend: Attend
  ) -> tuple[jax.Array, tuple[Any, ...]]:
    """Run packed tokens `[T]` through every block; `[T, E]`, and the pages of every layer as `attend` leaves them."""
    return run_blocks(self.layers, self.embedded(tokens), positions, pages, attend)

  def embedded(self, tokens: jax.Array) -> jax.Array:
    """The embeddings that the first block is given, `[T, E]`."""
    return self.embed[...][tokens]

  def logits(self, x: jax.Array) -> jax.Array:
    """Logits `[B, V]` in float32 of the rows `[B, E]`."""
    x = rms_norm(x, self.final_norm[...], self.model.norm_eps)
    matrix = self.embed if self.model.tied_embeddings else self.unembed
    return project(x, matrix[...], jnp.dtype(jnp.float32))


def run_blocks(
  blocks: Sequence[Block], x: jax.Array, positions: jax.Array, pages: Sequence[Any], attend: Attend
) -> tuple[jax.Array, tuple[Any, ...]]:
  """Run `[T, E]` through some blocks in turn; the same again, and the pages of each as `attend` leaves them."""
  turned = turn(positions, blocks[0].model)
  new_pages = []
  for block, layer in zip(blocks, pages, strict=True):
    x, layer = block(x, turned, layer, attend)
    new_pages.append(layer)
  return x, tuple(new_pages)


@functools.lru_cache(maxsize=64)
def _parts(model: ModelSpec, dtype: jnp.dtype, layers: range | None = None) -> tuple[nnx.GraphDef, nnx.State]:
  """The whole model, or a list of its blocks, without the bytes: made once, not for each program that binds it."""
  if layers is None:
    return nnx.split(nnx.eval_shape(lambda: Transformer(model, dtype)))
  return nnx.split(nnx.eval_shape(lambda: nnx.List([Block(model, layer, dtype) for layer in layers])))


def _bind(parts: tuple[nnx.GraphDef, nnx.State], weights: dict[Any, Any]) -> Any:
  graph, state = parts
  state = jax.tree.map(lambda leaf: leaf, state)  # a copy, to be filled
  nnx.replace_by_pure_dict(state, weights)
  return nnx.merge(graph, state)


def bind(model: ModelSpec, weights: Weights) -> Transformer:
  """The model with these weights, for use under `jit`."""
  return _bind(_parts(model, jax.tree.leaves(weights)[0].dtype), weights)


def bind_blocks(model: ModelSpec, weights: Sequence[Weights], first: int) -> Sequence[Block]:
  """The blocks from layer `first` on with these weights, one item a layer, for use under `jit`."""
  layers = range(first, first + len(weights))
  return _bind(_parts(model, jax.tree.leaves(weights)[0].dtype, layers), dict(enumerate(weights)))


def weight_shapes(model: ModelSpec, dtype: jnp.dtype) -> Weights:
  """The shape and dtype of every weight, without its bytes."""
  return nnx.to_pure_dict(_parts(model, jnp.dtype(dtype))[1])
