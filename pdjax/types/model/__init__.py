"""A language model as its parts say it, with what follows from them."""

from pdjax.types.model.checks import is_positive, is_size
from pdjax.types.model.parts import GQA, MLA, Attention, Experts, FeedForward, Gated, Plain
from pdjax.types.model.rope import RopeScaling
from pdjax.types.model.spec import MAX_LAYERS, ModelSpec
from pdjax.types.model.weight import Axis, Weight
from pdjax.types.model.weights import axis_shards, evenly_cut, mesh_shape

__all__ = [
  'GQA', 'MAX_LAYERS', 'MLA', 'Attention', 'Axis', 'Experts', 'FeedForward', 'Gated', 'ModelSpec',
  'Plain', 'RopeScaling', 'Weight', 'axis_shards', 'evenly_cut', 'is_positive', 'is_size', 'mesh_shape',
]  # fmt: skip
