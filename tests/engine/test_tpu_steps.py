"""A worker's steps as TPUs would run them: compiled whole by the real compiler, with the kernels in, without a TPU."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from pallas_kernels import devices, static_cost
from pdjax.engine.programs import Decode, Prefill, Program
from pdjax.engine.worker import Worker
from pdjax.kv.transfer import DevicePut
from pdjax.model.transformer import weight_shapes
from pdjax.sharding import ShardingRules, make_mesh, replicated
from pdjax.types.model import ModelSpec
from pdjax.types.transfer import TransferSpec
from pdjax.types.worker import WorkerSpec

pytestmark = pytest.mark.skipif(static_cost.compiler() is None, reason='there is no TPU compiler here; see topology()')

LLAMA = dataclasses.replace(ModelSpec.llama3_8b(), context_len=8192)
SMOLLM2 = dataclasses.replace(ModelSpec.smollm2_135m(), num_layers=2)
PAIRS = dataclasses.replace(SMOLLM2, query_heads=12, kv_heads=4)
PAGE_SIZE, BFLOAT16 = 16, jnp.dtype('bfloat16')


class Unallocated(Worker):
  """A worker whose pages and slots are shapes alone."""

  def reset(self):
    self.incarnation += 1
    self.pages = self.page_shapes
    whole = replicated(self.mesh)
    self.slots = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), self.packing.empty_slots()
    )


def unallocated(model: ModelSpec, device: devices.Device, tp: int, num_pages: int) -> Worker:
  """A worker on TPUs whose weights are shapes alone too."""
  mesh, rules, axes = (
    make_mesh(model, static_cost.topology(device)[:tp]),
    ShardingRules(),
    {name: row.axes for name, row in model.weights.items()},
  )

  def placed(path, leaf):
    name = '.'.join(str(getattr(step, 'key', getattr(step, 'idx', step))) for step in path)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, rules.spec(*axes[name])))

  weights = jax.tree_util.tree_map_with_path(placed, weight_shapes(model, BFLOAT16))
  spec = WorkerSpec('tpu', tp=tp, num_pages=num_pages, max_sequences=64, page_size=PAGE_SIZE, kv_dtype='bfloat16')
  return Unallocated(spec, model, mesh, weights)


def assert_kernels_work_in_place(worker: Worker, device: devices.Device, program: Program) -> None:
  """The step fits the device, copies no pool, and in each layer a kernel appends and another attends."""
  compiled = worker.lower(program).compile()
  memory = compiled.memory_analysis()
  pool = worker.pages.num_pages * PAGE_SIZE * worker.model.cached_token_bytes('bfloat16') // worker.spec.tp
  assert memory.alias_size_in_bytes >= pool
  assert memory.temp_size_in_bytes < pool / 4, 'a pool is copied'
  kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  assert kept + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes < device.hbm_bytes
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') >= 2 * worker.model.num_layers


@pytest.mark.slow
@pytest.mark.parametrize('name', ['v5e', 'v6e'])
@pytest.mark.parametrize('program', [Decode(64), Prefill(512)], ids=lambda one: one.name)
def test_llama_3_8b_fits_and_its_cache_stays_in_place(name, program):
  device = devices.by_name(name)
  assert_kernels_work_in_place(unallocated(LLAMA, device, tp=4, num_pages=4096), device, program)


@pytest.mark.parametrize(
  'model, tp, layout, program',
  [
    (SMOLLM2, 1, 'kv', Decode(64)),
    pytest.param(SMOLLM2, 1, 'kv', Prefill(512), marks=pytest.mark.slow),
    pytest.param(SMOLLM2, 3, 'kv', Decode(64), marks=pytest.mark.slow),
    pytest.param(PAIRS, 2, 'paired', Prefill(512), marks=pytest.mark.slow),
    pytest.param(PAIRS, 2, 'paired', Decode(64), marks=pytest.mark.slow),
  ],
)
def test_heads_of_64_are_packed_for_the_kernels(model, tp, layout, program):
  device = devices.by_name('v5e')
  worker = unallocated(model, device, tp, num_pages=1 << 15)
  assert worker.pages.layout.name == layout
  assert_kernels_work_in_place(worker, device, program)


def test_a_transfer_between_packed_pools_copies_neither():
  device = devices.by_name('v5e')
  pools = [unallocated(SMOLLM2, device, tp, num_pages=1 << 15).pools['kv'] for tp in (1, 3)]
  transport = DevicePut(*pools, TransferSpec())
  everything = SMOLLM2.num_layers, 64
  for program in (transport.source._lower_gather(everything), transport.target._lower_scatter(everything)):
    assert program.compile().memory_analysis().temp_size_in_bytes < 1 << 20
