"""Random weights of a given shape: to measure and test without a checkpoint."""

import dataclasses
import zlib

import numpy as np

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
    row = self.spec.weights[name]
    if row.kind == 'norm':
      return np.ones(row.file_shape, np.float32)
    rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
    drawn = rng.standard_normal(row.file_shape, np.float32)
    return drawn * np.float32(0.1) if row.kind == 'bias' else (drawn / np.sqrt(row.fan_in)).astype(np.float32)

  def tokenizer(self) -> Tokenizer | None:
    """None: random weights have no words."""
    return None

  def end_tokens(self) -> EndTokens:
    """The end tokens that the model's shape names."""
    return EndTokens((('model', self.spec.eos_token_ids),)) if self.spec.eos_token_ids else EndTokens()
