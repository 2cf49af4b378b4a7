"""Hub ids are downloaded: only what is needed, and only what can be no path; a stand-in on this machine serves it."""

import pathlib
import sys

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from pdjax.model.checkpoint import GGUFCheckpoint, SafetensorsCheckpoint, find_checkpoint, hub, open_checkpoint
from tests.model.checkpoint.hub_server import COMMIT, serve_hub
from tests.model.checkpoint.test_gguf import write as write_gguf
from tests.model.checkpoint.test_safetensors import write as write_safetensors
from tests.model.test_tokenizer import write_folder as write_tokenizer


def files(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def repositories(tmp_path_factory) -> dict[str, dict[str, bytes]]:
  whole, sharded, quantised = (tmp_path_factory.mktemp(name) for name in ('whole', 'sharded', 'quantised'))
  write_safetensors(whole)
  write_tokenizer(whole, {'eos_token': '</s>'})
  (whole / 'special_tokens_map.json').write_text('{"bos_token": "<s>"}')
  (whole / 'added_tokens.json').write_text('{"<tool>": 3}')
  (whole / 'chat_template.jinja').write_text('{{ bos_token }}')
  (whole / 'generation_config.json').write_text('{"eos_token_id": 2}')
  (whole / 'additional_chat_templates').mkdir()
  (whole / 'additional_chat_templates' / 'tool_use.jinja').write_text('{{ tools }}')
  write_safetensors(sharded, shards=2)
  write_gguf(quantised / 'tiny-F32.gguf')
  other = {'README.md': b'# A model', 'pytorch_model.bin': b'another format', 'original/params.json': b'{}'}
  gguf = files(quantised)
  return {
    'tests/Tiny-1.5': files(whole) | other,
    'tests/sharded': files(sharded) | other,
    'tests/one-GGUF': gguf | other | {'config.json': b'{}'},
    'tests/two-GGUF': gguf | {'tiny-Q8_0.gguf': b'GGUF'},
    'tests/pictures': {'cat.png': b''},
  }


@pytest.fixture
def requested(repositories, tmp_path, monkeypatch):
  """The hub's stand-in in place of the hub, an empty cache, and all requests so far."""
  with serve_hub(repositories) as (endpoint, paths):
    monkeypatch.setattr(constants, 'ENDPOINT', endpoint)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', endpoint + '/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_PROGRESS_BARS', True)
    monkeypatch.chdir(tmp_path)
    yield paths


@pytest.mark.parametrize('name', ['Tiny-1.5', 'sharded'])
def test_a_repository_of_safetensors_is_opened_with_what_it_needs(requested, repositories, name):
  checkpoint = open_checkpoint(f'tests/{name}')
  assert isinstance(checkpoint, SafetensorsCheckpoint)
  assert checkpoint.spec.name == name and np.isfinite(checkpoint.tensor('layers.1.q')).all()
  assert (checkpoint.tokenizer() is not None) == (name == 'Tiny-1.5')
  fetched = {path.rpartition(f'/resolve/{COMMIT}/')[2] for path in requested if path.startswith('GET /tests/')}
  assert fetched == repositories[f'tests/{name}'].keys() - {'README.md', 'pytorch_model.bin', 'original/params.json'}


@pytest.mark.parametrize('hub_id', ['tests/one-GGUF', 'tests/two-GGUF:tiny-F32.gguf'])
def test_a_gguf_file_is_found_or_named(requested, hub_id):
  checkpoint = open_checkpoint(hub_id)
  assert isinstance(checkpoint, GGUFCheckpoint) and checkpoint.spec.name == 'tiny-F32'
  assert not [path for path in requested if path.startswith('GET') and 'Q8_0' in path]


@pytest.mark.parametrize('revision', ['', '@v1', f'@{COMMIT}'])
@pytest.mark.parametrize(('name', 'file'), [('Tiny-1.5', ''), ('one-GGUF', ''), ('two-GGUF', ':tiny-F32.gguf')])
def test_a_revision_is_the_commit_that_it_was_when_it_was_downloaded(requested, name, file, revision):
  found = find_checkpoint(f'tests/{name}{revision}{file}')
  assert found.source == f'tests/{name}@{COMMIT}{file}'
  assert found.open().spec.name == ('tiny-F32' if 'GGUF' in name else name)
  requested.clear()
  assert find_checkpoint(found.source) == found  # another worker asks for the commit
  assert not [path for path in requested if path.startswith('GET /tests/')]


def out_of_reach(monkeypatch, setting: str) -> None:
  value = {'ENDPOINT': 'http://127.0.0.1:9', 'HF_HUB_OFFLINE': True}[setting]
  monkeypatch.setattr(constants, setting, value)
  if setting == 'ENDPOINT':
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', value + '/{repo_id}/resolve/{revision}/{filename}')


@pytest.mark.parametrize('setting', ['ENDPOINT', 'HF_HUB_OFFLINE'])
@pytest.mark.parametrize('hub_id', ['tests/Tiny-1.5', 'tests/one-GGUF', 'tests/two-GGUF:tiny-F32.gguf'])
def test_what_is_downloaded_once_needs_no_hub(requested, monkeypatch, hub_id, setting):
  name = open_checkpoint(hub_id).spec.name
  out_of_reach(monkeypatch, setting)
  assert open_checkpoint(hub_id).spec.name == name


def test_a_hub_that_goes_away_in_between_is_said_so(requested, monkeypatch):
  def gone(*args, **kwargs):
    raise RuntimeError('connection lost')  # what is raised is another from version to version

  monkeypatch.setattr(huggingface_hub, 'hf_hub_download', gone)
  with pytest.raises(ConnectionError, match=r'tests/one-GGUF could not be downloaded .*connection lost'):
    open_checkpoint('tests/one-GGUF')


@pytest.mark.parametrize(
  ('hub_id', 'kind', 'message'),
  [
    ('tests/two-GGUF', ValueError, 'holds tiny-F32.gguf, tiny-Q8_0.gguf, expected .* as in tests/two-GGUF:tiny-F32'),
    ('tests/pictures', ValueError, 'holds no checkpoint, expected'),
    ('tests/no--name', ValueError, 'tests/no--name names no repository that the hub could have .*--'),
    ('tests/absent', FileNotFoundError, "found nothing at tests/absent here, and the hub at http.* has no repository"),
    ('tests/Tiny-1.5@v9', FileNotFoundError, "tests/Tiny-1.5 at .* has no revision as in 'tests/Tiny-1.5@v9'"),
    ('tests/one-GGUF:absent.gguf', FileNotFoundError, "the repository tests/one-GGUF .* has no file 'absent.gguf'"),
  ],
)  # fmt: skip
def test_what_is_not_there_is_named(requested, hub_id, kind, message):
  with pytest.raises(kind, match=message):
    open_checkpoint(hub_id)


@pytest.mark.parametrize(
  ('hub_id', 'setting'),
  [
    ('tests/Tiny-1.5', 'ENDPOINT'),
    ('tests/Tiny-1.5', 'HF_HUB_OFFLINE'),
    ('tests/one-GGUF:tiny-F32.gguf', 'HF_HUB_OFFLINE'),
  ],
)
def test_a_hub_out_of_reach_is_said_so(requested, monkeypatch, hub_id, setting):
  out_of_reach(monkeypatch, setting)
  with pytest.raises(ConnectionError, match=f'{hub_id} is not on this machine, and the hub .* cannot be reached'):
    open_checkpoint(hub_id)
  assert not requested


def test_the_package_to_install_is_named(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(FileNotFoundError, match=r"pip install 'pdjax\[hub\]'"):
    open_checkpoint('owner/name')


@pytest.mark.parametrize(
  ('name', 'meant'),
  [
    ('Qwen/Qwen2.5-0.5B', True),
    ('owner/name', True),
    ('owner/name-GGUF:name-Q4_K_M.gguf', True),
    ('owner/name-GGUF:folder/name.gguf', True),
    ('owner/name@v1', True),
    ('owner/name@refs/pr/1:name.gguf', True),
    ('owner/name@', False),
    ('owner/name@v 1', False),
    ('smollm2', False),
    ('owner/name.gguf', False),
    ('owner/model.safetensors', False),
    ('./owner/name', False),
    ('../owner/name', False),
    ('/owner/name', False),
    ('~/name', False),
    ('owner/name/more', False),
    ('owner/name:other', False),
    ('models/name', False),  # a folder that is here
  ],
)
def test_only_what_can_be_no_path_is_a_hub_id(monkeypatch, tmp_path, name, meant):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'models').mkdir()
  assert hub.is_hub_id(name) == meant


def test_a_path_goes_before_the_hub(requested, tmp_path):
  folder = tmp_path / 'tests' / 'Tiny-1.5'
  folder.mkdir(parents=True)
  write_safetensors(folder, config={'eos_token_id': 9})
  assert open_checkpoint('tests/Tiny-1.5').spec.eos_token_ids == (9,)
  with pytest.raises(FileNotFoundError, match='found nothing at tests/sharded'):
    open_checkpoint('tests/sharded')
  assert not requested
