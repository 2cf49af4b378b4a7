"""A worker's passes as TPUs would run them: compiled whole by the real compiler, with the kernels in, without a TPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from pallas_kernels import devices, static_cost
from pdjax.engine.slots import Slots
from pdjax.engine.worker import Worker
from pdjax.kv import page_bytes
from pdjax.model.transformer import weight_axes, weight_shapes
from pdjax.sharding import ShardingRules, make_mesh, replicated
from pdjax.types.cluster import WorkerSpec
from pdjax.types.model import ModelSpec

pytestmark = pytest.mark.skipif(static_cost.compiler() is None, reason='there is no TPU compiler here; see topology()')

LLAMA = dataclasses.replace(ModelSpec.llama3_8b(), context_len=8192)
TP, PAGES, PAGE_SIZE = 4, 4096, 16


class Unallocated(Worker):
  """A worker whose pages and slots are shapes alone."""

  def reset(self):
    self.incarnation += 1
    self.pages = self.page_shapes
    rows = self._num_slots + self.spec.max_chunks
    slots = Slots(self._empty_rows(), jax.ShapeDtypeStruct((rows, self.model.vocab_size), np.uint16))
    whole = replicated(self.mesh)
    self.slots = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), slots)


def llama(device: devices.Device) -> Worker:
  """Llama 3 8B over four TPUs, its weights shapes alone too."""
  mesh, rules, axes = make_mesh(LLAMA, static_cost.topology(device)[:TP]), ShardingRules(), weight_axes(LLAMA)

  def placed(path, leaf):
    name = '.'.join(str(getattr(step, 'key', getattr(step, 'idx', step))) for step in path)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, rules.spec(*axes[name])))

  weights = jax.tree_util.tree_map_with_path(placed, weight_shapes(LLAMA, jnp.dtype('bfloat16')))
  spec = WorkerSpec('llama', tp=TP, num_pages=PAGES, max_sequences=64)
  return Unallocated(spec, LLAMA, mesh, weights, PAGE_SIZE, jnp.dtype('bfloat16'), lambda request: 16)


@pytest.mark.parametrize(
  'name, key',
  [
    ('v5e', ('decode', 64)),
    pytest.param('v6e', ('decode', 64), marks=pytest.mark.slow),
    pytest.param('v5e', ('prefill', 512), marks=pytest.mark.slow),
    pytest.param('v6e', ('prefill', 512), marks=pytest.mark.slow),
  ],
)
def test_llama_3_8b_fits_and_its_cache_stays_in_place(name, key):
  device = devices.by_name(name)
  worker = llama(device)
  compiled = worker._lower(key).compile()
  memory = compiled.memory_analysis()
  pool = PAGES * page_bytes(LLAMA, PAGE_SIZE, jnp.dtype('bfloat16')) // TP
  assert memory.alias_size_in_bytes >= pool
  assert memory.temp_size_in_bytes < pool / 4, 'a pool is copied'
  kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  assert kept + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes < device.hbm_bytes
  kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
  assert kernels >= 2 * LLAMA.num_layers  # an append and an attention in each layer
