"""One table from logical axes to mesh axes, one mesh a worker."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec as P

from pdjax.sharding import MESH_AXES, ShardingRules, make_mesh, replicated
from tests.tiny import TINY, TINY_8_2, TINY_12_12


def test_an_axis_goes_where_the_table_says():
  rules = ShardingRules()
  assert rules.spec('embed', 'query_heads', 'head') == P(None, ('kv', 'group'), None)
  assert rules.spec('embed', 'kv_heads', 'head') == P(None, 'kv', None)
  assert rules.spec('vocab', None) == P(('kv', 'group'), None)


def test_a_new_layout_is_a_new_table():
  assert ShardingRules(embed='group', ffn='kv').spec('embed', 'ffn') == P('group', 'kv')


def test_an_unknown_axis_is_our_own_bug():
  with pytest.raises(AttributeError, match='sequence'):
    ShardingRules().spec('sequence')


@pytest.mark.parametrize('vocab_size, tp, whole', [(96, 2, False), (97, 2, True), (97, 1, False), (98, 4, True)])
def test_a_vocabulary_is_cut_only_if_it_divides(vocab_size, tp, whole):
  rules = ShardingRules.for_model(dataclasses.replace(TINY, vocab_size=vocab_size), tp)
  assert (rules.vocab is None) == whole
  assert rules.ffn == MESH_AXES  # the rest of the table is as ever


@pytest.mark.parametrize(
  'model, tp, kv, group',
  [(TINY, 1, 1, 1), (TINY, 2, 2, 1), (TINY, 6, 2, 3), (TINY_8_2, 4, 2, 2), (TINY_8_2, 8, 2, 4), (TINY_12_12, 6, 6, 1)],
)
def test_a_mesh_cuts_key_value_heads_and_copies_them_where_devices_are_left(model, tp, kv, group):
  mesh = make_mesh(model, jax.devices()[:tp])
  assert dict(mesh.shape) == {'kv': kv, 'group': group}
  assert mesh.devices.flatten().tolist() == jax.devices()[:tp]


@pytest.mark.parametrize('model, tp', [(TINY, 3), (TINY, 4), (TINY_8_2, 3), (TINY_12_12, 8)])
def test_a_mesh_that_the_heads_do_not_fit_is_refused_with_those_that_do(model, tp):
  with pytest.raises(ValueError, match=rf'tp={tp} does not fit .*use one of 1, 2'):
    make_mesh(model, jax.devices()[:tp])


def test_replicated_keeps_a_whole_copy_on_every_device():
  sharding = replicated(make_mesh(TINY_8_2, jax.devices()[:4]))
  assert sharding.is_fully_replicated and sharding.num_devices == 4
