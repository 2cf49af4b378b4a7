"""Checkpoints: trained weights and tokenizers, from GGUF files and safetensors folders."""

from pdjax.model.checkpoint.base import Checkpoint, tensor_shapes
from pdjax.model.checkpoint.gguf import GGUFCheckpoint
from pdjax.model.checkpoint.open import open_checkpoint
from pdjax.model.checkpoint.random import RandomCheckpoint
from pdjax.model.checkpoint.safetensors import SafetensorsCheckpoint

__all__ = [
  'Checkpoint',
  'GGUFCheckpoint',
  'RandomCheckpoint',
  'SafetensorsCheckpoint',
  'open_checkpoint',
  'tensor_shapes',
]
