"""The parts of a Llama block: RMS norm, rotary positions, attention and gated feed-forward over packed tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pdjax.types.model import ModelSpec

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, int | None], tuple[jax.Array, jax.Array]]
"""q `[T, H, D]`, k `[T, K, D]`, v `[T, K, D]`, one layer's pages and its sliding window, if it has one, to attended
`[T, H, D]` and the pages with k, v."""

Turn = tuple[jax.Array, jax.Array]
"""Cosines and sines `[T, 1, D/2]` of the angles by which each token's features turn."""


def weight(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: jnp.dtype) -> nnx.Param:
  """A weight that names its logical axes; zeros until a checkpoint's array takes its place."""
  return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


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
  """How tokens at these positions `[T]` turn."""
  angles = positions[:, None, None].astype(jnp.float32) * rope_frequencies(model)
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, turn: Turn) -> jax.Array:
  """Rotary position embedding of `[T, heads, D]`; the two halves of a head are the pairs."""
  cos, sin = turn
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _to_heads(x: jax.Array, weight: jax.Array) -> jax.Array:
  """`[T, E]` by `[E, heads, D]` to `[T, heads, D]`, as a product of matrices: XLA on CPU copies three-axis weights."""
  return (x @ weight.reshape(x.shape[1], -1)).reshape(x.shape[0], *weight.shape[1:])


class Block(nnx.Module):
  """One transformer block."""

  def __init__(self, model: ModelSpec, layer: int, dtype: jnp.dtype):
    embed, heads, kv_heads, head, ffn = (
      model.embed_dim, model.query_heads, model.kv_heads, model.head_dim, model.ffn_dim,
    )  # fmt: skip
    self.attn_norm = weight((embed,), ('embed',), dtype)
    self.q = weight((embed, heads, head), ('embed', 'query_heads', 'head'), dtype)
    self.k = weight((embed, kv_heads, head), ('embed', 'kv_heads', 'head'), dtype)
    self.v = weight((embed, kv_heads, head), ('embed', 'kv_heads', 'head'), dtype)
    if model.qkv_bias:
      self.q_bias = weight((heads, head), ('query_heads', 'head'), dtype)
      self.k_bias = weight((kv_heads, head), ('kv_heads', 'head'), dtype)
      self.v_bias = weight((kv_heads, head), ('kv_heads', 'head'), dtype)
    if model.qk_norm:
      self.q_norm = weight((head,), ('head',), dtype)
      self.k_norm = weight((head,), ('head',), dtype)
    self.o = weight((heads, head, embed), ('query_heads', 'head', 'embed'), dtype)
    self.mlp_norm = weight((embed,), ('embed',), dtype)
    self.gate = weight((embed, ffn), ('embed', 'ffn'), dtype)
    self.up = weight((embed, ffn), ('embed', 'ffn'), dtype)
    self.down = weight((ffn, embed), ('ffn', 'embed'), dtype)
    self.model = model
    self.layer = layer

  def __call__(self, x: jax.Array, turn: Turn, pages: jax.Array, attend: Attend) -> tuple[jax.Array, jax.Array]:
    """Run packed tokens through the block.

    Args:
      x: `[T, E]`.
      turn: How each token's queries and keys turn.
      pages: This layer's pages, whatever `attend` takes.
      attend: Writes keys and values and attends.

    Returns:
      `[T, E]`, and the pages with the tokens' keys and values in them.
    """
    normed = rms_norm(x, self.attn_norm[...], self.model.norm_eps)
    q, k, v = self._project(normed)
    attended, pages = attend(rotate(q, turn), rotate(k, turn), v, pages, self.model.window(self.layer))
    x = x + attended.reshape(x.shape[0], -1) @ self.o[...].reshape(-1, x.shape[1])
    normed = rms_norm(x, self.mlp_norm[...], self.model.norm_eps)
    hidden = jax.nn.silu(normed @ self.gate[...]) * (normed @ self.up[...])
    return x + hidden @ self.down[...], pages

  def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[T, H, D]`, keys and values `[T, K, D]` of `[T, E]`."""
    q, k, v = (_to_heads(x, weight[...]) for weight in (self.q, self.k, self.v))
    if self.model.qkv_bias:
      q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
    if self.model.qk_norm:
      q = rms_norm(q, self.q_norm[...], self.model.norm_eps)
      k = rms_norm(k, self.k_norm[...], self.model.norm_eps)
    return q, k, v
