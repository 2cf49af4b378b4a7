"""A checkpoint's tensors, each put straight into its sharding on every mesh that wants it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pdjax.model.checkpoint.base import Checkpoint, ShardedCheckpoint, tensor_shapes
from pdjax.model.transformer import Weights, weight_axes
from pdjax.sharding import ShardingRules
from pdjax.types.model import ModelSpec


def load_weights(
  checkpoint: Checkpoint, model: ModelSpec, meshes: Mapping[Any, Mesh], dtype: jnp.dtype
) -> dict[Any, Weights]:
  """Read each tensor once and place it on every mesh; the host never holds more than one whole tensor.

  A checkpoint that restores into shardings is read once for every mesh instead, each device its own part.

  Args:
    checkpoint: Where the tensors come from.
    model: Its shape.
    meshes: The meshes by any key.
    dtype: What the weights are converted to.

  Returns:
    The weights by the same keys.

  Raises:
    ValueError: if a tensor is missing or has another shape.
  """
  axes, shapes = weight_axes(model), tensor_shapes(model)
  weights: dict[Any, Weights] = {key: {'layers': {i: {} for i in range(model.num_layers)}} for key in meshes}

  def sharding(name: str, mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, ShardingRules.for_model(model, mesh.size).spec(*axes[name]))

  if isinstance(checkpoint, ShardedCheckpoint):
    for key, mesh in meshes.items():
      for name, array in checkpoint.restore({name: sharding(name, mesh) for name in shapes}, dtype).items():
        _put(weights[key], name, array)
    return weights
  for name, shape in shapes.items():
    tensor = np.asarray(checkpoint.tensor(name)).astype(dtype)
    if tensor.shape != shape:
      raise ValueError(f'tensor {name!r} has shape {tensor.shape}, but {model.name} expects {shape}.')
    for key, mesh in meshes.items():
      _put(weights[key], name, jax.make_array_from_callback(shape, sharding(name, mesh), tensor.__getitem__))
  return weights


def _put(weights: dict[Any, Any], name: str, array: jax.Array) -> None:
  """Put an array into nested dictionaries by its dotted name; numbers are layers."""
  *folders, last = (int(part) if part.isdigit() else part for part in name.split('.'))
  for folder in folders:
    weights = weights[folder]
  weights[last] = array
