"""Configs and config files: what is understood, and what the message says when it is not."""

import dataclasses
import pathlib
import re

import pytest

from experiments.load_config import load_config, load_policy
from pdjax.config import ServingConfig
from pdjax.cost import Roofline
from pdjax.launch import simulate
from pdjax.overrides import apply_overrides
from pdjax.policies import Colocated, Disaggregated
from pdjax.types import (
  CacheArray,
  CacheKind,
  ChipSpec,
  HostPlace,
  PrefixCache,
  RayCluster,
  Role,
  TransferSpec,
  WorkerSpec,
  decode_pool,
  prefill_pool,
)
from pdjax.workload import Fixed, MultiTurn, Poisson, Uniform
from tests.serving.driver import TINY
from tests.tiny import config

CONFIG = ServingConfig(
  model=TINY,
  workers=prefill_pool(1, tp=2) + decode_pool(1, devices=(0, 1), tp=2),
  policy=Disaggregated(max_prefill_tokens=64),
  workload=Poisson(requests_per_s=2.0, num_requests=4, prompt=Uniform(1, 8), output=Fixed(3), prompts=('Hi', 'Bye')),
)


class Slow:
  """Costs of no chip in particular."""

  def step_seconds(self, *args):
    return 0.1

  def transfer_seconds(self, *args):
    return 0.1


def _raises(words: str):
  return pytest.raises(ValueError, match=re.escape(words))


# ---------------------------------------------------------------------------- the config itself


@pytest.mark.parametrize(
  'fields, words',
  [
    ({'workers': ()}, 'the config has no worker, expected at least one'),
    ({'workers': (WorkerSpec('a'), WorkerSpec('b'), WorkerSpec('a'))}, "the names ['a'] more than once"),
    ({'page_size': 0}, 'page_size is 0, expected at least 1 token'),
    ({'dtype': 'int8'}, "dtype is 'int8', expected one of 'auto', 'float32', 'bfloat16', 'float16'"),
    ({'max_context': 0}, 'max_context is 0, expected at least 1 token'),
    (
      {'workers': prefill_pool(2)},
      'prefill0 prefill, prefill1 prefill, expected one that prefills and one that decodes',
    ),
    ({'workers': decode_pool(1)}, 'the workers are decode0 decode, expected one that prefills'),
    (
      {'policy': Disaggregated(decode_steps=17)},
      'decode_steps=17, but a worker takes at most 16 in one step; lower it or raise max_fused_steps',
    ),
    (
      {'processes': RayCluster(), 'transfer': TransferSpec('host_staged')},
      "transport is 'host_staged', but between processes KV travels by 'cross_process'; set that or 'auto'",
    ),
    (
      {'processes': RayCluster(), 'workers': (WorkerSpec('a', devices=(1,)), WorkerSpec('b'))},
      'the workers a name their devices, but in processes of their own each has its own',
    ),
    ({'model': None}, 'neither a model nor a checkpoint'),
    ({'model': None, 'checkpoint': 'random'}, 'neither a model nor a checkpoint'),
  ],
)
def test_a_config_that_cannot_run_is_refused(fields, words):
  with _raises(words):
    dataclasses.replace(CONFIG, **fields)


def test_elements_have_the_bytes_of_their_dtype():
  assert [dataclasses.replace(CONFIG, dtype=dtype).dtype_bytes for dtype in ('float32', 'bfloat16', 'float16')] == [
    4, 2, 2,
  ]  # fmt: skip


@pytest.mark.parametrize(
  'cost, dtype, dtype_bytes, precision',
  [
    (Roofline(), 'float32', 4, 'highest'),  # of a CPU
    (Roofline(ChipSpec.tpu_v5e()), 'bfloat16', 2, 'default'),
    (Roofline(ChipSpec('T4', 65e12, 320e9, 16e9, dtype='float16')), 'float16', 2, 'default'),
    (Slow(), 'bfloat16', 2, 'default'),
  ],
)
def test_without_devices_auto_is_what_the_chip_of_the_costs_is_fastest_in(cost, dtype, dtype_bytes, precision):
  config = dataclasses.replace(CONFIG, dtype='auto', cost=cost)
  assert (config.definite_dtype, config.dtype_bytes, config.precision) == (dtype, dtype_bytes, precision)
  assert {worker.kv_dtype for worker in config.cluster} == {dtype}
  named = dataclasses.replace(config, dtype='float16', kv_dtype='int8')
  assert (named.definite_dtype, {worker.kv_dtype for worker in named.cluster}) == ('float16', {'int8'})


def test_a_simulation_in_auto_says_which_dtype_it_took():
  workload = dataclasses.replace(CONFIG.workload, prompts=None)
  config = dataclasses.replace(CONFIG, dtype='auto', cost=Roofline(ChipSpec.h100()), workload=workload)
  found = simulate(config).report.config
  assert (found['dtype'], {worker['kv_dtype'] for worker in found['workers']}) == ('bfloat16', {'bfloat16'})


# ---------------------------------------------------------------------------- config files


@pytest.fixture
def file(tmp_path):
  """Writes a config file and gives its path."""

  def write(body: str, first_line: str = '') -> str:
    path = tmp_path / 'mine.py'
    path.write_text(
      f'{first_line}from pdjax.config import ServingConfig\n'
      'from pdjax.types import ModelSpec, colocated_pool\n\n'
      'def serving(**fields):\n'
      '  return ServingConfig(model=ModelSpec.smollm2_135m(), workers=colocated_pool(1), **fields)\n\n' + body
    )
    return str(path)

  return write


def test_a_config_file_makes_a_run(file):
  path = file('def get_config(): return serving(page_size=8)')
  assert load_config(path).page_size == 8
  assert load_config(f'{path}:').page_size == 8


ARGUMENTS = (
  'def get_config(pages: int, name: str = "x", share: float = 0.5, fast: bool = False, most: int | None = 3):\n'
)


def test_arguments_are_read_as_their_annotations_want(file):
  path = file(f'{ARGUMENTS}  return serving(page_size=pages, checkpoint=repr((name, share, fast, most)))')
  assert load_config(f'{path}:pages=4').page_size == 4
  config = load_config(f'{path}:pages=4,name=7,share=1,fast=true,most=None')
  assert config.checkpoint == "('7', 1.0, True, None)"
  assert load_config(f'{path}:pages=4,name=a=b').checkpoint == "('a=b', 0.5, False, 3)"


@pytest.mark.parametrize(
  'arguments, words',
  [
    ('', 'wants pages; write'),
    ('name=7', 'wants pages; write'),
    ('pagse=4', "argument 'pagse=4' is not of the form name=value with one of pages, name, share, fast, most"),
    ('4', "argument '4' is not of the form name=value"),
    ('pages=four', "pages is 'four', expected an integer"),
    ('pages=4,fast=2', 'fast is 2, expected True or False'),
    ('pages=0', 'page_size is 0, expected at least 1'),
  ],
)
def test_arguments_that_make_no_sense_are_refused(file, arguments, words):
  path = file(f'{ARGUMENTS}  return serving(page_size=pages)')
  with _raises(words):
    load_config(f'{path}:{arguments}')


def test_a_file_that_is_not_there_is_named_with_those_that_are(monkeypatch):
  monkeypatch.chdir(pathlib.Path(__file__).parents[1])
  with pytest.raises(FileNotFoundError) as error:
    load_config('configs/smollm_cpu.py:split=2P1D')
  assert "config 'configs/smollm_cpu.py' is not a file" in str(error.value)
  assert 'configs/smollm2_cpu.py' in str(error.value)
  with pytest.raises(FileNotFoundError, match="'configs' is not a file"):
    load_config('configs')


def test_a_file_that_is_no_python_is_refused(tmp_path):
  path = tmp_path / 'run.json'
  path.write_text('{}')
  with _raises('is not a .py file; a config is a Python file with get_config()'):
    load_config(str(path))


def test_a_file_that_makes_something_else_is_refused(file):
  with _raises('get_config() returned dict, expected a ServingConfig'):
    load_config(file('def get_config(): return {}'))


def test_a_file_without_a_config_says_what_is_wanted(file):
  with _raises('has no get_config(); a config file defines get_config(**arguments) -> ServingConfig'):
    load_config(file('get_confg = None'))


@pytest.mark.parametrize('first_line', ['', 'from __future__ import annotations\n'])
def test_a_config_file_may_define_a_policy_of_its_own(file, first_line):
  body = (
    'import dataclasses\nfrom pdjax.policies import Disaggregated\n\n'
    '@dataclasses.dataclass(frozen=True)\nclass Mine(Disaggregated):\n  patience: int = 3\n\n'
    'def get_config(): return serving(policy=Mine())'
  )
  config = apply_overrides(load_config(file(body, first_line)), ['policy.patience=5', 'policy.decode_steps=2'])
  assert (config.policy.patience, config.policy.decode_steps) == (5, 2)


# ---------------------------------------------------------------------------- what is cached, and where


WINDOWED = dataclasses.replace(TINY, cache_kinds=(CacheKind('window', (0, 1), (CacheArray('k', (2, 8)),), reach=8),))
CHATS, RANDOM = MultiTurn(num_chats=2), Poisson(num_requests=2)


@pytest.mark.parametrize(
  ('fields', 'kept'),
  [
    ({}, PrefixCache()),
    ({'workload': RANDOM}, None),  # no prompt begins like another
    ({'workload': dataclasses.replace(RANDOM, prompts=('a', 'b'))}, PrefixCache()),
    ({'workload': None}, PrefixCache()),  # whoever submits some may
    ({'workload': RANDOM, 'places': (HostPlace('host0', 10**6),)}, PrefixCache()),
    ({'page_size': 24}, None),  # no whole blocks
    ({'page_size': 24, 'workers': prefill_pool(1, page_size=32) + decode_pool(1, page_size=16)}, PrefixCache()),
    ({'places': (HostPlace('host0', 10**6, page_size=20),)}, None),
    ({'model': WINDOWED}, None),
    ({'prefix_cache': None}, None),
    ({'prefix_cache': PrefixCache(block_tokens=4), 'workload': RANDOM}, PrefixCache(block_tokens=4)),
  ],
)  # fmt: skip
def test_prefixes_are_kept_by_default_where_something_may_repeat(fields, kept):
  run = dataclasses.replace(config(page_size=16, workload=CHATS), **fields)
  assert run.cache_of(run.model) == kept


def test_a_host_has_the_pages_of_the_workers_where_these_are_alike():
  workers = prefill_pool(1, page_size=32, kv_dtype='int8') + decode_pool(1, page_size=32, kv_dtype='int8')
  run = dataclasses.replace(config(workload=CHATS), workers=workers, places=(HostPlace('host0', 10**6),))
  (host,) = run.holders(TINY)
  assert (host.page_size, host.kv_dtype, host.role) == (32, 'int8', Role.HOLD)
  assert host.num_pages == 10**6 // (32 * TINY.cached_token_bytes('int8'))
  unlike = dataclasses.replace(run, workers=(workers[0], dataclasses.replace(workers[1], page_size=16, kv_dtype=None)))
  assert [(one.page_size, one.kv_dtype) for one in unlike.holders(TINY)] == [(4, 'float32')]


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'prefix_cache': None}, r'has places \(host0\) and no prefix_cache.*set prefix_cache=PrefixCache\(\), or leave'),
    ({'places': (HostPlace('decode0', 10**6),)}, r"the names \['decode0'\] more than once"),
    ({'policy': Disaggregated(returns_to='hots0')}, "returns_to='hots0', but the places are prefill0, decode0, host0"),
    (
      {'workers': (WorkerSpec('w', 'hold'),)},
      "the workers w have the role 'hold', which runs no steps; make them places",
    ),
  ],
)
def test_places_that_make_no_sense_are_refused(fields, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(config(workload=CHATS), **{'places': (HostPlace('host0', 10**6),)} | fields)


def test_a_host_that_holds_no_page_or_keeps_none_is_refused_as_soon_as_the_model_is_known():
  run = dataclasses.replace(config(page_size=16, workload=CHATS), places=(HostPlace('host0', 100),))
  with pytest.raises(ValueError, match=r'bytes=100, but one page of 16 tokens in float32 takes .*; raise bytes'):
    run.holders(TINY)
  with pytest.raises(ValueError, match=r'no prefixes can be kept of tiny in these pages; set prefix_cache=PrefixCache'):
    dataclasses.replace(run, page_size=20).holders(TINY)


def test_blocks_that_return_to_a_worker_need_ways_from_everywhere():
  run = config(workload=CHATS)
  to_worker, to_host = (dataclasses.replace(run, policy=Disaggregated(returns_to=name),
                        places=(HostPlace('host0', 10**6),), prefix_cache=PrefixCache(block_tokens=4))
                        for name in ('prefill0', 'host0'))  # fmt: skip
  assert to_worker.moves_anywhere and not to_host.moves_anywhere
  ways = [{(one.name, other.name) for one, other in each.ways((*each.workers, *each.holders(TINY)))}
          for each in (to_worker, to_host)]  # fmt: skip
  assert ways[0] - ways[1] == {('decode0', 'prefill0')} and ('host0', 'decode0') in ways[1]
  with pytest.raises(ValueError, match="Colocated has returns_to='source', but what it decodes lies where it was"):
    Colocated(returns_to='source')


def test_workers_on_one_device_have_one_chip():
  h100 = ChipSpec.h100()
  alike = (
    WorkerSpec('p', Role.PREFILL, devices=(0,), chip=h100),
    WorkerSpec('d', Role.DECODE, devices=(0,), chip=h100),
  )
  assert dataclasses.replace(CONFIG, workers=alike).workers == alike
  unlike = (alike[0], dataclasses.replace(alike[1], chip=None))
  with pytest.raises(ValueError, match=r"'p' and 'd' share device 0 and have unlike chips \(H100, that of cost\)"):
    dataclasses.replace(CONFIG, workers=unlike)
  apart = (alike[0], dataclasses.replace(unlike[1], devices=(1,)))
  assert dataclasses.replace(CONFIG, workers=apart).workers == apart


POLICY = """
import dataclasses
import pdjax

@dataclasses.dataclass(frozen=True)
class Mine(pdjax.Disaggregated):
  extra: int = 3

class Picky(pdjax.Disaggregated):
  def __init__(self, needed): ...

ready = Mine(extra=5)
other = 7
"""


@pytest.fixture
def policies(tmp_path):
  (tmp_path / 'my.py').write_text(POLICY)
  return str(tmp_path / 'my.py')


def test_a_policy_of_a_file_is_a_class_or_an_object_of_it(policies):
  mine = load_policy(f'{policies}:Mine')
  assert (type(mine).__name__, mine.extra) == ('Mine', 3)
  assert load_policy(f'{policies}:ready').extra == 5


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    (':Yours', 'Yours is not there; the policies in it are Mine, Picky, ready'),
    (':other', 'other is no policy, which has a method decide(view)'),
    (':Picky', 'Picky() raised'),
    (':', 'is not of the form FILE.py:NAME'),
    ('', 'is not of the form FILE.py:NAME'),
  ],
)
def test_what_is_no_policy_of_a_file_is_refused_with_those_that_are(policies, name, words):
  with _raises(words):
    load_policy(f'{policies}{name}')
  with pytest.raises(FileNotFoundError, match=r"policy file 'yours\.py' is not a file"):
    load_policy('yours.py:Mine')
