"""Checkpoints: trained weights and tokenizers, from GGUF files, safetensors folders, Orbax folders and the hub."""

from pdjax.model.checkpoint.base import Checkpoint, ShardedCheckpoint, tensor_shapes
from pdjax.model.checkpoint.gguf import GGUFCheckpoint
from pdjax.model.checkpoint.open import find_checkpoint, load, open_checkpoint
from pdjax.model.checkpoint.orbax import OrbaxCheckpoint, save_orbax
from pdjax.model.checkpoint.random import RandomCheckpoint
from pdjax.model.checkpoint.safetensors import SafetensorsCheckpoint

__all__ = [
  'Checkpoint',
  'GGUFCheckpoint',
  'OrbaxCheckpoint',
  'RandomCheckpoint',
  'SafetensorsCheckpoint',
  'ShardedCheckpoint',
  'find_checkpoint',
  'load',
  'open_checkpoint',
  'save_orbax',
  'tensor_shapes',
]
