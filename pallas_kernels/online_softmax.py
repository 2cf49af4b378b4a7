"""What walking over paged keys and values in blocks has in common: an online softmax (Milakov and Gimelshein 2018)."""

import jax
import jax.numpy as jnp

NOTHING = -1e30  # the top of a row that has seen nothing; finite, so that differences stay free of NaN
_HIDDEN = 2 * NOTHING  # so far below any top that its exponential is 0


def table_blocks(tables: jax.Array, page_size: int, block_tokens: int) -> jax.Array:
  """Page tables `[B, N]` cut into blocks `[B, M, n]` of about `block_tokens` cached tokens, the last padded."""
  width = tables.shape[1]
  block_pages = min(max(block_tokens // page_size, 1), width)
  return jnp.pad(tables, ((0, 0), (0, -width % block_pages))).reshape(tables.shape[0], -1, block_pages)


def read(pages: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Keys and values `[W, K, S, D]` of `pages` `[P, 2, K, G, D]` for W blocks of pages `ids` `[W, n]`; S is n·G.

  A head's tokens in a page are one run of memory, so heads are gathered apart: no transpose follows.
  """
  _, _, kv_heads, page_size, head_dim = pages.shape
  runs = pages.reshape(-1, page_size * head_dim)
  keys = (ids[:, None, :] * (2 * kv_heads) + jnp.arange(kv_heads)[:, None]).reshape(-1)
  shape = (ids.shape[0], kv_heads, ids.shape[1] * page_size, head_dim)
  return tuple(runs.at[at].get(mode='clip').reshape(shape) for at in (keys, keys + kv_heads))  # type: ignore[return-value]


def weigh(
  queries: jax.Array, keys: jax.Array, visible: jax.Array, top: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Softmax weights over a block, not divided by their sum yet.

  Args:
    queries: `[..., R, D]`, scaled already.
    keys: `[..., S, D]`.
    visible: `[..., R, S]` or what broadcasts to it, whether a row sees a token.
    top: `[..., R, 1]`, the highest score before this block.

  Returns:
    The weights `[..., R, S]` in float32 relative to the highest score so far, and that score `[..., R, 1]`.
  """
  scores = jnp.einsum('...rd,...sd->...rs', queries, keys, preferred_element_type=jnp.float32)
  scores = jnp.where(visible, scores, _HIDDEN)
  top = jnp.maximum(NOTHING if top is None else top, scores.max(-1, keepdims=True))
  return jnp.exp(scores - top), top


def gather_values(weights: jax.Array, values: jax.Array) -> jax.Array:
  """Values `[..., S, D]` summed by weights `[..., R, S]`, in float32."""
  weights = weights.astype(values.dtype)
  return jnp.einsum('...rs,...sd->...rd', weights, values, preferred_element_type=jnp.float32)
