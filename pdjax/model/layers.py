"""The parts of a Llama block: RMS norm, rotary positions, attention and gated feed-forward over packed tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from pdjax.types.model import ModelSpec

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""q `[T, H, D]`, k `[T, K, D]`, v `[T, K, D]` and one layer's pages to attended `[T, H, D]` and the pages with k, v."""


def weight(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: jnp.dtype) -> nnx.Param:
  """A weight that names its logical axes; zeros until a checkpoint's array takes its place."""
  return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """Divide rows by their root mean square (Zhang and Sennrich 2019), in float32."""
  wide = x.astype(jnp.float32)
  wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
  return wide.astype(x.dtype) * scale


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
  """Rotary position embedding (Su et al. 2021) of `[T, heads, D]`; the two halves of a head are the pairs."""
  half = x.shape[-1] // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions[:, None, None].astype(jnp.float32) * frequencies  # [T, 1, D/2]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _to_heads(x: jax.Array, weight: jax.Array) -> jax.Array:
  """`[T, E]` by `[E, heads, D]` to `[T, heads, D]`, as a product of matrices: XLA on CPU copies three-axis weights."""
  return (x @ weight.reshape(x.shape[1], -1)).reshape(x.shape[0], *weight.shape[1:])


class Block(nnx.Module):
  """One transformer block."""

  def __init__(self, model: ModelSpec, dtype: jnp.dtype):
    embed, heads, kv_heads, head, ffn = (
      model.embed_dim, model.query_heads, model.kv_heads, model.head_dim, model.ffn_dim,
    )  # fmt: skip
    self.attn_norm = weight((embed,), ('embed',), dtype)
    self.q = weight((embed, heads, head), ('embed', 'query_heads', 'head'), dtype)
    self.k = weight((embed, kv_heads, head), ('embed', 'kv_heads', 'head'), dtype)
    self.v = weight((embed, kv_heads, head), ('embed', 'kv_heads', 'head'), dtype)
    self.o = weight((heads, head, embed), ('query_heads', 'head', 'embed'), dtype)
    self.mlp_norm = weight((embed,), ('embed',), dtype)
    self.gate = weight((embed, ffn), ('embed', 'ffn'), dtype)
    self.up = weight((embed, ffn), ('embed', 'ffn'), dtype)
    self.down = weight((ffn, embed), ('ffn', 'embed'), dtype)
    self.model = model

  def __call__(
    self, x: jax.Array, positions: jax.Array, pages: jax.Array, attend: Attend
  ) -> tuple[jax.Array, jax.Array]:
    """Run packed tokens through the block.

    Args:
      x: `[T, E]`.
      positions: `[T]`, each token's place in its sequence.
      pages: This layer's pages, whatever `attend` takes.
      attend: Writes keys and values and attends.

    Returns:
      `[T, E]`, and the pages with the tokens' keys and values in them.
    """
    normed = rms_norm(x, self.attn_norm[...], self.model.norm_eps)
    q = rotate(_to_heads(normed, self.q[...]), positions, self.model.rope_theta)
    k = rotate(_to_heads(normed, self.k[...]), positions, self.model.rope_theta)
    attended, pages = attend(q, k, _to_heads(normed, self.v[...]), pages)
    x = x + attended.reshape(x.shape[0], -1) @ self.o[...].reshape(-1, x.shape[1])
    normed = rms_norm(x, self.mlp_norm[...], self.model.norm_eps)
    hidden = jax.nn.silu(normed @ self.gate[...]) * (normed @ self.up[...])
    return x + hidden @ self.down[...], pages
