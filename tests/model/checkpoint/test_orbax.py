"""Converted checkpoints come back equal on any mesh, each device reading its own part, and damage is named."""

import asyncio
import dataclasses
import gc
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from pdjax.model.checkpoint import (
  OrbaxCheckpoint,
  RandomCheckpoint,
  SafetensorsCheckpoint,
  ShardedCheckpoint,
  open_checkpoint,
  orbax,
  save_orbax,
  tensor_shapes,
)
from pdjax.model.weights import load_weights
from pdjax.sharding import make_mesh
from pdjax.types import RopeScaling
from tests.model.test_tokenizer import write_folder as write_tokenizer
from tests.tiny import TINY

SPEC = dataclasses.replace(
  TINY, name='converted', query_heads=6, kv_heads=3, rope_scaling=RopeScaling('llama3', 8.0), sliding_window=5,
  windowed_layers=(1,), qkv_bias=True, qk_norm=True,
)  # fmt: skip
FAMILIES = pathlib.Path(__file__).parents[2] / 'data' / 'families'


@pytest.fixture(scope='module')
def original() -> RandomCheckpoint:
  return RandomCheckpoint(SPEC, seed=7)


@pytest.fixture(scope='module')
def saved(original, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('orbax') / 'converted'
  save_orbax(original, folder)
  return folder


@pytest.fixture
def folder(saved, tmp_path) -> pathlib.Path:
  """A copy to be damaged."""
  return shutil.copytree(saved, tmp_path / 'copy')


def test_a_converted_checkpoint_keeps_its_model_and_weights(original, saved):
  checkpoint = open_checkpoint(saved)
  assert isinstance(checkpoint, OrbaxCheckpoint)
  assert (checkpoint.spec, checkpoint.dtype, checkpoint.tokenizer()) == (SPEC, np.float32, None)
  for name in ('embed', 'layers.1.q', 'layers.0.k_bias', 'layers.1.q_norm', 'unembed'):
    np.testing.assert_array_equal(checkpoint.tensor(name), original.tensor(name), err_msg=name)
  with pytest.raises(KeyError, match='no weight'):
    checkpoint.tensor('layers.2.q')


def test_weights_are_restored_straight_into_other_meshes(original, saved, monkeypatch):
  checkpoint = open_checkpoint(saved)
  meshes = {tp: make_mesh(SPEC, jax.devices()[tp : 2 * tp]) for tp in (1, 3)}
  assert isinstance(checkpoint, ShardedCheckpoint)
  expected = load_weights(original, SPEC, meshes, jnp.dtype('float32'))
  monkeypatch.setattr(OrbaxCheckpoint, 'tensor', lambda self, name: pytest.fail(f'all of {name} is asked for'))
  restored = load_weights(checkpoint, SPEC, meshes, jnp.dtype('float32'))
  assert jax.tree.structure(restored) == jax.tree.structure(expected)
  for (path, one), other in zip(jax.tree.leaves_with_path(restored), jax.tree.leaves(expected), strict=True):
    assert one.sharding.is_equivalent_to(other.sharding, one.ndim), path
    np.testing.assert_array_equal(one, other, err_msg=str(path))


def test_weights_are_converted_to_the_type_asked_for(original, saved):
  weights = load_weights(
    open_checkpoint(saved), SPEC, {'w': make_mesh(SPEC, jax.devices()[:3])}, jnp.dtype('bfloat16')
  )['w']
  assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype('bfloat16')}
  np.testing.assert_array_equal(weights['unembed'], original.tensor('unembed').T.astype(jnp.bfloat16))


def test_weights_are_restored_inside_a_notebook(original, saved):
  async def cell():  # notebooks run theirs in an event loop
    return open_checkpoint(saved).tensor('embed')

  np.testing.assert_array_equal(asyncio.run(cell()), original.tensor('embed'))


def bytes_read() -> int:
  metrics = tensorstore.experimental_collect_matching_metrics('/tensorstore/kvstore/file/bytes_read')
  return sum(value['value'] for metric in metrics for value in metric['values'])


def test_a_device_reads_little_more_than_its_own_part(tmp_path, monkeypatch):
  monkeypatch.setattr(orbax, '_CHUNK_BYTES', 2**16)
  spec = dataclasses.replace(TINY, vocab_size=4096, embed_dim=96)
  checkpoint = save_orbax(RandomCheckpoint(spec), tmp_path / 'wide')
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), 'x')
  checkpoint.tensor('final_norm')  # what is read once
  before = bytes_read()
  array = checkpoint.restore({'embed': NamedSharding(mesh, PartitionSpec('x'))}, np.float32)['embed']
  assert {shard.data.shape for shard in array.addressable_shards} == {(1024, 96)}
  assert 0.5 * array.nbytes < bytes_read() - before < 1.5 * array.nbytes  # four times that, were all read by each


@pytest.mark.parametrize('dtype', [None, 'bfloat16', 'float32'])
def test_any_format_converts_with_its_tokenizer(tmp_path, dtype):
  source = shutil.copytree(FAMILIES / 'qwen2', tmp_path / 'source')
  write_tokenizer(source, {'bos_token': '<s>', 'eos_token': '</s>', 'chat_template': '<turn>{{ messages[0].content }}'})
  checkpoint = SafetensorsCheckpoint(source)
  converted = save_orbax(checkpoint, tmp_path / 'converted', dtype)
  assert converted.spec == checkpoint.spec
  expected = {None: np.dtype(np.float16), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}.get(dtype, np.dtype(np.float32))
  assert converted.dtype == converted.tensor('layers.0.up').dtype == expected
  np.testing.assert_array_equal(converted.tensor('layers.0.up'), checkpoint.tensor('layers.0.up').astype(expected))
  ours, theirs = converted.tokenizer(), checkpoint.tokenizer()
  assert ours.encode('ab <turn>é') == theirs.encode('ab <turn>é')
  messages = [{'role': 'user', 'content': 'ab'}]
  assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)
  assert (ours.special_tokens, ours.eos_token_ids) == (theirs.special_tokens, theirs.eos_token_ids)


def test_a_conversion_overwrites_nothing(original, saved, tmp_path):
  with pytest.raises(FileExistsError, match='not empty; give another folder'):
    save_orbax(original, saved)
  with pytest.raises(ValueError, match="dtype is 'int8', expected one of"):
    save_orbax(original, tmp_path / 'new', 'int8')
  assert not (tmp_path / 'new').exists()


def test_an_unfinished_conversion_is_no_checkpoint(folder):
  (folder / 'pdjax.json').unlink()
  with pytest.raises(ValueError, match='holds neither, expected'):
    open_checkpoint(folder)
  with pytest.raises(FileNotFoundError, match=r'has no pdjax\.json'):
    OrbaxCheckpoint(folder)


def change(path: pathlib.Path, **changes) -> None:
  content = json.loads(path.read_text())
  spec = changes.pop('spec', {})
  if isinstance(spec, dict) and isinstance(content.get('spec'), dict):
    content['spec'] |= spec
  else:
    content['spec'] = spec
  path.write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'version': 2}, 'version 2, expected 1'),
    ({'dtype': 'int4'}, "dtype 'int4', expected one of"),
    ({'dtype': ['int4']}, "dtype .'int4'., expected one of"),
    ({'crc32': 5}, 'no CRC-32 of each weight'),
    ({'crc32': {'embed': 5}}, 'no CRC-32 of each weight'),
    ({'spec': {'num_layers': 10**9}}, 'num_layers=1000000000, expected at most 10,000'),
    ({'spec': {'rope_theta': 'x'}}, "rope_theta='x', expected a positive number"),
    ({'spec': {'embed_dim': 24.0}}, 'embed_dim=24.0, expected an integer'),
    ({'spec': {'eos_token_ids': 'x'}}, "eos_token_ids='x', expected a tuple of integers"),
    ({'spec': None}, 'the model None, expected the fields'),
    ({'spec': {'color': 'blue'}}, 'a model that cannot be .*color'),
    ({'spec': {'kv_heads': 5}}, '6 query heads and 5 key/value heads'),
    ({'spec': {'rope_scaling': {'kind': 'yarn', 'factor': 2.0}}}, "rope_scaling .*kind='yarn'"),
    ({'spec': {'num_layers': 3}}, "lacks 14 of the 45 weights .* 'layers.2.attn_norm'"),
    ({'spec': {'tied_embeddings': True}}, "holds weight 'unembed'"),
  ],
)
def test_a_damaged_description_is_refused(folder, changes, message):
  change(folder / 'pdjax.json', **changes)
  with pytest.raises(ValueError, match=message) as caught:
    OrbaxCheckpoint(folder)
  assert str(folder) in str(caught.value)


@pytest.mark.parametrize('content', ['', '{"tree_metadata"', '[]', '{"tree_metadata": {"a": 1}}'])
def test_a_damaged_list_of_weights_is_refused(folder, content):
  (folder / 'weights' / '_METADATA').write_text(content)
  with pytest.raises(ValueError, match='_METADATA'):
    OrbaxCheckpoint(folder)
  (folder / 'weights' / '_METADATA').unlink()
  with pytest.raises(FileNotFoundError, match='has no _METADATA'):
    OrbaxCheckpoint(folder)


@pytest.mark.parametrize(
  'field, value, message',
  [
    ('ffn_dim', 50, r"weight 'layers\.0\.gate' of .* has shape \(24, 48\), expected \(24, 50\)"),  # would be padded
    ('ffn_dim', 40, r"weight 'layers\.0\.gate' of .* has shape \(24, 48\), expected \(24, 40\)"),  # or cut
    ('vocab_size', 112, r"weight 'embed' of .* has shape \(96, 24\), expected \(112, 24\)"),
    ('embed_dim', 16, r"weight 'embed' of .* has shape \(\d+, 24\), expected \(\d+, 16\)"),
  ],
)
def test_a_weight_of_another_shape_is_named(folder, field, value, message):
  change(folder / 'pdjax.json', spec={field: value})
  checkpoint = OrbaxCheckpoint(folder)
  with pytest.raises(ValueError, match=message):
    load_weights(checkpoint, checkpoint.spec, {'w': make_mesh(SPEC, jax.devices()[:1])}, jnp.dtype('float32'))


def damage(folder: pathlib.Path, how: str) -> None:
  """Spoil the files that hold the weights themselves, and none that says where they lie."""
  for path in (folder / 'weights').rglob('d/*'):
    content = path.read_bytes()
    if len(content) > 4000:
      path.unlink()
      if how != 'gone':
        path.write_bytes(content[:100] if how == 'cut' else content[::-1])


@pytest.mark.parametrize('how', ['cut', 'gone', 'garbled'])
def test_damaged_weights_are_refused_by_name(folder, how):
  damage(folder, how)
  with pytest.raises(ValueError, match=r"weight 'layers\.1\.up' of .*/copy cannot be read .* convert or copy it again"):
    OrbaxCheckpoint(folder).tensor('layers.1.up')


@pytest.mark.parametrize('devices', [1, 3])  # one has every weight whole, of three each has a part of most
def test_damaged_weights_are_refused_by_name_wherever_they_go(folder, devices):
  damage(folder, 'cut')
  mesh = make_mesh(SPEC, jax.devices()[:devices])
  with pytest.raises(ValueError, match=r"weight '[\w.]+' of .*/copy cannot be read"):
    load_weights(OrbaxCheckpoint(folder), SPEC, {'w': mesh}, jnp.dtype('float32'))
  gc.collect()  # Orbax leaves unfinished reads behind, which complain here: pyproject.toml lets them


def swap(folder: pathlib.Path, one: str, other: str) -> None:
  """Exchange two weights of one shape as a damaged store would, in silence: by name, with all their checksums kept."""
  description = json.loads((folder / 'pdjax.json').read_text())
  sums = description['crc32']
  sums[one], sums[other] = sums[other], sums[one]
  (folder / 'pdjax.json').write_text(json.dumps(description))


def test_a_weight_of_other_bytes_is_named_where_it_is_read_whole(folder):
  swap(folder, 'layers.0.gate', 'layers.0.up')
  message = r"weight 'layers\.0\.gate' of .*/copy is damaged: its CRC-32 is \d+, expected \d+ as pdjax\.json says"
  with pytest.raises(ValueError, match=message):
    OrbaxCheckpoint(folder).tensor('layers.0.gate')
  with pytest.raises(ValueError, match=message):
    load_weights(OrbaxCheckpoint(folder), SPEC, {'w': make_mesh(SPEC, jax.devices()[:1])}, jnp.dtype('bfloat16'))
  # Devices that have a part each cannot tell, but they compare what they have whole.
  mesh = make_mesh(SPEC, jax.devices()[:3])
  load_weights(OrbaxCheckpoint(folder), SPEC, {'w': mesh}, jnp.dtype('float32'))
  swap(folder, 'layers.1.q_norm', 'final_norm')
  with pytest.raises(ValueError, match=r"weight 'layers\.1\.q_norm' of .* is damaged"):
    load_weights(OrbaxCheckpoint(folder), SPEC, {'w': mesh}, jnp.dtype('float32'))


def test_a_folder_without_checksums_opens(original, folder):
  description = json.loads((folder / 'pdjax.json').read_text())
  assert description.pop('crc32').keys() == tensor_shapes(SPEC).keys()
  (folder / 'pdjax.json').write_text(json.dumps(description))
  np.testing.assert_array_equal(OrbaxCheckpoint(folder).tensor('embed'), original.tensor('embed'))


def test_no_file_is_a_pickle(saved):
  assert not [path for path in saved.rglob('*') if path.is_file() and path.read_bytes()[:1] == b'\x80']
  assert ocp.PyTreeCheckpointer().metadata(saved / 'weights').item_metadata.tree.keys() == tensor_shapes(SPEC).keys()


@dataclasses.dataclass(frozen=True)
class Large(RandomCheckpoint):
  """Random weights with one number beyond float16."""

  where: str = 'layers.1.up'

  def tensor(self, name: str) -> np.ndarray:
    tensor = super().tensor(name)
    if name == self.where:
      tensor.reshape(-1)[-1] = 1e6
    return tensor


@pytest.mark.parametrize('where', ['layers.1.up', 'final_norm', 'embed', 'unembed'])
def test_a_weight_beyond_float16_is_refused_wherever_it_is_converted(tmp_path, where):
  original = Large(SPEC, where=where)
  message = rf"weight '{where}' holds 1e\+06 .* but float16 ends at 65504 .*dtype='bfloat16'"
  mesh = {'w': make_mesh(SPEC, jax.devices()[:1])}
  with pytest.raises(ValueError, match=message):
    load_weights(original, SPEC, mesh, jnp.dtype('float16'))
  with pytest.raises(ValueError, match=message):
    save_orbax(original, tmp_path / 'float16', 'float16')
  converted = save_orbax(original, tmp_path / 'float32')
  for devices in (1, 3):  # read whole, and each device its part
    with pytest.raises(ValueError, match=message):
      load_weights(converted, SPEC, {'w': make_mesh(SPEC, jax.devices()[:devices])}, jnp.dtype('float16'))
    load_weights(converted, SPEC, {'w': make_mesh(SPEC, jax.devices()[:devices])}, jnp.dtype('bfloat16'))


def test_a_refused_conversion_is_no_checkpoint(tmp_path):
  with pytest.raises(ValueError, match='would make it infinite'):
    save_orbax(Large(SPEC), tmp_path / 'float16', 'float16')
  assert not (tmp_path / 'float16').exists()
