"""Reads Hugging Face checkpoint folders: config.json beside one or more safetensors files."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from absl import logging

from pdjax.model.checkpoint.base import from_stored, with_chat_template
from pdjax.model.checkpoint.hf_config import declared_dtype, default_eos_ids, spec_from_config
from pdjax.model.checkpoint.names import name_in
from pdjax.model.end_tokens import EndTokens
from pdjax.model.text_files import read_json, read_text
from pdjax.model.tokenizer import Tokenizer
from pdjax.types.model import ModelSpec

_DTYPES = {
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'float16': np.dtype(np.float16),
  'float32': np.dtype(np.float32),
}
_STORED_DTYPES = {'BF16': 'bfloat16', 'F16': 'float16', 'F32': 'float32'}

_COMPARED_AT_ONCE = 2**22  # elements of two matrices, which may be gigabytes


class SafetensorsCheckpoint:
  """A Llama, SmolLM2, Mistral, Qwen2 or Qwen3 model in a folder as Hugging Face lays it out.

  The weights are `model.safetensors`, or all that is in the files that `model.safetensors.index.json` lists, as in
  transformers. Opening reads the configuration, the tokenizer and the headers of the files; `tensor` maps what it is
  asked for. Files and tensors that are not used are told in the log; those that would change the answer are refused.

  Args:
    folder: The folder.
    name: The name of the model; None is the folder's name.

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
    ends = _named_ends(self.folder, config)
    spec = spec_from_config(config, config_path, name, ends.ids)
    self._stored = _open_shards(self.folder)  # by the tensors' names
    self._embed_name = name_in('safetensors', 'embed')
    self.spec = spec if not spec.tied_embeddings else self._with_found_head(spec)
    self._check_tensors()
    self._dtype = _DTYPES[self._stored_dtype('embed')]
    if isinstance(declared := declared_dtype(config), str) and declared in _DTYPES:
      self._dtype = _DTYPES[declared]
    self._tokenizer = self._open_tokenizer(ends.ids)
    if self._tokenizer is not None:
      ends = ends.joined(self._tokenizer.own_ends, self.spec.vocab_size)
      self._tokenizer = dataclasses.replace(self._tokenizer, eos_token_ids=ends.ids)
    self.spec = dataclasses.replace(self.spec, eos_token_ids=ends.ids)
    self._ends = ends

  @property
  def dtype(self) -> np.dtype:
    """The type named in config.json, or else the embedding's."""
    return self._dtype

  def tensor(self, name: str) -> np.ndarray:
    """One weight in our shape and the type it is stored in; see `Checkpoint.tensor`.

    Raises:
      KeyError: if the model has no weight of this name.
    """
    if name not in self.spec.weights:
      raise KeyError(f'{self.folder} has no weight {name!r}; the names are the keys of checkpoint.spec.weights.')
    stored_name = self._name_of(name)
    return from_stored(self.spec.weights[name], self._stored[stored_name].file.get_tensor(stored_name))

  def tokenizer(self) -> Tokenizer | None:
    """The folder's tokenizer, or None if it has no tokenizer.json."""
    return self._tokenizer

  def end_tokens(self) -> EndTokens:
    """The tokens that end a sequence, by the files that say so."""
    return with_chat_template(self._ends, self._tokenizer, self.spec)

  def _open_tokenizer(self, eos_token_ids: tuple[int, ...]) -> Tokenizer | None:
    if not (self.folder / 'tokenizer.json').is_file():
      return None
    return Tokenizer.from_folder(self.folder, eos_token_ids=eos_token_ids)

  def _name_of(self, name: str) -> str:
    return self._embed_name if name == 'embed' else name_in('safetensors', name)

  def _with_found_head(self, spec: ModelSpec) -> ModelSpec:
    """The spec, tied as config.json says if one matrix is there or both are equal; else both are used."""
    embed, head = name_in('safetensors', 'embed'), name_in('safetensors', 'unembed')
    if head not in self._stored:
      return spec
    if embed not in self._stored:  # tied the other way round
      self._embed_name = head
      return spec
    if self._are_equal(embed, head):
      logging.warning('%s: %s is not used: it is a copy of %s.', self.folder, head, embed)
      return spec
    logging.warning(
      '%s: config.json ties the embeddings, but %s differs from %s: both are used; set tie_word_embeddings to false.',
      self.folder,
      head,
      embed,
    )
    return dataclasses.replace(spec, tied_embeddings=False)

  def _are_equal(self, one: str, other: str) -> bool:
    slices = [self._stored[name].file.get_slice(name) for name in (one, other)]
    shape, other_shape = (tuple(part.get_shape()) for part in slices)
    if shape != other_shape or len(shape) != 2 or any(part.get_dtype() not in _STORED_DTYPES for part in slices):
      return False
    step = max(1, _COMPARED_AT_ONCE // max(1, shape[1]))
    for start in range(0, shape[0], step):
      first, second = (part[start : min(start + step, shape[0])] for part in slices)
      if not np.array_equal(first, second):
        return False
    return True

  def _stored_dtype(self, name: str) -> str:
    stored_name = self._name_of(name)
    shard = self._stored[stored_name]
    stored = shard.file.get_slice(stored_name).get_dtype()
    if stored not in _STORED_DTYPES:
      raise ValueError(
        f'tensor {stored_name!r} of {shard.path} is stored as {stored}, expected BF16, F16 or F32; '
        'save the model in one of these.'
      )
    return _STORED_DTYPES[stored]

  def _check_tensors(self):
    expected = {self._name_of(name): name for name in self.spec.weights}
    shapes = {name: row.stored_shape for name, row in self.spec.weights.items()}
    if missing := [name for name in expected if name not in self._stored]:
      hint = ' (or set tie_word_embeddings in config.json)' if missing[0] == name_in('safetensors', 'unembed') else ''
      raise ValueError(
        f'{self.folder} lacks {len(missing)} of the {len(expected)} tensors that its config.json calls for, '
        f'the first {missing[0]!r}; save or download it again{hint}.'
      )
    others = [name for name in self._stored if name not in expected and name != name_in('safetensors', 'unembed')]
    rotary = [name for name in others if name.endswith('rotary_emb.inv_freq')]
    if unknown := [name for name in others if name not in rotary]:
      raise ValueError(
        f'{self._stored[unknown[0]].path} holds tensor {unknown[0]!r} ({len(unknown)} like it), expected only the '
        'weights that config.json calls for; leaving it out would give wrong tokens. Use a model without adapters or '
        'extra layers.'
      )
    if rotary:  # as transformers does, whatever they hold
      logging.warning(
        '%s: %s not used: the frequencies of the rotary embedding follow from config.json.',
        self.folder,
        _listed(rotary),
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
    _tell_unused_files(folder, [whole.name])
    shard = _open(whole)
    return dict.fromkeys(shard.file.keys(), shard)
  if not index_path.is_file():
    raise FileNotFoundError(
      f'{folder} has neither {whole.name} nor {index_path.name}, expected one of them; '
      'save the model as safetensors or download its weights.'
    )
  weight_map = _read_index(index_path)
  shards = {}
  for file_name in dict.fromkeys(weight_map.values()):
    if not (folder / file_name).is_file():
      raise FileNotFoundError(
        f'{folder} lacks {file_name!r}, expected because {index_path.name} lists it; download that file.'
      )
    shards[file_name] = _open(folder / file_name)
  _tell_unused_files(folder, shards)
  held = {file_name: set(shard.file.keys()) for file_name, shard in shards.items()}
  for name, file_name in weight_map.items():
    if name not in held[file_name]:
      raise ValueError(
        f'{folder / file_name} lacks tensor {name!r}, expected there because {index_path.name} says so; '
        'download both again.'
      )
  found: dict[str, _Shard] = {}
  for file_name, names in held.items():
    for name in sorted(names):
      if name in found and not _same_tensor(name, found[name], shards[file_name]):
        raise ValueError(
          f'tensor {name!r} is in {found[name].path} and, with other values, in {shards[file_name].path}, expected it '
          'once; download both again.'
        )
      found.setdefault(name, shards[file_name])
  return found


def _read_index(path: pathlib.Path) -> dict[str, str]:
  """The file of each tensor, by an index that gives each one file."""
  weight_map = read_json(path).get('weight_map')
  if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
    raise ValueError(f'{path} has no weight_map from tensor to file name, expected one; download it again.')

  def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if twice := [(key, value) for key, value in pairs if content[key] != value]:
      raise ValueError(
        f'{path} lists {twice[0][0]!r} twice, as {twice[0][1]!r} and {content[twice[0][0]]!r}, expected it once; '
        'download it again.'
      )
    return content

  json.loads(read_text(path), object_pairs_hook=once)
  return weight_map


def _same_tensor(name: str, one: _Shard, other: _Shard) -> bool:
  first, second = (shard.file.get_tensor(name) for shard in (one, other))
  return first.dtype == second.dtype and np.array_equal(first, second)


def _tell_unused_files(folder: pathlib.Path, used: Iterable[str]) -> None:
  used = set(used)
  if unused := sorted(path.name for path in folder.glob('*.safetensors') if path.name not in used):
    logging.warning('%s: %s not used: the weights are %s.', folder, _listed(unused), _listed(sorted(used)))


def _listed(names: list[str], most: int = 8) -> str:
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more


def _open(path: pathlib.Path) -> _Shard:
  try:
    return _Shard(path, safetensors.safe_open(path, framework='numpy'))
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{path} ({path.stat().st_size} bytes) is cut short or damaged ({error}), expected a complete safetensors file; '
      'download or copy it again.'
    ) from error


def _named_ends(folder: pathlib.Path, config: Mapping[str, Any]) -> EndTokens:
  """The ends of a sequence that the model's two configurations name."""
  named = [(folder / 'config.json', config.get('eos_token_id', default_eos_ids(config)))]
  path = folder / 'generation_config.json'
  if path.is_file():
    named.append((path, read_json(path).get('eos_token_id')))
  found = []
  for path, ids in named:
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(token) is int for token in ids):
      raise ValueError(f'{path} has eos_token_id {ids}, expected an integer or a list of them; correct it.')
    ids = tuple(dict.fromkeys(token for token in ids if token != -1))  # -1 is how old files say that there is none
    if ids:
      found.append((path.name, ids))
  return EndTokens(tuple(found))
