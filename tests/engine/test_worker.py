"""A worker's programs, as the compiler counts: pools are updated in place, and nothing grows with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdjax.engine.programs import Decode
from pdjax.engine.slots import Sequences, Slots
from pdjax.engine.steps import Steps
from pdjax.engine.worker import Worker
from pdjax.kv import KVPages
from pdjax.kv.transfer import DevicePut
from pdjax.model import sampling
from pdjax.model.transformer import weight_shapes
from pdjax.serving.orders import ChunkOrder, StepOrder
from pdjax.sharding import replicated
from pdjax.types import ModelSpec, Request, SamplingParams, TransferSpec
from tests.engine.cluster import Cluster, compiled
from tests.tiny import TINY

LARGE = 1024  # pages, against 64


def enlarged(cluster: Cluster, name: str) -> Worker:
  """The same worker with a larger pool, not compiled yet."""
  worker = cluster.workers[name]
  return Worker(
    dataclasses.replace(worker.spec, num_pages=LARGE), worker.model, worker.mesh, worker.weights,
  )  # fmt: skip


def pool_bytes(worker: Worker) -> int:
  return worker.spec.num_pages * worker.spec.page_size * worker.model.cached_token_bytes(worker.spec.kv_dtype)


@pytest.mark.parametrize(
  'fixture, name, program',
  [
    ('two_and_two', 'prefill0', 'prefillx32'),
    ('two_and_two', 'decode0', 'decodex4'),
    pytest.param('colocated_pair', 'both0', 'fusedx32x2', marks=pytest.mark.slow),
  ],
)
def test_a_step_updates_its_pool_in_place_and_needs_no_more_memory_for_a_larger_one(fixture, name, program, request):
  cluster = request.getfixturevalue(fixture)
  worker, larger = cluster.workers[name], enlarged(cluster, name)
  small = worker.program(program).memory_analysis()
  with jax.default_matmul_precision('highest'):
    large = larger.lower(larger.programs[program]).compile().memory_analysis()
  assert small.alias_size_in_bytes >= pool_bytes(worker)
  assert large.alias_size_in_bytes >= pool_bytes(larger)
  assert large.temp_size_in_bytes <= 1.1 * small.temp_size_in_bytes
  assert large.temp_size_in_bytes < pool_bytes(larger) / 4


@pytest.mark.parametrize(
  'fixture, name, program',
  [
    ('two_and_two', 'prefill0', 'prefillx32'),
    ('two_and_two', 'decode0', 'decodex1'),
    ('two_and_two', 'decode0', 'decodex4'),
    pytest.param('colocated_pair', 'both0', 'fusedx32x2', marks=pytest.mark.slow),
  ],
)
def test_to_know_whether_logits_are_finite_takes_less_than_a_percent_of_a_step(fixture, name, program, request):
  worker = request.getfixturevalue(fixture).workers[name]
  assert_cheap(lambda: worker.lower(worker.programs[program]))


@pytest.mark.slow
@pytest.mark.parametrize('sequences', [1, 8, 64])
def test_so_it_does_for_a_model_as_people_use_them(sequences, one_and_one):
  """The wider a model, the more of its step is in its products; the more sequences, the more is in their logits."""
  worker = one_and_one.workers['decode0']
  model = ModelSpec.smollm2_135m()
  pages = KVPages.shapes(model.cache[0], 64, 16, jnp.dtype('float32'), worker.mesh)
  width = model.context_len // 16
  rows = np.zeros((sequences, model.vocab_size), np.uint16)
  state = weight_shapes(model, jnp.dtype('float32')), Slots(Sequences.empty(sequences, width), rows)
  weights, slots = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(worker.mesh)), state
  )
  ids, steps = np.zeros(sequences, np.int32), np.int32(1)
  assert_cheap(lambda: jax.jit(Steps(model, worker.mesh, 16).decode).lower(weights, pages, slots, ids, steps))


def assert_cheap(lower) -> None:
  """Less than a hundredth of what a step computes and reads, by the compiler's count, tells of finite logits."""
  costs = lower().compile().cost_analysis()
  likeliest = sampling.likeliest
  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(sampling, 'have_nan', lambda logits: jnp.zeros(len(logits), bool))
    patched.setattr(sampling, 'likeliest', lambda logits: (likeliest(logits)[0], jnp.zeros(len(logits))))
    without = lower().compile().cost_analysis()
  for what in ('flops', 'bytes accessed'):
    assert without[what] < costs[what] < 1.01 * without[what]


def test_a_step_of_an_earlier_incarnation_takes_nothing_of_the_next(two_and_two):
  worker = two_and_two.workers['prefill0']
  request = Request('r', (1, 2, 3), SamplingParams(max_tokens=4))
  order = StepOrder(0, 'prefill0', (ChunkOrder(request, 0, 3, {'kv': (0,)}, 4),))
  before = worker.dispatch(order)
  worker.reset()
  again = worker.dispatch(order)
  assert [result.request for result in worker.collect(order, before)[0]] == ['r']
  (result,), _, _ = worker.collect(order, again)
  assert result.request == 'r' and len(result.tokens) == 1
  assert not worker.followed.ids


@pytest.mark.parametrize(
  'fixture, name', [('two_and_two', 'prefill0'), ('two_and_two', 'decode0'), ('colocated_pair', 'both0')]
)
def test_every_program_has_run_once_before_the_first_request_and_nothing_is_alive_then(
  fixture, name, request, monkeypatch
):
  model = request.getfixturevalue(fixture).workers[name]
  layers = TransferSpec(granularity='layers')
  worker = Worker(model.spec, model.model, model.mesh, model.weights, transfer=layers)
  ran = []
  run = Worker.run
  monkeypatch.setattr(Worker, 'run', lambda worker, one, *rest: [ran.append(one.name), run(worker, one, *rest)][1])
  seconds = worker.compile('highest')
  assert set(ran) == set(seconds)
  assert not np.asarray(worker.slots.rows.alive).any()
  assert not np.asarray(worker.slots.history).any()
  assert not any(np.asarray(layer[1:]).any() for layer in worker.pages.layers)


def test_a_transfer_is_written_in_place_and_needs_no_more_memory_for_a_larger_pool(two_and_two):
  source, target = two_and_two.workers['prefill0'], two_and_two.workers['decode0']
  larger_source, larger_target = enlarged(two_and_two, 'prefill0'), enlarged(two_and_two, 'decode0')
  small = two_and_two.transports['prefill0', 'decode0', 'kv']
  large = DevicePut(larger_source.pools['kv'], larger_target.pools['kv'], two_and_two.config.transfer)
  shape = (two_and_two.model.num_layers, 4)
  small_scatter, large_scatter = (
    small.target._scatters[shape].memory_analysis(),
    large.target._lower_scatter(shape).compile().memory_analysis(),
  )
  assert small_scatter.alias_size_in_bytes >= pool_bytes(target)
  assert large_scatter.alias_size_in_bytes >= pool_bytes(larger_target)
  assert large_scatter.temp_size_in_bytes <= 1.1 * small_scatter.temp_size_in_bytes
  small_gather = small.source._gathers[shape].memory_analysis()
  large_gather = large.source._lower_gather(shape).compile().memory_analysis()
  assert large_gather.temp_size_in_bytes <= 1.1 * small_gather.temp_size_in_bytes
  assert pool_bytes(source) < pool_bytes(larger_source)


def test_a_page_is_copied_and_a_past_remembered_in_place(two_and_two):
  worker = two_and_two.workers['decode0']
  copied, remembered = (worker.program(name).memory_analysis() for name in ('copy', 'remember'))
  assert copied.alias_size_in_bytes >= pool_bytes(worker)
  assert copied.temp_size_in_bytes <= 2 * worker.spec.page_size * worker.model.cached_token_bytes(worker.spec.kv_dtype)
  assert remembered.alias_size_in_bytes >= worker.slots.history.nbytes
  assert remembered.temp_size_in_bytes < worker.slots.history.nbytes / 4


def test_steps_give_the_buffers_of_their_pool_back(one_and_one):
  worker = one_and_one.workers['decode0']
  before = [shard.data.unsafe_buffer_pointer() for layer in worker.pages.layers for shard in layer.addressable_shards]
  old = worker.pages
  batch = worker.spec.batch_buckets[0]
  worker.run(Decode(batch), worker.packing.ids((), batch), jnp.int32(1))
  after = [shard.data.unsafe_buffer_pointer() for layer in worker.pages.layers for shard in layer.addressable_shards]
  assert after == before
  assert all(layer.is_deleted() for layer in old.layers)


def test_a_worker_compiles_every_bucket_of_its_role(two_and_two, colocated_pair):
  programs = {name for name in two_and_two.warm_up.program_s if '→' not in name}
  expected = {f'prefill{i}/{program}' for i in range(2) for program in ('remember', 'copy', 'prefillx32')}
  expected |= {
    f'decode{i}/{program}'
    for i in range(2)
    for program in ('remember', 'admit', 'grow', 'copy', 'decodex1', 'decodex4')
  }
  assert programs == expected
  assert {name for name in colocated_pair.warm_up.program_s if name.startswith('both0')} == {
    'both0/remember', 'both0/admit', 'both0/grow', 'both0/copy', 'both0/fusedx32x2', 'both0/decodex1', 'both0/decodex2',
  }  # fmt: skip
  ways = {name for name in two_and_two.warm_up.program_s if '→' in name}
  assert ways == {f'prefill{i}→decode{j}/{size} units' for i in range(2) for j in range(2) for size in (1, 4)}


def test_a_reset_worker_is_a_new_incarnation_with_empty_pages(one_and_one):
  worker = one_and_one.workers['decode0']
  worker.pages.layers[0].delete()
  assert worker.broken
  incarnation = worker.incarnation
  worker.reset()
  assert not worker.broken and worker.incarnation == incarnation + 1
  assert not any(bool(layer.any()) for layer in worker.pages.layers)
  assert not bool(worker.slots.rows.alive.any())


def test_compilations_are_noticed():
  before = len(compiled)
  jax.jit(lambda x: x * TINY.vocab_size - 0.125).lower(jnp.zeros(17)).compile()
  assert len(compiled) > before
