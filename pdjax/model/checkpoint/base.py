"""The protocol of checkpoints of all file formats: a spec, tensors under our names and shapes, a tokenizer."""

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from pdjax.model.end_tokens import EndTokens
from pdjax.model.tokenizer import Tokenizer
from pdjax.types.model import ModelSpec, Weight

if TYPE_CHECKING:
  import jax


class Checkpoint(Protocol):
  """A trained model on disk, read tensor by tensor.

  Opening one reads headers and small files; the weights stay in the file until `tensor` asks for them. The rotary
  embedding is always half-split: feature `i` of a head turns with feature `i + D/2`.
  """

  @property
  def spec(self) -> ModelSpec:
    """The model's shape."""
    ...

  @property
  def dtype(self) -> np.dtype:
    """Floating-point type the checkpoint's weights are meant to be used in."""
    ...

  def tensor(self, name: str) -> np.ndarray:
    """One weight in our shape; a view of the file where that is possible, so never write to it.

    Args:
      name: A key of `tensor_shapes(spec)`.

    Returns:
      A float32 array, or one of the checkpoint's own floating-point type (float16, bfloat16), not always contiguous.

    Raises:
      KeyError: if the model has no weight of this name.
    """
    ...

  def tokenizer(self) -> Tokenizer | None:
    """The checkpoint's tokenizer, or None if it carries none."""
    ...

  def end_tokens(self) -> EndTokens:
    """The tokens that end a sequence, by the parts of the checkpoint that say so; `ids` are `spec.eos_token_ids`."""
    ...


@runtime_checkable
class ShardedCheckpoint(Checkpoint, Protocol):
  """A checkpoint that gives every device its part of a tensor, so that no whole tensor need lie on the host."""

  def restore(
    self, shardings: 'Mapping[str, jax.sharding.Sharding]', dtype: 'jax.typing.DTypeLike'
  ) -> 'dict[str, jax.Array]':
    """Read weights straight into shardings.

    Args:
      shardings: The sharding of each, by keys of `tensor_shapes(spec)`.
      dtype: The dtype they are converted to.

    Raises:
      ValueError: if one is missing, damaged or of another shape.
    """
    ...


def with_chat_template(ends: EndTokens, tokenizer: Tokenizer | None, spec: ModelSpec) -> EndTokens:
  """These ends and, for chats, the tokens that the tokenizer's chat template puts behind an assistant's message."""
  if tokenizer is None:
    return ends
  return ends.with_turn(tokenizer.turn_end_ids, spec.vocab_size, f'the chat template of {tokenizer.source}')


def checked_spec(source: pathlib.Path, **fields: Any) -> ModelSpec:
  """The model with these fields of `ModelSpec`.

  Raises:
    ValueError: if there is no such model; the message names the file that describes it.
  """
  try:
    return ModelSpec(**fields)
  except (ValueError, TypeError) as error:
    raise ValueError(
      f'{source} describes a model that cannot be ({error}), expected one whose numbers fit together; '
      'download or convert it again.'
    ) from error


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
  """The shape of every weight of a model as a checkpoint hands it out, the inputs of a matrix first.

  Returns:
    The shapes by the names of `ModelSpec.weights`, such as `embed` [V, E] and `layers.{i}.q` [E, H, D].
  """
  return {name: row.file_shape for name, row in spec.weights.items()}


def from_stored(row: Weight, stored: np.ndarray) -> np.ndarray:
  """Bring a weight kept as `Weight.stored_shape`, a matrix as [outputs, inputs], into the shape of `tensor_shapes`."""
  return stored.reshape(row.shape).transpose(row.file_order)
