"""Overrides of fields by their names: what is understood, and what the message says when it is not."""

import dataclasses
import re

import pytest

from pdjax.config import ServingConfig
from pdjax.overrides import apply_overrides, parse_value
from pdjax.policies import Disaggregated, MostFreePages
from pdjax.types import SLO, ChipSpec, Role, decode_pool, prefill_pool
from pdjax.workload import Fixed, Poisson, Uniform
from tests.serving.driver import TINY

CONFIG = ServingConfig(
  model=TINY,
  workers=prefill_pool(1, tp=2) + decode_pool(1, devices=(0, 1), tp=2),
  policy=Disaggregated(max_prefill_tokens=64),
  workload=Poisson(requests_per_s=2.0, num_requests=4, prompt=Uniform(1, 8), output=Fixed(3), prompts=('Hi', 'Bye')),
)


def _raises(words: str):
  return pytest.raises(ValueError, match=re.escape(words))


@pytest.mark.parametrize(
  'override, path, value',
  [
    ('page_size=64', 'page_size', 64),
    (' page_size = 64 ', 'page_size', 64),
    ('policy.max_prefill_tokens=256', 'policy.max_prefill_tokens', 256),
    ('workers.0.tp=3', 'workers.0.tp', 3),
    ('workers.prefill0.tp=3', 'workers.0.tp', 3),
    ('workers.1.num_pages=128', 'workers.1.num_pages', 128),
    ('workers.decode0.num_pages=auto', 'workers.1.num_pages', 'auto'),
    ('workers.decode0.role=both', 'workers.1.role', Role.BOTH),
    ('workers.decode0.may_become=prefill', 'workers.1.may_become', (Role.PREFILL,)),
    ('workers.decode0.may_become=prefill, both', 'workers.1.may_become', (Role.PREFILL, Role.BOTH)),
    ('workers.decode0.devices=(2,3)', 'workers.1.devices', (2, 3)),
    ('workers.decode0.devices=[2,3]', 'workers.1.devices', (2, 3)),
    ('workers.decode0.devices=None', 'workers.1.devices', None),
    ('workers.decode0.devices.1=5', 'workers.1.devices', (0, 5)),
    ('workload.requests_per_s=3', 'workload.requests_per_s', 3.0),
    ('workload.prompt.high=9', 'workload.prompt.high', 9),
    ('workload.sampling.ignore_eos=true', 'workload.sampling.ignore_eos', True),
    ('workload.sampling.ignore_eos=False', 'workload.sampling.ignore_eos', False),
    ('workload.sampling.stop_token_ids=(1,2)', 'workload.sampling.stop_token_ids', (1, 2)),
    ('workload.prompts.1=Why = so?', 'workload.prompts', ('Hi', 'Why = so?')),
    ('workload.requests_per_s=inf', 'workload.requests_per_s', float('inf')),
    ('cost.chip.flops_per_s=1e12', 'cost.chip.flops_per_s', 1e12),
    ('workers.decode0.chip=h100', 'workers.1.chip', ChipSpec.h100()),
    ('workers.decode0.chip=none', 'workers.1.chip', None),
    ('dtype=bfloat16', 'dtype', 'bfloat16'),
    ('dtype=auto', 'dtype', 'auto'),
    ('platform=cpu', 'platform', 'cpu'),
    ('platform=none', 'platform', None),
    ('max_context=32', 'max_context', 32),
    ('max_context=None', 'max_context', None),
    ('checkpoint=models/my model.gguf', 'checkpoint', 'models/my model.gguf'),
    ('checkpoint=2024', 'checkpoint', '2024'),
  ],
)
def test_an_override_sets_one_field_and_leaves_the_rest(override, path, value):
  config = apply_overrides(CONFIG, [override])
  found = _get(config, path)
  assert found == value and type(found) is type(value)
  is_of_roles = path.endswith(('role', 'may_become'))  # which are no literals
  with_old = CONFIG if is_of_roles else apply_overrides(config, [f'{path}={_get(CONFIG, path)!r}'])
  assert with_old == CONFIG


def _get(config, path: str):
  for name in path.split('.'):
    config = config[int(name)] if name.isdigit() else getattr(config, name)
  return config


def test_a_limit_can_be_set_where_there_was_none():
  assert CONFIG.slo is None
  assert apply_overrides(CONFIG, ['slo.ttft_ms=500', 'slo.tpot_ms=50']).slo == SLO(ttft_ms=500, tpot_ms=50)


def test_overrides_apply_in_turn_and_the_config_given_stays():
  config = apply_overrides(CONFIG, ['page_size=8', 'policy.decode_steps=2', 'page_size=32'])
  assert (config.page_size, config.policy.decode_steps, CONFIG.page_size) == (32, 2, 16)


def test_no_override_is_the_same_config():
  assert apply_overrides(CONFIG, []) is CONFIG


@pytest.mark.parametrize(
  'override, words',
  [
    ('page_size', "override 'page_size' is not of the form field=value, e.g. page_size=64"),
    ('=64', "override '=64' is not of the form field=value"),
    ('pagesize=64', "ServingConfig has no field 'pagesize' (did you mean 'page_size'?); it has workers, workload"),
    ('policy.max_prefil_tokens=1', "Disaggregated has no field 'max_prefil_tokens' (did you mean 'max_prefill_tokens'"),
    ('policy.token_budget=1', "Disaggregated has no field 'token_budget'; it has max_prefill_tokens, decode_steps"),
    ('workers.decode9.tp=1', "there is no item 'decode9'; there are prefill0, decode0"),
    ('workers.2.tp=1', "there is no item '2'; there are prefill0, decode0"),
    ('workers.tp=1', "there is no item 'tp'; there are prefill0, decode0"),
    ('page_size.bytes=1', "16 has no fields, so 'bytes' cannot be set in it"),
    ('max_context.tokens=1', "None has no fields, so 'tokens' cannot be set in it"),
    ('slo.ttft=1', "SLO has no field 'ttft' (did you mean 'ttft_ms'?); it has ttft_ms, tpot_ms, e2el_ms"),
    ('page_size=big', "page_size is 'big', expected an integer"),
    ('page_size=64.0', 'page_size is 64.0, expected an integer'),
    ('page_size=True', 'page_size is True, expected an integer'),
    ('page_size=None', 'page_size is None, expected an integer'),
    ('page_size={[]: 1}', "page_size is '{[]: 1}', expected an integer"),
    ('workload.requests_per_s=fast', "requests_per_s is 'fast', expected a number"),
    ('workload.sampling.ignore_eos=1', 'ignore_eos is 1, expected True or False'),
    ('dtype=float64', "dtype is 'float64', expected one of 'auto', 'float32', 'bfloat16', 'float16'."),
    ('workers.0.num_pages=many', "num_pages is 'many', expected an integer or 'auto'"),
    ('workers.0.role=translate', "role is 'translate', expected one of 'prefill', 'decode', 'both'"),
    ('workers.0=5', '0 is 5, expected WorkerSpec(...)'),
    ('workers.0.chip=h300', "chip is 'h300', expected ChipSpec(...) or None; name one of generic_cpu, tpu_v5e"),
    ('workers=3', 'workers is 3, expected a tuple of WorkerSpec'),
    (
      'prefix_cache=True',
      "expected PrefixCache(...), 'auto', or None; set its fields one by one, such as prefix_cache.block_tokens",
    ),
    ('prefix_cache.block_tokens=0', 'PrefixCache.block_tokens is 0, expected at least 1'),
    ('workers.0.may_become=(3,)', "may_become[0] is 3, expected one of 'prefill', 'decode', 'both'"),
    ('workers.0.may_become=translate', "may_become[0] is 'translate', expected one of 'prefill', 'decode', 'both'"),
    ('workers=(1, 2)', 'workers[0] is 1, expected WorkerSpec(...)'),
    ('workers.1.devices=(0, "b")', "devices[1] is 'b', expected an integer"),
    ('policy=Colocated', "policy is 'Colocated', expected a Policy"),
    ('page_size=0', "override 'page_size=0': ServingConfig.page_size is 0, expected at least 1 token"),
    ('workers.0.tp=0', "override 'workers.0.tp=0': worker 'prefill0' has tp=0, expected at least 1"),
    ('workers.1.name=prefill0', "the names ['prefill0'] more than once"),
    ('policy.decode_steps=0', 'Disaggregated has decode_steps=0, expected at least 1'),
    ('policy.max_prefill_tokens=-8', 'Disaggregated has max_prefill_tokens=-8, expected at least 1'),
    ('cost=Roofline', "cost is 'Roofline', expected a CostModel"),
    ('workload.requests_per_s=-1', '-1'),
    ('workload.sampling.max_tokens=0', 'max_tokens is 0, expected at least 1'),
  ],
)
def test_an_override_that_makes_no_sense_says_so(override, words):
  with _raises(words) as error:
    apply_overrides(CONFIG, [override])
  assert override.partition('=')[0] in str(error.value)


def test_objects_are_no_text_but_their_fields_are():
  config = dataclasses.replace(CONFIG, policy=Disaggregated(place_decode=MostFreePages()), slo=SLO(ttft_ms=5))
  assert apply_overrides(config, ['slo.tpot_ms=7']).slo == SLO(5, 7.0)
  with _raises("place_decode is 'MostFreePages', expected a Placement"):
    apply_overrides(config, ['policy.place_decode=MostFreePages'])


@pytest.mark.parametrize(
  'text, hint, value', [('3', int, 3), ('3', float, 3.0), ('3', str, '3'), ('none', int | None, None), ('x', str, 'x')]
)
def test_a_value_is_read_as_its_type_wants(text, hint, value):
  found = parse_value(text, hint, 'it')
  assert found == value and type(found) is type(value)


def test_a_value_of_another_type_is_named():
  with _raises("the size is 'x', expected an integer"):
    parse_value('x', int, 'the size')
