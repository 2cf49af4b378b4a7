"""Processes that do not fit together are refused, and the message names both values."""

import dataclasses

import pytest

from pdjax.types import ModelSpec, WorkerSpec
from pdjax.types.handshake import (
  HandshakeError,
  Hello,
  Machine,
  PoolShape,
  WayPlan,
  check_plans,
  check_together,
  check_worker,
)
from pdjax.types.hardware import DeviceKind

MODEL = ModelSpec.smollm2_135m()
POOL = PoolShape(MODEL.cache[0], num_pages=8, page_size=16, dtype='float32', layout='plain', mesh=(1, 1))
PREFILL = Hello(
  worker='prefill0',
  incarnation=1,
  machine=Machine('here', 7, (DeviceKind('cpu', 'cpu'),), ('cpu:0',), 1e9, '127.0.0.1:1'),
  versions=(('pdjax', '0.1.0'), ('jax', '0.10.2')),
  model=MODEL,
  weights='0123456789abcdef',
  dtype='float32',
  pools=(POOL,),
)
DECODE = dataclasses.replace(PREFILL, worker='decode0', machine=dataclasses.replace(PREFILL.machine, pid=8))
SPEC = WorkerSpec('prefill0', 'prefill', num_pages=8, page_size=16, kv_dtype='float32', weights='float32')
PLAN = WayPlan(kind='kv', unit=4, dtype='float32', piece_heads=1, pieces=(3, 1), batches=((30, 1), (30, 4)))


def test_what_fits_together_passes():
  check_worker(PREFILL, SPEC, MODEL)
  check_together([PREFILL, DECODE])
  check_together([PREFILL])
  check_plans('prefill0', 'decode0', (PLAN,), (PLAN,))


def test_pools_may_be_unlike():
  other = PoolShape(MODEL.cache[0], num_pages=99, page_size=1, dtype='int8', layout='paired', mesh=(3, 1))
  check_together([PREFILL, dataclasses.replace(DECODE, pools=(other,))])


@pytest.mark.parametrize(
  'change, ours, theirs',
  [
    ({'versions': (('pdjax', '0.1.0'), ('jax', '0.12.0'))}, 'jax version 0.10.2', 'jax version 0.12.0'),
    ({'versions': (('pdjax', '0.2.0'), ('jax', '0.10.2'))}, 'pdjax version 0.1.0', 'pdjax version 0.2.0'),
    ({'versions': (('pdjax', '0.1.0'),)}, 'jax version 0.10.2', 'jax version None'),
    ({'model': dataclasses.replace(MODEL, num_layers=29)}, 'num_layers=30', 'num_layers=29'),
    ({'weights': 'f' * 16}, 'sum to 0123456789abcdef', 'sum to ffffffffffffffff'),
  ],
)
def test_processes_that_differ_are_refused_naming_both(change, ours, theirs):
  with pytest.raises(HandshakeError) as refused:
    check_together([PREFILL, dataclasses.replace(DECODE, **change)])
  message = str(refused.value)
  assert "worker 'prefill0' has" in message and "worker 'decode0' has" in message
  assert message.index(ours) < message.index(theirs)


@pytest.mark.parametrize(
  'change, what, expected',
  [
    ({'num_pages': 7}, 'num_pages 7', 8),
    ({'page_size': 32}, 'page_size 32', 16),
    ({'dtype': 'int8'}, "kv_dtype 'int8'", "'float32'"),
    ({'mesh': (3, 1)}, 'tp 3', 1),
  ],
)
def test_a_pool_that_the_controller_does_not_count_on_is_refused(change, what, expected):
  hello = dataclasses.replace(PREFILL, pools=(dataclasses.replace(POOL, **change),))
  with pytest.raises(HandshakeError, match=f"'prefill0' has {what}, but the controller expects {expected};"):
    check_worker(hello, SPEC, MODEL)


def test_weights_of_unlike_dtypes_are_compared_with_those_of_their_own_alone():
  narrow = dataclasses.replace(DECODE, dtype='bfloat16', weights='1' * 16)
  check_together([PREFILL, narrow, dataclasses.replace(PREFILL, worker='prefill1')])
  with pytest.raises(
    HandshakeError, match=f"'decode0' has weights that sum to {'1' * 16}, but worker 'decode1' .*{'2' * 16}"
  ):
    check_together([PREFILL, narrow, dataclasses.replace(narrow, worker='decode1', weights='2' * 16)])
  with pytest.raises(HandshakeError, match="'prefill0' has weights 'bfloat16', but the controller expects 'float32'"):
    check_worker(dataclasses.replace(PREFILL, dtype='bfloat16'), SPEC, MODEL)


def test_a_process_that_serves_another_model_than_the_controller_is_refused():
  with pytest.raises(HandshakeError, match=r"'prefill0' has model .*num_layers=30.* but the controller expects .*=29"):
    check_worker(PREFILL, SPEC, dataclasses.replace(MODEL, num_layers=29))


def test_a_process_that_holds_other_cache_kinds_is_refused():
  other = dataclasses.replace(POOL, kind=dataclasses.replace(POOL.kind, name='draft'))
  for pools in ((other,), (POOL, other), ()):
    with pytest.raises(HandshakeError, match=r"'prefill0' has cache kinds .*but the controller expects .*name='kv'"):
      check_worker(dataclasses.replace(PREFILL, pools=pools), SPEC, MODEL)


def test_a_layout_that_was_asked_for_is_held_to():
  check_worker(PREFILL, dataclasses.replace(SPEC, page_layout='auto'), MODEL)
  with pytest.raises(HandshakeError, match=r"page_layout 'plain', but the controller expects 'kv'"):
    check_worker(PREFILL, dataclasses.replace(SPEC, page_layout='kv'), MODEL)


@pytest.mark.parametrize('change', [{'unit': 2}, {'dtype': 'int8'}, {'pieces': (1, 1)}, {'batches': ((30, 1),)}])
def test_ends_that_cut_what_travels_differently_are_refused(change):
  ((field, value),) = change.items()
  with pytest.raises(HandshakeError) as refused:
    check_plans('prefill0', 'decode0', (PLAN,), (dataclasses.replace(PLAN, **change),))
  message = str(refused.value)
  assert f"'kv' leaves with {field} {getattr(PLAN, field)!r}, but {value!r} is expected" in message
  with pytest.raises(HandshakeError, match=r"cache kinds \['kv'\] leave, but \[\] are expected"):
    check_plans('prefill0', 'decode0', (PLAN,), ())
