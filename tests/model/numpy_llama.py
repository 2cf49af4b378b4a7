"""Llama in plain NumPy, written from the papers: no cache, no pages, no batch. What everything else must equal."""

import dataclasses

import numpy as np

from pdjax.model.checkpoint import RandomCheckpoint
from pdjax.types import ModelSpec


@dataclasses.dataclass(frozen=True)
class NumpyLlama:
  """The model of a checkpoint, one prompt at a time, in float32."""

  checkpoint: RandomCheckpoint

  @property
  def model(self) -> ModelSpec:
    return self.checkpoint.spec

  def logits(self, tokens) -> np.ndarray:
    """`[T, V]`: after each token, what comes next."""
    model, weight = self.model, self.checkpoint.tensor
    x = weight('embed')[np.asarray(tokens)]
    for i in range(model.num_layers):
      normed = self._norm(x, weight(f'layers.{i}.attn_norm'))
      q, k, v = (np.tensordot(normed, weight(f'layers.{i}.{name}'), 1) for name in 'qkv')  # [T, heads, D]
      attended = self._attend(self._rotate(q), self._rotate(k), v)
      x = x + np.tensordot(attended, weight(f'layers.{i}.o'), 2)
      normed = self._norm(x, weight(f'layers.{i}.mlp_norm'))
      gate = normed @ weight(f'layers.{i}.gate')
      x = x + (gate / (1 + np.exp(-gate)) * (normed @ weight(f'layers.{i}.up'))) @ weight(f'layers.{i}.down')
    unembed = weight('embed').T if model.tied_embeddings else weight('unembed')
    return self._norm(x, weight('final_norm')) @ unembed

  def _norm(self, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + np.float32(self.model.norm_eps)) * scale

  def _rotate(self, x: np.ndarray) -> np.ndarray:
    """Features i and i + D/2 of a head are one complex number, turned by the position times its frequency."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * self.model.rope_theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1).astype(np.float32)

  def _attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    group = self.model.query_heads // self.model.kv_heads
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum('thd,shd->hts', q, k) / np.sqrt(np.float32(self.model.head_dim))
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum('hts,shd->thd', weights / weights.sum(-1, keepdims=True), v)
