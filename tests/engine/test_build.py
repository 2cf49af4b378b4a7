"""From a config to an engine: what cannot be built is refused before anything is loaded, and why is said."""

import dataclasses
import re
import subprocess
import sys

import jax
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
