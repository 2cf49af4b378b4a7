"""The Llama family in plain NumPy, from the papers: no cache, no pages, no batch. What everything else must equal."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pdjax.model.checkpoint import RandomCheckpoint
from pdjax.types import ModelSpec


@dataclasses.dataclass(frozen=True)
class NumpyLlama:
  """The model of a checkpoint, one prompt at a time, in float32.

  Attributes:
    checkpoint: The weights.
    caches: In which dtypes keys and values are remembered, by a worker that prefills and by one that decodes: where
      they differ, those of the prompt are converted from one to the other.
    prompt_len: Tokens of the prompt, which the first of them runs; all if None.
  """

  checkpoint: RandomCheckpoint
  caches: tuple[str, str] = ('float32', 'float32')
  prompt_len: int | None = None

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
      if model.qkv_bias:
        q, k, v = (x + weight(f'layers.{i}.{name}_bias') for x, name in ((q, 'q'), (k, 'k'), (v, 'v')))
      if model.qk_norm:
        q, k = self._norm(q, weight(f'layers.{i}.q_norm')), self._norm(k, weight(f'layers.{i}.k_norm'))
      attended = self._attend(self._rotate(q), self._rotate(k), v, model.window(i))
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
    frequencies = [self._stretched(self.model.rope_theta ** (-i / half)) for i in range(half)]
    angles = np.arange(len(x))[:, None] * np.array(frequencies)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1).astype(np.float32)

  def _stretched(self, frequency: float) -> float:
    """One frequency after the scaling of the rotary embedding, by its wavelength in tokens."""
    scaling = self.model.rope_scaling
    if scaling is None:
      return frequency
    wavelength = 2 * np.pi / frequency
    longest_kept = scaling.original_context_len / scaling.high_freq_factor
    shortest_slowed = scaling.original_context_len / scaling.low_freq_factor
    if scaling.kind == 'linear' or wavelength > shortest_slowed:
      return frequency / scaling.factor
    if wavelength < longest_kept:
      return frequency
    blend = scaling.original_context_len / wavelength - scaling.low_freq_factor
    blend /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - blend) * frequency / scaling.factor + blend * frequency

  def _attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None) -> np.ndarray:
    prompt, (ours, theirs) = self.prompt_len or len(q), self.caches
    kept = [remembered(x, ours) for x in (k, v)]
    out = self._attend_to(q, *kept, window, ours)
    if prompt < len(q):
      if ours != theirs:
        kept = [remembered(np.concatenate([a[:prompt], b[prompt:]]), theirs) for a, b in zip(kept, (k, v), strict=True)]
      out[prompt:] = self._attend_to(q, *kept, window, theirs)[prompt:]
    return out

  def _attend_to(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None, cache: str) -> np.ndarray:
    group = self.model.query_heads // self.model.kv_heads
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    factor = 'float32' if cache == 'int8' else cache  # of what is multiplied by keys and by values
    q = remembered(q / np.sqrt(np.float32(self.model.head_dim)), factor)
    scores = np.einsum('thd,shd->hts', q, k)
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    if window is not None:
      scores[:, np.tril(np.ones(scores.shape[1:], bool), -window)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum('hts,shd->thd', remembered(weights, factor), v) / weights.sum(-1).T[..., None]


def remembered(x: np.ndarray, dtype: str) -> np.ndarray:
  """Float32 values `[..., D]` as a cache of this dtype gives them back; int8 has a scale for each D of them."""
  if dtype != 'int8':
    return x.astype(jnp.dtype(dtype)).astype(np.float32)
  largest = np.abs(x).max(-1, keepdims=True)
  return np.round(x * (127 / largest)) * (largest / 127)
