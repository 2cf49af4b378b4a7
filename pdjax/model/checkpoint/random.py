"""Random weights of a given shape: to measure and test without a checkpoint."""

import dataclasses
import zlib

import numpy as np

from pdjax.model.checkpoint.base import tensor_shapes
from pdjax.model.end_tokens import EndTokens
from pdjax.model.tokenizer import Tokenizer
from pdjax.types.model import ModelSpec


@dataclasses.dataclass(frozen=True)
class RandomCheckpoint:
  """Normal weights that keep activations near unit size, the same for the same seed."""

  spec: ModelSpec
  seed: int = 0

  @property
  def dtype(self) -> np.dtype:
    """float32."""
    return np.dtype(np.float32)

  def tensor(self, name: str) -> np.ndarray:
    """The tensor of that name, float32, in the shape of `tensor_shapes`."""
    shape = tensor_shapes(self.spec)[name]
    if name.endswith('norm'):
      return np.ones(shape, np.float32)
    rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
    if name.endswith('bias'):
      return rng.standard_normal(shape, np.float32) * np.float32(0.1)
    fan_in = {'embed': 1, 'o': shape[0] * (shape[1] if len(shape) > 1 else 1)}.get(name.split('.')[-1], shape[0])
    return (rng.standard_normal(shape, np.float32) / np.sqrt(fan_in)).astype(np.float32)

  def tokenizer(self) -> Tokenizer | None:
    """None: random weights have no words."""
    return None

  def end_tokens(self) -> EndTokens:
    """The end tokens that the model's shape names."""
    return EndTokens((('model', self.spec.eos_token_ids),)) if self.spec.eos_token_ids else EndTokens()
