"""Reads GGUF files, the single-file format of llama.cpp, quantised or not."""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from pdjax.model.checkpoint.base import checked_spec, from_stored, with_chat_template
from pdjax.model.checkpoint.names import name_in
from pdjax.model.checkpoint.narrow import convert_weight
from pdjax.model.checkpoint.rope_factors import scaling_from_factors
from pdjax.model.end_tokens import EndTokens
from pdjax.model.gguf_vocabulary import GGUFVocabulary
from pdjax.model.tokenizer import Tokenizer
from pdjax.types.model import ModelSpec, RopeScaling, is_positive, is_size

if TYPE_CHECKING:
  import gguf

# What of the vocabulary says where a sequence ends; the rest, merges above all, is read with the tokenizer.
_END_KEYS = tuple(
  f'tokenizer.ggml.{key}' for key in ('pre', 'tokens', 'token_type', 'eos_token_id', 'eot_token_id', 'eom_token_id')
)
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

# Types of tensors that are expanded: all that the gguf package (0.19) knows how to.
STORED_TYPES = (
  'F32', 'F16', 'BF16', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K',
  'IQ1_S', 'IQ1_M', 'IQ2_XXS', 'IQ2_XS', 'IQ2_S', 'IQ3_XXS', 'IQ3_S', 'IQ4_NL', 'IQ4_XS', 'TQ1_0', 'TQ2_0',
  'MXFP4', 'NVFP4',
)  # fmt: skip
_ROPE_FACTORS = 'rope_freqs.weight'
_ROPE_FREQUENCIES = '.attn_rot_embd.weight'

_ARCHITECTURES = ('llama', 'qwen2', 'qwen3')  # Llama, SmolLM2 and Mistral are all 'llama'

# Settings of an architecture that must be left out or have one of these values.
_ALLOWED: dict[str, tuple[Any, ...]] = {
  'attention.causal': (True,),
  'attention.clamp_kqv': (0.0,),
  'attention.scale': (0.0,),
  'attention.temperature_scale': (0.0,),
  'embedding_scale': (0.0, 1.0),
  'expert_count': (0,),
  'logit_scale': (0.0, 1.0),
  'residual_scale': (0.0, 1.0),
  'rope.scaling.attn_factor': (0.0, 1.0),
}


class GGUFCheckpoint:
  """A Llama, SmolLM2, Mistral, Qwen2 or Qwen3 model in one GGUF file.

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
    metadata = self._metadata(key for key in fields if not key.startswith('tokenizer.') or key in _END_KEYS)
    self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
    self._architecture = _architecture(self.path, metadata)
    self._ends = GGUFVocabulary(metadata, str(self.path)).end_tokens()
    self.spec = _spec(self.path, _Metadata(self.path, self._architecture, metadata), self._tensors, self._ends.ids)
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
    if name not in self.spec.weights:
      raise KeyError(f'{self.path} has no weight {name!r}; the names are the keys of checkpoint.spec.weights.')
    stored = _expand(self.path, self._tensors[name_in('gguf', name)])
    if self._architecture == 'llama' and name.endswith(('.q', '.k', '.q_bias', '.k_bias')):
      stored = _half_split(stored, heads=self.spec.weights[name].shape[0])
    return from_stored(self.spec.weights[name], stored)

  def tokenizer(self) -> Tokenizer | None:
    """The tokenizer in the file's metadata, or None if there is none.

    Raises:
      ValueError: if it is of a kind that pdjax does not know.
    """
    fields = self._reader.fields
    if self._tokenizer is None and 'tokenizer.ggml.model' in fields:
      metadata = self._metadata(key for key in fields if key.startswith('tokenizer.'))
      self._tokenizer = Tokenizer.from_gguf_metadata(metadata, source=str(self.path))
    return self._tokenizer

  def end_tokens(self) -> EndTokens:
    """The tokens that end a sequence, by the keys of the metadata that say so."""
    try:
      tokenizer = self.tokenizer()
    except ValueError:  # of a kind that is not known here: it serves token ids all the same
      tokenizer = None
    return with_chat_template(self._ends, tokenizer, self.spec)

  def _metadata(self, keys: Iterable[str]) -> dict[str, Any]:
    """Values of the file's metadata as plain Python."""
    values = {}
    for key in keys:
      try:
        values[key] = self._reader.fields[key].contents()
      except UnicodeDecodeError as error:
        raise ValueError(
          f'{self.path} has text in {key} that is no UTF-8 ({error}); it is damaged: download or copy it again.'
        ) from error
    return values

  def _check_tensors(self):
    expected = {name_in('gguf', name): row.stored_shape for name, row in self.spec.weights.items()}
    if missing := [name for name in expected if name not in self._tensors]:
      raise ValueError(
        f'{self.path} lacks {len(missing)} of the {len(expected)} tensors of this model, the first {missing[0]!r}; '
        'convert or download it again.'
      )
    known = {*expected, _ROPE_FACTORS}
    rotary = [name for name in self._tensors if name.startswith('blk.') and name.endswith(_ROPE_FREQUENCIES)]
    if rotary:  # of the oldest files; llama.cpp reads none of them either
      logging.warning(
        '%s: %s (%d like it) not used: the frequencies of the rotary embedding follow from the metadata.',
        self.path,
        rotary[0],
        len(rotary),
      )
    if unknown := [name for name in self._tensors if name not in known and name not in rotary]:
      raise ValueError(
        f'{self.path} holds tensor {unknown[0]!r} ({len(unknown)} like it), expected only the weights of a plain '
        f'{self._architecture} model; leaving it out would give wrong tokens. Use a model without experts, adapters or '
        'extra layers.'
      )
    for name, shape in expected.items():
      found = _shape(self._tensors[name])
      if found != shape:
        raise ValueError(
          f'tensor {name!r} of {self.path} has shape {found}, expected {shape} from the metadata; '
          'convert or download it again.'
        )


def _open(path: pathlib.Path) -> 'gguf.GGUFReader':
  from pdjax.model.checkpoint.gguf_reader import Reader  # the package, which other formats do without

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
    reader = Reader(path)
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


def _architecture(path: pathlib.Path, metadata: Mapping[str, Any]) -> str:
  architecture = metadata.get('general.architecture')
  if architecture not in _ARCHITECTURES:
    raise ValueError(
      f'{path} has general.architecture {architecture!r}, expected one of {", ".join(_ARCHITECTURES)}; pdjax reads no '
      'other architecture from GGUF yet, so use a model of one of these.'
    )
  parts = metadata.get('split.count', 1)
  if type(parts) is not int or parts > 1:
    raise ValueError(f'{path} is one of {parts!r} parts, expected a whole model; join them with gguf-split --merge.')
  return architecture


@dataclasses.dataclass(frozen=True)
class _Metadata:
  """The settings of a file's architecture, `{architecture}.{key}`, with the checks that they need."""

  path: pathlib.Path
  architecture: str
  values: Mapping[str, Any]

  def get(self, key: str, default: Any = None) -> Any:
    return self.values.get(f'{self.architecture}.{key}', default)

  def size(self, key: str, default: int | None = None) -> int:
    value = self.get(key, default)
    if isinstance(value, list) and len(set(value)) == 1:  # one number a layer
      value = value[0]
    if not is_size(value):
      raise self.error(key, value, 'one positive integer')
    return value

  def number(self, key: str, default: float) -> float:
    """A positive number, as the shortest decimal that is this float32: files keep 1e-5 as 9.999999747378752e-06."""
    value = self.get(key, default)
    if not is_positive(value) or not _LEAST <= value <= _MOST:
      raise self.error(key, value, 'a positive number')
    return float(str(np.float32(value)))

  def error(self, key: str, value: Any, expected: str) -> ValueError:
    return ValueError(
      f'{self.path} has {self.architecture}.{key}={value!r} in its metadata, expected {expected}; '
      'convert the model again or use another.'
    )

  def refuse_unsupported(self) -> None:
    for key, values in _ALLOWED.items():
      value = self.get(key)
      if value is not None and value not in values:
        raise self.error(key, value, f'none or {values[-1]}, because pdjax does not compute such a model yet')

  def windows(self, context_len: int, num_layers: int) -> tuple[int | None, tuple[int, ...] | None]:
    """The sliding window, and the layers that have it if not all do."""
    if not self.get('attention.sliding_window'):
      return None, None
    window = self.size('attention.sliding_window')
    if window >= context_len:
      return None, None
    # Without a pattern every layer of a Mistral model has the window; Qwen models have it in some only.
    everywhere = [True] * num_layers if self.architecture == 'llama' else None
    pattern = self.get('attention.sliding_window_pattern', everywhere)
    if not isinstance(pattern, list) or len(pattern) != num_layers:
      raise self.error('attention.sliding_window_pattern', pattern, f'{num_layers} truth values, one a layer')
    layers = tuple(layer for layer, windowed in enumerate(pattern) if windowed)
    if not layers:
      return None, None
    return window, None if len(layers) == num_layers else layers

  def rope_scaling(self, factors: np.ndarray | None, rope_theta: float) -> RopeScaling | None:
    """The stretching of the rotary embedding: by one factor in the metadata, or one a frequency in a tensor."""
    kind = self.get('rope.scaling.type', 'linear') or 'linear'
    if kind not in ('none', 'linear'):
      raise self.error('rope.scaling.type', kind, "'none' or 'linear', because pdjax does not compute others yet")
    key = 'rope.scaling.factor' if self.get('rope.scaling.factor') is not None else 'rope.scale_linear'
    linear = self.number(key, 1.0) if kind == 'linear' and self.get(key) else 1.0
    if linear != 1.0 and factors is not None:
      raise self.error(key, linear, f'none or 1.0 beside tensor {_ROPE_FACTORS!r}')
    if factors is None:
      return None if linear == 1.0 else RopeScaling('linear', linear)
    try:
      return scaling_from_factors(factors, rope_theta)
    except ValueError as error:
      raise ValueError(
        f'{self.path} scales its rotary embedding by tensor {_ROPE_FACTORS!r} with {error}, expected those of Llama 3 '
        'or one for all frequencies; pdjax does not compute others yet, so use a model without.'
      ) from error


def _spec(
  path: pathlib.Path,
  metadata: _Metadata,
  tensors: 'Mapping[str, gguf.ReaderTensor]',
  eos_token_ids: tuple[int, ...],
) -> ModelSpec:
  metadata.refuse_unsupported()
  if 'token_embd.weight' not in tensors:
    raise ValueError(f"{path} lacks tensor 'token_embd.weight', expected in every model; convert or download it again.")
  embed_dim, query_heads = metadata.size('embedding_length'), metadata.size('attention.head_count')
  num_layers, context_len = metadata.size('block_count'), metadata.size('context_length')
  if num_layers > len(tensors):
    raise metadata.error('block_count', num_layers, f'no more than the {len(tensors)} tensors of the file')
  head_dim = metadata.size('attention.key_length', embed_dim // query_heads)
  for key in ('attention.value_length', 'rope.dimension_count'):
    if (found := metadata.size(key, head_dim)) != head_dim:
      raise metadata.error(key, found, f'{head_dim} as the features of a head')
  rope_theta = metadata.number('rope.freq_base', 10_000.0)
  factors = None
  if _ROPE_FACTORS in tensors:
    factors = _expand(path, tensors[_ROPE_FACTORS])
    if factors.shape != (head_dim // 2,):
      raise ValueError(
        f'tensor {_ROPE_FACTORS!r} of {path} has shape {factors.shape}, expected {(head_dim // 2,)}, one for each '
        'frequency; convert or download it again.'
      )
  sliding_window, windowed_layers = metadata.windows(context_len, num_layers)
  return checked_spec(
    path,
    name=path.stem,
    num_layers=num_layers,
    embed_dim=embed_dim,
    query_heads=query_heads,
    kv_heads=metadata.size('attention.head_count_kv', query_heads),
    head_dim=head_dim,
    ffn_dim=metadata.size('feed_forward_length'),
    vocab_size=_shape(tensors['token_embd.weight'])[0],
    context_len=context_len,
    rope_theta=rope_theta,
    norm_eps=metadata.number('attention.layer_norm_rms_epsilon', 1e-5),
    tied_embeddings='output.weight' not in tensors,
    eos_token_ids=eos_token_ids,
    rope_scaling=metadata.rope_scaling(factors, rope_theta),
    sliding_window=sliding_window,
    windowed_layers=windowed_layers,
    qkv_bias=metadata.architecture == 'qwen2' or 'blk.0.attn_q.bias' in tensors,
    qk_norm=metadata.architecture == 'qwen3',
  )


def _expand(path: pathlib.Path, tensor: 'gguf.ReaderTensor') -> np.ndarray:
  """A tensor as float32."""
  import gguf

  kind = tensor.tensor_type.name
  try:
    if kind in STORED_TYPES:
      return convert_weight(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32, tensor.name)
  except NotImplementedError:  # an older gguf package
    pass
  raise ValueError(
    f'tensor {tensor.name!r} of {path} is stored as {kind}, which is not expanded here, expected one of '
    f'{", ".join(STORED_TYPES)}; convert the model to one of them.'
  )


def _shape(tensor: 'gguf.ReaderTensor') -> tuple[int, ...]:
  return tuple(int(size) for size in reversed(tensor.shape))  # the file lists the fastest axis first


def _half_split(rows: np.ndarray, heads: int) -> np.ndarray:
  """Undo the row order of llama.cpp, where features that turn together are neighbours: [H * D, ...] as it was."""
  paired = rows.reshape(heads, -1, 2, *rows.shape[1:])  # [H, D/2, 2, ...]
  return paired.swapaxes(1, 2).reshape(rows.shape)
