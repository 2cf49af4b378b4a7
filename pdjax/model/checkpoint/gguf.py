"""Reads GGUF files, the single-file format of llama.cpp, quantised or not."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from pdjax.model.checkpoint.base import from_stored, stored_shapes, tensor_shapes
from pdjax.model.tokenizer import Tokenizer
from pdjax.types.model import ModelSpec

_END_IDS = ('tokenizer.ggml.eos_token_id', 'tokenizer.ggml.eot_token_id', 'tokenizer.ggml.eom_token_id')

_TOP_NAMES = {'embed': 'token_embd.weight', 'final_norm': 'output_norm.weight', 'unembed': 'output.weight'}
_LAYER_NAMES = {
  'attn_norm': 'attn_norm',
  'q': 'attn_q',
  'k': 'attn_k',
  'v': 'attn_v',
  'o': 'attn_output',
  'mlp_norm': 'ffn_norm',
  'gate': 'ffn_gate',
  'up': 'ffn_up',
  'down': 'ffn_down',
}


class GGUFCheckpoint:
  """A model of the Llama family in one GGUF file.

  The file is mapped, not read: opening it costs its header, and `tensor` dequantises what it is asked for.

  Args:
    path: The file.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file is not GGUF, ends too early, or holds a model that pdjax would compute wrongly.
  """

  spec: ModelSpec

  def __init__(self, path: str | os.PathLike[str]):
    self.path = pathlib.Path(path)
    self._reader = _open(self.path)
    fields = self._reader.fields
    metadata = {key: field.contents() for key, field in fields.items() if not key.startswith('tokenizer.')}
    metadata |= {key: fields[key].contents() for key in _END_IDS if key in fields}
    self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
    _refuse_unsupported(self.path, metadata, self._tensors)
    self.spec = _spec(self.path, metadata, self._tensors)
    self._shapes = tensor_shapes(self.spec)
    self._check_tensors()
    self._tokenizer: Tokenizer | None = None

  @property
  def dtype(self) -> np.dtype:
    """float32: that is what the quantised blocks expand to."""
    return np.dtype(np.float32)

  def tensor(self, name: str) -> np.ndarray:
    """One weight in our shape, dequantised to float32; see `Checkpoint.tensor`.

    Raises:
      KeyError: if the model has no weight of this name.
      ValueError: if it is stored in a quantisation that the `gguf` package cannot expand.
    """
    if name not in self._shapes:
      raise KeyError(f'{self.path} has no weight {name!r}; the names are the keys of tensor_shapes(checkpoint.spec).')
    tensor = self._tensors[_gguf_name(name)]
    try:
      stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
      raise ValueError(
        f'tensor {tensor.name!r} of {self.path} is stored as {tensor.tensor_type.name}, which the gguf package cannot '
        'expand; convert the model to F16, Q8_0 or another common type.'
      ) from None
    stored = stored.astype(np.float32, copy=False)
    if name.endswith(('.q', '.k')):
      stored = _half_split(stored, heads=self._shapes[name][1])
    return from_stored(name, stored, self._shapes[name])

  def tokenizer(self) -> Tokenizer | None:
    """The tokenizer in the file's metadata, or None if there is none.

    Raises:
      ValueError: if it is of a kind that pdjax does not know.
    """
    fields = self._reader.fields
    if self._tokenizer is None and 'tokenizer.ggml.model' in fields:
      metadata = {key: field.contents() for key, field in fields.items() if key.startswith('tokenizer.')}
      self._tokenizer = Tokenizer.from_gguf_metadata(metadata, source=str(self.path))
    return self._tokenizer

  def _check_tensors(self):
    expected = {_gguf_name(name): shape for name, shape in stored_shapes(self.spec).items()}
    if missing := [name for name in expected if name not in self._tensors]:
      raise ValueError(
        f'{self.path} lacks {len(missing)} of the {len(expected)} tensors of this model, the first {missing[0]!r}; '
        'convert or download it again.'
      )
    if unknown := [name for name in self._tensors if name not in expected]:
      raise ValueError(
        f'{self.path} holds tensor {unknown[0]!r} ({len(unknown)} like it), expected only the weights of a plain Llama '
        'model; leaving it out would give wrong tokens. Use a model without biases, experts or extra layers.'
      )
    for name, shape in expected.items():
      found = _shape(self._tensors[name])
      if found != shape:
        raise ValueError(
          f'tensor {name!r} of {self.path} has shape {found}, expected {shape} from the metadata; '
          'convert or download it again.'
        )


class _Reader(gguf.GGUFReader):
  """The gguf package's reader on a plain array: slicing a `np.memmap` costs it seconds on a large vocabulary."""

  @property  # type: ignore[override]
  def data(self) -> np.ndarray:
    return self._bytes

  @data.setter
  def data(self, mapped: np.ndarray):
    self._bytes = np.asarray(mapped)  # still the mapped file, without the subclass


def _open(path: pathlib.Path) -> gguf.GGUFReader:
  if not path.is_file():
    found = 'a folder' if path.is_dir() else 'nothing'
    raise FileNotFoundError(f'found {found} at {path}, expected a GGUF file; check the path or download the model.')
  size = path.stat().st_size
  with path.open('rb') as file:
    magic = file.read(4)
  if magic != b'GGUF':
    raise ValueError(
      f'{path} ({size} bytes) starts with {magic!r}, expected b"GGUF"; '
      'it is not a GGUF file or its download failed: download it again.'
    )
  try:
    reader = _Reader(path)
  except Exception as error:  # what the package raises on a cut file depends on where the cut is
    raise ValueError(
      f'{path} ends at byte {size}, before all that its header announces, or is damaged ({error}); '
      'expected a complete GGUF file of version 2 or 3: download or copy it again.'
    ) from error
  end = max((tensor.data_offset + tensor.n_bytes for tensor in reader.tensors), default=0)
  if end > size:
    raise ValueError(f'{path} ends at byte {size}, expected tensor data up to byte {end}: download or copy it again.')
  if reader.byte_order != 'I':
    raise ValueError(f'{path} is in the other byte order than this machine; convert it with gguf-convert-endian.')
  return reader


def _refuse_unsupported(path: pathlib.Path, metadata: Mapping[str, Any], tensors: Mapping[str, gguf.ReaderTensor]):
  architecture = metadata.get('general.architecture')
  if architecture != 'llama':
    raise ValueError(
      f"{path} has general.architecture {architecture!r}, expected 'llama'; pdjax reads no other architecture from "
      'GGUF yet, so use a model of the Llama family.'
    )
  if (parts := metadata.get('split.count', 1)) > 1:
    raise ValueError(f'{path} is one of {parts} parts, expected a whole model; join them with gguf-split --merge.')
  factors = next((name for name in tensors if name.startswith('rope_f')), None)
  scaling = {
    key: value
    for key, value in metadata.items()
    if (key == 'llama.rope.scaling.type' and value not in ('', 'none'))
    or (key in ('llama.rope.scaling.factor', 'llama.rope.scale_linear') and value not in (0.0, 1.0))
  }
  if factors or scaling:
    found = f'tensor {factors!r}' if factors else ', '.join(f'{key}={value!r}' for key, value in scaling.items())
    raise ValueError(
      f'{path} scales its rotary embedding ({found}), which pdjax does not support yet and which would give wrong '
      'tokens; use a model without rope scaling.'
    )


def _spec(path: pathlib.Path, metadata: Mapping[str, Any], tensors: Mapping[str, gguf.ReaderTensor]) -> ModelSpec:
  def size(key: str, default: int | None = None) -> int:
    value = metadata.get(f'llama.{key}', default)
    if isinstance(value, list) and len(set(value)) == 1:  # one number a layer
      value = value[0]
    if not isinstance(value, int) or value < 1:
      raise ValueError(
        f'{path} has llama.{key}={value!r} in its metadata, expected one positive integer; convert the model again.'
      )
    return value

  if 'token_embd.weight' not in tensors:
    raise ValueError(f"{path} lacks tensor 'token_embd.weight', expected in every model; convert or download it again.")
  embed_dim = size('embedding_length')
  query_heads = size('attention.head_count')
  head_dim = size('attention.key_length', embed_dim // query_heads)
  for key in ('attention.value_length', 'rope.dimension_count'):
    if size(key, head_dim) != head_dim:
      raise ValueError(
        f'{path} has llama.{key}={size(key)} and heads of {head_dim} features; pdjax expects both to be equal, '
        'so use another model.'
      )
  return ModelSpec(
    name=path.stem,
    num_layers=size('block_count'),
    embed_dim=embed_dim,
    query_heads=query_heads,
    kv_heads=size('attention.head_count_kv', query_heads),
    head_dim=head_dim,
    ffn_dim=size('feed_forward_length'),
    vocab_size=_shape(tensors['token_embd.weight'])[0],
    context_len=size('context_length'),
    rope_theta=_decimal(metadata.get('llama.rope.freq_base', 10_000.0)),
    norm_eps=_decimal(metadata.get('llama.attention.layer_norm_rms_epsilon', 1e-5)),
    tied_embeddings='output.weight' not in tensors,
    eos_token_ids=tuple(dict.fromkeys(metadata[key] for key in _END_IDS if key in metadata)),
  )


def _decimal(value: float) -> float:
  """The shortest decimal that is this float32: metadata keeps 1e-5 as 9.999999747378752e-06."""
  return float(str(np.float32(value)))


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
  return tuple(int(size) for size in reversed(tensor.shape))  # the file lists the fastest axis first


def _gguf_name(name: str) -> str:
  if name in _TOP_NAMES:
    return _TOP_NAMES[name]
  _, layer, kind = name.split('.')
  return f'blk.{layer}.{_LAYER_NAMES[kind]}.weight'


def _half_split(rows: np.ndarray, heads: int) -> np.ndarray:
  """Undo the row order of llama.cpp, where features that turn together are neighbours: [H * D, E] to [H * D, E]."""
  paired = rows.reshape(heads, -1, 2, rows.shape[-1])  # [H, D/2, 2, E]
  return paired.swapaxes(1, 2).reshape(rows.shape)
