"""Reads Hugging Face checkpoint folders: config.json beside one or more safetensors files."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from pdjax.model.checkpoint.base import from_stored, stored_shapes, tensor_shapes
from pdjax.model.checkpoint.hf_config import declared_dtype, spec_from_config
from pdjax.model.text_files import read_json
from pdjax.model.tokenizer import Tokenizer
from pdjax.types.model import ModelSpec

_DTYPES = {
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'float16': np.dtype(np.float16),
  'float32': np.dtype(np.float32),
}
_STORED_DTYPES = {'BF16': 'bfloat16', 'F16': 'float16', 'F32': 'float32'}

_TOP_NAMES = {'embed': 'model.embed_tokens.weight', 'final_norm': 'model.norm.weight', 'unembed': 'lm_head.weight'}
_LAYER_NAMES = {
  'attn_norm': 'input_layernorm.weight',
  'q': 'self_attn.q_proj.weight',
  'k': 'self_attn.k_proj.weight',
  'v': 'self_attn.v_proj.weight',
  'q_bias': 'self_attn.q_proj.bias',
  'k_bias': 'self_attn.k_proj.bias',
  'v_bias': 'self_attn.v_proj.bias',
  'q_norm': 'self_attn.q_norm.weight',
  'k_norm': 'self_attn.k_norm.weight',
  'o': 'self_attn.o_proj.weight',
  'mlp_norm': 'post_attention_layernorm.weight',
  'gate': 'mlp.gate_proj.weight',
  'up': 'mlp.up_proj.weight',
  'down': 'mlp.down_proj.weight',
}


class SafetensorsCheckpoint:
  """A Llama, SmolLM2, Mistral, Qwen2 or Qwen3 model in a folder as Hugging Face lays it out.

  The weights are `model.safetensors`, or the files that `model.safetensors.index.json` lists. Opening reads the
  configuration and the headers of the files; `tensor` maps what it is asked for.

  Args:
    folder: The folder.
    name: What to call the model; None is the folder's name.

  Raises:
    FileNotFoundError: if the folder, its config.json or one of its weight files is missing.
    ValueError: if a file is damaged or ends too early, or the model is one that pdjax would compute wrongly.
  """

  spec: ModelSpec

  def __init__(self, folder: str | os.PathLike[str], name: str | None = None):
    self.folder = pathlib.Path(folder)
    if not self.folder.is_dir():
      raise FileNotFoundError(
        f'found no folder at {self.folder}, expected one with config.json and model.safetensors; '
        'check the path or download the model.'
      )
    config_path = self.folder / 'config.json'
    config = read_json(config_path)
    name = self.folder.resolve().name if name is None else name
    self.spec = spec_from_config(config, config_path, name, _eos_token_ids(self.folder, config))
    self._shapes = tensor_shapes(self.spec)
    self._stored = _open_shards(self.folder)  # by the tensors' names
    self._check_tensors()
    self._dtype = _DTYPES[self._stored_dtype('embed')]
    if isinstance(declared := declared_dtype(config), str) and declared in _DTYPES:
      self._dtype = _DTYPES[declared]
    self._tokenizer: Tokenizer | None = None

  @property
  def dtype(self) -> np.dtype:
    """The type named in config.json, or else the embedding's."""
    return self._dtype

  def tensor(self, name: str) -> np.ndarray:
    """One weight in our shape and the type it is stored in; see `Checkpoint.tensor`.

    Raises:
      KeyError: if the model has no weight of this name.
    """
    if name not in self._shapes:
      raise KeyError(f'{self.folder} has no weight {name!r}; the names are the keys of tensor_shapes(checkpoint.spec).')
    stored_name = _stored_name(name)
    return from_stored(name, self._stored[stored_name].file.get_tensor(stored_name), self._shapes[name])

  def tokenizer(self) -> Tokenizer | None:
    """The folder's tokenizer, or None if it has no tokenizer.json.

    Raises:
      ValueError: if its files cannot be read.
    """
    if self._tokenizer is None and (self.folder / 'tokenizer.json').is_file():
      self._tokenizer = Tokenizer.from_folder(self.folder, eos_token_ids=self.spec.eos_token_ids)
    return self._tokenizer

  def _stored_dtype(self, name: str) -> str:
    stored_name = _stored_name(name)
    shard = self._stored[stored_name]
    stored = shard.file.get_slice(stored_name).get_dtype()
    if stored not in _STORED_DTYPES:
      raise ValueError(
        f'tensor {stored_name!r} of {shard.path} is stored as {stored}, expected BF16, F16 or F32; '
        'save the model in one of these.'
      )
    return _STORED_DTYPES[stored]

  def _check_tensors(self):
    expected = {_stored_name(name): name for name in self._shapes}
    shapes = stored_shapes(self.spec)
    if missing := [name for name in expected if name not in self._stored]:
      hint = ' (or set tie_word_embeddings in config.json)' if missing[0] == _TOP_NAMES['unembed'] else ''
      raise ValueError(
        f'{self.folder} lacks {len(missing)} of the {len(expected)} tensors that its config.json calls for, '
        f'the first {missing[0]!r}; save or download it again{hint}.'
      )
    # a copy of the tied embedding and the rotary frequencies say nothing new
    known = {*expected, _TOP_NAMES['unembed']}
    if unknown := [name for name in self._stored if name not in known and not name.endswith('rotary_emb.inv_freq')]:
      raise ValueError(
        f'{self._stored[unknown[0]].path} holds tensor {unknown[0]!r} ({len(unknown)} like it), expected only the '
        'weights that config.json calls for; leaving it out would give wrong tokens. Use a model without adapters or '
        'extra layers.'
      )
    for stored_name, name in expected.items():
      self._stored_dtype(name)
      shard = self._stored[stored_name]
      found = tuple(shard.file.get_slice(stored_name).get_shape())
      if found != shapes[name]:
        raise ValueError(
          f'tensor {stored_name!r} of {shard.path} has shape {found}, expected {shapes[name]} from config.json; '
          'the two do not belong together: download both again.'
        )


class _Shard(NamedTuple):
  path: pathlib.Path
  file: Any  # open


def _open_shards(folder: pathlib.Path) -> dict[str, _Shard]:
  """Every tensor of the folder with the file that holds it."""
  whole, index_path = folder / 'model.safetensors', folder / 'model.safetensors.index.json'
  if whole.is_file():
    shard = _open(whole)
    return dict.fromkeys(shard.file.keys(), shard)
  if not index_path.is_file():
    raise FileNotFoundError(
      f'{folder} has neither {whole.name} nor {index_path.name}, expected one of them; '
      'save the model as safetensors or download its weights.'
    )
  weight_map = read_json(index_path).get('weight_map')
  if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
    raise ValueError(f'{index_path} has no weight_map from tensor to file name, expected one; download it again.')
  shards = {}
  for file_name in dict.fromkeys(weight_map.values()):
    if not (folder / file_name).is_file():
      raise FileNotFoundError(
        f'{folder} lacks {file_name!r}, expected because {index_path.name} lists it; download that file.'
      )
    shards[file_name] = _open(folder / file_name)
  held = {file_name: set(shard.file.keys()) for file_name, shard in shards.items()}
  for name, file_name in weight_map.items():
    if name not in held[file_name]:
      raise ValueError(
        f'{folder / file_name} lacks tensor {name!r}, expected there because {index_path.name} says so; '
        'download both again.'
      )
  return {name: shards[file_name] for name, file_name in weight_map.items()}


def _open(path: pathlib.Path) -> _Shard:
  try:
    return _Shard(path, safetensors.safe_open(path, framework='numpy'))
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{path} ({path.stat().st_size} bytes) is cut short or damaged ({error}), expected a complete safetensors file; '
      'download or copy it again.'
    ) from error


def _eos_token_ids(folder: pathlib.Path, config: Mapping[str, Any]) -> tuple[int, ...]:
  """End-of-sequence ids; generation_config.json, if it has any, knows better than config.json."""
  path = folder / 'generation_config.json'
  ids = read_json(path).get('eos_token_id') if path.is_file() else None
  if ids is None:
    path, ids = folder / 'config.json', config.get('eos_token_id')
  ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
  if not all(type(token) is int for token in ids):
    raise ValueError(f'{path} has eos_token_id {ids}, expected an integer or a list of them; correct it.')
  return tuple(dict.fromkeys(token for token in ids if token != -1))  # -1 is how old files say that there is none


def _stored_name(name: str) -> str:
  if name in _TOP_NAMES:
    return _TOP_NAMES[name]
  _, layer, kind = name.split('.')
  return f'model.layers.{layer}.{_LAYER_NAMES[kind]}'
