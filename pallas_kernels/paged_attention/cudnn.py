"""Paged decode attention by cuDNN: one call over the pages as they lie, whatever the lengths.

The query heads that share a key/value head are rows of one problem, so that each key and value is read once for all of
them: all see the same tokens, and no mask is needed.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import cudnn, cudnn_trial
from pallas_kernels.devices import Device
from pallas_kernels.tuning import Facts


@dataclasses.dataclass(frozen=True)
class Config:
  """`apart` keeps pages that are not full from cuDNN."""

  apart: bool = True


def rule(device: Device, facts: Facts) -> Config:
  """Both forms are right; that which leaves all to cuDNN is faster, where NaN behind a sequence does not harm it."""
  return Config(cudnn_trial.apart(device, facts, rows=False))


def refusal(config: Config, device: Device, facts: Facts) -> str | None:
  """A reason against attending so with cuDNN, or None."""
  if int(facts['query_tokens']) > 1:
    return f'it takes one query a sequence, and there are {facts["query_tokens"]}.'
  return cudnn_trial.refusal(device, facts, rows=False, apart=config.apart)


def paged_attention(
  q: jax.Array,
  pages: jax.Array,
  tables: jax.Array,
  lengths: jax.Array,
  *,
  softmax_scale: float,
  sliding_window: int | None = None,
  soft_cap: float | None = None,
  sinks: jax.Array | None = None,
  scales: jax.Array | None = None,
  return_lse: bool = False,
  config: Config,
  device: Device,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `pallas_kernels.paged_attention.paged_attention`."""
  assert sliding_window is None and soft_cap is None and sinks is None and scales is None  # refused
  batch, query_heads, head_dim = q.shape[0], *q.shape[-2:]
  kv_heads = pages.shape[2]
  rows = jnp.full(batch, query_heads // kv_heads, jnp.int32)
  out, lse = cudnn.attend_pages(
    q.reshape(batch, kv_heads, -1, head_dim), pages, tables, rows, lengths,
    softmax_scale=softmax_scale, heads_first=True, apart=config.apart,
  )  # fmt: skip
  out = out.reshape(q.shape).astype(q.dtype)
  return (out, lse.reshape(q.shape[:-1])) if return_lse else out
