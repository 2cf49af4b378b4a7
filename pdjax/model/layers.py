"""The parts of a Llama block: RMS norm, rotary positions, attention and gated feed-forward over packed tokens."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pdjax.types.model import ModelSpec, Weight

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, int | None], tuple[jax.Array, jax.Array]]
"""q `[T, H, D]`, k `[T, K, D]`, v `[T, K, D]`, one layer's pages and its sliding window, if it has one, to attended
`[T, H, D]` and the pages with k, v."""

Turn = tuple[jax.Array, jax.Array]
"""Cosines `[T, 1, 1, D/2]` of the angles by which each token's features turn, and sines `[T, 1, 2, D/2]`, those of the
first half negative."""


def add_weights(module: nnx.Module, rows: Iterable[Weight], dtype: jnp.dtype) -> None:
  """Give a module the weights of these rows of the table, by their names; zeros until a checkpoint's arrays come."""
  for row in rows:
    setattr(module, row.name, nnx.Param(jnp.zeros(row.shape, dtype), axes=row.axes))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """Divide rows by their root mean square (Zhang and Sennrich 2019), in float32."""
  wide = x.astype(jnp.float32)
  wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
  return wide.astype(x.dtype) * scale


def rope_frequencies(model: ModelSpec) -> np.ndarray:
  """Radians a token `[D/2]` by which each pair of features turns (Su et al. 2021), stretched as the model says."""
  half = model.head_dim // 2
  frequencies = model.rope_theta ** (-np.arange(half) / half)
  scaling = model.rope_scaling
  if scaling is None:
    return frequencies.astype(np.float32)
  slowed = frequencies / scaling.factor
  if scaling.kind == 'llama3':
    turns = scaling.original_context_len * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    slowed = kept * frequencies + (1 - kept) * slowed
  return slowed.astype(np.float32)


def turn(positions: jax.Array, model: ModelSpec) -> Turn:
  """The turns of tokens at these positions `[T]`."""
  angles = positions[:, None, None, None].astype(jnp.float32) * rope_frequencies(model)
  sin = jnp.sin(angles)
  turned = jnp.cos(angles), jnp.concatenate([-sin, sin], axis=2)
  return jax.lax.optimization_barrier(turned)  # else XLA computes them again in every layer


def rotate(x: jax.Array, turn: Turn) -> jax.Array:
  """Rotary position embedding of `[T, heads, D]`; the two halves of a head are the pairs."""
  cos, sin = turn
  halves = x.astype(jnp.float32).reshape(*x.shape[:2], 2, -1)
  return (halves * cos + jnp.flip(halves, axis=2) * sin).reshape(x.shape).astype(x.dtype)


_FEW_ROWS = 128  # up to so many, a CPU spends more on rearranging a matrix for a product than on multiplying


def project(x: jax.Array, weight: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
  """Rows `[T, inputs]` by a matrix `[outputs, inputs]` to `[T, outputs]`, of another type if one is given.

  On a CPU a few rows are multiplied as columns, from the right: XLA's library reads its left operand as it lies, but
  packs the right one anew each time, which for a whole matrix takes longer than a small batch's arithmetic.
  """

  def rows_first(x, weight):
    return jnp.einsum('ti,oi->to', x, weight, preferred_element_type=dtype)

  def matrix_first(x, weight):
    columns = jax.lax.optimization_barrier(x.T)  # else XLA turns the product round again
    return jax.lax.optimization_barrier(jnp.matmul(weight, columns, preferred_element_type=dtype)).T

  if not 1 < x.shape[0] <= _FEW_ROWS:
    return rows_first(x, weight)
  return jax.lax.platform_dependent(x, weight, cpu=matrix_first, default=rows_first)


def _to_heads(x: jax.Array, weight: jax.Array) -> jax.Array:
  """`[T, E]` by `[heads, D, E]` to `[T, heads, D]`, as a product of matrices: XLA on CPU copies three-axis weights."""
  return project(x, weight.reshape(-1, x.shape[1])).reshape(x.shape[0], *weight.shape[:2])


class Block(nnx.Module):
  """One transformer block; its weights are those of `ModelSpec.layer_weights`."""

  attn_norm: nnx.Param
  q: nnx.Param
  k: nnx.Param
  v: nnx.Param
  q_bias: nnx.Param
  k_bias: nnx.Param
  v_bias: nnx.Param
  q_norm: nnx.Param
  k_norm: nnx.Param
  o: nnx.Param
  mlp_norm: nnx.Param
  gate: nnx.Param
  up: nnx.Param
  down: nnx.Param

  def __init__(self, model: ModelSpec, layer: int, dtype: jnp.dtype):
    add_weights(self, model.layer_weights(layer), dtype)
    self.model = model
    self.layer = layer

  def __call__(self, x: jax.Array, turn: Turn, pages: jax.Array, attend: Attend) -> tuple[jax.Array, jax.Array]:
    """Run packed tokens through the block.

    Args:
      x: `[T, E]`.
      turn: The turn of each token's queries and keys.
      pages: This layer's pages, whatever `attend` takes.
      attend: Writes keys and values and attends.

    Returns:
      `[T, E]`, and the pages with the tokens' keys and values in them.
    """
    normed = rms_norm(x, self.attn_norm[...], self.model.norm_eps)
    q, k, v = self._project(normed)
    attended, pages = attend(rotate(q, turn), rotate(k, turn), v, pages, self.model.window(self.layer))
    x = x + project(attended.reshape(x.shape[0], -1), self.o[...].reshape(x.shape[1], -1))
    normed = rms_norm(x, self.mlp_norm[...], self.model.norm_eps)
    hidden = jax.nn.silu(project(normed, self.gate[...])) * project(normed, self.up[...])
    return x + project(hidden, self.down[...]), pages

  def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[T, H, D]`, keys and values `[T, K, D]` of `[T, E]`."""
    q, k, v = (_to_heads(x, weight[...]) for weight in (self.q, self.k, self.v))
    if self.model.qkv_bias:
      q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
    if self.model.qk_norm:
      q = rms_norm(q, self.q_norm[...], self.model.norm_eps)
      k = rms_norm(k, self.k_norm[...], self.model.norm_eps)
    return q, k, v
