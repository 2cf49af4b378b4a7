"""Weights drawn on devices are those of the same seed, of the size that keeps activations near one."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.device_check.drawn import DrawnCheckpoint
from pdjax.model.checkpoint import ShardedCheckpoint, tensor_shapes
from pdjax.model.weights import load_weights
from pdjax.sharding import make_mesh
from tests.tiny import TINY_8_2


def test_every_weight_is_drawn_where_it_belongs_and_is_the_tensor_of_its_name():
  checkpoint = DrawnCheckpoint(TINY_8_2)
  assert isinstance(checkpoint, ShardedCheckpoint)
  meshes = {tp: make_mesh(TINY_8_2, jax.devices()[:tp]) for tp in (1, 2)}
  weights = load_weights(checkpoint, TINY_8_2, meshes, jnp.dtype('float32'))
  for one, two in zip(jax.tree.leaves(weights[1]), jax.tree.leaves(weights[2]), strict=True):
    np.testing.assert_array_equal(one, two)
  np.testing.assert_array_equal(np.asarray(weights[1]['layers'][1]['gate']).T, checkpoint.tensor('layers.1.gate'))
  assert (checkpoint.tensor('final_norm') == 1).all()


def test_other_seeds_and_names_are_other_numbers():
  one, other = DrawnCheckpoint(TINY_8_2), DrawnCheckpoint(TINY_8_2, seed=1)
  shapes = tensor_shapes(TINY_8_2)
  assert one.tensor('layers.0.q').shape == shapes['layers.0.q']
  assert not np.array_equal(one.tensor('layers.0.q'), other.tensor('layers.0.q'))
  assert not np.array_equal(one.tensor('layers.0.q'), one.tensor('layers.1.q'))
