"""Saves a checkpoint with Orbax in our own names and shapes, and restores it straight into any sharding."""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from absl import logging

from pdjax.model.checkpoint.base import Checkpoint, checked_spec, tensor_shapes, with_chat_template
from pdjax.model.checkpoint.narrow import convert_weight, may_overflow, refuse_overflow
from pdjax.model.end_tokens import EndTokens
from pdjax.model.text_files import read_json
from pdjax.model.tokenizer import Tokenizer
from pdjax.types.json_text import json_text, plain_data
from pdjax.types.model import ModelSpec, RopeScaling

if TYPE_CHECKING:
  import jax

# What makes a folder one of these; written last, so that a conversion that was cut short is no checkpoint.
DESCRIPTION = 'pdjax.json'
_WEIGHTS = 'weights'
_VERSION = 1

# A device reads whole chunks: small enough to read little beside its own part, large enough to be read fast.
_CHUNK_BYTES = 4 * 2**20

_DTYPES = {
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'float16': np.dtype(np.float16),
  'float32': np.dtype(np.float32),
}


class OrbaxCheckpoint:
  """A folder written by `save_orbax`: pdjax.json, the weights under their names, and the tokenizer's files.

  Opening it reads pdjax.json and the list of weights, and starts no JAX. A weight that is read whole is compared with
  its checksum in pdjax.json; of one that is cut over devices no part can be, and older folders have no checksums.

  Args:
    folder: The folder.

  Raises:
    FileNotFoundError: if the folder or one of its files is missing.
    ValueError: if a file is damaged or a weight is missing.
  """

  spec: ModelSpec

  def __init__(self, folder: str | os.PathLike[str]):
    self.folder = pathlib.Path(folder)
    path = self.folder / DESCRIPTION
    description = read_json(path)
    if description.get('version') != _VERSION:
      raise ValueError(
        f'{path} has version {description.get("version")!r}, expected {_VERSION}; convert the original checkpoint with '
        'this pdjax.'
      )
    dtype = description.get('dtype')
    if not isinstance(dtype, str) or dtype not in _DTYPES:
      raise ValueError(f'{path} has dtype {dtype!r}, expected one of {", ".join(_DTYPES)}; convert it again.')
    self._dtype = _DTYPES[dtype]
    self.spec = _read_spec(path, description.get('spec'))
    self._shapes = tensor_shapes(self.spec)
    self._check_names()
    self._checksums = _read_checksums(path, description.get('crc32'), self._shapes)
    self._checked_shapes = False
    self._tokenizer: Tokenizer | None = None
    self._ends = _read_ends(path, description.get('end_tokens'), self.spec)
    if 'end_tokens' not in description and (tokenizer := self.tokenizer()) is not None:
      # Written before the tokenizer's own end counted.
      self._ends = self._ends.joined(tokenizer.own_ends, self.spec.vocab_size)
      self.spec = dataclasses.replace(self.spec, eos_token_ids=self._ends.ids)
      self._tokenizer = dataclasses.replace(tokenizer, eos_token_ids=self._ends.ids)

  @property
  def dtype(self) -> np.dtype:
    """The type that the weights are stored in."""
    return self._dtype

  def tensor(self, name: str) -> np.ndarray:
    """One weight in our shape and the type it is stored in; see `Checkpoint.tensor`.

    Raises:
      KeyError: if the model has no weight of this name.
      ValueError: if it is damaged or of another shape.
    """
    with _orbax() as ocp:
      return self._read_whole(ocp, [name])[name]

  def restore(
    self, shardings: 'Mapping[str, jax.sharding.Sharding]', dtype: 'jax.typing.DTypeLike'
  ) -> 'dict[str, jax.Array]':
    """Read weights straight into shardings: each device reads its own part; see `ShardedCheckpoint.restore`.

    A weight that every device wants whole is read once and compared with its checksum. One that is cut is not: each
    device knows its own part only.

    Raises:
      KeyError: if the model has no weight of one of the names.
      ValueError: if one is damaged, of another shape, or holds a number that would be infinite in `dtype`.
    """
    import jax

    weights: dict[str, Any] = {}
    with _orbax() as ocp:
      # Layer by layer, so that no more than one of them is on its way through the host.
      for _, names in itertools.groupby(shardings, key=lambda name: name.rpartition('.')[0]):
        whole, cut = [], {}
        for name in names:
          if shardings[name].is_fully_replicated:
            whole.append(name)
          else:
            cut[name] = ocp.ArrayRestoreArgs(sharding=shardings[name], dtype=np.dtype(dtype))
        weights |= self._read(ocp, cut)
        if may_overflow(self._dtype, dtype):
          for name in cut:
            if jax.numpy.isinf(weights[name]).any():  # rare: only now is the whole of it read, as it is stored
              refuse_overflow(self._read_whole(ocp, [name])[name], dtype, name)
        for name, array in self._read_whole(ocp, whole).items():
          array = convert_weight(array, dtype, name)
          weights[name] = jax.make_array_from_callback(array.shape, shardings[name], array.__getitem__)
    return weights

  def tokenizer(self) -> Tokenizer | None:
    """The tokenizer that was converted with the weights, or None if there was none.

    Raises:
      ValueError: if its files cannot be read.
    """
    if self._tokenizer is None and (self.folder / 'tokenizer.json').is_file():
      ends = self.spec.eos_token_ids
      tokenizer = Tokenizer.from_folder(self.folder, eos_token_ids=ends, adds_tokens=False)
      self._tokenizer = dataclasses.replace(tokenizer, eos_token_ids=ends)
    return self._tokenizer

  def end_tokens(self) -> EndTokens:
    """The tokens that end a sequence, by the parts of the original that say so."""
    return with_chat_template(self._ends, self.tokenizer(), self.spec)

  def _check_names(self) -> None:
    path = self.folder / _WEIGHTS / '_METADATA'
    try:
      entries = read_json(path)['tree_metadata'].values()
      found = {'.'.join(str(part['key']) for part in entry['key_metadata']) for entry in entries}
    except (KeyError, TypeError, AttributeError) as error:
      raise ValueError(f'{path} does not list weights as Orbax does ({error!r}); convert or copy it again.') from error
    if missing := [name for name in self._shapes if name not in found]:
      raise ValueError(
        f'{self.folder} lacks {len(missing)} of the {len(self._shapes)} weights of this model, the first '
        f'{missing[0]!r}; convert or copy it again.'
      )
    if unknown := sorted(found - self._shapes.keys()):
      raise ValueError(
        f'{self.folder} holds weight {unknown[0]!r} ({len(unknown)} like it), expected only those of {self.spec.name}; '
        'convert it again.'
      )

  def _read_whole(self, ocp: Any, names: list[str]) -> dict[str, np.ndarray]:
    """Read weights onto the host, and compare them with their checksums."""
    arrays = self._read(ocp, {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names})
    for name, array in arrays.items():
      if name in self._checksums and (found := _checksum(array)) != self._checksums[name]:
        raise ValueError(
          f'weight {name!r} of {self.folder} is damaged: its CRC-32 is {found}, expected {self._checksums[name]} as '
          f'{DESCRIPTION} says; convert or copy it again.'
        )
    return arrays

  def _read(self, ocp: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """Read weights side by side, each with its arguments for Orbax."""
    if unknown := [name for name in wanted if name not in self._shapes]:
      raise KeyError(f'{self.folder} has no weight {unknown[0]!r}; the names are the keys of checkpoint.spec.weights.')
    if not wanted:
      return {}
    checkpointer = ocp.PyTreeCheckpointer()
    if not self._checked_shapes:
      self._check_shapes(checkpointer)
    args = ocp.args.PyTreeRestore(item=dict.fromkeys(wanted, 0), restore_args=wanted, partial_restore=True)
    try:
      return checkpointer.restore(self._weights, args=args)
    except Exception as error:  # what is raised depends on which of the files is damaged, and where
      if len(wanted) > 1:
        for name in wanted:  # one of them cannot be read by itself either: say which
          self.tensor(name)
      raise self._damaged(f'weight {next(iter(wanted))!r}', error) from error

  def _check_shapes(self, checkpointer: Any) -> None:
    """Compare the shapes of the weights with the model's, which Orbax is not asked for and so does not do.

    It gives a weight in the shape that is stored. Asked for another, Orbax up to 0.7.0 pads with zeros or cuts in
    silence; 0.8.0 to 0.12.8 refuse unless they are told `strict=False`.
    """
    try:
      stored = checkpointer.metadata(self._weights).item_metadata.tree
    except Exception as error:
      raise self._damaged('the list of weights', error) from error
    for name, shape in self._shapes.items():
      if tuple(stored[name].shape) != shape:
        raise ValueError(
          f'weight {name!r} of {self.folder} has shape {tuple(stored[name].shape)}, expected {shape} from '
          f'{DESCRIPTION}; the two do not belong together: convert it again.'
        )
    self._checked_shapes = True

  @property
  def _weights(self) -> pathlib.Path:
    return (self.folder / _WEIGHTS).resolve()

  def _damaged(self, what: str, error: BaseException) -> ValueError:
    while error.__cause__ is not None:
      error = error.__cause__
    reason = str(error).partition('\n')[0][:300]  # the rest is a description of the store
    return ValueError(
      f'{what} of {self.folder} cannot be read ({reason}); a file under {_WEIGHTS} is missing or damaged: convert or '
      'copy it again.'
    )


def save_orbax(checkpoint: Checkpoint, folder: str | os.PathLike[str], dtype: Any = None) -> OrbaxCheckpoint:
  """Write a checkpoint of any format as one that restores straight into any sharding.

  The host holds all weights once, in `dtype`, while they are written.

  Args:
    checkpoint: The original.
    folder: The folder to write to; made if it is not there.
    dtype: 'float32', 'bfloat16' or 'float16'; None is the type that the original is meant to be used in.

  Returns:
    The new checkpoint, opened.

  Raises:
    FileExistsError: if the folder is not empty.
    ValueError: if the type is another, a number of the original would be infinite in it, or the original is damaged.
  """
  folder = pathlib.Path(folder)
  name = np.dtype(checkpoint.dtype).name if dtype is None else str(getattr(dtype, 'name', dtype))
  if name not in _DTYPES:
    raise ValueError(f'dtype is {dtype!r}, expected one of {", ".join(_DTYPES)}.')
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise FileExistsError(f'{folder} is there already and not empty; give another folder, or remove it first.')
  tokenizer = checkpoint.tokenizer()
  weights = {
    one: np.ascontiguousarray(convert_weight(np.asarray(checkpoint.tensor(one)), _DTYPES[name], one))
    for one in tensor_shapes(checkpoint.spec)
  }
  folder.mkdir(parents=True, exist_ok=True)
  with _orbax() as ocp:
    save_args = dict.fromkeys(weights, ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES))
    args = ocp.args.PyTreeSave(weights, save_args=save_args)
    ocp.PyTreeCheckpointer().save((folder / _WEIGHTS).resolve(), args=args)
  if tokenizer is not None:
    tokenizer.save(folder)
  checksums = {one: _checksum(weight) for one, weight in weights.items()}
  description = {
    'version': _VERSION,
    'dtype': name,
    'spec': plain_data(checkpoint.spec.flat()),
    'end_tokens': dataclasses.replace(checkpoint.end_tokens(), turn=()).by_source(),
    'crc32': checksums,
  }
  (folder / DESCRIPTION).write_text(json_text(description, indent=2), encoding='utf-8')
  return OrbaxCheckpoint(folder)


@contextlib.contextmanager
def _orbax() -> Iterator[Any]:
  """Orbax, which loads JAX, and so only where weights are moved; its notes of every step are left out of the log."""
  verbosity = logging.get_verbosity()
  if verbosity == logging.INFO:
    logging.set_verbosity(logging.WARNING)
  try:
    import orbax.checkpoint

    yield orbax.checkpoint
  finally:
    logging.set_verbosity(verbosity)


def _checksum(array: np.ndarray) -> int:
  return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)


def _read_checksums(path: pathlib.Path, checksums: Any, names: Iterable[str]) -> dict[str, int]:
  if checksums is None:  # written before there were any
    return {}
  if not isinstance(checksums, dict) or any(type(checksums.get(name)) is not int for name in names):
    raise ValueError(
      f'{path} has no CRC-32 of each weight in crc32, expected one or no crc32 at all; convert it again.'
    )
  return checksums


def _read_ends(path: pathlib.Path, sources: Any, spec: ModelSpec) -> EndTokens:
  if sources is None:  # written before there were any
    return EndTokens(((path.name, spec.eos_token_ids),)) if spec.eos_token_ids else EndTokens()
  try:
    ends = EndTokens.from_sources(sources)
  except (ValueError, AttributeError) as error:
    raise ValueError(f'{path} has the end_tokens {sources!r} ({error}); convert it again.') from error
  if set(ends.ids) != set(spec.eos_token_ids):
    raise ValueError(
      f'{path} has the end_tokens {sources!r}, expected the ids of its eos_token_ids={spec.eos_token_ids}; convert it '
      'again.'
    )
  return ends


def _read_spec(path: pathlib.Path, fields: Any) -> ModelSpec:
  if not isinstance(fields, dict):
    raise ValueError(f'{path} has the model {fields!r}, expected the fields of a ModelSpec; convert it again.')
  fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
  if isinstance(scaling := fields.get('rope_scaling'), dict):
    try:
      fields['rope_scaling'] = RopeScaling(**scaling)
    except (ValueError, TypeError) as error:
      raise ValueError(f'{path} has the rope_scaling {scaling!r} ({error}); convert it again.') from error
  return checked_spec(path, **fields)
