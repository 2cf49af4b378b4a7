"""Cache kinds: their bytes by architecture, to the byte, and how much of a sequence each keeps and sends."""

import dataclasses

import pytest

from pdjax.types import ModelSpec
from pdjax.types.cache import CacheArray, CacheKind
from tests.serving.driver import TINY

STATE = CacheKind('state', tuple(range(24)), (CacheArray('state', (32, 128, 128), dtype='float32'),), 'request')
WINDOW = CacheKind('window', (0, 1), (CacheArray('kv', (2, 4, 8), cut=1),), 128)


def test_every_other_layer_of_gpt_oss_keeps_a_window():
  model = ModelSpec.gpt_oss_120b()
  full, window = model.cache
  assert (full.name, full.reach, len(full.layers)) == ('kv', 'all', 18)
  assert (window.name, window.reach, len(window.layers)) == ('window', 128, 18)
  assert not set(full.layers) & set(window.layers)
  assert model.cached_token_bytes('bfloat16') == 36_864
  assert model.cached_request_bytes('bfloat16') == 4_718_592
  assert model.cached_bytes(10_000, 'bfloat16') == 10_000 * 36_864 + 4_718_592
  assert model.cached_bytes(100, 'bfloat16') == 100 * 2 * 36_864  # no window is full yet
  naive = dataclasses.replace(model, sliding_window=None, windowed_layers=None)
  assert naive.cached_bytes(10_000, 'bfloat16') == 10_000 * 73_728


def test_a_latent_is_one_array_for_all_heads_and_lies_whole_on_every_device():
  model = ModelSpec.deepseek_v3()
  (latent,) = model.cache
  assert latent.name == 'latent' and latent.arrays == (CacheArray('latent', (576,)),)
  assert model.cached_token_bytes('bfloat16') == 70_272 == 61 * 576 * 2 and model.cached_request_bytes('bfloat16') == 0
  assert latent.num_bytes('bfloat16', shards=8) == 70_272


def test_a_dense_model_keeps_the_keys_and_values_of_all_tokens():
  model = ModelSpec.llama3_70b()
  assert [kind.name for kind in model.cache] == ['kv']
  assert model.cached_token_bytes('bfloat16') == 327_680 == 80 * 2 * 8 * 128 * 2
  assert model.cache[0].num_bytes('bfloat16', shards=8) == 327_680 // 8
  assert model.cached_token_bytes('int8') == 80 * 2 * 8 * (128 + 4)  # and a float32 scale for each head


def test_what_the_engine_computes_is_one_kind_past_a_window_too():
  mistral = ModelSpec.mistral_7b()
  assert mistral.only_simulated is None and [kind.reach for kind in mistral.cache] == ['all']


def test_a_recurrent_state_is_48_mib_whatever_the_dtype_and_the_length():
  model = dataclasses.replace(ModelSpec.qwen3_8b(), cache_kinds=(STATE,))
  for dtype in ('float32', 'bfloat16', 'int8'):
    assert model.cached_request_bytes(dtype) == 48 * 2**20 and model.cached_token_bytes(dtype) == 0
    assert [model.cached_bytes(tokens, dtype) for tokens in (0, 1, 9999)] == [0, 48 * 2**20, 48 * 2**20]
  assert model.only_simulated == 'the cache kinds state'
  assert model.read_bytes('bfloat16', [(0, 5)], [3, 4]) == 3 * 2 * 48 * 2**20  # each is read, and written back


def test_a_window_keeps_and_sends_its_last_tokens_and_a_state_goes_when_all_is_computed():
  assert [WINDOW.kept(tokens) for tokens in (0, 5, 128, 500)] == [0, 5, 128, 128]
  assert [WINDOW.sendable(tokens, 500) for tokens in (0, 372, 373, 499, 500)] == [0, 0, 1, 127, 128]
  assert [WINDOW.sendable(tokens, 100) for tokens in (0, 50, 100)] == [0, 50, 100]
  assert [STATE.sendable(tokens, 500) for tokens in (0, 499, 500)] == [0, 0, 1]
  full = dataclasses.replace(WINDOW, reach='all')
  assert [full.sendable(tokens, 500) for tokens in (0, 373, 500)] == [0, 373, 500]


def test_kinds_of_a_group_of_layers_are_those_that_have_some_there():
  kind = dataclasses.replace(WINDOW, layers=(1, 3, 5))
  assert [kind.num_layers(bounds) for bounds in (None, (0, 1), (0, 2), (2, 6))] == [3, 0, 1, 2]
  assert kind.layer_bytes('int8') == 2 * 4 * (8 + 4) and kind.layer_bytes('int8', shards=4) == 2 * (8 + 4)


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: CacheArray('a', ()), r"'a' has shape=\(\), expected at least one"),
    (lambda: CacheArray('a', (2, 0)), r'has shape\[1\]=0, expected an integer of at least 1'),
    (lambda: CacheArray('a', (2,), cut=1), r'has cut=1, expected an axis of \(2,\) or None'),
    (lambda: CacheArray('a', (2,), dtype='fp3'), "has dtype='fp3', expected one of 'float32'"),
    (lambda: CacheArray('a', (3,), cut=0).num_bytes('float32', 2), 'has 3 in the axis that is cut, which 2 devices'),
    (lambda: CacheKind('k', (), WINDOW.arrays), r"'k' has layers=\(\), expected at least one"),
    (lambda: CacheKind('k', (0,), ()), r"'k' has arrays=\(\), expected at least one"),
    (
      lambda: dataclasses.replace(WINDOW, reach=0),
      "has reach=0, expected a window of at least 1 token or one of 'all', ",
    ),
    (lambda: dataclasses.replace(WINDOW, page_size=0), 'has page_size=0, expected 1 entry or more, or None'),
    (lambda: CacheKind('k', 8, WINDOW.arrays), "'k' has layers=8, expected"),
    (lambda: CacheKind('k', (0,), WINDOW.arrays[0]), "'k' has arrays=CacheArray.*, expected"),
    (lambda: CacheKind('k', (0, 3, 3), WINDOW.arrays), "'k' has layer 3 twice; name each once"),
    (lambda: CacheKind('k', (0,), WINDOW.arrays * 2), "'k' has array 'kv' twice"),
    (lambda: dataclasses.replace(STATE, page_size=4), 'has page_size=4, but a state is a page; leave it out'),
    (lambda: CacheKind('', (0,), WINDOW.arrays), "has name='', expected at least one"),
    (lambda: CacheArray('a', (2, 2), cut=True), 'has cut=True, expected'),
    (lambda: dataclasses.replace(TINY, cache_kinds=()), r"'tiny' has cache_kinds=\(\), expected at least one, or None"),
    (lambda: dataclasses.replace(TINY, cache_kinds=(WINDOW, WINDOW)), 'cache kinds named window, window; give each'),
    (
      lambda: dataclasses.replace(TINY, cache_kinds=(STATE,)),
      "cache kind 'state' of layer 2, but its own are 0 to 1",
    ),
  ],
)
def test_what_can_be_no_cache_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
