"""The dtype of a run by its devices: what 'auto' takes, and what is refused before anything is loaded."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdjax import launch
from pdjax.controller.processes import Handshake, build_processes
from pdjax.cost import Roofline
from pdjax.deployment import calibrated
from pdjax.dtypes import settle_dtype
from pdjax.engine import build, worker_process
from pdjax.model.checkpoint import RandomCheckpoint, save_orbax
from pdjax.model.weights import load_weights
from pdjax.run_folder import read_run
from pdjax.sharding import make_mesh
from pdjax.types import ChipSpec
from pdjax.types.handshake import Machine
from pdjax.types.hardware import DeviceKind
from tests.controller.thread_peers import Processes
from tests.engine.plain import generate
from tests.engine.test_build import build_untouched
from tests.tiny import TINY, config

# As JAX shows them. Only a CUDA device has a compute capability of two numbers, and a TPU none at all.
DEVICES = {
  'H100': types.SimpleNamespace(platform='gpu', device_kind='NVIDIA H100 80GB HBM3', compute_capability='9.0'),
  'B200': types.SimpleNamespace(platform='gpu', device_kind='NVIDIA B200', compute_capability='10.0'),
  'A100': types.SimpleNamespace(platform='gpu', device_kind='NVIDIA A100-SXM4-40GB', compute_capability='8.0'),
  'T4': types.SimpleNamespace(platform='gpu', device_kind='Tesla T4', compute_capability='7.5'),
  'V100': types.SimpleNamespace(platform='gpu', device_kind='Tesla V100-SXM2-16GB', compute_capability='7.0'),
  'MI250': types.SimpleNamespace(platform='gpu', device_kind='AMD Instinct MI250X', compute_capability='gfx90a'),
  'v5e': types.SimpleNamespace(platform='tpu', device_kind='TPU v5 lite'),
  'CPU': types.SimpleNamespace(platform='cpu', device_kind='cpu'),
}
FASTEST = {
  'H100': 'bfloat16', 'B200': 'bfloat16', 'A100': 'bfloat16', 'T4': 'float16', 'V100': 'float16', 'MI250': 'bfloat16',
  'v5e': 'bfloat16', 'CPU': 'float32',
}  # fmt: skip
OLD = [name for name, dtype in FASTEST.items() if dtype == 'float16']


def kinds(prefill: str, decode: str) -> dict[str, list[DeviceKind]]:
  """One prefill and one decode worker on such devices."""
  return {'prefill0': [DeviceKind.of(DEVICES[prefill])], 'decode0': [DeviceKind.of(DEVICES[decode])]}


def run_with(kv_dtypes=(None, None), **fields):
  """A tiny run; each worker's own cache dtype may be given."""
  run = config()
  workers = [dataclasses.replace(one, kv_dtype=kv) for one, kv in zip(run.workers, kv_dtypes, strict=True)]
  return dataclasses.replace(run, workers=workers, **fields)


# ---------------------------------------------------------------------------- 'auto'


@pytest.mark.parametrize('device', DEVICES)
def test_auto_is_what_the_devices_are_fastest_in(device):
  run = settle_dtype(run_with(dtype='auto'), kinds(device, device))
  assert run.dtype == FASTEST[device]
  assert {worker.kv_dtype for worker in run.cluster} == {FASTEST[device]}


def test_auto_takes_one_dtype_for_devices_that_are_fastest_in_the_same():
  assert settle_dtype(run_with(dtype='auto'), kinds('T4', 'V100')).dtype == 'float16'
  assert settle_dtype(run_with(dtype='auto'), kinds('A100', 'v5e')).dtype == 'bfloat16'


def test_auto_is_refused_where_workers_disagree_naming_both_and_what_to_set():
  with pytest.raises(
    ValueError,
    match=re.escape(
      "dtype is 'auto', but worker 'prefill0' runs on NVIDIA A100-SXM4-40GB (compute capability 8.0), which is fastest "
      "in bfloat16, and worker 'decode0' runs on Tesla T4 (compute capability 7.5), which is fastest in float16; "
      "set dtype='float16' or dtype='float32', or give workers weights of their own (WorkerSpec.weights)."
    ),
  ):
    settle_dtype(run_with(dtype='auto'), kinds('A100', 'T4'))
  for remedy in ('float16', 'float32'):
    assert settle_dtype(run_with(dtype=remedy), kinds('A100', 'T4')).dtype == remedy


def test_workers_with_weights_of_their_own_have_no_say_in_auto():
  run = run_with(dtype='auto')
  own = dataclasses.replace(run.workers[1], weights='float16', kv_dtype='float16')
  run = settle_dtype(dataclasses.replace(run, workers=(run.workers[0], own)), kinds('A100', 'T4'))
  assert run.dtype == 'bfloat16' and [worker.weights for worker in run.cluster] == ['bfloat16', 'float16']
  narrow = dataclasses.replace(
    run, dtype='float16', workers=(run.workers[0], dataclasses.replace(own, weights='bfloat16'))
  )
  with pytest.raises(ValueError, match=r"weights is 'bfloat16', but worker 'decode0' .*; set weights='float16'"):
    settle_dtype(narrow, kinds('A100', 'T4'))


def test_auto_is_what_the_first_worker_has_where_all_name_their_weights():
  run = run_with(dtype='auto')
  workers = [
    dataclasses.replace(one, weights=name, kv_dtype=name)
    for one, name in zip(run.workers, ('float16', 'bfloat16'), strict=True)
  ]
  assert settle_dtype(dataclasses.replace(run, workers=workers), kinds('V100', 'H100')).dtype == 'float16'


def test_auto_is_refused_where_the_devices_of_one_worker_disagree():
  mixed = {'prefill0': [DeviceKind.of(DEVICES[name]) for name in ('T4', 'H100')], 'decode0': []}
  with pytest.raises(ValueError, match=r"'prefill0' runs on Tesla T4 .*, and worker 'prefill0' runs on NVIDIA H100"):
    settle_dtype(run_with(dtype='auto'), mixed)


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('device', DEVICES)
def test_a_dtype_that_is_named_is_kept_everywhere(device, dtype):
  run = run_with(dtype=dtype)
  assert settle_dtype(run, kinds(device, device)) == run


# ---------------------------------------------------------------------------- bfloat16 on GPUs without units for it


@pytest.mark.parametrize('device', DEVICES)
def test_bfloat16_is_refused_on_gpus_without_units_for_it_and_nowhere_else(device):
  run = run_with(dtype='bfloat16')
  if device not in OLD:
    assert settle_dtype(run, kinds(device, device)) == run
    return
  kind = f'{DEVICES[device].device_kind} (compute capability {DEVICES[device].compute_capability})'
  with pytest.raises(
    ValueError,
    match=re.escape(
      f"dtype is 'bfloat16', but worker 'prefill0' runs on {kind}, which has no units for it, as GPUs have from 8.0 "
      "on; set dtype='float16', or dtype='auto' for what the devices are fastest in."
    ),
  ):
    settle_dtype(run, kinds(device, device))


def test_one_old_gpu_among_new_ones_is_found():
  with pytest.raises(ValueError, match="worker 'decode0' runs on Tesla T4"):
    settle_dtype(run_with(dtype='bfloat16'), kinds('H100', 'T4'))
  behind = {'prefill0': [DeviceKind.of(DEVICES[name]) for name in ('H100', 'T4')], 'decode0': []}
  with pytest.raises(ValueError, match="worker 'prefill0' runs on Tesla T4"):
    settle_dtype(run_with(dtype='bfloat16'), behind)


@pytest.mark.parametrize('dtype', ['auto', 'float16', 'float32'])
def test_a_cache_in_bfloat16_is_refused_where_weights_in_it_would_be(dtype):
  message = r"kv_dtype is 'bfloat16', but worker '{}' runs on Tesla T4 .*; set kv_dtype='float16', or leave it out\."
  with pytest.raises(ValueError, match=message.format('prefill0')):
    settle_dtype(run_with(dtype=dtype, kv_dtype='bfloat16'), kinds('T4', 'T4'))
  with pytest.raises(ValueError, match=message.format('decode0')):
    settle_dtype(run_with((None, 'bfloat16'), dtype=dtype), kinds('T4', 'T4'))
  with pytest.raises(ValueError, match=message.format('decode0')):  # the worker's own goes before the config's
    settle_dtype(run_with(('int8', None), dtype=dtype, kv_dtype='bfloat16'), kinds('T4', 'T4'))


def test_a_cache_in_bfloat16_is_kept_where_its_own_worker_has_units_for_it():
  run = run_with(('bfloat16', 'int8'), dtype='float16')
  assert settle_dtype(run, kinds('A100', 'T4')) == run


# ---------------------------------------------------------------------------- before anything is loaded


@pytest.mark.parametrize('fields', [{'dtype': 'bfloat16'}, {'dtype': 'auto', 'kv_dtype': 'bfloat16'}])
def test_nothing_is_loaded_onto_devices_that_lack_what_is_asked_for(monkeypatch, fields):
  monkeypatch.setattr(build, 'prepare_devices', lambda platform, needed: [DEVICES['T4']] * needed)
  with pytest.raises(ValueError, match=r"dtype is 'bfloat16', but worker 'prefill0' runs on Tesla T4"):
    build_untouched(run_with(platform='gpu', **fields))


def test_only_devices_that_workers_have_count(monkeypatch):
  monkeypatch.setattr(build, 'prepare_devices', lambda platform, needed: [*jax.devices()[:2], DEVICES['T4']])
  with pytest.raises(AssertionError, match='was loaded'):
    build_untouched(run_with(dtype='bfloat16'))


class Elsewhere:
  """A process that tells of such devices, and must not be asked to do more."""

  def __init__(self, *devices: str):
    self.devices = devices

  def ask(self, method, *args):
    assert method == 'machine'
    kinds = tuple(DeviceKind.of(DEVICES[name]) for name in self.devices)
    return Machine('here', 1, kinds, ('cuda:0',), 1e9, '127.0.0.1:1')

  def restart(self):
    pass


@pytest.mark.parametrize(
  ('dtype', 'message'),
  [
    ('auto', "'prefill0' runs on NVIDIA H100 .*, and worker 'decode0' runs on Tesla T4"),
    ('bfloat16', "dtype is 'bfloat16', but worker 'decode0' runs on Tesla T4"),
  ],
)
def test_processes_are_asked_what_their_devices_are_before_they_load(dtype, message):
  with pytest.raises(ValueError, match=message):
    build_processes(run_with(dtype=dtype), TINY, {'prefill0': Elsewhere('H100'), 'decode0': Elsewhere('T4')})


def test_a_worker_that_comes_back_on_another_gpu_is_asked_again():
  peers = {'prefill0': Elsewhere('H100'), 'decode0': Elsewhere('A100')}
  handshake = Handshake(run_with(dtype='auto'), TINY, peers)
  assert handshake.count_on({name: handshake.begin(name) for name in peers}).dtype == 'bfloat16'
  peers['decode0'].devices = ('T4',)
  with pytest.raises(ValueError, match="dtype is 'bfloat16', but worker 'decode0' runs on Tesla T4"):
    handshake.revive('decode0', 2)


# ---------------------------------------------------------------------------- runs


def test_a_run_in_auto_on_a_cpu_is_one_in_float32_and_the_report_says_so(tmp_path):
  run = run_with(dtype='auto')
  result = launch.run(run, workdir=tmp_path)
  assert {one.request.id: (one.token_ids, one.finish_reason) for one in result.completions} == {
    request.id: generate(TINY, request) for request in run.workload.requests
  }
  assert result.report.config['dtype'] == 'float32'
  assert '"dtype": "float32"' in (tmp_path / 'report.json').read_text()
  assert read_run(tmp_path)['settled'] == {'dtype': 'float32'}
  assert {worker.kv_dtype for worker in result.workers} == {'float32'}


def test_processes_in_auto_have_one_dtype_that_the_handshake_knows(monkeypatch):
  v100 = DeviceKind.of(DEVICES['V100'])
  monkeypatch.setattr(worker_process, 'DeviceKind', types.SimpleNamespace(of=lambda device: v100))
  processes = Processes.of(run_with(dtype='auto'))
  try:
    assert processes.built.dtype == 'float16'
    for peer in processes.peers.values():
      worker = peer.process.engine.worker
      assert {leaf.dtype for leaf in jax.tree.leaves(worker.weights)} == {jnp.dtype('float16')}
      assert worker.spec.kv_dtype == 'float16'
  finally:
    processes.built.backend.close()


def test_a_checkpoint_in_bfloat16_is_loaded_in_float16(tmp_path):
  saved = save_orbax(RandomCheckpoint(TINY), tmp_path / 'saved', 'bfloat16')
  (weights,) = load_weights(saved, TINY, {'w': make_mesh(TINY, jax.devices()[:1])}, jnp.dtype('float16')).values()
  assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype('float16')}
  np.testing.assert_array_equal(
    weights['unembed'], RandomCheckpoint(TINY).tensor('unembed').T.astype(jnp.bfloat16).astype(np.float16)
  )


def test_a_simulation_in_auto_that_measures_this_machine_takes_what_it_is_fastest_in():
  measured = calibrated(run_with(dtype='auto', cost=Roofline(ChipSpec.tpu_v5e())))
  assert (measured.dtype, measured.cost.chip.dtype) == ('float32', 'float32')
