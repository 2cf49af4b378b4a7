"""Reads Hugging Face checkpoint folders: config.json beside one or more safetensors files."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from pdjax.model.checkpoint.base import from_stored, stored_shapes, tensor_shapes
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
  'attn_norm': 'input_layernorm',
  'q': 'self_attn.q_proj',
  'k': 'self_attn.k_proj',
  'v': 'self_attn.v_proj',
  'o': 'self_attn.o_proj',
  'mlp_norm': 'post_attention_layernorm',
  'gate': 'mlp.gate_proj',
  'up': 'mlp.up_proj',
  'down': 'mlp.down_proj',
}


class SafetensorsCheckpoint:
  """A model of the Llama family in a folder as Hugging Face lays it out.

  The weights are `model.safetensors`, or the files that `model.safetensors.index.json` lists. Opening reads the
  configuration and the headers of the files; `tensor` maps what it is asked for.

  Args:
    folder: The folder.

  Raises:
    FileNotFoundError: if the folder, its config.json or one of its weight files is missing.
    ValueError: if a file is damaged or ends too early, or the model is one that pdjax would compute wrongly.
  """

  spec: ModelSpec

  def __init__(self, folder: str | os.PathLike[str]):
    self.folder = pathlib.Path(folder)
    if not self.folder.is_dir():
      raise FileNotFoundError(
        f'found no folder at {self.folder}, expected one with config.json and model.safetensors; '
        'check the path or download the model.'
      )
    config_path = self.folder / 'config.json'
    config = _read_json(config_path)
    _refuse_unsupported(config_path, config)
    self.spec = _spec(config_path, config, _eos_token_ids(self.folder, config))
    self._shapes = tensor_shapes(self.spec)
    self._files = _open_shards(self.folder)  # tensor name -> open file
    self._check_tensors()
    self._dtype = _DTYPES[self._stored_dtype('embed')]
    if (declared := config.get('dtype', config.get('torch_dtype'))) in _DTYPES:
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
    return from_stored(name, self._files[stored_name].get_tensor(stored_name), self._shapes[name])

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
    stored = self._files[stored_name].get_slice(stored_name).get_dtype()
    if stored not in _STORED_DTYPES:
      raise ValueError(
        f'tensor {stored_name!r} of {self.folder} is stored as {stored}, expected BF16, F16 or F32; '
        'save the model in one of these.'
      )
    return _STORED_DTYPES[stored]

  def _check_tensors(self):
    expected = {_stored_name(name): name for name in self._shapes}
    shapes = stored_shapes(self.spec)
    if missing := [name for name in expected if name not in self._files]:
      hint = ' (or set tie_word_embeddings in config.json)' if missing[0] == _TOP_NAMES['unembed'] else ''
      raise ValueError(
        f'{self.folder} lacks {len(missing)} of the {len(expected)} tensors that its config.json calls for, '
        f'the first {missing[0]!r}; save or download it again{hint}.'
      )
    # a copy of the tied embedding and the rotary frequencies say nothing new
    known = {*expected, _TOP_NAMES['unembed']}
    if unknown := [name for name in self._files if name not in known and not name.endswith('rotary_emb.inv_freq')]:
      raise ValueError(
        f'{self.folder} holds tensor {unknown[0]!r} ({len(unknown)} like it), expected only the weights of a plain '
        'Llama model; leaving it out would give wrong tokens. Use a model without biases, adapters or extra layers.'
      )
    for stored_name, name in expected.items():
      self._stored_dtype(name)
      found = tuple(self._files[stored_name].get_slice(stored_name).get_shape())
      if found != shapes[name]:
        raise ValueError(
          f'tensor {stored_name!r} of {self.folder} has shape {found}, expected {shapes[name]} from config.json; '
          'the two do not belong together: download both again.'
        )


def _open_shards(folder: pathlib.Path) -> dict[str, Any]:
  """Every tensor of the folder with the open file that holds it."""
  whole, index_path = folder / 'model.safetensors', folder / 'model.safetensors.index.json'
  if whole.is_file():
    file = _open(whole)
    return dict.fromkeys(file.keys(), file)
  if not index_path.is_file():
    raise FileNotFoundError(
      f'{folder} has neither {whole.name} nor {index_path.name}, expected one of them; '
      'save the model as safetensors or download its weights.'
    )
  weight_map = _read_json(index_path).get('weight_map')
  if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
    raise ValueError(f'{index_path} has no weight_map from tensor to file name, expected one; download it again.')
  shards = {}
  for shard in dict.fromkeys(weight_map.values()):
    if not (folder / shard).is_file():
      raise FileNotFoundError(
        f'{folder} lacks {shard!r}, expected because {index_path.name} lists it; download that file.'
      )
    shards[shard] = _open(folder / shard)
  held = {shard: set(file.keys()) for shard, file in shards.items()}
  for name, shard in weight_map.items():
    if name not in held[shard]:
      raise ValueError(
        f'{folder / shard} lacks tensor {name!r}, expected there because {index_path.name} says so; '
        'download both again.'
      )
  return {name: shards[shard] for name, shard in weight_map.items()}


def _open(path: pathlib.Path) -> Any:
  try:
    return safetensors.safe_open(path, framework='numpy')
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{path} ({path.stat().st_size} bytes) is cut short or damaged ({error}), expected a complete safetensors file; '
      'download or copy it again.'
    ) from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise FileNotFoundError(f'{path.parent} has no {path.name}, expected one; download it or check the path.')
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is not valid JSON ({error}); download it again.') from error
  if not isinstance(content, dict):
    raise ValueError(f'{path} holds a {type(content).__name__}, expected a JSON object; download it again.')
  return content


def _eos_token_ids(folder: pathlib.Path, config: Mapping[str, Any]) -> tuple[int, ...]:
  """End-of-sequence ids; generation_config.json, if it has any, knows better than config.json."""
  generation_path = folder / 'generation_config.json'
  generation = _read_json(generation_path) if generation_path.is_file() else {}
  ids = generation.get('eos_token_id')
  if ids is None:
    ids = config.get('eos_token_id')
  if ids is None:
    return ()
  ids = ids if isinstance(ids, list) else [ids]
  if not all(isinstance(token, int) for token in ids):
    raise ValueError(f'{folder} has eos_token_id {ids}, expected an integer or a list of them; correct its config.')
  return tuple(dict.fromkeys(ids))


def _refuse_unsupported(path: pathlib.Path, config: Mapping[str, Any]):
  if (model_type := config.get('model_type')) != 'llama':
    raise ValueError(
      f"{path} has model_type {model_type!r}, expected 'llama'; pdjax reads no other type from safetensors yet, "
      'so use a model of the Llama family.'
    )
  rope = _rope(config)
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind != 'default':
    raise ValueError(
      f'{path} scales its rotary embedding ({kind!r}), which pdjax does not support yet and which would give wrong '
      'tokens; use a model without rope scaling.'
    )
  allowed: dict[str, tuple[Any, ...]] = {
    'attention_bias': (False,),
    'mlp_bias': (False,),
    'hidden_act': ('silu', 'swish'),
    'partial_rotary_factor': (1, 1.0),
    'quantization_config': (),
  }
  for key, values in allowed.items():
    value = config.get(key, rope.get(key))
    if value is not None and value not in values:
      expected = ' or '.join(repr(v) for v in values) or 'none'
      raise ValueError(f'{path} has {key}={value!r}, expected {expected}; pdjax does not compute such a model yet.')


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
  """The rotary settings, from the newer `rope_parameters` or the older `rope_scaling`."""
  return {**(config.get('rope_scaling') or {}), **(config.get('rope_parameters') or {})}


def _spec(path: pathlib.Path, config: Mapping[str, Any], eos_token_ids: tuple[int, ...]) -> ModelSpec:
  def size(key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
      raise ValueError(f'{path} has {key}={value!r}, expected a positive integer; download it again or correct it.')
    return value

  embed_dim, query_heads = size('hidden_size'), size('num_attention_heads')
  return ModelSpec(
    name=path.parent.resolve().name,
    num_layers=size('num_hidden_layers'),
    embed_dim=embed_dim,
    query_heads=query_heads,
    kv_heads=size('num_key_value_heads', query_heads),
    head_dim=size('head_dim', embed_dim // query_heads),
    ffn_dim=size('intermediate_size'),
    vocab_size=size('vocab_size'),
    context_len=size('max_position_embeddings', 2048),
    rope_theta=float(_rope(config).get('rope_theta', config.get('rope_theta', 10_000.0))),
    norm_eps=float(config.get('rms_norm_eps', 1e-6)),
    tied_embeddings=bool(config.get('tie_word_embeddings', False)),
    eos_token_ids=eos_token_ids,
  )


def _stored_name(name: str) -> str:
  if name in _TOP_NAMES:
    return _TOP_NAMES[name]
  _, layer, kind = name.split('.')
  return f'model.layers.{layer}.{_LAYER_NAMES[kind]}.weight'
