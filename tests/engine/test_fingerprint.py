"""One sum for one set of weights, however it is cut; another for another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdjax.engine.fingerprint import fingerprint
from pdjax.model.checkpoint import RandomCheckpoint
from pdjax.model.weights import load_weights
from pdjax.sharding import make_mesh
from tests.tiny import TINY_12_12


def weights(tp: int, seed: int = 0, dtype: str = 'float32'):
  mesh = make_mesh(TINY_12_12, jax.devices()[:tp])
  return load_weights(RandomCheckpoint(TINY_12_12, seed), TINY_12_12, {None: mesh}, jnp.dtype(dtype))[None]


def test_the_sum_is_that_of_the_weights_and_not_of_their_cut():
  assert fingerprint(weights(1)) == fingerprint(weights(3)) == fingerprint(weights(4))
  assert len({fingerprint(weights(1)), fingerprint(weights(1, seed=1)), fingerprint(weights(1, dtype='bfloat16'))}) == 3


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_one_bit_and_two_elements_in_other_places_change_it(dtype):
  array = np.arange(24, dtype=np.float32).reshape(4, 6)
  changed, swapped = array.copy(), array.copy()
  changed[2, 3] += 1
  swapped[[0, 1]] = swapped[[1, 0]]
  sums = {fingerprint({'a': jnp.asarray(one, dtype)}) for one in (array, changed, swapped, array.reshape(6, 4).T)}
  sums |= {fingerprint({'b': jnp.asarray(array, dtype)})}
  assert len(sums) == 5
