"""Checkpoints onto meshes: each tensor where the table says, with the values of the file."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pdjax.model.checkpoint import RandomCheckpoint
from pdjax.model.checkpoint.base import tensor_shapes
from pdjax.model.weights import load_weights
from pdjax.sharding import MESH_AXES, make_mesh
from tests.tiny import TINY, TINY_8_2

BOTH = MESH_AXES
SPECS = {
  'embed': P(BOTH, None),
  'attn_norm': P(None),
  'q': P(BOTH, None, None),
  'k': P('kv', None, None),
  'v': P('kv', None, None),
  'o': P(None, BOTH, None),
  'mlp_norm': P(None),
  'gate': P(BOTH, None),
  'up': P(BOTH, None),
  'down': P(None, BOTH),
  'final_norm': P(None),
  'unembed': P(BOTH, None),
}


@dataclasses.dataclass(frozen=True)
class Counted(RandomCheckpoint):
  """Counts how often each tensor is read."""

  reads: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def tensor(self, name):
    self.reads[name] += 1
    return super().tensor(name)


def outputs_first(name, tensor):
  """A checkpoint's tensor as the model keeps it."""
  kind = name.split('.')[-1]
  if kind in ('q', 'k', 'v', 'o', 'gate', 'up', 'down', 'unembed'):
    return np.moveaxis(tensor, -1, 0) if kind == 'o' else np.moveaxis(tensor, 0, -1)
  return tensor


def find(weights, name):
  for part in name.split('.'):
    weights = weights[int(part) if part.isdigit() else part]
  return weights


@pytest.mark.parametrize('model, tps', [(TINY, (1, 2)), (TINY_8_2, (1, 2, 4))], ids=lambda x: getattr(x, 'name', ''))
def test_every_weight_lies_as_the_table_says_and_holds_the_checkpoints_values(model, tps):
  checkpoint = Counted(model)
  meshes = {tp: make_mesh(model, jax.devices()[:tp]) for tp in tps}
  weights = load_weights(checkpoint, model, meshes, jnp.dtype('float32'))
  for tp, mesh in meshes.items():
    for name in tensor_shapes(model):
      array, expected = find(weights[tp], name), outputs_first(name, RandomCheckpoint(model).tensor(name))
      wanted = jax.sharding.NamedSharding(mesh, SPECS[name.split('.')[-1]])
      assert array.sharding.is_equivalent_to(wanted, array.ndim), (tp, name, array.sharding)
      for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[shard.index], err_msg=name)
  assert set(checkpoint.reads.values()) == {1}  # once, however many meshes want it
  assert set(checkpoint.reads) == set(tensor_shapes(model))


def test_key_value_heads_are_copied_where_there_are_more_devices_than_heads():
  weights = load_weights(
    RandomCheckpoint(TINY_8_2), TINY_8_2, {'w': make_mesh(TINY_8_2, jax.devices()[:4])}, jnp.dtype('float32')
  )['w']
  layer = weights['layers'][0]
  assert {shard.data.shape for shard in layer['k'].addressable_shards} == {(1, 8, 24)}  # 2 heads on 4 devices
  assert {shard.data.shape for shard in layer['q'].addressable_shards} == {(2, 8, 24)}
  heads = {shard.device.id: shard.index[0].start or 0 for shard in layer['k'].addressable_shards}
  queries = {shard.device.id: shard.index[0].start or 0 for shard in layer['q'].addressable_shards}
  assert all(query // 4 == heads[device] for device, query in queries.items())  # each beside the queries it serves


def test_a_vocabulary_that_the_devices_do_not_divide_stays_whole():
  model = dataclasses.replace(TINY, vocab_size=97)
  weights = load_weights(
    RandomCheckpoint(model), model, {'w': make_mesh(model, jax.devices()[:2])}, jnp.dtype('float32')
  )['w']
  assert weights['embed'].sharding.is_fully_replicated and weights['unembed'].sharding.is_fully_replicated
  assert not weights['layers'][1]['gate'].sharding.is_fully_replicated


def test_weights_are_converted_to_the_type_asked_for():
  weights = load_weights(
    RandomCheckpoint(TINY), TINY, {'w': make_mesh(TINY, jax.devices()[:1])}, jnp.dtype('bfloat16')
  )['w']
  assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype('bfloat16')}
  expected = RandomCheckpoint(TINY).tensor('unembed').T.astype(jnp.bfloat16)
  np.testing.assert_array_equal(weights['unembed'], expected)


def test_weights_of_unlike_dtypes_come_of_one_reading():
  checkpoint, mesh = Counted(TINY), make_mesh(TINY, jax.devices()[:1])
  dtypes = {name: jnp.dtype(name) for name in ('float32', 'bfloat16')}
  weights = load_weights(checkpoint, TINY, dict.fromkeys(dtypes, mesh), dtypes)
  for name, dtype in dtypes.items():
    assert {leaf.dtype for leaf in jax.tree.leaves(weights[name])} == {dtype}
    expected = RandomCheckpoint(TINY).tensor('unembed').T.astype(dtype)
    np.testing.assert_array_equal(weights[name]['unembed'], expected)
  assert set(checkpoint.reads.values()) == {1}


def test_a_tensor_of_another_shape_is_refused_by_name():
  checkpoint = RandomCheckpoint(dataclasses.replace(TINY, ffn_dim=50))
  with pytest.raises(ValueError, match=r"'layers\.0\.gate' has shape \(24, 50\), but tiny expects \(24, 48\)"):
    load_weights(checkpoint, TINY, {'w': make_mesh(TINY, jax.devices()[:1])}, jnp.dtype('float32'))
