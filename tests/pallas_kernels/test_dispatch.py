"""The choice for a problem: the caller's own if it can run, else that of a table, of a neighbour in it or of a rule."""

import dataclasses
import logging

import pytest

from pallas_kernels import cases, devices, dispatch, tuning
from pallas_kernels.dispatch import Plain, Tuned, choose
from pallas_kernels.page_copy.api import IMPLEMENTATIONS as COPIES

V6E = devices.by_name('v6e')
CPU = devices.Device('cpu', 'cpu')


@dataclasses.dataclass(frozen=True)
class Config:
  block: int


def refusal(config, device, facts):
  return f'blocks of {config.block} are too large.' if config.block > facts.get('most', 64) else None


IMPLEMENTATIONS = {
  'pallas_tpu': Tuned(
    lambda **kwargs: ('tpu', kwargs['config']), Config, lambda device, facts: Config(8), refusal, ('tpu',)
  ),
  'xla': Plain(lambda **kwargs: ('xla', None)),
}
ROWS = (
  tuning.Row('v6e', {'dtype': 'int8', 'batch': 4}, {'block': 40}),
  tuning.Row('v6e', {'dtype': 'int8', 'batch': 64}, {'block': 64}),
  tuning.Row('v6e', {'dtype': 'int8', 'batch': 64}, {'block': 16}),
  tuning.Row('v5e', {'dtype': 'int8', 'batch': 8}, {'block': 1}),
)


def taken(monkeypatch, wanted, facts, device=V6E, rows=ROWS):
  monkeypatch.setattr(tuning, 'load', lambda kernel: rows)
  return choose('a kernel', IMPLEMENTATIONS, wanted, facts, device)()


@pytest.mark.parametrize(
  'facts, block',
  [
    ({'dtype': 'int8', 'batch': 64}, 64),  # its own row, the first of two
    ({'dtype': 'int8', 'batch': 8}, 40),  # a neighbour's, by doublings
    ({'dtype': 'float32', 'batch': 64}, 8),  # no row of its kind: the rule
    ({'dtype': 'int8', 'batch': 64, 'most': 32}, 8),  # its row will not do: the rule
  ],
)
def test_parameters_come_from_the_row_or_the_nearest_or_the_rule(monkeypatch, facts, block):
  assert taken(monkeypatch, None, facts) == ('tpu', Config(block))


def test_the_environment_may_prefer_the_shorter_program(monkeypatch, caplog):
  rows = tuple(
    dataclasses.replace(row, figures={'bundles': 100 * int(row.config['block'])} if row.config['block'] < 64 else {})
    for row in ROWS
  )
  short = {'pallas_tpu': dataclasses.replace(IMPLEMENTATIONS['pallas_tpu'], shorten=lambda config: Config(2))}
  monkeypatch.setattr(tuning, 'load', lambda kernel: rows)
  for form, blocks in {'fast': (64, 40, 8), 'small': (16, 40, 2)}.items():
    monkeypatch.setenv('PALLAS_KERNELS_FORM', form)
    for block, facts in zip(
      blocks, ({'dtype': 'int8', 'batch': 64}, {'dtype': 'int8', 'batch': 4}, {'dtype': 'float32'}), strict=True
    ):
      dispatch._log.cache_clear()
      with caplog.at_level(logging.INFO, 'pallas_kernels'):
        assert choose('a kernel', short, None, facts, V6E)() == ('tpu', Config(block))
      assert (', small form, for ' in caplog.records[-1].message) == (form == 'small')


def test_a_form_that_is_none_is_named(monkeypatch):
  monkeypatch.setenv('PALLAS_KERNELS_FORM', 'tiny')
  with pytest.raises(ValueError, match=r"PALLAS_KERNELS_FORM='tiny' is no form .* 'fast' or 'small'"):
    taken(monkeypatch, None, {'dtype': 'int8'})


def test_other_devices_take_plain_xla(monkeypatch):
  assert taken(monkeypatch, None, {'dtype': 'int8'}, CPU) == ('xla', None)
  assert taken(monkeypatch, ('pallas_tpu', 'xla'), {'dtype': 'int8'}, CPU) == ('xla', None)


H100, T4 = devices.Device('NVIDIA H100 80GB HBM3', 'gpu'), devices.Device('Tesla T4', 'gpu')


@pytest.mark.parametrize('device', [H100, T4])
def test_a_new_platform_is_what_its_implementations_say(monkeypatch, caplog, device):
  """Nothing of a platform stands in dispatch: an implementation names it, or plain XLA takes other parameters there."""
  monkeypatch.setattr(tuning, 'load', lambda kernel: ())
  plain = {'xla': Plain(lambda **kwargs: ('xla', kwargs), {'gpu': {'blocks': (4, 8)}})}
  own = dataclasses.replace(IMPLEMENTATIONS['pallas_tpu'], platforms=('gpu',))
  dispatch._log.cache_clear()
  with caplog.at_level(logging.DEBUG, 'pallas_kernels'):
    assert choose('a kernel', plain, None, {}, device)() == ('xla', {'blocks': (4, 8)})
  assert f'a kernel on {device.name} takes xla, blocks=(4, 8)' in caplog.records[-1].message
  assert choose('a kernel', plain, None, {}, CPU)() == ('xla', {})
  assert choose('a kernel', plain | {'pallas_gpu': own}, None, {}, device)() == ('tpu', Config(8))
  assert choose('a kernel', plain | {'pallas_gpu': own}, None, {'most': 4}, device)() == ('xla', {'blocks': (4, 8)})
  assert choose('a kernel', plain | {'pallas_gpu': own}, None, {}, V6E)() == ('xla', {})
  with pytest.raises(ValueError, match=r"pallas_gpu: it is for GPUs, and this is v6e; .* 'xla'"):
    choose('a kernel', plain | {'pallas_gpu': own}, 'pallas_gpu', {}, V6E)


def test_what_cannot_run_is_passed_over_in_a_sequence_only(monkeypatch):
  facts = {'dtype': 'int8', 'most': 4}
  assert taken(monkeypatch, None, facts) == ('xla', None)
  with pytest.raises(dispatch.Refused, match=r'a kernel cannot run on v6e .* pallas_tpu: blocks of 8 are too large'):
    taken(monkeypatch, 'pallas_tpu', facts)
  with pytest.raises(dispatch.Refused, match='pallas_tpu: it is for TPUs, and this is cpu'):
    taken(monkeypatch, 'pallas_tpu', facts, CPU)
  with pytest.raises(ValueError, match="'cuda' is unknown; there are pallas_tpu, xla"):
    taken(monkeypatch, 'cuda', facts)


def test_what_is_taken_is_said_once(monkeypatch, caplog):
  dispatch._log.cache_clear()
  with caplog.at_level(logging.INFO, 'pallas_kernels'):
    for _ in range(2):
      taken(monkeypatch, None, {'dtype': 'int8', 'batch': 63})
  (record,) = caplog.records
  assert 'a kernel on v6e takes pallas_tpu, Config(block=64) of the row nearest' in record.message


KERNELS = {
  'paged_attention': cases.PAGED_ATTENTION,
  'prefill_attention': cases.PREFILL_ATTENTION,
  'quantized_matmul': cases.matmul_api.IMPLEMENTATIONS,
}


@pytest.mark.parametrize('kernel', [*KERNELS, 'page_copy', 'token_append'])
def test_every_row_of_a_table_can_run_where_it_says(kernel):
  tables = {**KERNELS, 'token_append': cases.append_api.IMPLEMENTATIONS}
  rows = tuning.load(kernel)
  assert rows
  for row in rows:
    implementations = COPIES[row.problem['function']] if kernel == 'page_copy' else tables[kernel]
    implementation = implementations['pallas_tpu']
    config = implementation.config(**row.config)
    assert implementation.refusal(config, devices.by_name(row.device), row.problem) is None, row


@pytest.mark.parametrize('kernel', KERNELS)
def test_a_long_program_has_a_short_one_beside_it(kernel):
  rows = tuning.load(kernel)
  long = 6000  # bundles, from which on a chip may wait for its instructions
  firsts = {(row.device, tuple(row.problem.items())): row for row in reversed(rows)}
  for row in firsts.values():
    fast, small = (tuning.nearest(rows, row.device, row.problem, form) for form in ('fast', 'small'))
    assert fast == (row, True) and small[1] and small[0].problem == row.problem
    if 'microseconds' in row.figures:  # timed on a chip, which knows how long it waits for instructions
      continue
    assert small[0].figures['bundles'] < long, row
    assert small[0].figures['percent'] <= row.figures['percent']


def test_rules_have_something_for_every_device():
  facts = {
    'dtype': 'bfloat16', 'q_dtype': 'bfloat16', 'values': 'bfloat16', 'scaled': 'neither', 'layout': 'plain',
    'query_heads': 32, 'kv_heads': 8, 'head_dim': 128, 'page_size': 16, 'batch': 64, 'context': 131_072,
    'query_tokens': 1, 'tokens': 512, 'layers': 32,
  }  # fmt: skip
  tables = (COPIES['gather_pages'], cases.append_api.IMPLEMENTATIONS, cases.PAGED_ATTENTION, cases.PREFILL_ATTENTION)
  for device in (devices.by_name(name) for name in ('v5e', 'v5p', 'v6e', 'tpu7x')):
    for implementation in (table['pallas_tpu'] for table in tables):
      config = implementation.rule(device, facts)
      assert implementation.refusal(config, device, facts) is None, device.name
      assert implementation.refusal(implementation.shorten(config), device, facts) is None, device.name


def test_an_unknown_device_is_named():
  with pytest.raises(ValueError, match="'v9' is unknown; there are v4, v5e"):
    devices.by_name('v9')
