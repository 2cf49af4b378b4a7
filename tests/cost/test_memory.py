"""The number of pages that fit beside the weights."""

import dataclasses
import math

import pytest

from pdjax.cost import Roofline, as_cost, size_by_chip, size_pools
from pdjax.types import ChipSpec, ModelSpec, WorkerSpec, decode_pool, prefill_pool
from pdjax.types.cluster import carve_devices, devices_needed, ways

LLAMA = ModelSpec.llama3_8b()
WEIGHTS = LLAMA.num_params * 2  # bf16: 16.06 GB
PAGE = 16 * 131_072  # bytes of a page of 16 tokens


def _size(workers, memory_bytes: float, model: ModelSpec = LLAMA, **fields) -> tuple[WorkerSpec, ...]:
  carved = carve_devices(workers, devices_needed(workers))
  filled = {'page_size': 16, 'kv_dtype': 'bfloat16', 'weights': 'bfloat16'}
  own = [{name: getattr(worker, name) or value for name, value in filled.items()} for worker in workers]
  workers = tuple(dataclasses.replace(worker, **fields) for worker, fields in zip(workers, own, strict=True))
  return size_pools(workers, carved, model, memory_bytes=memory_bytes, **fields)


def test_workers_on_the_same_devices_have_a_copy_of_the_weights_for_each_dtype():
  both = [WorkerSpec(name, devices=(0,), num_pages=50) for name in ('a', 'b')]
  assert len(_size(both, WEIGHTS + 100.5 * PAGE)) == 2
  unlike = [both[0], dataclasses.replace(both[1], weights='float32')]
  with pytest.raises(ValueError, match=f'needs {3 * WEIGHTS / 1e9:.3g} GB of weights'):
    _size(unlike, 2.9 * WEIGHTS)
  assert len(_size(unlike, 3 * WEIGHTS + 100.5 * PAGE)) == 2


def test_each_worker_has_the_bytes_of_its_own_weights():
  prefill, decode = _size(
    (WorkerSpec('p', 'prefill', weights='float32'), WorkerSpec('d', 'decode')), 2 * WEIGHTS + 100.5 * PAGE
  )
  assert (prefill.num_pages, decode.num_pages) == (100, 100 + int((WEIGHTS + 100.5 * PAGE) / PAGE) - 100)


def test_an_automatic_pool_fills_what_the_weights_leave():
  (worker,) = _size((WorkerSpec('w'),), WEIGHTS + 1000.5 * PAGE)
  assert worker.num_pages == 1000


def test_devices_of_a_mesh_divide_weights_and_pages():
  (worker,) = _size((WorkerSpec('w', tp=4),), LLAMA.weight_bytes_per_device(2, tp=4) + 1000.5 * PAGE / 4)
  assert worker.num_pages == 1000


def test_key_value_heads_that_are_copied_take_their_room_on_every_device():
  model = dataclasses.replace(LLAMA, kv_heads=2)
  (worker,) = _size((WorkerSpec('w', tp=8),), model.weight_bytes_per_device(2, tp=8) + 1000.5 * PAGE / 4 / 2, model)
  assert worker.num_pages == 1000


def test_explicit_pools_stay_as_they_are():
  workers = prefill_pool(1, num_pages=10) + decode_pool(1, num_pages=20)
  assert [worker.num_pages for worker in _size(workers, WEIGHTS + 20 * PAGE)] == [10, 20]


def test_each_worker_is_sized_by_its_own_devices():
  prefill, decode = _size(prefill_pool(1, num_pages=7) + decode_pool(1), WEIGHTS + 100.5 * PAGE)
  assert (prefill.num_pages, decode.num_pages) == (7, 100)


def test_workers_that_share_a_device_share_the_weights_and_divide_the_rest():
  workers = prefill_pool(1, devices=(0,)) + decode_pool(1, devices=(0,))
  assert [worker.num_pages for worker in _size(workers, WEIGHTS + 200.5 * PAGE)] == [100, 100]
  workers = prefill_pool(1, devices=(0,), num_pages=50) + decode_pool(1, devices=(0,))
  assert [worker.num_pages for worker in _size(workers, WEIGHTS + 200.5 * PAGE)] == [50, 150]


def test_room_for_what_travels_is_kept_though_the_others_are_sized_elsewhere():
  cluster = (WorkerSpec('p', 'prefill', page_size=16, kv_dtype='bfloat16'), WorkerSpec('d', 'decode'))
  (alone,) = _size(cluster[:1], WEIGHTS + 1000 * PAGE, staging_bytes=100 * PAGE)
  (among,) = _size(cluster[:1], WEIGHTS + 1000 * PAGE, staging_bytes=100 * PAGE, pairs=ways(cluster))
  assert alone.num_pages - among.num_pages == 100


def test_room_for_what_travels_is_kept_for_every_role_that_a_worker_may_take():
  cluster = (WorkerSpec('p', 'prefill', page_size=16, kv_dtype='bfloat16'), WorkerSpec('d', 'decode'))
  either = tuple(dataclasses.replace(worker, may_become=('prefill', 'decode')) for worker in cluster)
  (one_way,), (two_ways,) = (
    _size(workers[:1], WEIGHTS + 1000 * PAGE, staging_bytes=100 * PAGE, pairs=ways(workers))
    for workers in (cluster, either)
  )
  assert one_way.num_pages - two_ways.num_pages == 100


def test_unlike_meshes_on_one_device_each_bring_their_weights():
  workers = (WorkerSpec('a', devices=(0,)), WorkerSpec('b', tp=2, devices=(0, 1)))
  with pytest.raises(ValueError, match=r'needs 24\.1 GB of weights, but 19\.3 GB may be filled on device 0'):
    _size(workers, 1.2 * WEIGHTS)


def test_a_pool_is_no_larger_than_its_sequences_can_use():
  model = dataclasses.replace(LLAMA, context_len=1000)  # 63 pages of 16
  (worker,) = _size((WorkerSpec('w', max_sequences=3, max_chunks=2),), WEIGHTS + 1000 * PAGE, model)
  assert worker.num_pages == 3 * 63
  (worker,) = _size((WorkerSpec('w', max_sequences=3, max_chunks=5),), WEIGHTS + 1000 * PAGE, model)
  assert worker.num_pages == 5 * 63


def test_weights_that_do_not_fit_are_refused_with_both_figures_and_the_remedies():
  with pytest.raises(ValueError) as error:
    _size((WorkerSpec('w'),), 12e9)
  for words in ('Llama-3.1-8B needs 16.1 GB of weights', 'but 12 GB may be filled on device 0', 'smaller dtype'):
    assert words in str(error.value)


def test_an_explicit_pool_that_does_not_fit_is_refused_with_the_figures():
  with pytest.raises(ValueError) as error:
    _size((WorkerSpec('w', num_pages=10_000),), 20e9)
  assert 'weights (16.1 GB), pages (21 GB) and staging (0 GB) do not fit on device 0' in str(error.value)
  assert "20 GB may be filled; lower num_pages or set it to 'auto'" in str(error.value)


def test_devices_with_one_memory_in_common_share_it():
  workers = prefill_pool(1, num_pages=50) + decode_pool(1)
  prefill, decode = _size(workers, 2 * WEIGHTS + 150.5 * PAGE, one_memory=True)
  assert (prefill.num_pages, decode.num_pages) == (50, 100)
  with pytest.raises(ValueError, match=r'needs 32\.1 GB of weights, but 20 GB .* in the memory of this host'):
    _size(workers, 20e9, one_memory=True)


def test_devices_that_hide_their_memory_want_an_explicit_pool():
  with pytest.raises(ValueError, match=r"how much memory the devices have .*; give worker 'w' a num_pages"):
    _size((WorkerSpec('w'),), math.inf)
  assert _size((WorkerSpec('w', num_pages=5),), math.inf)[0].num_pages == 5


def test_explicit_pools_on_one_device_are_added_up():
  workers = prefill_pool(1, devices=(0,), num_pages=60) + decode_pool(1, devices=(0,), num_pages=60)
  assert len(_size(workers, WEIGHTS + 120.5 * PAGE)) == 2
  with pytest.raises(ValueError, match='do not fit on device 0'):
    _size(workers, WEIGHTS + 119.5 * PAGE)


def test_room_for_less_than_one_page_is_refused():
  with pytest.raises(ValueError, match=r"worker 'w' has .* left for pages .* one page of 16 tokens takes 0\.0021 GB"):
    _size((WorkerSpec('w'),), WEIGHTS + 0.5 * PAGE)


def test_a_tp_that_does_not_fit_the_model_is_refused():
  with pytest.raises(ValueError, match='tp=3 does not fit'):
    _size((WorkerSpec('w', tp=3),), 80e9)


# By our contract: of what steps take beside weights and pages, the least is worked out before anything is loaded.
@pytest.mark.parametrize(
  ('fields', 'num_bytes'),
  [
    ({'max_sequences': 100_000}, 100_000 * (6 * 128_256 + 4 * 8192)),
    ({'max_chunks': 100_000}, 100_000 * (6 * 128_256 + 4 * 8192)),
    ({'max_step_tokens': 10**7}, 10**7 * 4096 * 2),
    ({'max_fused_steps': 10**10}, 10**10 * 8 * 4),
  ],
)
def test_sizes_that_no_device_holds_are_refused_with_both_figures(fields, num_bytes):
  (field, value), *_ = fields.items()
  words = f"worker 'w' has {field}={value}, which takes at least {num_bytes / 1e9:,.1f} GB .* 63.9 GB are left for"
  with pytest.raises(ValueError, match=words):
    _size((WorkerSpec('w', **fields),), 80e9)
  assert _size((WorkerSpec('w', max_sequences=1024),), 80e9)


def test_unlike_chips_give_unlike_pools():
  """Each worker by its own chip's memory; virtual devices of one CPU have one, whatever chips they are to be."""
  small, large = (dataclasses.replace(ChipSpec.h100(), memory_bytes=(WEIGHTS + n * PAGE) / 0.9) for n in (40.5, 90.5))
  filled = {'page_size': 16, 'kv_dtype': 'bfloat16', 'weights': 'bfloat16'}
  workers = (*prefill_pool(1, chip=large, **filled), *decode_pool(2, **filled))
  carved = carve_devices(workers, 3)

  def sizes(cost, workers=workers) -> list[int]:
    return [one.num_pages for one in size_by_chip(workers, carved, LLAMA, as_cost(cost), pairs=ways(workers))]

  assert sizes(Roofline(small)) == [90, 40, 40]
  assert sizes(Roofline(large)) == [90, 90, 90]
  one_memory = Roofline(dataclasses.replace(large, memory_bytes=(3 * WEIGHTS + 30.5 * PAGE) / 0.9), shared_host=True)
  assert sizes(one_memory) == [10, 10, 10]

  class Unknown:
    def step_seconds(self, model, worker, chunks, contexts, steps):
      return 1.0

    def transfer_seconds(self, model, source, target, num_bytes):
      return 1.0

  with pytest.raises(ValueError, match=r"nothing says how much memory the devices have.* give worker 'decode0'"):
    sizes(Unknown())
