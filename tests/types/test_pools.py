"""Pools and lanes: pages of each cache kind on a worker, and the units in which a kind travels."""

import dataclasses

import pytest

from pdjax.types import ModelSpec, WorkerSpec
from pdjax.types.cache import CacheArray, CacheKind
from pdjax.types.pools import PoolSpecs, grown_pages, lanes, sent_bytes
from tests.serving.driver import TINY

WINDOW = CacheKind('window', (1,), (CacheArray('kv', (2, 2, 4), cut=1),), 10, page_size=4)
STATE = CacheKind('state', (0,), (CacheArray('state', (6,), dtype='float32'),), 'request')
MIXED = dataclasses.replace(TINY, cache_kinds=(*TINY.cache, WINDOW, STATE))
KV_BYTES, WINDOW_BYTES, STATE_BYTES = 2 * 2 * 2 * 8 * 4, 2 * 2 * 4 * 4, 24


def _worker(name: str = 'w', page_size: int = 16, **fields) -> WorkerSpec:
  return WorkerSpec(name, page_size=page_size, **fields)


def test_a_worker_holds_each_kind_in_pages_of_its_own_size():
  pools = PoolSpecs.of(MIXED, _worker())
  sizes = {name: (pool.page_size, pool.page_bytes) for name, pool in pools.by_kind.items()}
  assert sizes == {'kv': (16, 16 * KV_BYTES), 'window': (4, 4 * WINDOW_BYTES), 'state': (1, STATE_BYTES)}
  assert pools.pages_for(1) == {'kv': 1, 'window': 1, 'state': 1}
  assert pools.pages_for(40) == {'kv': 3, 'window': 3, 'state': 1}  # a window of ten tokens: three pages at most
  assert pools.page_bytes == 16 * KV_BYTES  # what a page of tokens adds
  more = 3 * 4 * WINDOW_BYTES + STATE_BYTES
  assert pools.device_bytes(pools.pages_for(40)) == 3 * 16 * KV_BYTES + more
  assert pools.whole_pages(pools.pages_for(40)) == 3 + -(-more // (16 * KV_BYTES))


def test_of_one_kind_a_page_is_a_page():
  pools = PoolSpecs.of(TINY, _worker(kv_dtype='int8'))
  assert pools.page_bytes == 16 * TINY.cached_token_bytes('int8')
  assert [pools.whole_pages(pools.pages_for(tokens)) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_devices_have_their_part_of_what_is_cut_and_all_of_what_is_not():
  pools = PoolSpecs.of(MIXED, _worker(tp=2))
  parts = {name: pool.device_bytes for name, pool in pools.by_kind.items()}
  assert parts == {'kv': 8 * KV_BYTES, 'window': 2 * WINDOW_BYTES, 'state': STATE_BYTES}
  deepseek = PoolSpecs.of(ModelSpec.deepseek_v3(), _worker(tp=8, kv_dtype='bfloat16'))
  assert deepseek.page_bytes == 16 * 70_272


def test_without_a_kind_that_grows_pages_count_what_there_is():
  windows = PoolSpecs.of(dataclasses.replace(MIXED, cache_kinds=(WINDOW, STATE)), _worker())
  assert windows.page_bytes == 16 * WINDOW_BYTES
  states = PoolSpecs.of(dataclasses.replace(MIXED, cache_kinds=(STATE,)), _worker())
  assert states.page_bytes == STATE_BYTES and states.whole_pages(states.pages_for(500)) == 1


def test_pools_of_kinds_with_unlike_pages_hold_the_same_tokens():
  growing = dataclasses.replace(WINDOW, reach='all', page_size=6)
  worker = _worker(num_pages=10)
  assert grown_pages(TINY.cache[0], worker) == 10 and grown_pages(growing, worker) == 26  # of 160 tokens, whole ones
  with pytest.raises(ValueError, match="no page of 20 of the cache kind 'window'; raise num_pages"):
    grown_pages(dataclasses.replace(growing, page_size=20), _worker(num_pages=1))
  pools = PoolSpecs.of(dataclasses.replace(TINY, cache_kinds=(*TINY.cache, growing)), worker)
  assert pools.page_bytes == 16 * (KV_BYTES + WINDOW_BYTES)


def test_units_fit_the_pages_of_both_sides_and_the_wire_has_the_smaller_dtype():
  kv, window, state = lanes(MIXED, _worker(page_size=16), _worker(page_size=24, kv_dtype='bfloat16'))
  assert (kv.unit, window.unit, state.unit) == (8, 4, 1)
  assert (kv.unit_bytes, window.unit_bytes, state.unit_bytes) == (8 * KV_BYTES // 2, 4 * WINDOW_BYTES // 2, 24)
  assert (kv.source_page_size, kv.target_page_size) == (16, 24)
  assert [kv.sendable(tokens, 21) for tokens in (7, 8, 17, 21)] == [0, 8, 16, 21]
  assert [window.sendable(tokens, 21) for tokens in (11, 14, 15, 20, 21)] == [0, 0, 4, 8, 10]
  assert [kv.num_bytes(entries, (0, 1)) for entries in (1, 8, 9)] == [KV_BYTES * 2, KV_BYTES * 2, KV_BYTES * 4]
  assert window.num_bytes(10, (0, 1)) == 0 and window.num_bytes(10, (1, 2)) == 12 * WINDOW_BYTES // 2


def test_a_moved_sequence_has_the_bytes_that_are_published():
  one, other = (_worker(kv_dtype='bfloat16') for _ in range(2))
  assert sent_bytes(ModelSpec.gpt_oss_120b(), one, other, 1600) == 1600 * 36_864 + 4_718_592
  assert sent_bytes(ModelSpec.deepseek_v3(), one, other, 1600) == 1600 * 70_272
  assert sent_bytes(ModelSpec.llama3_70b(), one, other, 1600) == 1600 * 327_680
