"""The sharding of arrays: one table from logical axes to mesh axes, and one mesh per worker out of all devices."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pdjax.types.model import ModelSpec, evenly_cut, mesh_shape

MESH_AXES = ('kv', 'group')
_ALL = MESH_AXES


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """Mesh axes for each logical axis; None keeps it whole on every device.

  A mesh has the axes `kv`, over which key/value heads are cut, and `group`, over which they are copied when there are
  more devices than key/value heads. Query heads, feed-forward columns and the vocabulary are cut over both.
  """

  query_heads: str | tuple[str, ...] | None = _ALL
  kv_heads: str | tuple[str, ...] | None = 'kv'
  head: str | tuple[str, ...] | None = None
  embed: str | tuple[str, ...] | None = None
  ffn: str | tuple[str, ...] | None = _ALL
  vocab: str | tuple[str, ...] | None = _ALL

  def spec(self, *axes: str | None) -> PartitionSpec:
    """The partition of an array with these logical axes."""
    return PartitionSpec(*(axis and getattr(self, axis) for axis in axes))

  @classmethod
  def for_model(cls, model: ModelSpec, tp: int) -> 'ShardingRules':
    """The table for a model: feed-forward columns or a vocabulary that `tp` does not divide stay whole."""
    cut = evenly_cut(model, tp)
    return cls(ffn=_ALL if 'ffn' in cut else None, vocab=_ALL if 'vocab' in cut else None)


def make_mesh(model: ModelSpec, devices: Sequence[jax.Device]) -> Mesh:
  """The mesh of one worker over its devices.

  Raises:
    ValueError: if their number does not fit the model's heads.
  """
  shape = mesh_shape(model, len(devices))
  return Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())
