"""From a config to an engine: what cannot be built is refused before anything is loaded, and why is said."""

import dataclasses
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from pdjax import launch
from pdjax.engine import build
from pdjax.model.checkpoint import RandomCheckpoint
from pdjax.types import TransferSpec, WorkerSpec
from pdjax.types.cluster import DeviceError
from pdjax.workload import Given
from tests.engine.plain import generate
from tests.tiny import SIZES, TINY, TINY_12_12, config, requests


@dataclasses.dataclass(frozen=True)
class Untouched(RandomCheckpoint):
  """A checkpoint that must not be read."""

  def tensor(self, name):
    raise AssertionError(f'{name} was loaded')


def build_untouched(run):
  return build.build_engine(run, run.model, Untouched(run.model))


def test_too_few_cpu_devices_once_jax_has_started_is_a_clear_error():
  have = len(jax.devices())
  with pytest.raises(DeviceError, match=rf'need {have + 4} CPU devices, but JAX has already started with {have}; .*'
                                         rf"jax_num_cpu_devices', {have + 4}"):  # fmt: skip
    build_untouched(config('1P1D', 6, 6, model=TINY_12_12))


def test_a_mesh_larger_than_the_devices_is_refused(monkeypatch):
  monkeypatch.setattr(build, 'prepare_devices', lambda platform, needed: jax.devices()[:3])  # as on an accelerator
  with pytest.raises(ValueError, match=r'need 4 devices \(prefill0 2, decode0 2\), but there are 3; lower tp'):
    build_untouched(config('1P1D', 2, 2))


@pytest.mark.parametrize('prefill_tp, decode_tp, wrong', [(5, 1, 5), (1, 3, 3), (1, 4, 4)])
def test_heads_that_do_not_divide_are_refused(prefill_tp, decode_tp, wrong):
  with pytest.raises(
    ValueError, match=f"tp={wrong} does not fit 'tiny' with 6 query heads and 2 key/value heads.*use one of 1, 2, 6"
  ):
    build_untouched(config('1P1D', prefill_tp, decode_tp))


def test_a_page_layout_that_the_heads_cannot_have_is_refused_before_anything_is_loaded():
  with pytest.raises(ValueError, match=r"page_layout is 'paired'.*with tp=2 there are 1 of the 2 of the model"):
    build_untouched(config('1P1D', 1, 2, page_layout='paired'))


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(monkeypatch):
  monkeypatch.setattr(build, 'device_memory_bytes', lambda device: 50_000.0)
  needed = re.escape(f'{2 * TINY.weight_bytes(4) / 1e9:.3g} GB')  # two workers, one memory
  with pytest.raises(ValueError, match=rf'tiny needs {needed} of weights, but 5e-05 GB may be filled in the memory of'):
    build_untouched(config())


def test_pages_that_do_not_fit_are_refused_before_anything_is_loaded(monkeypatch):
  monkeypatch.setattr(build, 'device_memory_bytes', lambda device: 2 * TINY.weight_bytes(4) + 1000.0)
  with pytest.raises(ValueError, match=r'weights \(.* GB\), pages \(.* GB\) and staging \(.* GB\) do not fit'):
    build_untouched(config())


def test_no_room_for_a_single_page_is_refused_before_anything_is_loaded(monkeypatch):
  used = 2 * (TINY.weight_bytes(4) + TransferSpec().staging_bytes)
  monkeypatch.setattr(build, 'device_memory_bytes', lambda device: used + 1000.0)
  with pytest.raises(
    ValueError, match="worker 'prefill0' has 5e-07 GB left for pages beside weights and staging, but one page"
  ):
    build_untouched(config(num_pages='auto'))


def test_workers_on_one_device_share_its_weights_and_the_report_says_so(monkeypatch):
  built = []

  class Noted(build.Worker):
    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      built.append(self)

  monkeypatch.setattr(build, 'Worker', Noted)
  sizes = {**SIZES, 'num_pages': 'auto', 'max_sequences': 2, 'devices': (3,)}
  workers = (WorkerSpec('early', 'prefill', **sizes), WorkerSpec('late', 'decode', **{**sizes, 'max_chunks': 1}))
  wanted = requests((1, 9, 20), max_tokens=4)
  said, seen = [], []
  run = dataclasses.replace(config(), workers=workers, workload=Given(wanted))
  result = launch.run(run, say=said.append, watch=seen.append)

  early, late = built
  ours, theirs = jax.tree.leaves(early.weights), jax.tree.leaves(late.weights)
  assert len(ours) == 21 and all(a is b for a, b in zip(ours, theirs, strict=True))
  assert {device.id for leaf in ours for device in leaf.devices()} == {3}
  assert 'early and late share a device: each waits while another computes.' in result.report.notes
  assert {one.request.id: (one.token_ids, one.finish_reason) for one in result.completions} == {
    request.id: generate(TINY, request) for request in wanted
  }
  assert [one.request.id for one in result.completions] == [request.id for request in wanted]
  assert tuple(seen) == result.events
  assert [worker.num_pages for worker in result.workers] == [64, 32]  # what chunks and slots can use at full length
  assert any(re.fullmatch('early: prefill, tp=1 on .*3, 64 pages of 4 tokens in float32', line) for line in said), said
  assert result.report.backend == 'engine' and result.report.calibrated


def test_virtual_cpu_devices_are_made_where_jax_has_not_started_and_some_to_spare():
  code = "from pdjax.engine.build import prepare_devices; print(len(prepare_devices('cpu', 5)))"
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
  assert out.stdout.strip() == str(5 + build.SPARE_CPU_DEVICES), out.stderr


# ---------------------------------------------------------------------------- platforms


def _device(platform: str, number: int) -> types.SimpleNamespace:
  return types.SimpleNamespace(platform=platform, id=number, device_kind=f'a {platform}')


THERE = {'cpu': [_device('cpu', i) for i in range(4)], 'gpu': [_device('gpu', i) for i in range(3)]}


@pytest.fixture
def gpus_and_cpus(monkeypatch) -> list[tuple]:
  """A machine with both, where JAX finds the GPUs first; what was asked of it."""
  asked = []

  def prepare(platform, needed, alone=True):
    asked.append((platform, needed, alone))
    if platform == 'tpu':
      raise DeviceError("there are no devices of platform 'tpu' (none)")
    return THERE[platform or 'gpu']

  monkeypatch.setattr(build, 'prepare_devices', prepare)
  monkeypatch.setattr(jax, 'devices', lambda platform=None: THERE[platform or 'gpu'])
  return asked


def _on(prefill, decode, platform=None, **fields):
  run = config('1P1D', **fields)
  places = zip(run.workers, (prefill, decode), strict=True)
  workers = tuple(dataclasses.replace(worker, platform=place) for worker, place in places)
  return dataclasses.replace(run, workers=workers, platform=platform)


@pytest.mark.parametrize(
  ('prefill', 'decode', 'platform', 'found'),
  [
    ('cpu', 'gpu', None, ['cpu', 'gpu']),
    ('gpu', 'cpu', None, ['gpu', 'cpu']),
    ('cpu', None, None, ['cpu', 'gpu']),  # what JAX finds first
    (None, 'gpu', 'cpu', ['cpu', 'gpu']),
    (None, None, 'cpu', ['cpu', 'cpu']),
    ('gpu', None, None, ['gpu', 'gpu']),
  ],
)
def test_each_worker_has_devices_of_its_platform(gpus_and_cpus, prefill, decode, platform, found):
  devices, carved = build.pick_devices(_on(prefill, decode, platform, prefill_tp=2))
  picked = {name: [devices[index] for index in mesh] for name, mesh in carved.items()}
  assert [picked[name][0].platform for name in ('prefill0', 'decode0')] == found
  assert len(picked['prefill0']) == 2 and len({id(one) for mesh in picked.values() for one in mesh}) == 3
  if len(set(found)) == 2:  # CPU devices are made before anything else starts JAX, which is not told to find them alone
    assert gpus_and_cpus[0][0] == 'cpu' and not any(alone for *_, alone in gpus_and_cpus)


def test_a_named_device_is_one_of_its_platform(gpus_and_cpus):
  run = _on('cpu', 'gpu')
  workers = tuple(dataclasses.replace(worker, devices=(1,)) for worker in run.workers)
  devices, carved = build.pick_devices(dataclasses.replace(run, workers=workers))
  assert [(devices[mesh[0]].platform, devices[mesh[0]].id) for mesh in carved.values()] == [('cpu', 1), ('gpu', 1)]


def test_a_platform_that_is_not_there_is_told_with_who_wants_it_and_what_is(gpus_and_cpus):
  with pytest.raises(DeviceError, match=r"decode0 on platform 'tpu' \(JAX finds 3 of gpu\): there are no devices of"):
    build.pick_devices(_on('cpu', 'tpu'))
  with pytest.raises(ValueError, match=r"prefill0, decode0 on platform 'gpu' \(JAX finds 3 of gpu\): .*need 4 devices"):
    build.pick_devices(_on('gpu', 'gpu', prefill_tp=3))


def test_workers_that_name_the_cpu_serve_on_it():
  run = _on('cpu', 'cpu')
  result = launch.run(run)
  assert result.report.completed == len(requests())
  expected = launch.run(dataclasses.replace(_on(None, None), platform='cpu'))
  assert {one.request.id: one.token_ids for one in result.completions} == {
    one.request.id: one.token_ids for one in expected.completions
  }


def test_pages_go_over_the_host_between_unlike_platforms():
  places = [types.SimpleNamespace(mesh=types.SimpleNamespace(devices=np.array(THERE[name]))) for name in ('cpu', 'gpu')]
  names = [build._transport_name(TransferSpec(), one, other) for one in places for other in places]
  assert names == ['device_put', 'host_staged', 'host_staged', 'device_put']


def test_cpu_workers_share_the_host_and_gpu_workers_fill_their_own(monkeypatch, gpus_and_cpus):
  run = _on('cpu', 'gpu', num_pages='auto', max_sequences=64)
  devices, carved = build.pick_devices(run)
  monkeypatch.setattr(build, 'device_memory_bytes', lambda device: 2e5 if device.platform == 'cpu' else 3e5)
  run = dataclasses.replace(run, transfer=TransferSpec(staging_bytes=1000))
  prefill, decode = build._size_pools(run, TINY, devices, carved, ())
  both = dataclasses.replace(run, workers=tuple(dataclasses.replace(one, platform='cpu') for one in run.workers))
  shared, _ = build._size_pools(both, TINY, *build.pick_devices(both), ())
  assert shared.num_pages < prefill.num_pages < decode.num_pages
