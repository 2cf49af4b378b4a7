"""The products that a step is held against are the model's: none can be joined with another layer's."""

import collections

import jax
import jax.numpy as jnp

from experiments.floor import multiply_all, products
from tests.tiny import TINY_8_2


def test_no_two_layers_share_an_operand_and_in_a_layer_only_gate_and_up_do():
  call = products(TINY_8_2, 4, 1, outputs_first=False)
  arrays = call.args
  jaxpr = jax.make_jaxpr(lambda *given: multiply_all(jnp.matmul, *given))(*arrays).jaxpr
  names = {var: jax.tree_util.keystr(path) for var, (path, _) in zip(
    jaxpr.invars, jax.tree_util.tree_leaves_with_path(arrays), strict=True
  )}  # fmt: skip
  read = collections.Counter(names[var] for equation in jaxpr.eqns for var in equation.invars)
  shared = {name for name, count in read.items() if count > 1}
  assert shared == {f'[0][{layer}][2]' for layer in range(TINY_8_2.num_layers)}
  assert sum(read.values()) == 2 * (5 * TINY_8_2.num_layers + 1)
  assert set(read) == set(names.values())


def test_each_layer_reads_memory_of_its_own():
  inputs, layers, *_ = products(TINY_8_2, 4, 1, outputs_first=True).args
  places = [array.unsafe_buffer_pointer() for array in jax.tree.leaves((inputs, layers))]
  assert len(set(places)) == len(places)
