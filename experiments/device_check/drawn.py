"""Random weights drawn on the devices that hold them, where those of `RandomCheckpoint` would take minutes on a host.

`checkpoint='random'` keeps its own: these differ from platform to platform in their last bits, and a run on one should
be a run on another.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.device_check.timing import compilers
from pdjax.model.checkpoint import tensor_shapes
from pdjax.model.end_tokens import EndTokens
from pdjax.model.tokenizer import Tokenizer
from pdjax.types import ModelSpec


@dataclasses.dataclass(frozen=True)
class DrawnCheckpoint:
  """Normal weights that keep activations near unit size, the same for the same seed on the same devices."""

  spec: ModelSpec
  seed: int = 0

  @property
  def dtype(self) -> np.dtype:
    """float32."""
    return np.dtype(np.float32)

  def tensor(self, name: str) -> np.ndarray:
    """The tensor of that name, float32, in the shape of `tensor_shapes`, fetched from the first device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return np.asarray(self.restore({name: sharding}, self.dtype)[name])

  def restore(
    self, shardings: Mapping[str, jax.sharding.Sharding], dtype: jax.typing.DTypeLike
  ) -> dict[str, jax.Array]:
    """Draw weights straight into shardings."""
    shapes = tensor_shapes(self.spec)
    kinds = {name: (shapes[name], _scale(name, shapes[name]), sharding) for name, sharding in shardings.items()}
    key = jax.random.key(self.seed)
    draw = functools.partial(_drawing, jnp.dtype(dtype).name, key)
    with ThreadPoolExecutor(compilers()) as pool:
      distinct = list(dict.fromkeys(kinds.values()))
      compiled = dict(zip(distinct, pool.map(lambda kind: draw(*kind), distinct), strict=True))
    return {name: compiled[kind](jax.random.fold_in(key, zlib.crc32(name.encode()))) for name, kind in kinds.items()}

  def tokenizer(self) -> Tokenizer | None:
    """None: random weights have no words."""
    return None

  def end_tokens(self) -> EndTokens:
    """The end tokens that the model's spec names."""
    return EndTokens((('model', self.spec.eos_token_ids),)) if self.spec.eos_token_ids else EndTokens()


def _scale(name: str, shape: tuple[int, ...]) -> float:
  """Standard deviation of a weight's numbers; 0 for what is all ones."""
  kind = name.rpartition('.')[2]
  if kind.endswith('norm'):
    return 0.0
  if kind.endswith('bias'):
    return 0.1
  return 1 / math.sqrt({'embed': 1, 'o': math.prod(shape[:-1])}.get(kind, shape[0]))


def _drawing(dtype: str, key: jax.Array, shape: tuple[int, ...], scale: float, sharding: jax.sharding.Sharding) -> Any:
  """A compiled program that draws such a weight from a key."""

  def draw(key):
    if not scale:
      return jnp.ones(shape, dtype)
    return (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype)

  return jax.jit(draw, out_shardings=sharding, keep_unused=True).lower(key).compile()
