"""Every config file loads, and its cluster serves in virtual time."""

import dataclasses
import inspect
import pathlib

import pytest

from experiments.load_config import load_config
from pdjax.config import ServingConfig
from pdjax.launch import simulate
from pdjax.policies import Colocated, Disaggregated
from pdjax.types import ModelSpec, Role
from pdjax.workload import Fixed, Poisson, Uniform

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(path.name for path in (ROOT / 'configs').glob('[a-z]*.py'))
REQUIRED = {'cpu.py': ':checkpoint=model.gguf'}
SMALL = {
  'changing_load_simulated.py': ':phase_s=6',
  'llama3_8b_simulated.py': ':num_requests=20',
  'mixed_simulated.py': ':num_requests=40',
  'unlike_chips_simulated.py': ':num_requests=20',
}


def _load(name: str, arguments: str = '') -> ServingConfig:
  return load_config(f'{ROOT / "configs" / name}{arguments or REQUIRED.get(name, "") or SMALL.get(name, "")}')


def _split(config: ServingConfig) -> str:
  """The workers in the field's shorthand, C for one of both roles."""
  letters = [{Role.PREFILL: 'P', Role.DECODE: 'D', Role.BOTH: 'C'}[worker.role] for worker in config.workers]
  return ''.join(f'{letters.count(letter)}{letter}' for letter in 'PDC' if letter in letters)


@pytest.mark.parametrize('name', FILES)
def test_a_config_loads_and_says_how_to_launch_it(name):
  assert isinstance(_load(name), ServingConfig)
  text = (ROOT / 'configs' / name).read_text()
  assert f'--config=configs/{name}' in text.split('"""')[1]


@pytest.mark.parametrize('name', FILES)
def test_a_config_serves_its_requests_in_virtual_time(name):
  config = _load(name)
  if config.model is None:  # its checkpoint is not at hand, but the shape of the model is
    workload = Poisson(requests_per_s=2.0, num_requests=12, prompt=Uniform(8, 24), output=Fixed(8))
    config = dataclasses.replace(config, model=ModelSpec.smollm2_135m(), checkpoint=None, workload=workload)
  report = simulate(config).report
  assert report.completed == report.num_prompts == config.workload.num_requests
  assert report.account.ttft_closes_s < 1e-6 and report.account.handoff_closes_s < 1e-6
  assert (report.num_transfers > 0) == config.moves_kv
  assert any('Uncalibrated' in note for note in report.notes)


@pytest.mark.parametrize('name', FILES)
def test_the_arguments_of_a_config_are_documented_and_have_types(name):
  path = ROOT / 'configs' / name
  module: dict = {}
  exec(compile(path.read_text(), path, 'exec'), module)
  get_config = module['get_config']
  for argument in inspect.signature(get_config).parameters.values():
    assert argument.annotation is not inspect.Parameter.empty
    assert f'\n  {argument.name}: ' in inspect.getdoc(get_config), f'{argument.name} is not explained'


@pytest.mark.parametrize(
  'name, arguments, split, tps',
  [
    ('smollm2_cpu.py', ':split=2P1D,prefill_tp=1,decode_tp=3', '2P1D', [1, 1, 3]),
    ('cpu.py', ':checkpoint=folder,split=1P2D,prefill_tp=2', '1P2D', [2, 1, 1]),
    ('llama3_8b_simulated.py', ':split=1P2D,tp=8', '1P2D', [8, 8, 8]),
    ('llama3_8b_simulated.py', ':split=colocated', '3C', [4, 4, 4]),
    ('smollm2_colocated.py', ':workers=3', '3C', [1, 1, 1]),
    ('smollm2_cpu.py', ':prefill_tp=9', '1P1D', [9, 1]),
  ],
)
def test_arguments_shape_the_cluster(name, arguments, split, tps):
  config = _load(name, arguments)
  assert _split(config) == split and [worker.tp for worker in config.workers] == tps
  assert isinstance(config.policy, Colocated if split.endswith('C') else Disaggregated)


def test_a_mix_is_counted_by_class_also_while_its_load_changes():
  config = _load('mixed_simulated.py', ':requests_per_s=4,busy_s=4')
  report = simulate(config).report
  assert report.by_class.keys() == {'chat', 'code'} and report.by_class['chat'].num_prompts > 10
  assert report.by_class['chat'].ttft.p50_ms < report.by_class['code'].ttft.p50_ms
  phases = [name.partition('/')[0] for name in report.timeline.requests.ids]
  assert phases.count('phase-1') > max(phases.count('phase-0'), phases.count('phase-2'))
  assert report.num_prompts == config.workload.num_requests


def test_the_baseline_differs_from_what_it_is_compared_with_only_in_workers_and_policy():
  baseline, disaggregated = _load('smollm2_colocated.py'), _load('smollm2_cpu.py')
  assert dataclasses.replace(baseline, workers=disaggregated.workers, policy=disaggregated.policy) == disaggregated
  assert sum(worker.tp for worker in baseline.workers) == sum(worker.tp for worker in disaggregated.workers)


def test_any_prompt_of_the_models_context_fits_the_pools_of_the_demo():
  config = _load('smollm2_cpu.py')
  for worker in config.workers:
    assert worker.num_pages * config.page_size >= ModelSpec.smollm2_135m().context_len


def test_one_device_holds_both_roles():
  config = _load('one_device.py')
  assert [worker.devices for worker in config.workers] == [(0,), (0,)] and _split(config) == '1P1D'
  assert _load('one_device.py', ':num_pages=auto').workers[0].num_pages == 'auto'


def _bill(arguments: str = ''):
  report = simulate(_load('unlike_chips_simulated.py', f':num_requests=60{arguments}')).report
  return report, report.bill


def test_unlike_chips_are_paid_for_and_each_role_gains_by_its_own():
  ours, bill = _bill()
  assert bill.chips.by_worker == {'prefill0': 'H100', 'decode0': 'A100-80', 'decode1': 'A100-80'}
  assert bill.chips.dollars_per_hour == pytest.approx(8 * 3.00 + 16 * 1.30) and bill.chips.watts == 8 * 700 + 16 * 400
  swapped, swapped_bill = _bill(',prefill=a100,decode=h100')
  assert ours.ttft.p50_ms < swapped.ttft.p50_ms and ours.tpot.p50_ms > swapped.tpot.p50_ms
  assert ours.ttft.p50_ms / swapped.ttft.p50_ms < swapped.tpot.p50_ms / ours.tpot.p50_ms  # FLOPs gain a prompt more
  assert bill.goodput_per_dollar > swapped_bill.goodput_per_dollar > 0


@pytest.mark.parametrize(('arguments', 'found'), [('', ('cpu', 'gpu')), (':prefill=gpu,decode=cpu', ('gpu', 'cpu'))])
def test_cpu_and_gpu_have_a_role_each_and_are_no_shared_device(arguments, found):
  config = _load('cpu_and_gpu.py', arguments)
  assert tuple(worker.platform for worker in config.workers) == found
  assert [worker.devices for worker in config.workers] == [(0,), (0,)]
  report = simulate(dataclasses.replace(config, model=ModelSpec.smollm2_135m(), checkpoint=None, workload=_FEW)).report
  assert not any('share a device' in note for note in report.notes)
  slow, fast = (report.utilisation[found.index(one)] for one in ('cpu', 'gpu'))
  assert slow.busy > fast.busy


_FEW = Poisson(requests_per_s=2.0, num_requests=12, prompt=Uniform(8, 24), output=Fixed(8))
