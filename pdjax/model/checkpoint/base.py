"""The protocol of checkpoints of all file formats: a spec, tensors under our names and shapes, a tokenizer."""

import math
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from pdjax.model.end_tokens import EndTokens
from pdjax.model.tokenizer import Tokenizer
from pdjax.types.model import ModelSpec

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
  """Every weight of a model with its shape.

  Returns:
    `embed` [V, E]; for each layer i, `layers.{i}.attn_norm` [E], `.q` [E, H, D], `.k` and `.v` [E, K, D],
    `.o` [H, D, E], `.mlp_norm` [E], `.gate` and `.up` [E, F], `.down` [F, E]; `final_norm` [E]; and `unembed` [E, V]
    unless the embeddings are tied. With `qkv_bias` also `.q_bias` [H, D], `.k_bias` and `.v_bias` [K, D], and with
    `qk_norm` `.q_norm` and `.k_norm` [D].
  """
  layer: dict[str, tuple[int, ...]] = {
    'attn_norm': (spec.embed_dim,),
    'q': (spec.embed_dim, spec.query_heads, spec.head_dim),
    'k': (spec.embed_dim, spec.kv_heads, spec.head_dim),
    'v': (spec.embed_dim, spec.kv_heads, spec.head_dim),
    'o': (spec.query_heads, spec.head_dim, spec.embed_dim),
    'mlp_norm': (spec.embed_dim,),
    'gate': (spec.embed_dim, spec.ffn_dim),
    'up': (spec.embed_dim, spec.ffn_dim),
    'down': (spec.ffn_dim, spec.embed_dim),
  }
  if spec.qkv_bias:
    layer |= {'q_bias': (spec.query_heads, spec.head_dim)}
    layer |= dict.fromkeys(('k_bias', 'v_bias'), (spec.kv_heads, spec.head_dim))
  if spec.qk_norm:
    layer |= dict.fromkeys(('q_norm', 'k_norm'), (spec.head_dim,))
  shapes: dict[str, tuple[int, ...]] = {'embed': (spec.vocab_size, spec.embed_dim)}
  for i in range(spec.num_layers):
    shapes |= {f'layers.{i}.{name}': shape for name, shape in layer.items()}
  shapes['final_norm'] = (spec.embed_dim,)
  if not spec.tied_embeddings:
    shapes['unembed'] = (spec.embed_dim, spec.vocab_size)
  return shapes


def stored_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
  """The shape each weight has in a file that keeps matrices as [outputs, inputs], as both our formats do."""
  stored = {}
  for name, shape in tensor_shapes(spec).items():
    if name == 'embed' or len(shape) == 1:
      stored[name] = shape
    elif name.endswith('bias'):
      stored[name] = (math.prod(shape),)
    else:
      num_inputs = 2 if name.endswith('.o') else 1  # axes: the output projection reads heads and their features
      stored[name] = (math.prod(shape[num_inputs:]), math.prod(shape[:num_inputs]))
  return stored


def from_stored(name: str, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Bring a weight kept as [outputs, inputs] into our shape."""
  if name == 'embed':
    return stored
  if stored.ndim == 1:
    return stored.reshape(shape)
  return stored.T.reshape(shape)
