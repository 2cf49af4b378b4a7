"""A checkpoint's tensors, each put straight into its sharding on every mesh that wants it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pdjax.model.checkpoint.base import Checkpoint, ShardedCheckpoint, tensor_shapes
from pdjax.model.checkpoint.narrow import convert_weight
from pdjax.model.transformer import Weights, weight_axes
from pdjax.sharding import ShardingRules
from pdjax.types.model import ModelSpec


def load_weights(
  checkpoint: Checkpoint, model: ModelSpec, meshes: Mapping[Any, Mesh], dtype: jnp.dtype
) -> dict[Any, Weights]:
  """Read each tensor once and place it on every mesh; the host never holds more than one whole tensor.

  Matrices are turned to have their outputs first, which is how `pdjax.model.layers.project` wants them. A checkpoint
  that restores into shardings is read once for every mesh instead, each device its own part.

  Args:
    checkpoint: The source of the tensors.
    model: Its shape.
    meshes: The meshes by any key.
    dtype: The dtype the weights are converted to.

  Returns:
    The weights by the same keys.

  Raises:
    ValueError: if a tensor is missing or has another shape, or a number of it would be infinite in `dtype`.
  """
  axes, shapes = weight_axes(model), tensor_shapes(model)
  weights: dict[Any, Weights] = {key: {'layers': {i: {} for i in range(model.num_layers)}} for key in meshes}

  def rules(mesh: Mesh) -> ShardingRules:
    return ShardingRules.for_model(model, mesh.size)

  if isinstance(checkpoint, ShardedCheckpoint):
    for key, mesh in meshes.items():
      found = {name: rules(mesh).spec(*_turned_back(name, axes[name])) for name in shapes}
      restored = checkpoint.restore({name: NamedSharding(mesh, spec) for name, spec in found.items()}, dtype)
      for name in shapes:
        array = restored.pop(name)  # turned one by one: there may be no room for all of them twice
        sharding = NamedSharding(mesh, rules(mesh).spec(*axes[name]))
        _put(weights[key], name, jax.device_put(array.transpose(_outputs_first(name, array.ndim)), sharding))
    return weights
  for name, shape in shapes.items():
    tensor = np.asarray(checkpoint.tensor(name))
    if tensor.shape != shape:
      raise ValueError(f'tensor {name!r} has shape {tensor.shape}, but {model.name} expects {shape}.')
    tensor = convert_weight(tensor.transpose(_outputs_first(name, tensor.ndim)), dtype, name, order='C')
    for key, mesh in meshes.items():
      sharding = NamedSharding(mesh, rules(mesh).spec(*axes[name]))
      _put(weights[key], name, jax.make_array_from_callback(tensor.shape, sharding, tensor.__getitem__))
  return weights


def _outputs_first(name: str, ndim: int) -> tuple[int, ...]:
  """The axes of a checkpoint's tensor in the order in which the model keeps them."""
  if ndim == 1 or name == 'embed' or name.endswith('_bias'):
    return tuple(range(ndim))
  inputs = 2 if name.endswith('.o') else 1  # the output projection reads heads and their features
  return (*range(inputs, ndim), *range(inputs))


def _turned_back(name: str, axes: tuple[str | None, ...]) -> list[str | None]:
  """A weight's logical axes in the order of the checkpoint's tensor."""
  return [axes[place] for place in np.argsort(_outputs_first(name, len(axes)))]


def _put(weights: dict[Any, Any], name: str, array: jax.Array) -> None:
  """Put an array into nested dictionaries by its dotted name; numbers are layers."""
  *folders, last = (int(part) if part.isdigit() else part for part in name.split('.'))
  for folder in folders:
    weights = weights[folder]
  weights[last] = array
