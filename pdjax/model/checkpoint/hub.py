"""Downloads checkpoints from the Hugging Face hub: only the files that are needed, once."""

import contextlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

# Names of a checkpoint's files; what else a repository holds (other formats, pictures) stays there.
_FILES = (
  'config.json',
  'generation_config.json',
  'model.safetensors',
  'model.safetensors.index.json',
  'model-*-of-*.safetensors',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
  'additional_chat_templates/*.jinja',
)
_HUB_ID = re.compile(
  r'(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^\s@:\\]+))?(:(?P<file>[^:\\]+\.gguf))?'
)
_SNAPSHOTS = 'snapshots'  # of a repository in the cache: a folder for each commit
_FILE_SUFFIXES = ('.gguf', '.safetensors', '.json', '.bin', '.pt', '.pth')


def is_hub_id(name: str) -> bool:
  """Whether this can only be meant for the hub: `owner/name`, with `@revision` and `:file.gguf` or without.

  What ends like a file, begins like a path, or begins with a folder that is here is a path.
  """
  match = _HUB_ID.fullmatch(name)
  if match is None or match['repository'].lower().endswith(_FILE_SUFFIXES):
    return False
  return not pathlib.Path(name.split('/')[0]).exists()


def download(hub_id: str) -> pathlib.Path:
  """Bring a checkpoint into the hub's cache on this machine, unless it is there.

  Args:
    hub_id: `owner/name` of a repository with safetensors or one `.gguf` file, or `owner/name:file.gguf`. Behind the
      name, `@revision` is a branch, a tag or a commit; without, it is the newest of the branch 'main'.

  Returns:
    A folder with config.json and safetensors files, or a `.gguf` file.

  Raises:
    FileNotFoundError: if the package huggingface_hub is not installed, or there is no such repository or file.
    ConnectionError: if the hub cannot be reached and the files are not in the cache.
    ValueError: if the repository holds no checkpoint, or several.
  """
  match = _HUB_ID.fullmatch(hub_id)
  assert match is not None
  repository, revision, file = match['repository'], match['revision'], match['file']
  try:
    import huggingface_hub
    from huggingface_hub import errors
  except ImportError:
    raise FileNotFoundError(
      f'found nothing at {hub_id}, and to download it from the hub takes the package huggingface_hub, which is not '
      "installed; run `pip install 'pdjax[hub]'` or correct the path."
    ) from None
  user: dict[str, Any] = {'library_name': 'pdjax'}
  what: dict[str, Any] = user | {'revision': revision}
  with _named_errors(hub_id, repository, file):
    if file is not None:
      return pathlib.Path(huggingface_hub.hf_hub_download(repository, file, **what))
    folder = pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(_FILES), **what))
    if (folder / 'config.json').is_file() and any(folder.glob('model*.safetensors')):
      return folder
    try:
      listed = huggingface_hub.HfApi(**user).model_info(repository, revision=revision, timeout=10).siblings
      files = [one.rfilename for one in listed or ()]
    except errors.HfHubHTTPError:
      raise
    except Exception:  # no hub, which each version of its package says in another way: what is in the cache is there
      files = [path.relative_to(folder).as_posix() for path in folder.rglob('*.gguf')]
      if not files:
        raise
  only = _only_gguf(hub_id, files)
  with _named_errors(hub_id, repository, only):
    return pathlib.Path(huggingface_hub.hf_hub_download(repository, only, **what))


def name_of(hub_id: str) -> str:
  """The name of a repository, without its owner."""
  match = _HUB_ID.fullmatch(hub_id)
  assert match is not None
  return match['repository'].rpartition('/')[2]


def pinned(hub_id: str, path: pathlib.Path) -> str:
  """The id of the very commit that was downloaded: it is the same on every host, and later too."""
  match = _HUB_ID.fullmatch(hub_id)
  assert match is not None
  parts = path.parts
  if _SNAPSHOTS not in parts[:-1]:
    return hub_id
  commit = parts[len(parts) - 1 - parts[::-1].index(_SNAPSHOTS) + 1]
  return f'{match["repository"]}@{commit}' + (f':{match["file"]}' if match['file'] else '')


@contextlib.contextmanager
def _named_errors(hub_id: str, repository: str, file: str | None) -> Iterator[None]:
  """Turns errors between this machine and the hub into ones that say what to do."""
  from huggingface_hub import constants, errors

  try:
    yield
  except errors.HFValidationError as error:
    raise ValueError(f'{hub_id} names no repository that the hub could have ({error}); correct it.') from error
  except errors.GatedRepoError as error:
    raise FileNotFoundError(
      f'the hub at {constants.ENDPOINT} asks for its terms to be accepted before it gives {repository}; accept them '
      'there and log in with `hf auth login`.'
    ) from error
  except errors.RepositoryNotFoundError as error:
    raise FileNotFoundError(
      f'found nothing at {hub_id} here, and the hub at {constants.ENDPOINT} has no repository {repository!r} for you; '
      'check the path or the name, or log in with `hf auth login` if it is private.'
    ) from error
  except errors.RevisionNotFoundError as error:
    raise FileNotFoundError(
      f'the repository {repository} at {constants.ENDPOINT} has no revision as in {hub_id!r}; name a branch, a tag '
      'or a commit that is there.'
    ) from error
  except errors.LocalEntryNotFoundError as error:
    raise ConnectionError(
      f'{hub_id} is not on this machine, and the hub at {constants.ENDPOINT} cannot be reached; check the path or the '
      'connection, or download it elsewhere and give its folder.'
    ) from error
  except errors.EntryNotFoundError as error:
    raise FileNotFoundError(
      f'the repository {repository} at {constants.ENDPOINT} has no file {file!r}; check its name there.'
    ) from error
  except Exception as error:  # of the hub's package and of those below it, which are others from version to version
    raise ConnectionError(
      f'{hub_id} could not be downloaded from the hub at {constants.ENDPOINT} ({error}); try again.'
    ) from error


def _only_gguf(hub_id: str, files: list[str]) -> str:
  found = sorted(file for file in files if file.lower().endswith('.gguf'))
  if len(found) != 1:
    listed = f'; name one, as in {hub_id}:{found[0]}' if found else '; use another repository'
    raise ValueError(
      f'the repository {hub_id} holds {", ".join(found) or "no checkpoint"}, expected config.json with safetensors '
      f'files or exactly one .gguf file{listed}.'
    )
  return found[0]
