"""One weight of a model, and the names of axes along which weights may be cut."""

import dataclasses
import math
from typing import Literal

Axis = Literal['query_heads', 'kv_heads', 'head', 'embed', 'ffn', 'vocab', 'experts', 'latent', 'position']
Kind = Literal['embedding', 'norm', 'bias', 'matrix']


@dataclasses.dataclass(frozen=True, slots=True)
class Weight:
  """One row of the weights table.

  Attributes:
    name: Its name; within a layer, without the layer's number.
    axes: The name of each axis of `shape`.
    shape: Its shape as the model keeps it: a matrix has its outputs first.
    kind: 'embedding', a table of rows; 'norm', a scale that begins as 1; 'bias', what is added; 'matrix', what rows are
      multiplied by.
    num_inputs: The number of its last axes over which a product sums.
    share: The part of it that one token is multiplied by: of experts, those that are active.
  """

  name: str
  axes: tuple[Axis, ...]
  shape: tuple[int, ...]
  kind: Kind = 'matrix'
  num_inputs: int = 1
  share: float = 1.0

  @property
  def size(self) -> int:
    """Its numbers."""
    return math.prod(self.shape)

  @property
  def num_outputs(self) -> int:
    """The number of its first axes, which a product leaves; of what is no matrix, all of them."""
    return len(self.shape) - self.num_inputs if self.kind == 'matrix' else len(self.shape)

  @property
  def file_order(self) -> tuple[int, ...]:
    """The axes of `shape` in the order of a checkpoint's tensor, which has the inputs of a matrix first."""
    outputs = self.num_outputs
    return (*range(outputs, len(self.shape)), *range(outputs))

  @property
  def file_shape(self) -> tuple[int, ...]:
    """Its shape as a checkpoint hands it out."""
    return tuple(self.shape[axis] for axis in self.file_order)

  @property
  def stored_shape(self) -> tuple[int, ...]:
    """Its shape in a file that keeps matrices as [outputs, inputs] and everything else but embeddings as rows."""
    if self.kind == 'embedding':
      return self.shape
    if self.kind != 'matrix':
      return (self.size,)
    return math.prod(self.shape[: self.num_outputs]), math.prod(self.shape[self.num_outputs :])

  @property
  def fan_in(self) -> int:
    """The numbers that a product sums up, so that random weights keep its results near unit size."""
    return math.prod(self.shape[self.num_outputs :])


def matrix(name: str, outputs: dict[Axis, int], inputs: dict[Axis, int], share: float = 1.0) -> Weight:
  """The row of a matrix with these output axes and these input axes, and their lengths."""
  shape = (*outputs.values(), *inputs.values())
  return Weight(name, (*outputs, *inputs), shape, num_inputs=len(inputs), share=share)


def norm(name: str, size: int, axis: Axis = 'embed') -> Weight:
  """The row of a norm's scale."""
  return Weight(name, (axis,), (size,), 'norm')


def bias(name: str, axes: dict[Axis, int], share: float = 1.0) -> Weight:
  """The row of a bias with these axes and their lengths."""
  return Weight(name, tuple(axes), tuple(axes.values()), 'bias', share=share)
