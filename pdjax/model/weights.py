"""A checkpoint's tensors, each put straight into its sharding on every mesh that wants it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pdjax.model.checkpoint.base import Checkpoint, ShardedCheckpoint
from pdjax.model.checkpoint.narrow import convert_weight
from pdjax.model.transformer import Weights
from pdjax.sharding import ShardingRules
from pdjax.types.model import ModelSpec


def load_weights(
  checkpoint: Checkpoint, model: ModelSpec, meshes: Mapping[Any, Mesh], dtype: jnp.dtype | Mapping[Any, jnp.dtype]
) -> dict[Any, Weights]:
  """Read each tensor once and place it on every mesh; the host never holds more than one whole tensor.

  Matrices are turned to have their outputs first, which is how `pdjax.model.layers.project` wants them. A checkpoint
  that restores into shardings is read once for every mesh instead, each device its own part.

  Args:
    checkpoint: The source of the tensors.
    model: Its shape.
    meshes: The meshes by any key.
    dtype: The dtype the weights are converted to; by the keys of `meshes`, if they are to have unlike ones.

  Returns:
    The weights by the same keys.

  Raises:
    ValueError: if a tensor is missing or has another shape, or a number of it would be infinite in its dtype.
  """
  rows = model.weights.values()
  weights: dict[Any, Weights] = {key: {'layers': {i: {} for i in range(model.num_layers)}} for key in meshes}

  dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(meshes, dtype)

  def rules(mesh: Mesh) -> ShardingRules:
    return ShardingRules.for_model(model, mesh.size)

  if isinstance(checkpoint, ShardedCheckpoint):
    for key, mesh in meshes.items():
      found = {row.name: rules(mesh).spec(*(row.axes[axis] for axis in row.file_order)) for row in rows}
      restored = checkpoint.restore({name: NamedSharding(mesh, spec) for name, spec in found.items()}, dtypes[key])
      for row in rows:
        array = restored.pop(row.name)  # turned one by one: there may be no room for all of them twice
        sharding = NamedSharding(mesh, rules(mesh).spec(*row.axes))
        _put(weights[key], row.name, jax.device_put(array.transpose(np.argsort(row.file_order)), sharding))
    return weights
  for row in rows:
    tensor = np.asarray(checkpoint.tensor(row.name))
    if tensor.shape != row.file_shape:
      raise ValueError(f'tensor {row.name!r} has shape {tensor.shape}, but {model.name} expects {row.file_shape}.')
    tensor = tensor.transpose(np.argsort(row.file_order))
    for one in dict.fromkeys(dtypes.values()):
      converted = convert_weight(tensor, one, row.name, order='C')
      for key, mesh in meshes.items():
        if dtypes[key] == one:
          sharding = NamedSharding(mesh, rules(mesh).spec(*row.axes))
          _put(weights[key], row.name, jax.make_array_from_callback(tensor.shape, sharding, converted.__getitem__))
  return weights


def _put(weights: dict[Any, Any], name: str, array: jax.Array) -> None:
  """Put an array into nested dictionaries by its dotted name; numbers are layers."""
  *folders, last = (int(part) if part.isdigit() else part for part in name.split('.'))
  for folder in folders:
    weights = weights[folder]
  weights[last] = array
